"""The arithmetic of bench: spreads over repeats and ratios inside a repeat."""

import pytest

from tests.reports.sample import SAMPLES
from vllm_tokenfilter.bench.run import summarise


def test_ratios_to_stock_are_taken_inside_a_repeat():
    rows = {(row["server"], row["context"]): row for row in summarise(SAMPLES)}
    ours = rows["r=0.5", 4000]
    # Every repeat is slower than the one before by the same factor for both, so the ratio has no spread.
    assert ours["between_median_s_to_stock"]["least"] == pytest.approx(0.05 / 0.12)
    assert ours["between_median_s_to_stock"]["greatest"] == pytest.approx(0.05 / 0.12)
    assert ours["between_median_s"] == {"median": pytest.approx(0.055), "least": 0.05, "greatest": pytest.approx(0.06)}
    assert ours["first_token_s"]["median"] == 1.5 and ours["repeats"] == 3
    assert "between_median_s_to_stock" not in rows["stock", 4000]


def test_without_stock_there_are_no_ratios_and_zeros_divide_nothing():
    rows = summarise([sample for sample in SAMPLES if sample.server != "stock"])
    assert not any(key.endswith("_to_stock") for row in rows for key in row)
    assert all("preemptions_to_stock" not in row for row in summarise(SAMPLES))
