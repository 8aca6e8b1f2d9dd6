"""Who may import whom: vLLM in one room, and nothing heavy for the settings and the arithmetic."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_tokenfilter"
MODULES = {
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path, top_level_only):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_vllm_is_imported_in_the_integration_room_only(name):
    if name.startswith("vllm_tokenfilter.integration"):
        return
    # Commands start vLLM when they run; importing them must not.
    top_level_only = name.startswith("vllm_tokenfilter.cli")
    found = [module for module in imports(MODULES[name], top_level_only) if module.split(".")[0] == "vllm"]
    assert found == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_algorithm_does_not_know_where_it_is_used(name):
    if not name.startswith(
        (
            "vllm_tokenfilter.config",
            "vllm_tokenfilter.layout",
            "vllm_tokenfilter.filtering",
            "vllm_tokenfilter.errors",
            "vllm_tokenfilter.kernels",
        )
    ):
        return
    above = ("vllm_tokenfilter.integration", "vllm_tokenfilter.cli", "vllm_tokenfilter.local.models")
    assert [module for module in imports(MODULES[name], False) if module.startswith(above)] == []


@pytest.mark.parametrize(
    "module", ["vllm_tokenfilter", "vllm_tokenfilter.config", "vllm_tokenfilter.layout", "vllm_tokenfilter.cli.app"]
)
def test_a_light_module_brings_neither_torch_nor_vllm(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
