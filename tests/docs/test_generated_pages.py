"""Generated pages are current, and every relative link in the documentation leads somewhere."""

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


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        to = page.parent / target if target else page
        assert to.exists(), f"{page.name} links to {target}"
        assert not heading or heading in anchors(to.read_text()), f"{page.name} links to {target}#{heading}"


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_prefill_steps_is_what_the_layout_says():
    rows = re.findall(
        r"^\| \**(\d+)\**[^|]*\| (\d+) \| ([\d.]+) x \|$", (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    layout = FilterConfig().layout
    for step, slots, gain in rows:
        assert peak_slots(8192, int(step), layout) == int(slots)
        assert f"{8192 / 32 / -(-int(slots) // 32):.3f}" == gain
