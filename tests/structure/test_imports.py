"""The rooms of the package: who may import whom, and how long a module may get."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_tokenfilter"
#: The package's modules by their name in it, such as "kernels.cpu.seal"; a folder by its own.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

#: From the bottom up. A module belongs to the longest of these names that its own begins with, and imports from its
#: layer and those listed before it. What is imported inside a function counts as well.
LAYERS = (
    ("", "errors"),
    ("layout", "schedule"),
    ("config",),
    ("local",),
    ("filtering", "selectors", "layer_plan", "rescale"),
    ("kernels",),
    ("kernels.cpu", "kernels.gpu"),
    ("planning",),
    ("integration",),
    ("integration.cpu", "integration.gpu"),
    ("integration.server", "integration.offline"),
    # What vLLM loads by path, and what leads into any room.
    ("integration.dispatch", "integration.plugin"),
    ("evaluation", "tuning", "inspection", "bench"),
    ("reports",),
    ("cli",),
)
#: Rooms of one device; nothing in them knows the other.
CPU, GPU = ("kernels.cpu", "integration.cpu"), ("kernels.gpu", "integration.gpu")
MOST_LINES, MOST_PRODUCT_LINES = 400, 13_500


def imports(nodes):
    """Full names of what is imported, modules and what is taken from them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_used_by(name):
    own = {full.removeprefix(f"{PACKAGE.name}.") for full in imports(ast.walk(TREES[name]))}
    return own & MODULES.keys() - {name, ""}


USES = {name: modules_used_by(name) for name in MODULES}


def arrows(wanted):
    return {f"{name} -> {used}" for name, uses in USES.items() for used in uses if wanted(name, used)}


def layer_of(name):
    rooms = {room: index for index, layer in enumerate(LAYERS) for room in layer}
    room = name
    while room not in rooms:
        room = room.rpartition(".")[0]
        assert room, f"say in LAYERS where {name} belongs"
    return rooms[room]


def in_rooms(name, rooms):
    return any(f"{name}.".startswith(f"{room}.") for room in rooms)


def lines_of(path):
    return len(path.read_text().splitlines())


def test_imports_point_downwards():
    layers = {name: layer_of(name) for name in MODULES}
    assert arrows(lambda name, used: layers[used] > layers[name]) == set()


def test_no_modules_import_each_other_in_a_circle():
    left = {name: set(uses) for name, uses in USES.items()}
    while free := [name for name, uses in left.items() if not uses & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_what_is_made_for_one_device_knows_nothing_of_the_other():
    across = arrows(
        lambda name, used: any(in_rooms(name, own) and in_rooms(used, other) for own, other in ((CPU, GPU), (GPU, CPU)))
    )
    assert across == set()


def test_vllm_is_imported_in_the_integration_room_only():
    # Commands start vLLM when they run; importing them must not.
    elsewhere = {
        name: [full for full in imports(tree.body if in_rooms(name, ["cli"]) else ast.walk(tree)) if is_vllm(full)]
        for name, tree in TREES.items()
        if not in_rooms(name, ["integration"])
    }
    assert not any(elsewhere.values()), elsewhere


def is_vllm(full):
    return full.split(".")[0] == "vllm"


def test_a_class_name_stands_for_one_class():
    nodes = (node for tree in TREES.values() for node in ast.walk(tree))
    names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert {name for name, count in names.items() if count > 1} == set()


def test_no_module_is_too_long_to_read():
    assert {name for name, path in MODULES.items() if lines_of(path) > MOST_LINES} == set()


def test_the_product_stays_small():
    sources = (path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".c", ".h", ".js", ".css"))
    assert sum(map(lines_of, sources)) < MOST_PRODUCT_LINES


@pytest.mark.parametrize(
    "module", ["vllm_tokenfilter", "vllm_tokenfilter.config", "vllm_tokenfilter.layout", "vllm_tokenfilter.cli.app"]
)
def test_a_light_module_brings_neither_torch_nor_vllm(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
