"""benchmarks/gpu_attention.py without a GPU: its whole path in Triton's interpreter; what only a GPU has, replaced."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.plan import plan_seals
from vllm_tokenfilter.layout import Layout

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_attention.py", "--interpret", "--repeats", "1", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())


def test_it_measures_every_case_and_says_what_it_left_out(result):
    assert result["interpreted"] and result["device"]["name"] and result["commit"]
    assert {(cell["kernel"], cell["batch"]) for cell in result["decode"]} == {("TRITON_ATTN", 1), ("TRITON_ATTN", 2)}
    for cell in result["decode"]:
        assert cell["stored"] == cell["context"] - 32 + 1
        assert set(cell["seconds"]) == {"ours", "stock", "stock at stored"}
        assert all(0 < share < 1 for share in cell["sealing_share"].values()) and cell["host_seconds"] > 0
    assert {(cell["rows"], cell["new_tokens"]) for cell in result["sealing"]} == {(1, 1), (2, 1), (1, 64)}
    token = 2 * 64 * 4  # K and V, elements, bytes of float32
    # Chunks 0 and 1 are read; the 64 raw tokens move.
    assert result["sealing"][0]["bytes_floor"] == (2 * 64 + 2 * 64) * token
    assert {cell["kernel"]: bool(cell["reason"]) for cell in result["skipped"]} == {"FLASH_ATTN": True}


def test_the_page_of_results_shows_the_file_and_nothing_without_it(result):
    from docs.render.results import results_page

    assert "GPU" not in results_page({})
    page = results_page({"gpu_attention": result})
    assert "## Decode attention and sealing on a GPU" in page and "gpu_attention.json" in page
    assert "| tiny | TRITON_ATTN | 2 | 128 | 1 |" in page
    assert "| sealing at most 1% at 32768 tokens, r = 0.5 | not measured |  |" in page
    assert "- not measured: shape tiny, batch 1, context 128, layers_measured 1, kernel FLASH_ATTN:" in page


def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_attention.py"], capture_output=True, text=True, check=False
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert done.returncode == 1 and "No NVIDIA GPU here" in done.stderr


@pytest.fixture
def decoding():
    spec = importlib.util.spec_from_file_location("gpu_decoding", BENCHMARKS / "gpu_decoding.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_device_is_timed_by_events_behind_a_busy_wait_and_graphs_are_replayed(decoding, monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("synchronize")

        def elapsed_time(self, other):
            return 250.0

    class Graph:
        def replay(self):
            done.append("replay")

    class Capture:
        def __init__(self, graph):
            assert isinstance(graph, Graph)

        def __enter__(self):
            done.append("capture")

        def __exit__(self, *error):
            done.append("captured")

    for name, value in {
        "Event": Event,
        "_sleep": lambda cycles: done.append("busy"),
        "CUDAGraph": Graph,
        "graph": Capture,
        "synchronize": lambda: done.append("wait"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = decoding.graph_of(lambda: done.append("run"), torch.device("cuda"))
    assert done == ["run", "wait", "capture", "run", "captured"]
    done.clear()
    assert decoding.DeviceTimer().seconds(replay) == 0.25
    assert done == ["busy", "record", "replay", "record", "synchronize"]


def test_the_byte_floor_counts_one_chunk_read_and_the_moves_of_a_decode_seal(decoding):
    layout = Layout(64, 32, 64, 4, 64)
    cache = GpuCache.over([torch.empty(8, 3, 16, 128, dtype=torch.bfloat16)] * 2, [0, 1], torch.bfloat16)
    plan = plan_seals(np.array([255]), np.array([256]), 16, layout)
    token = 2 * 3 * 2 * 64 * 2  # layers, heads, K and V, elements, bytes
    # Chunk 3 and its 64 predecessors are read; 32 kept tokens and 64 raw ones are read and written.
    assert decoding.seal_bytes_floor(cache, plan, layout) == (64 + 64 + 2 * (32 + 64)) * token
