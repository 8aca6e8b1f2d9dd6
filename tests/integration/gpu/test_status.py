"""What `verify` and the status say on a GPU machine: builders with stand-ins below them, the rest as it is."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import CUDAGraphMode

from vllm_tokenfilter.cli import verify
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import status
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.gpu import backend as gpu_backend
from vllm_tokenfilter.integration.gpu import clock as gpu_clock
from vllm_tokenfilter.integration.gpu.backend import FilteringBuilder
from vllm_tokenfilter.integration.worker import WorkerStatus


class Passed:
    """Stands in for a CUDA event: `SealClock` reads it at once, half a second after the one before."""

    now = 0.0

    def record(self):
        Passed.now += 0.5
        self.at = Passed.now

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def builder(inner, filtered, dense, counters, monkeypatch):
    """One KV-cache group's builder, as it is once it has run, without vLLM's below it."""
    made = FilteringBuilder.__new__(type(f"FilteringBuilderOver{inner}", (FilteringBuilder,), {"inner_name": inner}))
    made.config = FilterConfig(pruning_ratio=0.5, dense_layers=[1])
    made._filtered, made._dense, made.counters = dict.fromkeys(filtered), dense, counters
    made._vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    )
    monkeypatch.setattr(gpu_backend, "num_layers", lambda _: 4)
    monkeypatch.setattr(gpu_clock, "_event", Passed)
    made._unskipped = {}
    made._steps = SimpleNamespace(clock=gpu_clock.SealClock(counters, torch.device("cuda"))) if filtered else None
    made._settle = made._steps.clock.settle if filtered else lambda: None
    return made


@pytest.fixture
def answer(monkeypatch):
    """What a worker of two groups answers."""
    counters = StepCounters(tokens_seen=400, tokens_sealed=256, tokens_pruned=128, rows_filtered=200, seals=4)
    filtered = builder("FLASH_ATTN", [0, 2], {}, counters, monkeypatch)
    with filtered._steps.clock.measure():
        pass
    reasons = {"configured_dense": [1], "sliding_window_layer": [3]}
    dense = builder("TRITON_ATTN", [], reasons, StepCounters(tokens_seen=400), monkeypatch)
    worker = WorkerStatus()
    groups = [[SimpleNamespace(metadata_builders=[filtered])], [SimpleNamespace(metadata_builders=[dense])]]
    worker.model_runner = SimpleNamespace(attn_groups=groups)
    return worker.token_filtering_status()


def test_the_status_names_backends_graphs_dense_layers_and_the_time_of_seals(answer):
    assert answer["backend"] == "TOKEN_FILTERING" and answer["inner_backend"] == "FLASH_ATTN, TRITON_ATTN"
    assert answer["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert answer["layers_filtered"] == [0, 2]
    assert answer["layers_dense"] == {"configured_dense": [1], "sliding_window_layer": [3]}
    assert answer["seal_seconds"] == 0.5, "asking reads the events that the device has passed"
    merged = status.merge_workers([answer, answer])
    assert (merged["inner_backend"], merged["seal_seconds"]) == ("FLASH_ATTN, TRITON_ATTN", 1.0)


def test_verify_prints_and_checks_them(answer):
    texts = {"prompt_tokens": 250, "seconds": 1.0, "text": "a text"}
    config = FilterConfig(pruning_ratio=0.5, dense_layers=[1])
    filtered = {**texts, "status": answer}
    checks = verify._checks(config, texts, filtered)
    assert all(passed for check, passed in checks.items() if "torchvision" not in check)
    console = Console(record=True, width=200, file=io.StringIO())
    verify._print(
        {"versions": {"vllm": "0.32.0"}, "model": "tiny", "dense": texts, "filtered": filtered, "checks": checks},
        console,
    )
    printed = {
        cells[1].strip(): cells[2].strip()
        for line in console.export_text().splitlines()
        if len(cells := line.split("│")) == 4
    }
    assert printed["inner_backend"] == "FLASH_ATTN, TRITON_ATTN"
    assert printed["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert printed["layers_dense"] == "{'configured_dense': [1], 'sliding_window_layer': [3]}"


def test_another_ratio_at_run_time_is_refused_on_a_gpu_in_one_sentence(monkeypatch):
    from vllm_tokenfilter.integration import engine_core

    monkeypatch.setattr(engine_core, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    control = engine_core.Control.__new__(engine_core.Control)
    control._core, control.config = SimpleNamespace(), FilterConfig()
    assert control.prepare(0.25) == {
        "refused": "pruning_ratio=0.25 cannot follow at run time on a GPU in this version; restart the server."
    }
