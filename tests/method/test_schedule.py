"""How a ratio is spread over layers: the mean holds, and what cannot hold is refused in words."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.schedule import Schedule, whole_tokens

RATIOS = st.floats(0, 0.99)
KINDS = st.sampled_from(["uniform", "tail", "linear"])


@given(kind=KINDS, mean=RATIOS, num_layers=st.integers(1, 80))
def test_the_mean_over_the_layers_is_the_ratio(kind, mean, num_layers):
    try:
        ratios = Schedule(kind=kind).layer_ratios(mean, num_layers)
    except ConfigError as refusal:
        assert kind == "tail" and "use a share above" in str(refusal)
        return
    assert len(ratios) == num_layers and all(0 <= ratio < 1 for ratio in ratios)
    assert sum(ratios) / num_layers == pytest.approx(mean, abs=1e-9)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(ratios))


@given(
    kind=KINDS,
    mean=st.floats(0.1, 0.6),
    num_layers=st.integers(2, 60),
    chunk=st.sampled_from([16, 48, 64, 100, 128]),
)
def test_whole_tokens_keep_the_mean_of_the_layouts(kind, mean, num_layers, chunk):
    settings = {"pruning_ratio": mean, "chunk_size": chunk, "recent_window": 128, "anchor_terms": 16, "sink_tokens": 1}
    config = FilterConfig.parse({**settings, "schedule": {"kind": kind}})
    try:
        layouts = [row.layout for row in LayerPlan.of(config, num_layers).rows]
    except ConfigError:
        assume(False)
    removed = [0 if layout is None else layout.removed_per_chunk for layout in layouts]
    # Equal ratios round alike: half a token. Eighths of a chunk round as a whole: half an eighth over all layers.
    eighths = kind == "linear" and chunk % 8 == 0
    assert abs(sum(removed) / num_layers - mean * chunk) <= (chunk / 16 / num_layers if eighths else 0.5) + 1e-6
    assert not eighths or len(set(layouts)) <= 9


@given(st.lists(RATIOS, min_size=1, max_size=40), st.sampled_from([1, 8]))
def test_rounding_moves_no_layer_by_more_than_one_quantum(ratios, quantum):
    counts = whole_tokens(tuple(ratios), 64, quantum)
    assert all(count % quantum == 0 for count in counts)
    assert all(abs(count - ratio * 64) <= quantum + 1e-9 for count, ratio in zip(counts, ratios, strict=True))
    if len(set(ratios) - {0.0}) > 1:
        assert abs(sum(counts) - sum(ratios) * 64) <= quantum / 2 + 1e-6


@pytest.mark.parametrize(
    "settings, num_layers, sentence",
    [
        ({"schedule": {"kind": "tail", "share": 0.3}}, 30, "puts a ratio of 1.67 on the last 9 of 30 layers"),
        ({"schedule": {"kind": "per_layer", "ratios": [0.5, 0.5]}}, 3, "has 2 entries and the model 3 layers"),
        ({"schedule": {"kind": "per_layer", "ratios": [0, 0.5]}}, 2, "has the mean 0.25, not the ratio 0.5"),
        (
            {"pruning_ratio": 0.6, "schedule": {"kind": "tail", "share": 0.61}},
            100,
            "leaves a layer 1 tokens of a chunk",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_words(settings, num_layers, sentence):
    with pytest.raises(ConfigError) as refusal:
        LayerPlan.of(FilterConfig.parse(settings), num_layers)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"schedule": {"kind": "tail"}, "dense_layers": [3]}, "schedule.kind=tail decides which layers keep every"),
        ({"schedule": {"share": 0.5}}, "schedule.share=0.5 has no effect on kind=uniform"),
        ({"schedule": {"kind": "tail", "ratios": [0.5]}}, "schedule.ratios has no effect on kind=tail"),
        ({"schedule": {"kind": "per_layer"}}, "schedule.kind=per_layer needs schedule.ratios"),
        ({"schedule": {"knd": "tail"}}, "schedule.knd='tail' is not a setting; did you mean kind?"),
        ({"attention_skipping": {"ratoi": 0.5}}, "attention_skipping.ratoi=0.5 is not a setting; did you mean ratio?"),
        ({"attention_skipping": {"ratio": 1}}, "attention_skipping.ratio=1.0 is refused"),
        (
            {"attention_skipping": {"schedule": {"kind": "per_layer"}}},
            "schedule.kind=per_layer needs",
        ),
    ],
)
def test_a_contradiction_is_refused_before_the_model_is_known(settings, sentence):
    with pytest.raises(ConfigError) as refusal:
        FilterConfig.parse(settings)
    assert sentence in str(refusal.value)
