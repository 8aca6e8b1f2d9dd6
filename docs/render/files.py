"""The list of files in docs/architecture.md: every folder of the package, every file with its own first sentence."""

import ast
import re
from pathlib import Path

_SOURCES = (".py", ".c", ".h", ".js", ".css", ".html")


def files_block(root: Path) -> str:
    """A table per package folder, in alphabetical order; a folder is described by its `__init__.py`."""
    package = root / "vllm_tokenfilter"
    parts = []
    for folder in [package, *sorted(path.parent for path in package.rglob("*/__init__.py"))]:
        name = folder.relative_to(package).as_posix()
        title = "The top level" if name == "." else f"`{name}/`"
        rows = [
            f"| [{path.name}](../{path.relative_to(root).as_posix()}) | {first_sentence(path)} |"
            for path in sorted(folder.iterdir())
            if path.suffix in _SOURCES and path.name != "__init__.py"
        ]
        parts.append(f"### {title}\n\n{first_sentence(folder / '__init__.py')}\n")
        if rows:
            parts.append("\n".join(["| file | what it is |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts).rstrip()


def first_sentence(path: Path) -> str:
    """What a source file says of itself first: its docstring's first sentence, or that of its first comment.

    Raises:
        ValueError: the file says nothing of itself.
    """
    source = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(source)) or ""
    else:
        comment = re.match(
            r'(?:"use strict";\s*|<!doctype html>\s*)?(?:/\*(.*?)\*/|// (.*?)\n|<!--(.*?)-->)', source, re.DOTALL
        )
        text = (comment[1] or comment[2] or comment[3]) if comment else ""
    words = " ".join(text.split("\n\n")[0].replace("\n * ", " ").split())
    if not words:
        raise ValueError(f"{path} does not begin with a docstring or comment that says what it is")
    return re.split(r"(?<=[.!?])\s", words)[0].replace("|", "\\|")
