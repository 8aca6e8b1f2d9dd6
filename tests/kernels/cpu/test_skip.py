"""The kernels of attention skipping against the reference's formulas, on caches made here."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from vllm_tokenfilter.kernels.cpu import cache as cpu
from vllm_tokenfilter.kernels.cpu import skip
from vllm_tokenfilter.kernels.cpu.cache import BFLOAT16, FLOAT32, PagedCache
from vllm_tokenfilter.kernels.rules import SkipRule

HEADS, DIMS, BLOCK, BLOCKS = 2, 32, 32, 40
HISTORY, TERMS, WARMUP = 48, 32, 20


def make_cache(keys, values, blocks, encoding=FLOAT32):
    """A cache of [block, head, token, 2, dim] that holds one request's keys and values [heads, tokens, dims]."""
    dtype = torch.float32 if encoding == FLOAT32 else torch.bfloat16
    storage = torch.full((BLOCKS, HEADS, BLOCK, 2, DIMS), float("nan"), dtype=dtype)
    slots = torch.arange(keys.shape[1])
    where = torch.from_numpy(blocks)[slots // BLOCK]
    storage[where, :, slots % BLOCK, 0] = keys.transpose(0, 1).to(dtype)
    storage[where, :, slots % BLOCK, 1] = values.transpose(0, 1).to(dtype)
    integer, unsigned = (torch.int32, np.uint32) if encoding == FLOAT32 else (torch.int16, np.uint16)
    tokens, dims = np.arange(BLOCK, dtype=np.int64) * 2 * DIMS, np.arange(DIMS, dtype=np.int64)
    return PagedCache(
        elements=storage.view(integer).flatten().numpy().view(unsigned),
        encoding=encoding,
        widen_table=np.zeros(1, np.float32),
        layer_starts=np.zeros(1, np.int64),
        block_stride=HEADS * BLOCK * 2 * DIMS,
        head_stride=BLOCK * 2 * DIMS,
        num_kv_heads=HEADS,
        num_blocks=BLOCKS,
        key_tokens=tokens,
        key_dims=dims,
        value_tokens=tokens + DIMS,
        value_dims=dims,
    )


def reordered(cache, name):
    """The same cache as vLLM's kernels order it: AMX pairs a key's elements and two tokens' values, vec turns keys."""
    token, dim = np.arange(BLOCK), np.arange(DIMS)
    key_tokens, key_dims = token, dim * BLOCK
    value_tokens, value_dims = BLOCK * DIMS + token * DIMS, dim
    if name == "amx":
        key_tokens, key_dims = token // 16 * 16 * DIMS + token % 16 * 2, dim // 2 * 32 + dim % 2
        value_tokens = BLOCK * DIMS + token // 2 * 32 + token % 2
        value_dims = dim // 16 * 16 * BLOCK + dim % 16 * 2
    blocks = cache.elements.reshape(-1, 2 * BLOCK * DIMS)
    elements = np.empty_like(blocks)
    elements[:, key_tokens[:, None] + key_dims] = blocks[:, cache.key_tokens[:, None] + cache.key_dims]
    elements[:, value_tokens[:, None] + value_dims] = blocks[:, cache.value_tokens[:, None] + cache.value_dims]
    order = {"key_tokens": key_tokens, "key_dims": key_dims, "value_tokens": value_tokens, "value_dims": value_dims}
    return dataclasses.replace(cache, elements=elements.reshape(-1), **order)


def shuffled(cache):
    """The same cache in an order that only the table knows."""
    places = [x[:, None] + y for x, y in ((cache.key_tokens, cache.key_dims), (cache.value_tokens, cache.value_dims))]
    turned = [place[:, ::-1] for place in places]
    elements = cache.elements.reshape(-1, 2 * BLOCK * DIMS).copy()
    for place, own in zip(places, turned, strict=True):
        elements[:, own] = cache.elements.reshape(-1, 2 * BLOCK * DIMS)[:, place]
    return dataclasses.replace(
        cache,
        elements=elements.reshape(-1),
        key_dims=cache.key_dims[::-1].copy(),
        value_dims=cache.value_dims[::-1].copy(),
    )


ORDERS = {
    "rows": (lambda cache: cache, (cpu.BY_TOKEN, cpu.BY_TOKEN)),
    "vec": (lambda cache: reordered(cache, "vec"), (cpu.BY_DIM, cpu.BY_TOKEN)),
    "amx": (lambda cache: reordered(cache, "amx"), (cpu.DIM_PAIRS, cpu.TOKEN_PAIRS)),
    "table": (shuffled, (cpu.BY_TABLE, cpu.BY_TABLE)),
}


@pytest.mark.parametrize("encoding", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_elements_changes_nothing(name, encoding):
    keys, values = text_of("drifting", 256)
    blocks = np.random.default_rng(1).permutation(BLOCKS)[:8]
    plain = make_cache(keys, values, blocks, encoding)
    turn, expected = ORDERS[name]
    cache = turn(plain)
    orders = ((cache.key_tokens, cache.key_dims), (cache.value_tokens, cache.value_dims))
    assert tuple(cpu.element_order(*order) for order in orders) == expected
    (decisions, scores), (own_decisions, own_scores) = (
        decide(c, blocks, 256, [100, 1, 1], 0.5) for c in (plain, cache)
    )
    assert np.array_equal(decisions, own_decisions)
    assert np.allclose(scores, own_scores, atol=1e-6)
    query = torch.randn(1, 2 * HEADS, DIMS, generator=torch.Generator().manual_seed(0))
    assert np.allclose(*(attend(c, blocks, 200, 40, query) for c in (plain, cache)), atol=1e-6)


def rows_of(blocks, done, count):
    """One row: `count` new tokens behind `done` raw ones."""
    numbers = ([0, count], [done], [0], [done])
    return skip.SkipRows(blocks[None].astype(np.int32), *(np.array(x, np.int64) for x in numbers))


def make_room():
    """What a layer carries for its tokens, of one request at first."""
    return np.zeros((1, BLOCKS * BLOCK), np.int64), np.zeros((1, BLOCKS, 2 * HEADS * DIMS), np.float32)


def text_of(kind, length):
    """Keys and values [2, heads, length, dims] of drifting, periodic or constant text."""
    noise = torch.randn(2, HEADS, length, DIMS, generator=torch.Generator().manual_seed(length))
    if kind == "drifting":
        return noise.cumsum(2) / 3 + noise
    if kind == "periodic":
        return noise[:, :, torch.arange(length) % 17]
    return torch.ones_like(noise)


def decide(cache, blocks, length, steps, ratio):
    """Feed `length` tokens in `steps`; the decisions, and the scores carried."""
    rule = SkipRule(TERMS, "variance_aware", 0.9, HISTORY, WARMUP, 4, 16)
    carried, anchors = make_room()
    decisions, done = [], 0
    while done < length:
        count = min(steps[len(decisions) % len(steps)], length - done)
        state = skip.SkipState(cache, rule, rows_of(blocks, done, count), carried, anchors, 2)
        decisions.append(skip.decide_skips(state, 0, round(ratio * 10000)))
        done += count
    slots = np.arange(length)
    scores = carried[0, blocks[slots // BLOCK] * BLOCK + slots % BLOCK].view(np.float32).reshape(-1, 2)[:, 0]
    return np.concatenate(decisions).astype(bool), scores


@pytest.mark.parametrize("encoding", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["drifting", "periodic"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_decisions_follow_the_formulas(kind, ratio, encoding):
    length = 300
    keys, values = text_of(kind, length)
    if encoding == BFLOAT16:
        keys, values = keys.bfloat16().float(), values.bfloat16().float()
    blocks = np.random.default_rng(0).permutation(BLOCKS)[:12]
    found, scores = decide(make_cache(keys, values, blocks, encoding), blocks, length, [70, 1, 1, 33], ratio)
    own = reference.Settings(W=HISTORY, M=TERMS, skip=(ratio,), warmup=WARMUP)
    expected = reference.redundancy(keys, values, 0, length, own)
    assert np.abs(scores - expected.numpy()).max() < 1e-5
    decided, ties = reference.decide(expected, own, 0, theirs=torch.from_numpy(found), tie=1e-5)
    assert np.array_equal(decided.numpy(), found)
    assert kind == "periodic" or ties <= 3


def test_carried_anchors_do_not_drift():
    """Much larger than what tells tokens apart, what they have in common comes in and leaves a thousand times."""
    length, blocks = BLOCKS * BLOCK, np.arange(BLOCKS)
    keys, values = 30 + text_of("drifting", length)
    _, scores = decide(make_cache(keys, values, blocks), blocks, length, [1], 0.5)
    own = reference.Settings(W=HISTORY, M=TERMS, skip=(0.5,), warmup=WARMUP)
    expected = reference.redundancy(keys, values, length - 100, length, own)
    assert np.abs(scores[-100:] - expected.numpy()).max() < 2e-5


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["drifting", "periodic", "constant"]),
    ratio=st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.8, 0.95]),
    steps=st.lists(st.integers(1, 90), min_size=1, max_size=4),
)
def test_the_share_is_met_whatever_the_text(kind, ratio, steps):
    length = 1000 + WARMUP
    blocks = np.arange(BLOCKS)
    found, _ = decide(make_cache(*text_of(kind, length), blocks), blocks, length, steps, ratio)
    assert not found[:WARMUP].any()
    assert abs(found[WARMUP:].mean() - ratio) <= 0.009


@settings(max_examples=10, deadline=None)
@given(steps=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_how_a_text_is_cut_into_steps_changes_no_decision(steps):
    blocks = np.arange(BLOCKS)
    cache = make_cache(*text_of("drifting", 400), blocks)
    assert np.array_equal(decide(cache, blocks, 400, steps, 0.5)[0], decide(cache, blocks, 400, [400], 0.5)[0])


@pytest.mark.parametrize("first", [[320], [50, 40], [1]])
def test_whoever_takes_over_full_blocks_goes_on_as_their_owner(first):
    """A prefix hit ends with a full block, whose owner may have gone on meanwhile."""
    blocks, others = np.arange(10), np.array([0, 1, *range(20, 28)])
    keys, values = text_of("drifting", 320)
    owner, taker = (make_cache(keys, values, table) for table in (blocks, others))
    rule, room = SkipRule(TERMS, "variance_aware", 0.9, HISTORY, WARMUP, 4, 16), make_room()

    def feed(cache, table, done, length, steps):
        decisions = []
        while done < length:
            count = min(steps[len(decisions) % len(steps)], length - done)
            state = skip.SkipState(cache, rule, rows_of(table, done, count), *room, 2)
            decisions.append(skip.decide_skips(state, 0, 5000))
            done += count
        return np.concatenate(decisions)

    whole = feed(owner, blocks, 0, 320, first)
    assert np.array_equal(feed(taker, others, 64, 320, [7, 1]), whole[64:])


@pytest.mark.parametrize("encoding", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ORDERS)
def test_what_lies_behind_the_newest_token_may_be_anything(name, encoding):
    keys, values = text_of("drifting", 42)
    blocks = np.arange(BLOCKS)
    cache = ORDERS[name][0](make_cache(keys, values, blocks, encoding))  # NaN from slot 42 on
    one_by_one, at_once = (decide(cache, blocks, 42, steps, 0.5)[1] for steps in ([1], [42]))
    assert np.allclose(one_by_one, at_once, atol=1e-6)


def attend(cache, blocks, slot, window, query, softcap=0.0):
    """The substitute "window" for one token, float32 [query heads, dims]."""
    rule = SkipRule(TERMS, "mean", 0.9, HISTORY, 1, 4, window)
    state = skip.SkipState(cache, rule, rows_of(blocks, slot, 1), *make_room(), 2)
    state.skipped[:] = 1
    out = torch.full_like(query, float("nan"))
    encoding = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}[query.dtype]
    addresses = query.data_ptr(), query.stride(0), out.data_ptr(), out.stride(0)
    skip.attend_window(state, 0, query.shape[1] // HEADS, 0.3, softcap, *addresses, encoding)
    return out[0].float().numpy()


@pytest.mark.parametrize("slot, window", [(0, 16), (10, 16), (200, 16), (200, 400), (63, 1)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_window_is_plain_attention_to_sinks_and_newest(slot, window, softcap):
    keys, values = text_of("drifting", 256)
    # What lies behind the newest token may be anything.
    keys[:, slot + 1 :] = values[:, slot + 1 :] = float("nan")
    blocks = np.random.default_rng(1).permutation(BLOCKS)[:8]
    query = torch.randn(1, 2 * HEADS, DIMS, generator=torch.Generator().manual_seed(slot))
    seen = sorted({*range(min(4, slot + 1)), *range(max(0, slot + 1 - window), slot + 1)})
    cache = make_cache(keys, values, blocks)
    found, rounded = (attend(cache, blocks, slot, window, q, softcap) for q in (query, query.bfloat16()))
    for head in range(2 * HEADS):
        scores = query[0, head] @ keys[head // 2, seen].T * 0.3
        weights = (softcap * (scores / softcap).tanh() if softcap else scores).softmax(-1)
        expected = (weights @ values[head // 2, seen]).numpy()
        assert np.allclose(found[head], expected, atol=2e-6, rtol=1e-6)
        assert np.allclose(rounded[head], expected, atol=0.02, rtol=0.02)


def test_a_skipped_row_of_the_step_is_cleared_and_no_other():
    cache, blocks = make_cache(*text_of("drifting", 64), np.arange(2)), np.arange(2)
    rule = SkipRule(TERMS, "mean", 0.9, HISTORY, 1, 4, 16)
    state = skip.SkipState(cache, rule, rows_of(blocks, 10, 4), *make_room(), 2)
    state.skipped[:] = [0, 1, 1, 0]
    out = torch.ones(5, 3, 2, dtype=torch.bfloat16)  # padded by one row
    skip.clear_skipped(state, out.data_ptr(), out.stride(0) * out.element_size())
    assert out.sum((1, 2)).tolist() == [6, 0, 0, 6, 6]


def test_means_of_outputs_go_on_across_steps_and_blocks():
    rule = SkipRule(TERMS, "mean", 0.9, HISTORY, 1, 4, 16)
    blocks = np.array([5, 2, 9])
    cache = make_cache(*text_of("drifting", 96), blocks)
    draw = np.random.default_rng(0)
    outputs, skipped = draw.normal(size=(90, 6)).astype(np.float32), (draw.random(90) < 0.5).astype(np.uint8)
    means, found, done = np.zeros((BLOCKS, 7), np.float32), [], 0
    for count in (40, 1, 1, 30, 18):
        part = outputs[done : done + count].copy()
        state = skip.SkipState(cache, rule, rows_of(blocks, done, count), *make_room(), 2)
        state.skipped[:] = skipped[done : done + count]
        skip.average_outputs(state, means, part)
        found.append(part)
        done += count
    mean, weight = np.zeros(6), 0.0
    for own, out, gone in zip(np.concatenate(found), outputs, skipped, strict=True):
        if gone:
            assert np.allclose(own, mean / weight if weight else 0.0, atol=1e-4)
        else:
            assert np.array_equal(own, out)
            mean, weight = 0.9 * mean + 0.1 * out, 0.9 * weight + 0.1


@pytest.mark.parametrize("encoding", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_what_else_a_step_decides_changes_no_bit(encoding):
    """Two requests, each alone and both in one step, over several threads."""
    blocks, rule = (
        np.random.default_rng(0).permutation(BLOCKS)[:12],
        SkipRule(TERMS, "variance_aware", 0.9, 48, 20, 4, 16),
    )
    cache = make_cache(*text_of("drifting", 12 * BLOCK), blocks, encoding)
    tables = blocks.reshape(2, 6).astype(np.int32)

    def feed(rows, threads):
        room, found = make_room(), {row: [] for row in rows}
        for step in ((70, 1), (1, 90), (33, 1), (60, 90)):
            done = np.array([sum(map(len, found[row])) for row in rows], np.int64)
            starts = np.cumsum([0, *(step[row] for row in rows)], dtype=np.int64)
            state = skip.SkipState(
                cache, rule, skip.SkipRows(tables[rows], starts, done, np.zeros_like(done), done), *room, threads
            )
            for row, own in zip(rows, np.split(skip.decide_skips(state, 0, 5000), starts[1:-1]), strict=True):
                found[row].append(own.tolist())
        carried = room[0].reshape(BLOCKS, BLOCK)
        return {row: (found[row], carried[tables[row]].tolist()) for row in rows}

    assert feed([1, 0], 3) == feed([0], 1) | feed([1], 1)
