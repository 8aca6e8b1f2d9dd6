"""What `verify` and the status say on a GPU machine: builders with stand-ins below them, the rest as it is."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")
pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import CUDAGraphMode

from vllm_tokenfilter.cli import verify
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import worker
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.gpu import clock as gpu_clock
from vllm_tokenfilter.integration.gpu.backend import FilteringBuilder
from vllm_tokenfilter.integration.offline import verification
from vllm_tokenfilter.integration.status import Status, merge_workers
from vllm_tokenfilter.layer_plan import LayerFacts, LayerPlan


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


CONFIG = FilterConfig(pruning_ratio=0.5, dense_layers=(1,))
PLAN = LayerPlan.of(CONFIG, 4, {0: LayerFacts(), 1: LayerFacts(), 2: LayerFacts(), 3: LayerFacts("sliding", 64)})


def builder(inner, layers, counters, monkeypatch):
    """One KV-cache group's builder, as it is once it has run, without vLLM's below it."""
    made = FilteringBuilder.__new__(type(f"FilteringBuilderOver{inner}", (FilteringBuilder,), {"inner_name": inner}))
    made.config, made.plan, made.counters = CONFIG, PLAN.only(layers), counters
    monkeypatch.setattr(gpu_clock, "_event", Passed)
    made._clock = gpu_clock.SealClock(counters, torch.device("cuda"))
    made.settles = [made._clock.settle]
    return made


@pytest.fixture
def answer(monkeypatch):
    """What a worker of two groups answers."""
    counters = StepCounters(tokens_seen=400, tokens_sealed=256, tokens_pruned=128, rows_filtered=200, seals=4)
    filtered = builder("FLASH_ATTN", [0, 2], counters, monkeypatch)
    with filtered._clock.measure():
        pass
    dense = builder("TRITON_ATTN", [1, 3], StepCounters(tokens_seen=400), monkeypatch)
    extended = worker.WorkerStatus()
    groups = [[SimpleNamespace(metadata_builders=[filtered])], [SimpleNamespace(metadata_builders=[dense])]]
    extended.model_runner = SimpleNamespace(attn_groups=groups)
    extended.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    )
    return extended.token_filtering_status()


def test_the_status_names_backends_graphs_dense_layers_and_the_time_of_seals(answer):
    assert answer["backend"] == "TOKEN_FILTERING" and answer["inner_backends"] == ["FLASH_ATTN", "TRITON_ATTN"]
    assert answer["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert answer["layers"]["filtered"] == [0, 2]
    assert answer["layers"]["dense"] == {"configured_dense": [1], "sliding_window_layer": [3]}
    assert answer["counters"]["seal_seconds"] == 0.5, "asking reads the events that the device has passed"
    merged = merge_workers([Status.model_validate(answer)] * 2)
    assert merged.counters.seal_seconds == 1.0
    assert merged.settings_in_force["inner_backend"] == "FLASH_ATTN, TRITON_ATTN"


def test_verify_prints_and_checks_them(answer, monkeypatch):
    texts = {"prompt_tokens": 250, "seconds": 1.0, "text": "a text"}
    filtered = {**texts, "status": answer}
    checks = verification._checks(CONFIG, texts, filtered)
    assert all(passed for check, passed in checks.items() if "torchvision" not in check)
    console = Console(record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(verify, "Console", lambda: console)
    verify.print_report(
        {"versions": {"vllm": "0.32.0"}, "model": "tiny", "dense": texts, "filtered": filtered, "checks": checks}
    )
    printed = {
        cells[1].strip(): cells[2].strip()
        for line in console.export_text().splitlines()
        if len(cells := line.split("│")) == 4
    }
    assert printed["inner_backend"] == "FLASH_ATTN, TRITON_ATTN"
    assert printed["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert printed["layers_dense"] == "{'configured_dense': [1], 'sliding_window_layer': [3]}"
