"""Every name of vLLM that package, tests and benchmarks import or take from an imported module exists in this vLLM."""

import ast
import functools
import importlib
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

ROOT = Path(__file__).parents[2]
#: Their branches name what the other supported version has; `test_every_difference_...` calls those of this one.
BRANCHES = {ROOT / "vllm_tokenfilter" / "integration" / "versions.py", ROOT / "tests" / "vllm_moved.py"}
FILES = [
    path
    for folder in ("vllm_tokenfilter", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path not in BRANCHES
]


def is_vllm(name):
    return name.split(".")[0] == "vllm"


def used_names(tree):
    """(module, name in it or "") of every import from vLLM, and of every attribute taken from an imported module."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_vllm(alias.name):
                    yield alias.name, ""
                    if alias.asname:
                        modules[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and is_vllm(node.module):
            for alias in node.names:
                yield node.module, alias.name
                if exists(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        taken = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load)
        if taken and node.value.id in modules:
            yield modules[node.value.id], node.attr


@functools.cache
def exists(module):
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def names_in_source(module):
    """What a module binds outside of functions, also under a condition; for what only another build of vLLM imports."""
    spec = importlib.util.find_spec(module)
    names, left = set(), [ast.parse(Path(spec.origin).read_text())]
    while left:
        for node in ast.iter_child_nodes(left.pop()):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {alias.asname or alias.name for alias in node.names}
            else:
                names |= {word.id for word in ast.walk(node) if isinstance(word, ast.Name)}
                left.append(node)
    return names


@functools.cache
def has(module, name):
    if not exists(module):
        return False
    if not name or exists(f"{module}.{name}"):
        return True
    try:
        if hasattr(importlib.import_module(module), name):
            return True
    except ImportError:
        pass
    return name in names_in_source(module)


def test_what_we_import_from_vllm_is_there():
    missing = [
        f"{path.relative_to(ROOT)}: vLLM has no {module}{'.' if name else ''}{name}"
        for path in FILES
        for module, name in used_names(ast.parse(path.read_text()))
        if not has(module, name)
    ]
    assert missing == [], "what moved goes into integration/versions.py: " + "; ".join(missing)


def test_a_name_that_is_gone_is_found():
    code = "from vllm.v1.core import kv_cache_utils as utils\nimport vllm.nothing\nutils.BlockHash\nutils.gone"
    used = set(used_names(ast.parse(code)))
    assert {pair for pair in used if not has(*pair)} == {("vllm.nothing", ""), ("vllm.v1.core.kv_cache_utils", "gone")}


def test_every_difference_between_versions_holds_for_this_one(monkeypatch, tiny_model):
    import os

    from vllm.config import ModelConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tests.vllm_moved import planning
    from vllm_tokenfilter.integration import versions

    monkeypatch.setattr(os, "environ", dict(os.environ))
    versions.cli_env_setup()
    assert versions.make_arg_parser(FlexibleArgumentParser()).parse_args(["--max-model-len", "99"]).max_model_len == 99
    assert callable(planning.get_kv_cache_groups)

    class Config:
        model_config = ModelConfig(tiny_model, skip_tokenizer_init=True)

    assert versions.groups_its_own_cache(Config) is False
    known = hasattr(ModelConfig, "supports_kv_cache_grouping")
    assert known == versions._SINCE_33, "integration/versions.py: groups_its_own_cache"
