"""Attention skipping against the independent reference, in float32: the same decisions and log-probabilities."""

import pytest

from tests import reference
from tests.engine.driver import Engine, check
from vllm_tokenfilter.config import FilterConfig

LAYERS = 30
TAIL = (0.0,) * 10 + (0.75,) * 20

#: name -> settings, and what the reference calls them.
SETTINGS = {
    "none, all layers": (
        {"pruning_ratio": 0, "attention_skipping": {"ratio": 0.5, "substitute": "none"}},
        {"ratio": 0, "skip": (0.5,) * LAYERS},
    ),
    "none, tail": (
        {
            "pruning_ratio": 0,
            "attention_skipping": {
                "ratio": 0.5,
                "substitute": "none",
                "schedule": {"kind": "tail"},
                "warmup_tokens": 20,
            },
        },
        {"ratio": 0, "skip": TAIL, "warmup": 20},
    ),
    "window, filtered tail": (
        {
            "pruning_ratio": 0.5,
            "schedule": {"kind": "tail"},
            "attention_skipping": {"ratio": 0.3, "substitute": "window", "skip_window": 32},
        },
        {
            "kept_of": dict.fromkeys(range(10, 30), 16),
            "skip": (0.3,) * LAYERS,
            "substitute": "window",
            "skip_window": 32,
        },
    ),
    "running output, filtered": (
        {"pruning_ratio": 0.5, "attention_skipping": {"ratio": 0.5, "substitute": "running_output"}},
        {"ratio": 0.5, "skip": (0.5,) * LAYERS, "substitute": "running_output"},
    ),
    "linear schedules": (
        {
            "pruning_ratio": 0.25,
            "schedule": {"kind": "linear"},
            "attention_skipping": {"ratio": 0.25, "skip_window": 128, "schedule": {"kind": "linear"}},
        },
        None,
    ),
}


def settings_of(name):
    """Our settings and the reference's."""
    settings, other = SETTINGS[name]
    config = FilterConfig.parse(settings)
    if other is None:
        steps = [min(0.5, 0.9) * index / (LAYERS - 1) for index in range(LAYERS)]
        kept = {index: layout.kept_per_chunk for index, layout in enumerate(config.layouts(LAYERS)) if layout}
        assert abs(sum(64 - kept.get(index, 64) for index in range(LAYERS)) / LAYERS / 64 - 0.25) < 0.002
        other = {"kept_of": kept, "skip": tuple(steps), "substitute": "window", "skip_window": 128}
    return config, reference.Settings(**other)


def start(model_path, settings, **arguments):
    monkeypatch = pytest.MonkeyPatch()
    engine = Engine(
        monkeypatch,
        model_path,
        settings,
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        long_prefill_token_threshold=1024,
        kv_cache_memory_bytes=200 * 32 * 30 * 3 * 64 * 2 * 4,
        **{"enable_prefix_caching": False, **arguments},
    )
    return monkeypatch, engine


@pytest.fixture(scope="module")
def engine(model_path):
    """One engine whose settings can be set anew: its blocks follow the length."""
    monkeypatch, engine = start(model_path, {"pruning_ratio": 0})
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
def test_decisions_and_log_probabilities_equal_the_reference(engine, model, tokens, name):
    config, engine.settings = settings_of(name)
    for builder in engine.builders():
        builder.use(config)
    before = engine.status()
    runs = run_a_mixed_batch(engine, model, tokens, name)
    skipped = sum(sum(decisions) for run in runs for decisions in run.skipped.values())
    status = engine.status()
    assert status["attentions_skipped"] - before["attentions_skipped"] == skipped > 0
    assert status["reads_done"] < status["reads_filtered"] <= status["reads_dense"]
