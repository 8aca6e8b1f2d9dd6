"""Blocks that follow what is stored, and shared prefixes: a real engine with a small pool, held to the reference."""

import random

import pytest

from tests import reference
from tests.engine.driver import Engine, Record, check

NUM_BLOCKS = 41
CANARY = 12345.0


@pytest.fixture(scope="module")
def engine(subject):
    """Room for one request of the longest length and a little more: five requests of 450 tokens cannot all stay."""
    monkeypatch = pytest.MonkeyPatch()
    engine = Engine(
        monkeypatch,
        subject.path,
        {"pruning_ratio": 0.5},
        max_model_len=1200,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        long_prefill_token_threshold=128,
        kv_cache_memory_bytes=NUM_BLOCKS * subject.block_bytes,
        disable_log_stats=False,
    )
    engine.settings = reference.Settings(ratio=0.5)
    yield engine
    engine.close()
    monkeypatch.undo()


@pytest.fixture(autouse=True)
def fresh_cache(engine):
    """Every test begins with an empty prefix cache and ends with every block given back."""
    assert engine.core.scheduler.reset_prefix_cache()
    yield
    engine.drain()
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks were not given back"
    assert all(block.ref_cnt == 0 for block in pool.blocks[1:])


def taken_over(engine, name):
    return [run.start for run in engine.records[name].runs]


def test_a_preempted_request_is_recomputed_or_taken_over_to_the_same_tokens(engine, subject, tokens):
    names = [f"preempt{i}." for i in range(6)]
    for i, name in enumerate(names):
        engine.add(name, tokens[i * 300 : i * 300 + 200 + i], 300)
    engine.drain()
    assert any(len(engine.records[name].runs) > 1 for name in names), "the pool was large enough for everyone"
    check(engine, subject.model, names)


def test_a_prompt_seen_before_is_taken_over_up_to_its_recent_window(engine, subject, tokens):
    prompt = tokens[:700]
    for name in ("first.", "again."):
        engine.add(name, prompt, 40)
        engine.drain()
    assert taken_over(engine, "first.") == [0]
    assert taken_over(engine, "again.") == [(700 - 64) // 64 * 64]
    check(engine, subject.model, ["first.", "again."])


def test_a_chat_goes_on_from_the_text_the_model_wrote(engine, subject, tokens):
    history, previous = tokens[900:1100], 0
    names = []
    for turn in range(4):
        names.append(f"turn{turn}.")
        engine.add(names[-1], history, 120)
        engine.drain()
        reused = taken_over(engine, names[-1])[0]
        # What the last turn computed and sealed, the model's answer included.
        assert reused == max(0, previous - 64) // 64 * 64
        previous = len(history) + 119
        history = history + engine.records[names[-1]].output + tokens[2000 + 50 * turn : 2050 + 50 * turn]
    check(engine, subject.model, names)


def test_requests_that_share_a_prefix_side_by_side_equal_the_reference(engine, subject, tokens):
    system, names = tokens[300:620], []
    engine.add("warm.", system + tokens[:100], 2)
    engine.drain()
    for i in range(5):
        names.append(f"user{i}.")
        engine.add(names[-1], system + tokens[1200 + 40 * i : 1300 + 40 * i], 30)
    engine.drain()
    assert all(taken_over(engine, name)[0] == 320 for name in names)
    check(engine, subject.model, ["warm.", *names])


def test_parallel_samples_of_one_prompt_share_it(engine, tokens):
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": tokens[:500]}
    sampling = SamplingParams(n=3, temperature=0.5, max_tokens=20, ignore_eos=True)
    watched, engine.records = engine.records, _Anything()
    try:
        first, second = (engine.llm.generate([prompt], sampling)[0] for _ in range(2))
    finally:
        engine.records = watched
    assert second.num_cached_tokens >= 384
    assert [len(output.token_ids) for output in first.outputs] == [20, 20, 20]


def test_the_hit_rate_that_vllm_reports_is_the_tokens_taken_over(engine, tokens):
    def reported():
        values = {metric.name: metric.value for metric in engine.llm.get_metrics() if hasattr(metric, "value")}
        return values["vllm:prefix_cache_queries"], values["vllm:prefix_cache_hits"]

    before = reported()
    for name in ("rate0.", "rate1."):
        engine.add(name, tokens[:640], 2)
        engine.drain()
    assert taken_over(engine, "rate1.") == [576]
    assert [now - then for then, now in zip(before, reported(), strict=True)] == [1280, 576]


def test_blocks_that_no_request_owns_are_never_touched(engine, subject, tokens):
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    cache = engine.runner.kv_caches[0]
    names = [f"canary{i}." for i in range(3)]
    for i, name in enumerate(names):
        engine.add(name, tokens[i * 70 : i * 70 + 260], 80)
    step = checked = 0
    while engine.engine.has_unfinished_requests():
        free = [b.block_id for b in pool.blocks[1:] if b.ref_cnt == 0 and b.block_hash is None]
        # A seal that is due may still write blocks that were just freed: it is run by the step that reuses them.
        idle = free if not any(builder.due for builder in engine.builders()) else []
        for layer in engine.runner.kv_caches:
            layer[idle] = CANARY
        engine.step()
        step += 1
        still_free = [block for block in idle if pool.blocks[block].ref_cnt == 0]
        checked += len(still_free)
        for layer in engine.runner.kv_caches:
            assert (layer[still_free] == CANARY).all(), f"step {step} wrote blocks of no request"
    assert checked > 100 and cache.shape[0] == NUM_BLOCKS
    check(engine, subject.model, names)


@pytest.mark.slow
def test_two_hundred_random_requests_with_shared_prefixes_equal_the_reference(engine, subject, tokens):
    draw = random.Random(7)
    names, texts = [], [tokens[i * 350 : i * 350 + 420] for i in range(4)]
    waiting = 200
    while waiting or engine.engine.has_unfinished_requests():
        if waiting and draw.random() < 0.25:
            name = f"random{waiting}."
            start = draw.choice(texts)[: draw.randrange(20, 420)]
            at = draw.randrange(3000)
            engine.add(name, start + tokens[at : at + draw.randrange(1, 120)], draw.randrange(1, 80))
            names.append(name)
            waiting -= 1
        engine.step()
        if names and draw.random() < 0.01 and not engine.records[names[-1]].finished:
            engine.abort(names[-1])
        done = [name for name in names if engine.records[name].finished and engine.records[name].output]
        if done and draw.random() < 0.05:  # a next turn of some finished request
            record = engine.records[draw.choice(done)]
            if len(record.prompt) + len(record.output) < 1000:
                texts.append((record.prompt + record.output)[:420])
    names = [name for name in names if engine.records[name].logprobs]
    assert sum(run.start > 0 for name in names for run in engine.records[name].runs) > 50
    check(engine, subject.model, names)


class _Anything(dict):
    """Records for requests whose names vLLM makes up."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        self[name] = Record([])
        return self[name]
