"""The page of results: what it holds, and that a browser shows it."""

import copy
import re
import shutil
import struct
import subprocess
import zlib

import pytest

from docs.render import selection
from docs.render.readme import readme_block
from docs.render.results import paired_intervals, results_page
from tests.reports import sample
from vllm_tokenfilter.reports.page import render_page

pytest.importorskip("matplotlib", reason="the extra eval is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page():
    return render_page([sample.EVALUATION, sample.BENCHMARK])


def test_the_page_is_self_contained_and_has_plots_tables_and_origins(page):
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:href", "")), "something is loaded from elsewhere"
    assert page.count('<svg role="img" aria-label=') == 3
    for word in ("variance_aware", "random", "perplexity", "r=0.5", "between tokens", "abc123", "AMD EPYC"):
        assert word in page
    assert "filter inactive" in page


def test_the_same_results_give_the_same_page(page):
    assert render_page(copy.deepcopy([sample.EVALUATION, sample.BENCHMARK])) == page


def test_names_from_a_file_cannot_become_markup():
    evil = copy.deepcopy(sample.BENCHMARK)
    evil["model"] = "<script>alert(1)</script>"
    assert "<script>" not in render_page([evil])


def tuning(seed, whole, command="vllm-tokenfilter tune"):
    ratios = [0.0 if layer in whole else 0.75 for layer in range(6)]
    settings = {"pruning_ratio": sum(ratios) / 6, "schedule": {"ratios": ratios}}
    score = {"name": "dense", "ratios": [0.0], "token_accuracy": 1.0, "answer_logprob": 0.0, "prose_nll": 0.0}
    more = {"kind": "tuning", "text": "prose", "settings": settings, "scores": [score], "seconds": 300.0}
    return {**sample.ORIGIN, **more, "command": command, "parameters": {"seed": seed}}


def test_repeated_tunings_stand_in_one_table_and_say_what_they_found():
    results = {
        "tuning": tuning(1, {2, 4}),
        "tuning_seed_2": tuning(2, {2, 5}),
        "tuning_75": tuning(1, {2}, "x --reuse y"),
    }
    shown = results_page(results)
    assert "| prose | 1 | 0.500 | 2 | 5.0 | 2, 4 |" in shown and "| prose | 2 | 0.500 | 2 | 5.0 | 2, 5 |" in shown
    assert "| prose | 1 | 0.625 | 2 | - | 2 |" in shown
    assert "## Tuning, prose" in shown and "## Tuning 75, prose" in shown and "## Tuning seed 2" not in shown


def test_the_frontier_is_what_no_other_setting_beats():
    points = {"tuned": (0.1, 0.9), "uniform": (0.05, 0.5), "linear": (0.2, 0.9), "first layers whole": (0.05, 0.4)}
    scores = [{"name": name, "prose_nll": 2 + nll, "token_accuracy": hit} for name, (nll, hit) in points.items()]
    trials = selection.selection_trials({"scores": [{"name": "dense", "prose_nll": 2, "token_accuracy": 1}, *scores]})
    assert [trial.name for trial in selection.frontier(trials)] == ["uniform", "tuned"]
    assert len({trial.group for trial in trials}) == 3
    drawn = selection.settings_tried(trials)
    assert "linear" in drawn and "first layers whole" in drawn and drawn == selection.settings_tried(trials)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page(page, tmp_path):
    (tmp_path / "page.html").write_text(page)
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--window-size=1000,2400",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={picture}",
            (tmp_path / "page.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    width, height, ink = inked_share(picture.read_bytes())
    assert (width, height) == (1000, 2400)
    assert 0.01 < ink < 0.5, f"{ink:.1%} of the page is not background"


def inked_share(png):
    """Width, height and the share of bytes that differ from the page's first pixel, of an 8-bit PNG."""
    width, height, _, colour = struct.unpack(">IIBB", png[16:26])
    channels = {2: 3, 6: 4}[colour]
    data, position = b"", 8
    while position < len(png):
        (size,) = struct.unpack(">I", png[position : position + 4])
        if png[position + 4 : position + 8] == b"IDAT":
            data += png[position + 8 : position + 8 + size]
        position += size + 12
    raw, stride = zlib.decompress(data), width * channels
    # A filtered row of nothing but background is all zeros after its first pixel.
    rows = [raw[i * (stride + 1) + 1 + channels : (i + 1) * (stride + 1)] for i in range(height)]
    return width, height, sum(len(row) - row.count(0) for row in rows) / (stride * height)


def test_intervals_pair_windows_and_tell_a_difference_from_none():
    rows = {row[0]: row for row in paired_intervals(sample.EVALUATION)[1:]}
    low, high = map(float, rows["random"][-1].split(" to "))
    assert low > 1, "a baseline worse in every window must be told apart"
    low, high = map(float, rows["key"][-1].split(" to "))
    assert low < 1 < high, "noise must not be called a difference"


def test_the_readme_shows_the_files_own_numbers():
    block = readme_block(
        {
            "perplexity_tuned": {
                **sample.EVALUATION,
                "cells": [*sample.EVALUATION["cells"], sample.cell("smollm2-135m-tuned", 0.5, 10.2, sample.WINDOWS)],
            },
            "capacity": {"summary": {"ratios": {"r=0.5": 1.85, "tuned, mean r=0.5": 1.75}}},
            "recall": {"cells": [recalled("dense", 0.99), recalled("variance_aware", 0.5), recalled("other", 0.1)]},
        }
    )
    # Ratio 0.75 of the same method, which comes later in the file, must not take the place of 0.5.
    assert "| **+10.0%** | **+2.0%** | [perplexity_tuned.json]" in block and "| **90.0%** | **90.0%** |" in block
    assert "| **1.850 x** | **1.750 x** | [capacity.json]" in block
    assert "dense: 99.0%) | **50.0%** | not measured | [recall.json]" in block
    assert "bench" not in results_page({}).lower() or "benchmarks/results" in results_page({})


def recalled(method, accuracy):
    where = {"kind": "passkey", "length": 1500, "depth": 0.5, "trials": 100}
    return {"method": method, "parameters": where, "values": {"token_accuracy": accuracy}}
