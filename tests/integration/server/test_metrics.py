"""The table of metrics, and what the exporter makes of statuses."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from docs.render.pages import metrics_page
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.server.metrics import METRICS, Exporter
from vllm_tokenfilter.integration.status import GroupStatus, Status
from vllm_tokenfilter.layer_plan import LayerFacts, LayerPlan


def status(settings=None, facts=None, **counters):
    """A server's, after one request, with one group of four layers."""
    config = FilterConfig.parse(settings)
    plan = LayerPlan.of(config, 4, facts)
    counted = {"tokens_seen": 200, "tokens_sealed": 128, "tokens_pruned": 64, "rows_filtered": 7, "seals": 2}
    counted |= {"seal_seconds": 0.25, "rows_dense": {"short": 3}, "attentions_decided": 100, "attentions_skipped": 40}
    group = GroupStatus(plan=plan, counters=StepCounters(**{**counted, **counters}), blocks_held=5, blocks_dense=8)
    return Status(backend="TOKEN_FILTERING", settings=config, groups=[group])


@pytest.fixture
def exported():
    registry = CollectorRegistry()
    exporter = Exporter(registry)
    return exporter, lambda name, **labels: registry.get_sample_value(name, labels), registry


def test_every_metric_has_type_unit_and_a_row_on_its_page():
    page = metrics_page()
    for metric in METRICS:
        assert metric.name.startswith("tokenfilter_") and metric.unit and metric.help.endswith(".")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert f"| `{metric.name}` | {metric.kind} | {metric.unit} |" in page


def test_every_metric_is_exposed_with_its_type(exported):
    exporter, _, registry = exported
    settings = {"dense_layers": [1], "attention_skipping": {"ratio": 0.5}}
    facts = [LayerFacts(), LayerFacts(), LayerFacts(alibi=True), LayerFacts()]
    exporter.update(status(settings, dict(enumerate(facts))))
    text = generate_latest(registry).decode()
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}" in text
        assert f"\n{metric.name}{{" in text or f"\n{metric.name} " in text, metric.name


def test_values_are_the_statuses(exported):
    exporter, value, _ = exported
    exporter.update(status())
    exporter.update(status(tokens_seen=500, seal_seconds=0.5))
    assert value("tokenfilter_tokens_seen_total") == 500
    assert value("tokenfilter_seal_seconds_total") == 0.5
    assert value("tokenfilter_rows_dense_total", reason="short") == 3
    assert value("tokenfilter_kv_blocks_held", layers="0-3") == 5
    assert value("tokenfilter_kv_blocks_saved", layers="0-3") == 3
    assert value("tokenfilter_realised_ratio", layers="0-3") == 64 / 500


def test_a_counter_that_starts_anew_goes_on(exported):
    exporter, value, _ = exported
    exporter.update(status(tokens_seen=500))
    exporter.update(status(tokens_seen=20))
    exporter.update(status(tokens_seen=30))
    assert value("tokenfilter_tokens_seen_total") == 530


def test_settings_that_were_replaced_go_to_nought(exported):
    exporter, value, _ = exported
    labels = {
        **{name: str(entry) for name, entry in FilterConfig().model_dump(mode="json").items()},
        "version": "0.1.0",
    }
    exporter.update(status())
    assert value("tokenfilter_config_info", **labels) == 1
    exporter.update(status({"pruning_ratio": 0.75}))
    assert value("tokenfilter_config_info", **labels) == 0
    assert value("tokenfilter_config_info", **{**labels, "pruning_ratio": "0.75"}) == 1
    exporter.update(status())
    assert value("tokenfilter_config_info", **labels) == 1


def test_servers_of_one_process_share_its_registry(exported):
    first, value, registry = exported
    second = Exporter(registry)
    first.update(status(tokens_seen=200))
    second.update(status(tokens_seen=50))
    first.update(status(tokens_seen=300))
    assert value("tokenfilter_tokens_seen_total") == 350


def test_a_look_that_fails_is_counted_and_the_next_one_goes_on(exported, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm_tokenfilter.integration.server import endpoints

    exporter, value, _ = exported
    looks = iter([status(tokens_seen=100), RuntimeError("a worker did not answer"), status(tokens_seen=300)])

    async def look(engine_client):
        answer = next(looks, None)
        if answer is None:
            raise endpoints.EngineDeadError
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(endpoints, "Exporter", lambda: exporter)
    monkeypatch.setattr(endpoints, "METRICS_INTERVAL_S", 0)
    monkeypatch.setattr(endpoints, "_status", look)
    asyncio.run(endpoints._export(None))
    assert value("tokenfilter_tokens_seen_total") == 300
    assert value("tokenfilter_looks_failed_total") == 1
