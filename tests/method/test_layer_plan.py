"""The layer plan: what settings and facts make of every layer."""

import pytest

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.layer_plan import LayerFacts, LayerPlan, ranges


def plan(settings, *facts):
    return LayerPlan.of(FilterConfig.parse(settings), len(facts), dict(enumerate(facts)))


FULL, SLIDING, ALIBI = LayerFacts(), LayerFacts("sliding", 128), LayerFacts(alibi=True)


def test_layers_are_chosen_by_first_layer_and_dense_layers():
    found = LayerPlan.of(FilterConfig.parse({"first_layer": 2, "dense_layers": [4]}), 6)
    assert found.filtered == [2, 3, 5] and found.dense == {"configured_dense": [0, 1, 4]}
    assert found.layouts == {FilterConfig().layout} and found.effective_ratio == 0.5


def test_a_layer_whose_cache_is_not_ours_to_filter_stays_dense_for_that_reason_first():
    facts = (FULL, SLIDING, LayerFacts("chunked", 128), LayerFacts("other"), ALIBI)
    reasons = {
        "sliding_window_layer": [1],
        "chunked_local_layer": [2],
        "unsupported_cache_layer": [3],
        "alibi_layer": [4],
    }
    found = plan({"pruning_ratio": 0.5}, *facts)
    assert found.filtered == [0] and found.dense == reasons
    assert plan({"pruning_ratio": 0}, *facts).dense == {"pruning_ratio_zero": [0], **reasons}


def test_a_layer_finds_the_cache_it_reads_as_the_owner_left_it_and_does_not_skip():
    reader = LayerFacts(reads=0)
    settings = {"dense_layers": [1], "attention_skipping": {"ratio": 0.25}}
    found = plan(settings, FULL, FULL, reader, LayerFacts(reads=1))
    assert found.filtered == [0] and found.dense == {"configured_dense": [1, 3]}
    assert found.rows[2].layout == found.rows[0].layout and not found.rows[2].filtered
    assert found.skipping == [0, 1] and found.unskipped == {"reads_another_layers_cache": [2, 3]}


@pytest.mark.parametrize(
    "facts", [(FULL, LayerFacts(alibi=True, reads=0), LayerFacts(reads=0)), (ALIBI, LayerFacts(reads=0))]
)
def test_a_cache_is_filtered_only_if_all_who_read_it_can_read_it_so(facts):
    found = plan({"pruning_ratio": 0.5}, *facts)
    assert not found.layouts and found.dense == {"alibi_layer": list(range(len(facts)))}


def test_learned_sinks_are_in_the_way_of_the_windows_substitute_alone():
    sinks = LayerFacts(learned_sinks=True)
    skipping = {"ratio": 0.25, "substitute": "window"}
    assert plan({"attention_skipping": skipping}, FULL, sinks).unskipped == {"learned_attention_sinks": [1]}
    assert plan({"attention_skipping": {**skipping, "substitute": "none"}}, FULL, sinks).skipping == [0, 1]


def test_layers_that_should_not_skip_have_no_reason():
    schedule = {"kind": "tail", "share": 0.5}
    found = plan({"attention_skipping": {"ratio": 0.25, "schedule": schedule}}, FULL, SLIDING, FULL, ALIBI)
    assert found.skipping == [2] and found.unskipped == {"alibi_layer": [3]}
    assert [row.skip_units for row in found.rows] == [0, 0, 5000, 0]


def test_the_stages_of_a_pipeline_join_to_the_plan_of_the_model():
    config = FilterConfig.parse({"schedule": {"kind": "tail"}})
    facts = {0: FULL, 1: SLIDING, 2: FULL, 3: FULL}
    whole = LayerPlan.of(config, 4, facts)
    stages = [LayerPlan.of(config, 4, {index: facts[index] for index in own}) for own in ((0, 1), (2, 3))]
    assert [stage.indices for stage in stages] == [[0, 1], [2, 3]]
    assert LayerPlan.joined(reversed(stages)) == whole and whole.only([2, 3]) == stages[1]


def test_schedules_that_do_not_fit_the_layers_are_refused_together():
    per_layer = {"kind": "per_layer", "ratios": [0.5, 0.5]}
    config = FilterConfig.parse({"schedule": per_layer, "attention_skipping": {"ratio": 0.5, "schedule": per_layer}})
    with pytest.raises(ConfigError) as refusal:
        LayerPlan.of(config, 3)
    assert len(refusal.value.reasons) == 2


def test_runs_of_layers_that_are_alike_make_the_table():
    found = plan({"dense_layers": [2], "attention_skipping": {"ratio": 0.25}}, FULL, FULL, FULL, ALIBI, FULL)
    assert [tuple(row.values()) for row in found.table(64)] == [
        ("0-1", 32, 0.5, 0.25),
        ("2", 64, 0.0, 0.25),
        ("3", 64, 0.0, 0.0),
        ("4", 32, 0.5, 0.25),
    ]


def test_a_plan_travels_as_plain_types():
    found = plan({"pruning_ratio": 0.5, "attention_skipping": {"ratio": 0.25}}, FULL, SLIDING, LayerFacts(reads=0))
    assert LayerPlan.model_validate(found.model_dump(mode="json")) == found


def test_indices_are_written_as_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([]) == "none"
