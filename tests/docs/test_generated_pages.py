"""Generated pages are current, and every link and file name in the documentation leads somewhere."""

import re
from pathlib import Path

import pytest

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.layout import peak_slots

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_current():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from docs.render.pages import stale_pages

    assert stale_pages() == [], "run `make docs`"


PAGES = pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)


@PAGES
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        to = page.parent / target if target else page
        assert to.exists(), f"{page.name} links to {target}"
        assert not heading or heading in anchors(to.read_text()), f"{page.name} links to {target}#{heading}"


@PAGES
def test_files_that_are_named_exist(page):
    """In backticks: a source file, or anything in a folder of the repository or the package."""
    roots = (ROOT, ROOT / "vllm_tokenfilter")
    for name in re.findall(r"`([\w./-]+)`", page.read_text()):
        folder = name.partition("/")[0]
        if name.endswith((".py", ".c", ".h")) or (folder and any((root / folder).is_dir() for root in roots)):
            assert any((root / name).exists() for root in roots), f"{page.name} names {name}"


def test_files_that_docstrings_name_exist():
    """A path with a folder, of ours unless it is vLLM's."""
    package = ROOT / "vllm_tokenfilter"
    for path in package.rglob("*.py"):
        for name in re.findall(r"`(\w[\w./-]*\.(?:py|c|h))`", path.read_text()):
            roots = (ROOT, package, path.parent, path.parents[1])
            assert name.startswith("vllm/") or any((root / name).exists() for root in roots), f"{path} names {name}"


def test_names_in_the_recipes_are_where_they_are_said_to_be():
    text = (ROOT / "AGENTS.md").read_text().replace("\n   ", " ")
    named = re.findall(r"`([\w.]+)`(?: \(or `\w+`\))?(?: in| of|,? \() ?`([\w./]+\.\w+)`", text)
    assert len(named) > 20
    for name, file in named:
        source = next(path for root in (ROOT / "vllm_tokenfilter", ROOT) if (path := root / file).exists()).read_text()
        assert set(name.split(".")) <= set(re.findall(r"\w+", source)), f"AGENTS.md says that {name} is in {file}"


def test_the_reading_path_has_five_short_stops():
    path = (ROOT / "README.md").read_text().partition("## Reading the code")[2]
    stops = re.findall(r"^\d\. \[[^]]*\]\(([^)]*)\)", path, re.MULTILINE)
    assert len(stops) == 5
    for stop in stops:
        assert len((ROOT / stop).read_text().splitlines()) <= 200, f"{stop} is long for a first reading"


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_prefill_steps_is_what_the_layout_says():
    row = r"^\| \**(\d+)\**[^|]*\| (\d+) \| ([\d.]+) x \| \d+ % \|$"
    rows = re.findall(row, (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    layout = FilterConfig().layout
    for step, slots, gain in rows:
        assert peak_slots(8192, int(step), layout) == int(slots)
        assert f"{8192 / 32 / -(-int(slots) // 32):.3f}" == gain
