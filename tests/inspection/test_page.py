"""The page of `inspect`: what it holds, and what a browser makes of it, for eyes, keys and screen readers."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.reports import sample
from tests.reports.test_page import inked_share
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.inspection.page import figures, render_page
from vllm_tokenfilter.inspection.text import InspectedText, read_text

inspection = pytest.importorskip("vllm_tokenfilter.inspection.compare", reason="torch is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CONFIG = FilterConfig(pruning_ratio=0.5, dense_layers=(2,))
ORIGIN = {**sample.ORIGIN, "source": "<i>essay</i>.txt"}


def inspected(num_tokens=400):
    draw = np.random.default_rng(0)
    pieces = [f" word{i}" for i in range(num_tokens)]
    pieces[5:7] = ["<script>", ""]
    states = np.full((4, num_tokens), inspection.RAW, np.uint8)
    sealed = (num_tokens - 64) // 64 * 64
    states[[0, 1, 3], :sealed] = draw.integers(0, 2, (3, sealed))
    states[[0, 1, 3], min(200, num_tokens - 1)] = inspection.PRUNED
    dense = draw.uniform(0.01, 1, num_tokens - 1)
    return inspection.Inspection(
        text=InspectedText(list(range(num_tokens)), pieces, 7),
        layers=[0, 1, 2, 3],
        dense_layers={"configured_dense": [2]},
        states=states,
        key_similarity=draw.uniform(0.5, 1, (4, num_tokens)).astype(np.float32),
        value_similarity=draw.uniform(-0.5, 1, (4, num_tokens)).astype(np.float32),
        dense_probability=dense,
        filtered_probability=dense * draw.uniform(0.5, 1.1, num_tokens - 1).clip(max=1),
        same_choice=draw.uniform(0, 1, num_tokens - 1) < 0.9,
        kl=draw.uniform(0, 0.1, num_tokens - 1),
    )


@pytest.fixture(scope="module")
def page():
    return render_page(inspected(), CONFIG, ORIGIN)


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_is_self_contained_and_says_what_it_shows(page):
    assert not re.search(r"(src|href)=|url\(|@import", page), "something is loaded from elsewhere"
    for words in ("3 of 4", "perplexity, filtered", "configured_dense", "The last 7 tokens", "abc123"):
        assert words in page
    assert render_page(inspected(), CONFIG, ORIGIN) == page


def test_text_cannot_become_markup(page):
    assert page.count("<script") == 2 and "&lt;script&gt;" in page and "<i>essay" not in page


def test_every_picture_has_a_name_and_a_table_that_says_the_same(page):
    elements = Elements(page).found
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    pictures = [attributes for tag, attributes in elements if tag == "canvas"]
    assert len(pictures) == 3
    for picture in pictures:
        assert picture["role"] == "img" and picture["tabindex"] == "0"
        assert {picture["aria-labelledby"], picture["aria-describedby"], picture["aria-details"]} <= ids
        assert picture["aria-details"].endswith("-table")
    assert sum(attributes.get("role") == "option" for _, attributes in elements) == 400


def luminance(colour):
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """As WCAG 2.2 defines it."""
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(page, mode):
    block = re.findall(r":root \{(.*?)\}", page, re.DOTALL)[mode]
    found = dict(re.findall(r"--([a-z]+): ([^;]+);", block))
    hexes = {name: tuple(bytes.fromhex(value[1:])) for name, value in found.items() if value.startswith("#")}
    heat, strong = [int(part) for part in found["heat"].split(",")], float(found["strong"])
    shaded = [strong * hot + (1 - strong) * paper for hot, paper in zip(heat, hexes["paper"], strict=True)]
    assert contrast(hexes["ink"], hexes["paper"]) > 7
    assert contrast(hexes["ink"], shaded) > 4.5, "a token that every layer dropped"
    assert contrast(hexes["faint"], hexes["paper"]) > 4.5
    for line in ("key", "value", "cost", "gain"):
        assert contrast(hexes[line], hexes["paper"]) > 3, line


def test_the_page_has_one_main_part_and_headings_in_order(page):
    tags = [tag for tag, _ in Elements(page).found]
    assert tags.count("main") == 1
    headings = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1 and set(headings[1:]) == {2}
    captions = [attributes for tag, attributes in Elements(page).found if attributes.get("role") == "region"]
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in captions), "cannot scroll"


def test_a_text_too_short_to_be_filtered_says_so():
    short = inspected(100)
    short.states[:] = inspection.RAW
    page = render_page(short, CONFIG, ORIGIN)
    assert "Nothing was sealed" in page and figures(short)["pruned_share"] == 0


class Tokenizer:
    """One token a word; a chat template of role and content."""

    chat_template = "given"

    def __call__(self, text, **_):
        spans = [match.span() for match in re.finditer(r"\s*\S+", text)]
        return {"input_ids": list(range(len(spans))), "offset_mapping": spans}

    def apply_chat_template(self, messages, tokenize):
        if messages[0]["role"] not in ("system", "user"):
            raise ValueError("conversations begin with a user")
        return "".join(" <" + message["role"] + "> " + message["content"] for message in messages)


def test_text_and_conversations_are_read(tmp_path):
    file = tmp_path / "text"
    file.write_text("a few words here\n")
    assert read_text(file, False, Tokenizer(), 3).pieces == ["a", " few", " words"]
    assert read_text(file, False, Tokenizer(), 3).num_cut == 1
    assert read_text(file, True, Tokenizer(), 9).pieces[:2] == [" <user>", " a"]
    file.write_text(json.dumps([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]))
    assert read_text(file, True, Tokenizer(), 9).pieces[-2:] == [" <user>", " hi"]


@pytest.mark.parametrize(
    "content, words",
    [("hi", ["hi"]), ([{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}], ["hi", "you"]), (None, [])],
)
def test_the_content_of_a_message_is_text_parts_or_null(tmp_path, content, words):
    file = tmp_path / "text"
    file.write_text(
        "\ufeff" + json.dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": content}])
    )
    pieces = read_text(file, True, Tokenizer(), 9).pieces
    assert [piece.strip() for piece in pieces] == ["<user>", "?", "<assistant>", *words]


@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"role": "user"}', "must be a list of messages"),
        ("5", "must be a list of messages"),
        ('["text"]', "must be a list of messages"),
        ('[{"role": "user"}]', "must be a list of messages"),
        ('[{"role": "user", "content": 5}]', "where a content is text, text parts or null"),
        ('[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]', "where a content is text"),
        ('[{"role": "user", "content": [{"type": "text", "text": null}]}]', "where a content is text"),
        ('[{"role": "assistant", "content": "hi"}]', "does not fit the model's chat template"),
        ("[]", "does not fit the model's chat template"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, content, sentence):
    file = tmp_path / "text"
    file.write_text(content)
    with pytest.raises(EvaluationError, match=sentence):
        read_text(file, True, Tokenizer(), 9)


def browse(page, folder, *flags, fragment=""):
    (folder / "page.html").write_text(page)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1700"]
    command += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}", *flags]
    address = (folder / "page.html").as_uri() + fragment
    return subprocess.run([*command, address], check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("mode", [[], ["--blink-settings=preferredColorScheme=0"]], ids=["light", "dark"])
def test_a_browser_shows_the_page_in_light_and_dark(page, tmp_path, mode):
    picture = tmp_path / "page.png"
    browse(page, tmp_path, *mode, f"--screenshot={picture}")
    width, height, ink = inked_share(picture.read_bytes())
    assert (width, height) == (1100, 1700)
    assert 0.02 < ink < 0.6, f"{ink:.1%} of the page is not background"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("mode", [[], ["--blink-settings=preferredColorScheme=0"]], ids=["light", "dark"])
def test_an_accessibility_checker_finds_nothing(page, tmp_path, mode):
    checker = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    axe = (Path(checker.__file__).parent / "axe.min.js").read_text()
    script = (
        f"<script>{axe}</script><script>axe.run({{runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'best-practice']}}).then("
        "(found) => { document.body.dataset.found = JSON.stringify({passes: found.passes.length, "
        "violations: found.violations.map((one) => [one.help, one.nodes[0].html])}); });</script></body>"
    )
    broken = page.replace('<html lang="en">', "<html>")
    for content, fails in ((page, False), (broken, True)):
        dom = browse(content.replace("</body>", script), tmp_path, *mode, "--virtual-time-budget=30000", "--dump-dom")
        found = json.loads(
            next(attributes for _, attributes in Elements(dom).found if "data-found" in attributes)["data-found"]
        )
        assert found["passes"] > 20 and bool(found["violations"]) == fails, found["violations"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_keys_move_the_cursor_and_a_reader_is_told(page, tmp_path):
    keys = ["End", "ArrowLeft", "Home", "PageDown", "ArrowDown", "ArrowRight"]  # 64 + 16 + 1
    script = (
        "<script>{ const told = [];"
        f"for (const key of {json.dumps(keys)}) {{"
        "document.getElementById('text').dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
        "told.push(document.getElementById('told').textContent); }"
        "const pick = document.getElementById('layer'); pick.value = '2'; pick.dispatchEvent(new Event('change'));"
        "told.push(document.getElementById('told').textContent);"
        "document.body.dataset.told = JSON.stringify(told); }</script></body>"
    )
    dom = browse(page.replace("</body>", script), tmp_path, "--dump-dom", fragment="#200")
    assert 'aria-activedescendant="t81"' in dom
    chosen = [attributes["id"] for _, attributes in Elements(dom).found if attributes.get("aria-selected") == "true"]
    assert chosen == ["t81"]
    told = json.loads(
        next(attributes for _, attributes in Elements(dom).found if "data-told" in attributes)["data-told"]
    )
    assert [line.split()[1] for line in told] == ["399", "398", "0", "64", "80", "81", "81"]
    assert "filtered layers; key similarity" in told[5] and "dense" in told[5]
    assert "whole in layer 2" in told[6]
