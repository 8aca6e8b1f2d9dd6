"""What the settings accept, and the sentence that everything else is refused with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_set_means_the_defaults(nothing):
    config = FilterConfig.parse(nothing)
    assert config == FilterConfig()
    assert (config.pruning_ratio, config.chunk_size, config.recent_window, config.sink_tokens) == (0.5, 64, 64, 4)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"pruning_ratio": 1.0}, "pruning_ratio=1.0 is refused (Input should be less than 1)"),
        ({"pruning_ratio": -0.1}, "pruning_ratio=-0.1 is refused"),
        ({"pruning_ratio": float("nan")}, "pruning_ratio=nan is refused"),
        ({"pruning_ratio": "0.5"}, "pruning_ratio='0.5' is refused"),
        ({"pruning_ratio": True}, "pruning_ratio=True is refused"),
        ({"pruning_ratio": None}, "pruning_ratio=None is refused"),
        ({"pruning_ratio": 0.001}, "removes no token of a chunk of 64; use 0 or at least 0.015625"),
        ({"pruning_ratio": 0.999}, "keeps no token of a chunk of 64; use at most 0.984375"),
        ({"pruning_ratio": 0.95}, "sink_tokens=4 is above the 3 tokens a chunk keeps"),
        ({"chunk_size": 1}, "chunk_size=1 is refused"),
        ({"chunk_size": 64.0}, "chunk_size=64.0 is refused"),
        ({"chunk_size": 128}, "recent_window=64 is below chunk_size=128; use recent_window of at least 128"),
        ({"chunk_size": 32}, "anchor_terms=64 is above chunk_size=32; use anchor_terms of at most 32"),
        ({"sink_tokens": -1}, "sink_tokens=-1 is refused"),
        ({"anchor_decay": 1}, "anchor_decay=1.0 is refused"),
        ({"anchor_decay": 0}, "anchor_decay=0.0 is refused"),
        ({"fusion": "max"}, "fusion='max' is refused"),
        ({"dense_layers": [-1]}, "dense_layers contains -1; a layer's index must be 0 or more"),
        ({"dense_layers": [0.5]}, "dense_layers.0=0.5 is refused"),
        ({"dense_layers": 3}, "dense_layers=3 is refused"),
        ({"first_layer": -1}, "first_layer=-1 is refused"),
        ({"prunning_ratio": 0.5}, "prunning_ratio=0.5 is not a setting; did you mean pruning_ratio?"),
        ({"window": 64}, "window=64 is not a setting; "),
        ({3: 4}, "3=4 is not a setting"),
        ([("pruning_ratio", 0.5)], "must be a mapping"),
        ("pruning_ratio=0.5", "must be a mapping"),
        (0.5, "token_filtering=0.5 must be a mapping"),
    ],
)
def test_a_bad_setting_is_refused_by_name_value_and_remedy(settings, sentence):
    with pytest.raises(ConfigError) as refusal:
        FilterConfig.parse(settings)
    assert sentence in str(refusal.value)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as refusal:
        FilterConfig.parse({"pruning_ratio": 2, "chunk_sise": 64, "first_layer": "a"})
    for name in ("pruning_ratio", "did you mean chunk_size?", "first_layer"):
        assert name in str(refusal.value)


@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(sorted(FilterConfig.model_fields)),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-5, 5000),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.integers(-2, 40)),
        ),
        max_size=5,
    )
)
def test_any_mapping_is_either_accepted_whole_or_refused_in_words(settings):
    try:
        config = FilterConfig.parse(settings)
    except ConfigError as refusal:
        assert str(refusal)
    else:
        layout = config.layout
        assert 1 <= layout.kept_per_chunk <= layout.chunk_size <= layout.recent_window
        assert layout.anchor_terms <= layout.chunk_size and layout.sink_tokens <= layout.kept_per_chunk
        assert (layout.removed_per_chunk > 0) == (config.pruning_ratio > 0)


def test_a_configuration_cannot_change_after_it_is_read():
    with pytest.raises(ValidationError):
        FilterConfig().pruning_ratio = 0.9


@pytest.mark.parametrize(
    "ratio, chunk, kept", [(0, 64, 64), (0.5, 64, 32), (0.3, 64, 45), (0.75, 48, 12), (0.9, 64, 6)]
)
def test_the_ratio_is_rounded_to_whole_tokens_once(ratio, chunk, kept):
    config = FilterConfig.parse({"pruning_ratio": ratio, "chunk_size": chunk, "anchor_terms": chunk})
    assert config.layout.kept_per_chunk == kept
