"""Statuses merged: parts of a model, ranks, and engines, without counting a token twice or losing a layer."""

from collections import Counter
from dataclasses import fields

import pytest

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import Merge, StepCounters, merged_as
from vllm_tokenfilter.integration.status import GroupStatus, Status, merge_engines, merge_parts, merge_workers
from vllm_tokenfilter.layer_plan import LayerPlan

TAIL = {"schedule": {"kind": "tail", "share": 0.5}, "pruning_ratio": 0.25, "attention_skipping": {"ratio": 0.25}}


def counters(**changes):
    """Every counter above zero, a new one too."""
    counted = {own.name: 7 for own in fields(StepCounters)}
    counted |= {"tokens_seen": 500, "tokens_sealed": 256, "tokens_pruned": 128, "rows_filtered": 40}
    counted |= {"rows_dense": Counter(short=9), "seals": 3, "seal_seconds": 0.5}
    counted |= {"attentions_decided": 300, "attentions_skipped": 100}
    return StepCounters(**{**counted, "reads_dense": 900, "reads_filtered": 600, "reads_done": 400, **changes})


def worker(settings, *groups, num_layers=4):
    """A worker's status as it arrives: each group is indices of layers, and what was counted."""
    config = FilterConfig.parse(settings)
    plan = LayerPlan.of(config, num_layers)
    parts = [GroupStatus(plan=plan.only(layers), counters=counted) for layers, counted in groups]
    status = Status(backend="TOKEN_FILTERING", settings=config, groups=parts)
    return Status.model_validate(status.model_dump(mode="json"))


ALL = {"pruning_ratio": 0.5, "attention_skipping": {"ratio": 0.25}}


def test_a_status_travels_as_plain_types_with_the_counters_under_their_key():
    one = worker(ALL, (range(4), counters()))
    plain = one.model_dump(mode="json")
    assert plain["counters"] == counters().as_dict() and plain["layers"]["filtered"] == [0, 1, 2, 3]
    assert plain["settings"] == one.settings_in_force
    assert Status.model_validate(plain) == one


def test_every_counter_merges_by_one_rule():
    assert sorted(sum(map(merged_as, Merge), ())) == sorted(own.name for own in fields(StepCounters))


def test_groups_of_a_worker_count_tokens_once_and_what_layers_did_each():
    dense = counters(tokens_sealed=0, tokens_pruned=0, rows_filtered=0, rows_dense=Counter(ratio=49), seals=0)
    one = worker(TAIL, ([0, 1], dense), ([2], counters(tokens_pruned=100)), ([3], counters(tokens_pruned=200)))
    total = one.counters
    assert (total.tokens_seen, total.tokens_pruned, total.rows_filtered) == (500, 150, 40)
    assert total.rows_dense == {"short": 9}, "rows count where tokens are removed"
    assert (total.seals, total.attentions_skipped, total.reads_done) == (6, 300, 1200)


def test_tensor_parallel_ranks_do_the_same_and_seal_each_for_itself():
    rank = worker(ALL, (range(4), counters()))
    merged = merge_workers([rank, rank])
    assert merged.counters == counters(seals=6, seal_seconds=1.0)
    assert merged.layers == rank.layers and [group.plan.indices for group in merged.groups] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_pipeline_stages_hold_other_layers_of_the_same_groups(ranks):
    first = worker(ALL, ([0, 1], counters()))
    second = worker(ALL, ([2, 3], counters(attentions_skipped=50, reads_done=300)))
    merged = merge_workers([first] * ranks + [second] * ranks)
    assert merged.layers.filtered == merged.layers.skipping == [0, 1, 2, 3]
    assert [group.plan.indices for group in merged.groups] == [[0, 1, 2, 3]]
    total = merged.counters
    assert (total.tokens_seen, total.tokens_pruned, total.rows_filtered) == (500, 128, 40)
    assert (total.attentions_decided, total.attentions_skipped, total.reads_done) == (600, 150, 700)
    assert total.seals == 6 * ranks


def test_a_stage_without_layers_of_a_group_leaves_the_groups_in_order():
    nothing = ([], StepCounters())
    stages = [
        worker(TAIL, ([0, 1], counters(tokens_pruned=0, tokens_sealed=0)), nothing),
        worker(TAIL, nothing, ([2, 3], counters())),
    ]
    merged = merge_workers(stages)
    assert [(group.plan.indices, group.plan.effective_ratio) for group in merged.groups] == [
        ([0, 1], 0.0),
        ([2, 3], 0.5),
    ]
    assert merged.counters.tokens_pruned == 128 and merged.counters.tokens_seen == 500
    assert merged.layers == LayerPlan.of(FilterConfig.parse(TAIL), 4)


def test_data_parallel_engines_add_up():
    engine = merge_workers([worker(ALL, (range(4), counters()))])
    held = [group.model_copy(update={"blocks_held": 5, "blocks_dense": 8}) for group in engine.groups]
    engine = engine.model_copy(update={"groups": held})
    server = merge_engines([engine, engine.model_copy(update={"switching": True})])
    twice = {name: 2 * count for name, count in counters().as_dict().items() if name != "rows_dense"}
    assert server.counters.as_dict() == {**twice, "rows_dense": {"short": 18}}
    assert server.engines == 2 and server.switching and server.layers == engine.layers
    assert (server.groups[0].blocks_held, server.groups[0].blocks_dense) == (10, 16)


def test_merging_leaves_what_it_merged_as_it_was():
    live = counters()
    merged = merge_parts([GroupStatus(plan=LayerPlan.of(FilterConfig.parse(ALL), 4), counters=live)])
    live.tokens_seen += 1
    live.rows_dense["short"] += 1
    assert merged.counters == counters()
