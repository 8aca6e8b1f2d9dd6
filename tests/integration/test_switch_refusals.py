"""Which servers refuse another pruning ratio while they run: the engine core's rules over a stand-in for vLLM's."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import engine_core, refusals
from vllm_tokenfilter.integration.server.arguments import EMBEDDED_FILTER


def prepared(monkeypatch, settings, ratio):
    monkeypatch.setattr(refusals, "settings_of", lambda vllm_config: FilterConfig.parse(settings))
    coordinator = SimpleNamespace(single_type_managers=())
    scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=coordinator))
    return engine_core.Control(SimpleNamespace(vllm_config=None, scheduler=scheduler)).prepare(ratio)


@pytest.mark.parametrize(
    "settings", [EMBEDDED_FILTER, {"schedule": {"kind": "tail"}}, {"schedule": {"kind": "linear"}}]
)
def test_a_schedule_over_layers_is_told_how_to_start_for_another_ratio(monkeypatch, settings):
    answer = prepared(monkeypatch, settings, 0.25)
    kind = settings["schedule"]["kind"]
    assert answer["refused"].startswith(f"pruning_ratio=0.25 cannot change at run time with schedule.kind={kind}")
    assert "schedule.kind=uniform (--pruning-ratio alone for the embedded model)" in answer["refused"]


def test_a_server_without_filtered_groups_is_told_to_start_with_a_ratio(monkeypatch):
    answer = prepared(monkeypatch, {"pruning_ratio": 0}, 0.25)
    assert "restart it with a pruning_ratio above 0" in answer["refused"]


def test_a_ratio_out_of_range_is_refused(monkeypatch):
    assert "pruning_ratio=1.5" in prepared(monkeypatch, {"pruning_ratio": 0.5}, 1.5)["refused"]
