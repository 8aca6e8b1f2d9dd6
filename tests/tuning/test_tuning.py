"""Finding the retrieval layers: what is hidden from a layer, and how layers are chosen."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import reference
from tests.command import run_command
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.local.settings_file import read_settings
from vllm_tokenfilter.tuning import search, texts, tuner
from vllm_tokenfilter.tuning.run import TuningRequest, run


def no_progress(stage, units):
    return lambda unit=None: None


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("layers", [[], [0], [3], [1, 2]])
def test_scores_are_those_of_the_reference_with_the_same_layers_pruned(model, layers):
    draw = torch.Generator().manual_seed(len(layers))
    tokens = torch.randint(100, 40000, (480,), generator=draw).tolist()
    ratios = [0.75 if index in layers else 0.0 for index in range(4)]
    settings = {"pruning_ratio": sum(ratios) / 4, "schedule": {"kind": "per_layer", "ratios": ratios}}
    config = FilterConfig.parse(settings if layers else {"pruning_ratio": 0})
    text = texts.TuningText("passkey", tokens, 20)
    score = tuner.Tuner(model).measure([text], {"tried": config}, "Trying", no_progress)[0]
    assert score.ratios == ratios
    # The reference seals between steps: the text is one, its end the next.
    steps = [len(tokens) - texts.TAIL, texts.TAIL]
    expected = reference.run(model, tokens, steps, reference.Settings(kept_of=dict.fromkeys(layers, 16)))
    logprobs = expected.logprobs[-21:-1]
    wanted = logprobs.gather(1, torch.tensor(tokens[-20:])[:, None]).mean()
    assert abs(score.answer_logprob - float(wanted)) < 1e-3
    assert score.token_accuracy == float((logprobs.argmax(-1) == torch.tensor(tokens[-20:])).float().mean())


def test_hiding_in_one_layer_changes_the_score(model):
    tokens = torch.randint(100, 40000, (480,), generator=torch.Generator().manual_seed(5)).tolist()
    settings = {"dense": FilterConfig.parse({"pruning_ratio": 0})}
    settings |= {str(layer): FilterConfig.parse(_only(layer)) for layer in range(4)}
    text = texts.TuningText("passkey", tokens, 20)
    scores = tuner.Tuner(model).measure([text], settings, "Trying", no_progress)
    assert len({score.answer_logprob for score in scores}) == 5


def _only(layer):
    ratios = [0.875 if index == layer else 0.0 for index in range(4)]
    return {"pruning_ratio": 0.875 / 4, "schedule": {"kind": "per_layer", "ratios": ratios}}


@given(ratio=st.floats(0.01, 0.99), num_layers=st.integers(2, 100))
def test_the_mean_ratio_is_met_or_refused(ratio, num_layers):
    try:
        count, chunk = search.pruned_layers(ratio, num_layers)
    except EvaluationError as error:
        assert "use at most" in str(error)
        return
    config = search.pruning_config(range(count), num_layers, chunk)
    removed = [row.layout.effective_ratio if row.layout else 0 for row in LayerPlan.of(config, num_layers).rows]
    assert sum(removed) / num_layers >= ratio - 1e-6
    assert 0 < count < num_layers or num_layers == 1
    # One layer fewer would not do.
    assert (count - 1) * (1 - search.KEPT_PER_CHUNK / chunk) / num_layers < ratio


@given(damage=st.lists(st.floats(-1, 1), min_size=1, max_size=40), data=st.data())
def test_layers_that_clearly_lose_are_pruned_last_and_in_the_order_of_their_loss(damage, data):
    count = data.draw(st.integers(0, len(damage)))
    chosen = search.choose_layers(damage, count)
    assert len(chosen) == count and chosen == sorted(set(chosen))
    clear = [layer for layer in range(len(damage)) if damage[layer] > 0.1 * max(damage) > 0]
    pruned, whole = [layer for layer in clear if layer in chosen], [layer for layer in clear if layer not in chosen]
    assert not pruned or set(chosen) | set(clear) == set(range(len(damage)))
    assert not pruned or not whole or max(damage[layer] for layer in pruned) <= min(damage[layer] for layer in whole)


@given(
    recalls=st.sets(st.integers(0, 29), min_size=1, max_size=4),
    noise=st.lists(st.floats(-0.04, 0.04), min_size=30, max_size=30),
)
def test_what_is_chance_does_not_move_the_choice(recalls, noise):
    """Layers that recall stay whole, then those beside them, whatever the others seem to lose."""
    beside = {near for layer in recalls for near in (layer - 1, layer + 1) if 0 <= near < 30} - recalls
    damage = [(1 if layer in recalls else 0) + noise[layer] for layer in range(30)]
    for whole in (recalls, recalls | beside):
        assert set(range(30)) - set(search.choose_layers(damage, 30 - len(whole))) == whole


def test_another_seed_asks_other_questions_of_other_text(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prose = list(range(100, 700)) * 20
    made = [texts.make_texts(tokenizer, prose, 500, 1, seed) for seed in (1, 1, 2)]
    assert made[0] == made[1] and len(made[0]) == 12
    assert all(one.tokens != other.tokens for one, other in zip(made[0], made[2], strict=True) if one.kind != "prose")


def test_the_command_writes_settings_that_hold(tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--length", "600", "--trials", "1", "--seed", "7", "--text", "builtin"]
    done = run_command("tune", *arguments, "--out", "tuned.yaml", "--json", "tuned.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = read_settings(tmp_path / "tuned.yaml")
    found = json.loads((tmp_path / "tuned.json").read_text())
    assert config.model_dump(mode="json") == found["settings"]
    names = [score["name"] for score in found["scores"]]
    assert names == ["dense", *(f"layer {index}" for index in range(4)), "tuned", "uniform"]
    assert len(LayerPlan.of(config, 4).filtered) == search.pruned_layers(0.5, 4)[0]
    # Another ratio from the same trials.
    request = {"model": tiny_model, "ratio": 0.25, "length": 600, "trials": 1, "seed": 7, "text": "builtin"}
    again = TuningRequest(
        **request,
        data_dir=None,
        device=None,
        out=tmp_path / "quarter.yaml",
        json=tmp_path / "q.json",
        reuse=tmp_path / "tuned.json",
    )
    run(again, no_progress)
    assert json.loads((tmp_path / "q.json").read_text())["scores"][:5] == found["scores"][:5]
    least = min(range(4), key=lambda layer: search.damage_of(*_pair(found, layer)))
    assert read_settings(tmp_path / "quarter.yaml").schedule.ratios[least] > 0
    with pytest.raises(EvaluationError, match="was measured with trials=1, not 2"):
        run(dataclasses.replace(again, trials=2), no_progress)
    with pytest.raises(EvaluationError, match="was measured with seed=7, not 8"):
        run(dataclasses.replace(again, seed=8), no_progress)


def _pair(found, layer):
    scores = {score["name"]: tuner.Score(**score) for score in found["scores"]}
    return scores[f"layer {layer}"], scores["dense"]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"ratio": 1.0}, "ratio=1 must be above 0 and below 1"),
        ({"ratio": 0.95}, "ratio=0.95 leaves too few layers dense; use at most"),
        ({"length": 100}, "length=100 leaves nothing to prune"),
        ({"length": 9000}, "length=9000 is beyond the model's 4096 tokens"),
        ({"device": "nonsense"}, "cannot be loaded on nonsense"),
        ({"text": "/nowhere.txt"}, "text=/nowhere.txt cannot be read"),
        ({"reuse": Path("/nowhere.json")}, "reuse=/nowhere.json must be a result file of the kind tuning"),
        ({"out": Path("/nowhere/x.yaml")}, "out=/nowhere/x.yaml cannot be written"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tiny_model, tmp_path, wrong, sentence):
    right = {"model": tiny_model, "ratio": 0.5, "length": 600, "trials": 1, "seed": 7, "text": "builtin"}
    request = {
        **right,
        "data_dir": None,
        "device": None,
        "out": tmp_path / "x.yaml",
        "json": None,
        "reuse": None,
        **wrong,
    }
    with pytest.raises(EvaluationError, match=re.escape(sentence)):
        run(TuningRequest(**request), no_progress)
    assert not (tmp_path / "x.yaml").exists()
