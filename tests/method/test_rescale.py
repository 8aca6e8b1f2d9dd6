"""Which other ratios a running server can have, and what they make of its layers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.local.settings_file import read_settings
from vllm_tokenfilter.rescale import Scale

#: What the embedded model is served with: 20 of 30 layers lose 96 of 128 tokens.
TUNED = read_settings(Path(__file__).parents[2] / "configs" / "smollm2-135m-tuned.yaml").model_dump(mode="json")
UNEVEN = {"pruning_ratio": 0.25, "schedule": {"kind": "per_layer", "ratios": [0.0, 0.25, 0.25, 0.5]}}


def scale(settings, layers=30):
    return Scale.of(FilterConfig.parse(settings), layers)


def removed(config, layers):
    return [layout.removed_per_chunk if layout else 0 for _, layout, _ in config.layer_settings(layers)]


def test_whole_layers_of_a_tuned_server_stay_whole_and_the_others_take_the_asked_mean():
    tuned = scale(TUNED)
    quarter = tuned.settings_for(0.25)
    assert quarter.pruning_ratio == 0.25 and quarter.chunk_size == 128
    assert [bool(count) for count in removed(quarter, 30)] == [bool(count) for count in tuned.removed]
    assert set(removed(quarter, 30)) == {0, 48}
    assert tuned.settings_for(0.5) == tuned.started
    assert set(removed(tuned.settings_for(0), 30)) == {0}


def test_a_ratio_that_whole_tokens_cannot_give_is_the_nearest_one():
    near = scale(TUNED).settings_for(0.3)
    assert set(removed(near, 30)) == {0, 58} and near.pruning_ratio == pytest.approx(20 * 58 / (30 * 128))


def test_what_the_whole_layers_leave_is_the_highest_ratio():
    tuned = scale(TUNED)
    assert tuned.highest == pytest.approx(20 / 30 * 124 / 128)
    assert set(removed(tuned.settings_for(tuned.highest), 30)) == {0, 124}
    with pytest.raises(ConfigError, match=r"10 of 30 layers keep every token.*use 0 to 0.645833"):
        tuned.settings_for(0.65)
    with pytest.raises(ConfigError, match="removes no token of a chunk in any layer; use 0 or at least"):
        tuned.settings_for(0.0001)


def test_the_range_of_the_server_that_make_serve_starts_is_the_one_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    highest = scale(TUNED).highest
    assert f"{{'lowest': 0.0, 'highest': {highest}}}" in page


def test_layers_at_their_limit_leave_the_rest_to_the_others():
    uneven = scale(UNEVEN, 4)
    assert uneven.removed == (0, 16, 16, 32)
    assert removed(uneven.settings_for(0.375), 4) == [0, 24, 24, 48]
    # 60 of 64 are the most; doubled and more, the last layer has them.
    assert removed(uneven.settings_for(0.6), 4) == [0, 47, 47, 60]
    assert removed(uneven.settings_for(uneven.highest), 4) == [0, 60, 60, 60]


@pytest.mark.parametrize("kind", ["tail", "linear"])
def test_other_schedules_are_scaled_by_the_same_rule(kind):
    started = scale({"schedule": {"kind": kind}})
    half = started.settings_for(0.25)
    now = removed(half, 30)
    assert half.pruning_ratio == pytest.approx(0.25, abs=1 / 128)
    assert [count > 0 for count in now] == [count > 0 for count in started.removed]
    assert len(set(zip(started.removed, now, strict=True))) == len(set(started.removed))


def test_a_uniform_server_takes_the_ratio_itself():
    uniform = scale({"pruning_ratio": 0.5, "dense_layers": [0, 1]})
    assert uniform.settings_for(0.25).pruning_ratio == 0.25 and uniform.highest == 60 / 64
    with pytest.raises(ConfigError, match="sink_tokens=4"):
        uniform.settings_for(0.96)


@given(
    st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75]), min_size=1, max_size=12).filter(any),
    st.floats(0, 0.999),
)
def test_layers_alike_stay_alike_and_the_mean_is_within_half_a_token(ratios, wanted):
    mean = sum(ratios) / len(ratios)
    started = scale({"pruning_ratio": mean, "schedule": {"kind": "per_layer", "ratios": ratios}}, len(ratios))
    try:
        config = started.settings_for(wanted)
    except ConfigError:
        assert wanted > started.highest or 0 < wanted < 1 / 64
        return
    now = removed(config, len(ratios))
    assert len(set(zip(started.removed, now, strict=True))) == len(set(started.removed))
    assert all(count == 0 for count, before in zip(now, started.removed, strict=True) if not before)
    assert max(now) <= started.most_removed
    assert abs(sum(now) / (64 * len(now)) - wanted) <= 0.5 / 64 + 1e-9
    for layout in {layout for _, layout, _ in started.started.layer_settings(len(now)) if layout}:
        assert started.layout(layout, config).removed_per_chunk == now[started.removed.index(layout.removed_per_chunk)]
