"""Attention skipping against the independent reference, in float32: the same decisions and log-probabilities."""

import inspect
import textwrap

import numpy as np
import pytest

from tests import reference
from tests.engine.driver import Engine, check
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.layer_plan import LayerPlan

#: name -> our settings.
SETTINGS = {
    "none, all layers": {"pruning_ratio": 0, "attention_skipping": {"ratio": 0.5, "substitute": "none"}},
    "none, tail": {
        "pruning_ratio": 0,
        "attention_skipping": {
            "ratio": 0.5,
            "substitute": "none",
            "schedule": {"kind": "tail"},
            "warmup_tokens": 20,
        },
    },
    "window, filtered tail": {
        "pruning_ratio": 0.5,
        "schedule": {"kind": "tail"},
        "attention_skipping": {"ratio": 0.3, "substitute": "window", "skip_window": 32},
    },
    "running output, filtered": {
        "pruning_ratio": 0.5,
        "attention_skipping": {"ratio": 0.5, "substitute": "running_output"},
    },
    "linear schedules": {
        "pruning_ratio": 0.25,
        "schedule": {"kind": "linear"},
        "attention_skipping": {"ratio": 0.25, "skip_window": 128, "schedule": {"kind": "linear"}},
    },
}


def settings_of(name, num_layers):
    """Our settings and the reference's, whose ratios of layers are worked out here."""
    config = FilterConfig.parse(SETTINGS[name])
    num_tail = round(num_layers * 2 / 3)
    tail = (0.0,) * (num_layers - num_tail) + (0.5 * num_layers / num_tail,) * num_tail
    match name:
        case "none, all layers":
            other = {"ratio": 0, "skip": (0.5,) * num_layers}
        case "none, tail":
            other = {"ratio": 0, "skip": tail, "warmup": 20}
        case "window, filtered tail":
            kept = {index: 64 - round(64 * ratio) for index, ratio in enumerate(tail) if ratio}
            other = {"kept_of": kept, "skip": (0.3,) * num_layers, "substitute": "window", "skip_window": 32}
        case "running output, filtered":
            other = {"ratio": 0.5, "skip": (0.5,) * num_layers, "substitute": "running_output"}
        case "linear schedules":
            steps = [0.5 * index / (num_layers - 1) for index in range(num_layers)]
            plan = LayerPlan.of(config, num_layers)
            kept = {row.index: row.layout.kept_per_chunk for row in plan.rows if row.layout}
            removed = [64 - kept.get(index, 64) for index in range(num_layers)]
            assert abs(sum(removed) / num_layers / 64 - 0.25) < 0.002 and removed == sorted(removed)
            other = {"kept_of": kept, "skip": tuple(steps), "substitute": "window", "skip_window": 128}
    return config, reference.Settings(**other)


def start(subject, settings, **arguments):
    monkeypatch = pytest.MonkeyPatch()
    engine = Engine(
        monkeypatch,
        subject.path,
        settings,
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        long_prefill_token_threshold=1024,
        kv_cache_memory_bytes=200 * subject.block_bytes,
        **{"enable_prefix_caching": False, **arguments},
    )
    return monkeypatch, engine


@pytest.fixture(scope="module")
def engine(subject):
    """One engine whose settings can be set anew: its blocks follow the length."""
    monkeypatch, engine = start(subject, {"pruning_ratio": 0})
    yield engine
    engine.close()
    monkeypatch.undo()


def run_a_mixed_batch(engine, model, tokens, name):
    """Prompts that join while others decode; some prefill in several steps; all held to the reference."""
    engine.prefill_steps_of(100)
    plan = {"a": (10, 40), "b": (150, 60), "c": (330, 24), "d": (77, 70)}
    names = [f"{name}-{key}." for key in plan]
    waiting = list(zip(names, plan.values(), strict=True))
    step = 0
    while waiting or engine.engine.has_unfinished_requests():
        if step % 7 == 0 and waiting:
            own, (length, new) = waiting.pop(0)
            engine.add(own, tokens[len(waiting) * 90 :][:length], new)
        engine.step()
        step += 1
    check(engine, model, names)
    return [engine.records[own].runs[0] for own in names]


@pytest.mark.parametrize("name", SETTINGS)
def test_decisions_and_log_probabilities_equal_the_reference(engine, subject, tokens, name):
    config, engine.settings = settings_of(name, subject.num_layers)
    engine.use(config)
    before = engine.status()["counters"]
    runs = run_a_mixed_batch(engine, subject.model, tokens, name)
    skipped = sum(sum(decisions) for run in runs for decisions in run.skipped.values())
    status = engine.status()["counters"]
    assert status["attentions_skipped"] - before["attentions_skipped"] == skipped > 0
    assert status["reads_done"] < status["reads_filtered"] <= status["reads_dense"]


def test_a_ratio_of_zero_leaves_the_other_mechanism_bitwise_unchanged(engine, subject, tokens):
    filtering, skipping = {"pruning_ratio": 0.5}, {"attention_skipping": {"ratio": 0.5}}
    pairs = [
        (filtering, {**filtering, "attention_skipping": {"ratio": 0}}),
        (
            {**skipping, "pruning_ratio": 0},
            {**skipping, "pruning_ratio": 0, "schedule": {"kind": "per_layer", "ratios": [0.0] * subject.num_layers}},
        ),
    ]
    engine.prefill_steps_of(100)
    found = {}
    for number, settings in enumerate(settings for pair in pairs for settings in pair):
        engine.use(FilterConfig.parse(settings))
        names = [f"zero{number}-{length}." for length in (30, 333)]
        for name, length in zip(names, (30, 333), strict=True):
            engine.add(name, tokens[:length], 40)
        while engine.engine.has_unfinished_requests():
            engine.step()
        records = [engine.records[name] for name in names]
        found[number] = [(r.output, r.logprobs, r.runs[0].choice, r.runs[0].skipped) for r in records]
    assert found[0] == found[1] and any(choice for _, _, choice, _ in found[0])
    assert found[2] == found[3] and any(skipped for _, _, _, skipped in found[2])


def test_every_request_skips_its_layers_share_of_1000_decoded_tokens(engine, subject, tokens):
    from transformers import AutoTokenizer

    config = FilterConfig.parse(
        {
            "pruning_ratio": 0.25,
            "attention_skipping": {"ratio": 0.5, "substitute": "window", "schedule": {"kind": "linear"}},
        }
    )
    engine.use(config)
    tokenizer = AutoTokenizer.from_pretrained(subject.path)
    code = tokenizer(inspect.getsource(textwrap))["input_ids"][:150]
    prompts = {"prose": tokens[:150], "code": code, "repetitive": tokenizer("one two three " * 60)["input_ids"][:150]}
    for name, prompt in prompts.items():
        engine.add(f"share-{name}.", prompt, 1000)
    while engine.engine.has_unfinished_requests():
        engine.step()
    rows = LayerPlan.of(config, subject.num_layers).rows
    ratios = np.array([row.skip_units for row in rows]) / 10000
    assert np.ptp(ratios) > 0.4
    for name, prompt in prompts.items():
        skipped = engine.records[f"share-{name}."].runs[0].skipped
        shares = {layer: np.mean(decisions[len(prompt) :]) for layer, decisions in skipped.items()}
        assert len(shares) == np.count_nonzero(ratios)
        for layer, share in shares.items():
            assert abs(share - ratios[layer]) <= 0.02, f"{name}, layer {layer}: {share:.4f} for {ratios[layer]:.4f}"
