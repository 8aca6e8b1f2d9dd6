"""The table of metrics, and what the exporter makes of statuses."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from docs.render.pages import metrics_page
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.server.metrics import METRICS, Exporter


def status(**changes):
    group = {"layers": "0-3", "effective_ratio": 0.5, "tokens_seen": 200, "tokens_pruned": 64}
    group |= {"blocks_held": 5, "blocks_dense": 8}
    counters = {"tokens_seen": 200, "tokens_sealed": 128, "tokens_pruned": 64, "rows_filtered": 7, "seals": 2}
    rest = {"seal_seconds": 0.25, "rows_dense": {"short": 3}, "layers_filtered": [0, 1, 2, 3], "layers_dense": {}}
    rest |= {"layers_unskipped": {}, "attentions_decided": 100, "attentions_skipped": 40}
    rest |= {"reads_dense": 900, "reads_filtered": 600, "reads_done": 500}
    return {**FilterConfig().model_dump(), **counters, **rest, "groups": [group], "engines": 1, **changes}


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
    exporter.update(status(layers_dense={"configured_dense": [1]}, layers_unskipped={"alibi_layer": [2]}))
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
    assert value("tokenfilter_realised_ratio", layers="0-3") == 64 / 200


def test_a_counter_that_starts_anew_goes_on(exported):
    exporter, value, _ = exported
    exporter.update(status(tokens_seen=500))
    exporter.update(status(tokens_seen=20))
    exporter.update(status(tokens_seen=30))
    assert value("tokenfilter_tokens_seen_total") == 530


def test_settings_that_were_replaced_go_to_nought(exported):
    exporter, value, _ = exported
    labels = {**{name: str(entry) for name, entry in FilterConfig().model_dump().items()}, "version": "0.1.0"}
    exporter.update(status())
    assert value("tokenfilter_config_info", **labels) == 1
    exporter.update(status(pruning_ratio=0.75))
    assert value("tokenfilter_config_info", **labels) == 0
    assert value("tokenfilter_config_info", **{**labels, "pruning_ratio": "0.75"}) == 1
    exporter.update(status())
    assert value("tokenfilter_config_info", **labels) == 1


def test_workers_and_engines_are_merged_without_counting_a_token_twice():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm_tokenfilter.integration.status import merge_engines, merge_workers

    one = status(layers_dense={"configured_dense": [1]}, layers_filtered=[0, 2, 3])
    one["groups"][0]["tokens_sealed"] = 128
    ranks = merge_workers([one, one])
    assert ranks["tokens_seen"] == 200 and ranks["seals"] == 4 and ranks["seal_seconds"] == 0.5
    assert ranks["layers_filtered"] == [0, 2, 3] and ranks["layers_dense"] == {"configured_dense": [1]}
    assert len(ranks["groups"]) == 1
    engines = merge_engines([ranks, ranks])
    assert engines["tokens_seen"] == 400 and engines["rows_dense"] == {"short": 6} and engines["engines"] == 2
    assert engines["groups"][0]["blocks_held"] == 10 and engines["groups"][0]["tokens_pruned"] == 128
