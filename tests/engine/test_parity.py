"""The served filter against the independent reference, in float32: kept tokens and log-probabilities."""

import pytest
import torch

from tests import reference
from tests.engine.driver import Engine, check

#: Model -> ratio -> settings. The embedded model with real text; a tiny one is as exact a test of other settings.
SETTINGS = {
    "embedded": {
        0.25: {"pruning_ratio": 0.25},
        0.5: {"pruning_ratio": 0.5},
        0.75: {"pruning_ratio": 0.75, "dense_layers": [17, 18, 19], "recent_window": 96, "anchor_terms": 32},
    },
    "tiny": {
        0.25: {"pruning_ratio": 0.25},
        0.75: {"pruning_ratio": 0.75, "dense_layers": [2], "recent_window": 96, "anchor_terms": 32},
    },
}


@pytest.fixture(
    scope="module",
    params=[
        ("embedded", 0.5),
        ("tiny", 0.25),
        ("tiny", 0.75),
        pytest.param(("embedded", 0.25), marks=pytest.mark.slow),
        pytest.param(("embedded", 0.75), marks=pytest.mark.slow),
    ],
    ids=lambda case: f"{case[0]}, ratio {case[1]}",
)
def engine(request):
    monkeypatch = pytest.MonkeyPatch()
    name, ratio = request.param
    subject = request.getfixturevalue("tiny_subject" if name == "tiny" else "embedded")
    options = SETTINGS[name][ratio]
    engine = Engine(
        monkeypatch,
        subject.path,
        options,
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=4096,
        long_prefill_token_threshold=4096,
        enable_prefix_caching=False,  # the tests repeat prompts; test_memory.py has it on
        kv_cache_memory_bytes=132 * subject.block_bytes,
    )
    engine.model = subject.model
    engine.settings = reference.Settings(
        ratio=ratio,
        W=options.get("recent_window", 64),
        M=options.get("anchor_terms", 64),
        dense_layers=tuple(options.get("dense_layers", ())),
    )
    yield engine
    engine.close()
    monkeypatch.undo()


def test_the_reference_itself_is_the_model_when_nothing_is_filtered(model, tokens):
    ids = tokens[:300]
    own = reference.run(model, ids, [100, 150] + 50 * [1], reference.Settings(ratio=0)).logprobs
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert (own - theirs).abs().max() < 1e-3


@pytest.mark.parametrize(
    "steps",
    [0, pytest.param(64, marks=pytest.mark.slow), 100, pytest.param(512, marks=pytest.mark.slow)],
    ids=["prefill at once", "prefill by 64", "prefill by 100", "prefill by 512"],
)
def test_a_batch_of_prompts_and_their_decoding_equal_the_reference(engine, tokens, steps):
    engine.prefill_steps_of(steps)
    names = []
    for i, length in enumerate((10, 127, 129, 400)):
        names.append(f"batch{steps}-{i}.")
        engine.add(names[-1], tokens[i * 90 : i * 90 + length], 72)
    engine.drain()
    check(engine, engine.model, names)
    for name, length in zip(names, (10, 127, 129, 400), strict=True):
        longest = max(engine.records[name].runs[0].steps)
        assert longest == min(length, steps or length), "the prompt was not cut as asked"


def test_requests_that_join_finish_and_abort_leave_the_others_untouched(engine, tokens):
    engine.prefill_steps_of(100)
    names = [f"mixed{i}." for i in range(8)]
    plan = {
        0: (300, 128),
        1: (65, 20),
        2: (500, 40),
        3: (190, 128),
        4: (12, 128),
        5: (640, 30),
        6: (256, 10),
        7: (77, 90),
    }
    aborted = {2: 25, 5: 60}
    start, step = 0, 0
    while start < 8 or engine.engine.has_unfinished_requests():
        if step % 9 == 0 and start < 8:
            length, new = plan[start]
            engine.add(names[start], tokens[start * 37 : start * 37 + length], new)
            start += 1
        engine.step()
        for index, when in aborted.items():
            if step == when and not engine.records[names[index]].finished:
                engine.abort(names[index])
        step += 1
    check(engine, engine.model, [name for name in names if engine.records[name].logprobs])


def test_a_long_prompt_equals_the_reference(engine, tokens):
    engine.prefill_steps_of(1024)
    engine.add("long.", tokens[: 3000 if engine.settings.ratio == 0.5 else 1000], 8)
    engine.drain()
    check(engine, engine.model, ["long."])
    status = engine.status()["counters"]
    assert status["tokens_pruned"] > 0 and status["rows_filtered"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 64, 100, 512])
@pytest.mark.parametrize("length", [10, 129, 700, 1500, 3000])
def test_every_length_and_step_decodes_128_tokens_like_the_reference(engine, tokens, steps, length):
    engine.prefill_steps_of(steps)
    name = f"grid{steps}-{length}."
    engine.add(name, tokens[100 : 100 + length], 128)
    engine.drain()
    check(engine, engine.model, [name])
