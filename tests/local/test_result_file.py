"""Result files: a line for each measurement, nothing lost, and refused where they are of something else."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokenfilter.bench.run import Benchmark
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.local.result_file import as_text

CHECKED_IN = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
IDENTITY = {"model": "tiny", "parameters": {"contexts": [512], "repeats": 3}}


@given(VALUES)
def test_nothing_is_lost_or_changed(value):
    assert repr(json.loads(as_text(value))) == repr(value)


def test_every_entry_has_one_line():
    text = as_text({"kind": "x", "machine": {"cores": 2}, "samples": [{"a": [1, 2], "b": {"c": [3]}}, {"a": []}]})
    assert text.splitlines() == [
        "{",
        ' "kind": "x",',
        ' "machine": {"cores": 2},',
        ' "samples": [',
        '  {"a": [1, 2], "b": {"c": [3]}},',
        '  {"a": []}',
        " ]",
        "}",
    ]


@pytest.mark.parametrize("path", CHECKED_IN, ids=lambda path: path.stem)
def test_the_published_results_are_as_they_are_written(path):
    assert path.read_text() == as_text(json.loads(path.read_text())) + "\n"


def test_an_interrupted_run_goes_on_with_what_it_had(tmp_path):
    path = tmp_path / "bench.json"
    first = Benchmark.resume(path, **IDENTITY)
    first.capacity = {"stock": {"kv_cache_tokens": 7.0}}
    first.write(path)
    again = Benchmark.resume(path, **IDENTITY)
    assert again.capacity == first.capacity and again.time >= first.time


def test_a_file_of_another_grid_is_left_alone(tmp_path):
    path = tmp_path / "bench.json"
    Benchmark.resume(path, **IDENTITY)
    before = path.read_text()
    with pytest.raises(EvaluationError, match="was measured with model=tiny, not large; choose another name"):
        Benchmark.resume(path, **IDENTITY | {"model": "large"})
    path.write_text(before.replace('"benchmark"', '"tuning"'))
    with pytest.raises(EvaluationError, match="must be a result file of the kind benchmark"):
        Benchmark.resume(path, **IDENTITY)
