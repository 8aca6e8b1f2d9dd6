"""One module knows which vLLM is installed; elsewhere no version is asked for, and no import of vLLM is guarded."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ROOT / "vllm_tokenfilter" / "integration" / "versions.py"
SUPPORTED = next(
    ast.literal_eval(node.value)
    for node in ast.parse(VERSIONS.read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id == "SUPPORTED"
)
NUMBER = re.compile("|".join(rf"(?<![\d.]){major}\.{minor}(?!\d)" for major, minor in SUPPORTED))
ASKED = re.compile(r"__version_tuple__|vllm\.__version__|vllm\.version\b")


def files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path != VERSIONS]


def guarded_imports(tree):
    """Imports of vLLM that the code around them expects to fail."""
    for guard in (node for node in ast.walk(tree) if isinstance(node, ast.Try)):
        caught = " ".join(map(ast.unparse, guard.handlers))
        if "ImportError" in caught or "ModuleNotFoundError" in caught:
            for node in ast.walk(ast.Module(guard.body, [])):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                yield from (name for name in names if name.split(".")[0] == "vllm")


def test_at_most_two_versions_of_vllm_are_supported():
    assert 1 <= len(SUPPORTED) <= 2


@pytest.mark.parametrize("path", files("vllm_tokenfilter"), ids=lambda path: str(path.relative_to(ROOT)))
def test_product_code_names_no_version_and_guards_no_import(path):
    text = path.read_text()
    assert not NUMBER.findall(text), "what a version decides is in integration/versions.py"
    assert list(guarded_imports(ast.parse(text))) == []


def test_only_one_module_asks_for_the_version():
    asking = {path.name for path in files("vllm_tokenfilter", "tests", "benchmarks") if ASKED.search(path.read_text())}
    assert asking <= {Path(__file__).name}


def test_a_guarded_import_would_be_found():
    code = "def f():\n try:\n  from vllm.v1 import core\n except ImportError:\n  pass"
    assert list(guarded_imports(ast.parse(code))) == ["vllm.v1"]
    assert list(guarded_imports(ast.parse(code.replace("ImportError", "ValueError")))) == []
