"""The CPU sealing kernel against the readable reference, on caches whose element order is made up by the test."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch

from vllm_tokenfilter.config import FilterConfig, Fusion
from vllm_tokenfilter.kernels.cpu.cache import BFLOAT16, FLOAT32, TABLE16, PagedCache
from vllm_tokenfilter.kernels.cpu.seal import DueSeals, seal_chunks
from vllm_tokenfilter.kernels.plan import DuePlan
from vllm_tokenfilter.kernels.reference import seal_reference
from vllm_tokenfilter.kernels.rules import SELECTOR_CODES, ScoreRule
from vllm_tokenfilter.layout import Layout, stored_tokens

CANARY = {torch.float32: 12345.0, torch.bfloat16: 12352.0, torch.float16: 12344.0}
UNSIGNED = {
    torch.float32: (torch.int32, np.uint32),
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
}
ENCODING = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: TABLE16}


def make_cache(dtype, num_layers, num_blocks, num_heads, block_size, head_size, transposed_keys):
    """A cache full of canaries, with keys stored row by row or dimension by dimension."""
    shape = (num_layers, num_blocks, num_heads, 2 * block_size * head_size)
    storage = torch.full(shape, CANARY[dtype], dtype=dtype)
    tokens, dims = np.arange(block_size, dtype=np.int64), np.arange(head_size, dtype=np.int64)
    integer, unsigned = UNSIGNED[dtype]
    stride = num_heads * shape[-1]
    table = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    cache = PagedCache(
        elements=storage.view(integer).flatten().numpy().view(unsigned),
        encoding=ENCODING[dtype],
        widen_table=table if dtype == torch.float16 else np.zeros(1, np.float32),
        layer_starts=np.arange(num_layers, dtype=np.int64) * num_blocks * stride,
        block_stride=stride,
        head_stride=shape[-1],
        num_kv_heads=num_heads,
        num_blocks=num_blocks,
        key_tokens=tokens if transposed_keys else tokens * head_size,
        key_dims=dims * block_size if transposed_keys else dims,
        value_tokens=block_size * head_size + tokens * head_size,
        value_dims=dims,
    )
    return storage, cache


def places(cache, layer, blocks, num_tokens):
    """Element indices of keys and of values, [num_heads, num_tokens, head_size]."""
    slots = np.arange(num_tokens)
    base = cache.layer_starts[layer] + np.asarray(blocks, np.int64)[slots // cache.block_size] * cache.block_stride
    heads = np.arange(cache.num_kv_heads)[:, None, None] * cache.head_stride
    inside = slots % cache.block_size
    keys = heads + (base + cache.key_tokens[inside])[:, None] + cache.key_dims
    values = heads + (base + cache.value_tokens[inside])[:, None] + cache.value_dims
    return torch.from_numpy(keys), torch.from_numpy(values)


def prose(num_layers, num_heads, num_tokens, head_size, dtype, seed):
    """Keys and values that drift, so that redundancies spread as those of text do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_heads, num_tokens, head_size)
    drift = torch.randn(shape, generator=generator).cumsum(2) * 0.2
    return drift.to(dtype), (torch.randn(shape, generator=generator) + drift).to(dtype)


def due_seals(block_tables, num_tokens, first_chunk, last_chunk, shared_chunks):
    """What is due of rows of such lengths."""
    numbers = (np.array(x, np.int64) for x in (num_tokens, first_chunk, last_chunk))
    plan = DuePlan(np.arange(len(num_tokens)), *numbers, block_tables.shape[1])
    return DueSeals.snapshot(plan, block_tables, np.array(shared_chunks, np.int64))


CASES = [
    # dtype, heads, head size, block size, chunk, kept, window, sinks, terms, transposed keys
    (torch.float32, 3, 64, 32, 64, 32, 64, 4, 64, True),
    (torch.bfloat16, 3, 64, 128, 64, 32, 64, 4, 64, True),
    (torch.bfloat16, 1, 32, 32, 16, 4, 40, 0, 7, False),
    (torch.float16, 2, 80, 32, 48, 36, 64, 36, 48, True),
    (torch.float32, 8, 16, 16, 32, 1, 33, 1, 1, False),
]


def settings(layout, **rule):
    return FilterConfig(
        pruning_ratio=layout.removed_per_chunk / layout.chunk_size,
        chunk_size=layout.chunk_size,
        recent_window=layout.recent_window,
        sink_tokens=layout.sink_tokens,
        anchor_terms=layout.anchor_terms,
        **rule,
    )


RULES = {
    **{fusion: {"fusion": fusion} for fusion in get_args(Fusion)},
    **{selector: {"selector": selector} for selector in ("random", "keydiff", "key_norm", "value_key_norm", "lagkv")},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype, heads, dims, block_size, chunk, keep, window, sinks, terms, transposed", CASES)
def test_a_seal_equals_the_reference_and_touches_no_other_block(
    dtype, heads, dims, block_size, chunk, keep, window, sinks, terms, transposed, name
):
    layout = Layout(chunk, keep, window, sinks, terms)
    config = settings(layout, **RULES[name])
    assert config.layout == layout
    rule = ScoreRule.of(config)
    num_layers, lengths = 2, [window + chunk, window + 3 * chunk + 5, window + 6 * chunk - 1]
    per_row = -(-max(lengths) // block_size)
    storage, cache = make_cache(dtype, num_layers, 3 * per_row + 2, heads, block_size, dims, transposed)
    flat = storage.view(-1)
    tables = np.random.default_rng(0).permutation(3 * per_row + 2)[: 3 * per_row].reshape(3, -1).astype(np.int32)
    rows = [prose(num_layers, heads, length, dims, dtype, seed) for seed, length in enumerate(lengths)]
    owned = torch.zeros(flat.shape, dtype=torch.bool)
    for row, (keys, values) in enumerate(rows):
        for layer in range(num_layers):
            key_places, value_places = places(cache, layer, tables[row], lengths[row])
            flat[key_places], flat[value_places] = keys[layer], values[layer]
            owned[key_places] = owned[value_places] = True
    last = np.array([(length - window) // chunk for length in lengths])
    saved = np.zeros((num_layers, cache.num_blocks * block_size), np.float32)

    due = due_seals(tables, lengths, [0, 0, 0], last, [0, 0, 0])
    chosen = seal_chunks(cache, saved, due, layout, rule, np.arange(num_layers), 2)

    ends = np.cumsum(last)
    for row, (keys, values) in enumerate(rows):
        for layer in range(num_layers):
            want_keys, want_values, want_scores, want_choice = seal_reference(
                keys[layer], values[layer], None, 0, int(last[row]), config, layer
            )
            choice = chosen[layer, ends[row] - last[row] : ends[row]]
            assert (choice == torch.stack(want_choice).numpy()).all()
            key_places, value_places = places(cache, layer, tables[row], stored_tokens(lengths[row], layout))
            assert torch.equal(flat[key_places], want_keys)
            assert torch.equal(flat[value_places], want_values)
            slots = last[row] * keep + np.arange(chunk)
            got = saved[layer, tables[row][slots // block_size].astype(np.int64) * block_size + slots % block_size]
            np.testing.assert_allclose(got, want_scores.numpy(), atol=5e-5, rtol=1e-5)
    assert (flat[~owned] == CANARY[dtype]).all()


def seal_in_steps(ends_of_steps, selector, dtype=torch.bfloat16):
    """Feed one request in steps as the backend does; returns what each chunk kept, and the final keys."""
    layout, heads, dims, block_size = Layout(64, 24, 100, 4, 50), 2, 32, 32
    total = ends_of_steps[-1]
    num_blocks = -(-total // block_size)
    storage, cache = make_cache(dtype, 1, num_blocks, heads, block_size, dims, True)
    flat, tables = storage.view(-1), np.arange(num_blocks, dtype=np.int32)[::-1].copy()[None]
    keys, values = prose(1, heads, total, dims, dtype, 7)
    saved = np.full((1, num_blocks * block_size), np.nan, np.float32)
    computed, choices = 0, []
    for end in ends_of_steps:
        stored = stored_tokens(computed, layout)
        key_places, value_places = places(cache, 0, tables[0], stored + end - computed)
        flat[key_places[:, stored:]] = keys[0, :, computed:end]
        flat[value_places[:, stored:]] = values[0, :, computed:end]
        first, last = (max(0, (n - 100) // 64) for n in (computed, end))
        if last > first:
            due = due_seals(tables, [end], [first], [last], [0])
            choices.extend(seal_chunks(cache, saved, due, layout, ScoreRule(selector), np.zeros(1, np.int64), 2)[0])
        computed = end
    key_places, _ = places(cache, 0, tables[0], stored_tokens(total, layout))
    return np.stack(choices), flat[key_places].clone()


@pytest.mark.parametrize(
    "steps",
    [list(range(1, 901)), [*range(64, 900, 64), 900], [100, 612, 613, 900], [163, 164, 165, 228, 900]],
    ids=["token by token", "by 64", "uneven", "around the first seal"],
)
@pytest.mark.parametrize("selector", SELECTOR_CODES)
def test_what_stays_does_not_depend_on_how_the_sequence_is_cut_into_steps(steps, selector):
    whole_choice, whole_keys = seal_in_steps([900], selector)
    choice, keys = seal_in_steps(steps, selector)
    assert (choice == whole_choice).all()
    assert torch.equal(keys, whole_keys)


@pytest.mark.parametrize("selector", [name for name in SELECTOR_CODES if name != "recency"])
def test_chunks_taken_over_sealed_are_left_alone_and_the_next_has_no_predecessors(selector):
    layout, shared, last, block_size, dims = Layout(64, 32, 64, 4, 64), 3, 5, 32, 16
    length = last * 64 + 64
    stored = stored_tokens(shared * 64, layout, shared) + length - shared * 64
    storage, cache = make_cache(torch.float32, 1, 12, 2, block_size, dims, True)
    tables, flat = np.arange(12, dtype=np.int32)[::-1].copy()[None], storage.view(-1)
    keys, values = prose(1, 2, stored, dims, torch.float32, 5)
    key_places, value_places = places(cache, 0, tables[0], stored)
    flat[key_places], flat[value_places] = keys[0], values[0]
    saved = np.full((1, 12 * block_size), np.nan, np.float32)
    due = due_seals(tables, [length], [shared], [last], [shared])
    chosen = seal_chunks(cache, saved, due, layout, ScoreRule(selector), np.zeros(1, np.int64), 1)
    config = settings(layout, selector=selector)
    want_keys, want_values, _, want_choice = seal_reference(keys[0], values[0], None, shared, last, config)
    assert (chosen[0] == torch.stack(want_choice).numpy()).all()
    key_places, value_places = places(cache, 0, tables[0], stored_tokens(length, layout, shared))
    assert torch.equal(flat[key_places], want_keys)
    assert torch.equal(flat[value_places], want_values)
    assert torch.equal(want_keys[:, : shared * 32], keys[0][:, : shared * 32])


def test_of_equal_redundancies_the_older_tokens_stay():
    layout = Layout(16, 5, 16, 2, 16)
    storage, cache = make_cache(torch.float32, 1, 4, 2, 16, 16, False)
    storage.fill_(0.0)
    due = due_seals(np.arange(4, dtype=np.int32)[None], [32], [0], [1], [0])
    chosen = seal_chunks(cache, np.zeros((1, 64), np.float32), due, layout, ScoreRule(), np.zeros(1, np.int64), 1)
    assert chosen[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_what_is_carried_of_raw_tokens_moves_with_them():
    layout, length = Layout(16, 6, 24, 3, 16), 24 + 2 * 16 + 7
    _, cache = make_cache(torch.float32, 2, 8, 2, 16, 8, True)
    tables = np.arange(8, dtype=np.int32)[::-1].copy()[None]
    slots = np.arange(length)
    physical = tables[0, slots // 16].astype(np.int64) * 16 + slots % 16
    carried = np.zeros((2, 128), np.int64)
    carried[:, physical] = slots + 1000 * np.arange(2)[:, None]  # each token's own position and layer
    due, saved = due_seals(tables, [length], [0], [2], [0]), np.zeros((2, 128), np.float32)
    seal_chunks(cache, saved, due, layout, ScoreRule(), np.arange(2), 1, None, carried)
    raw = slots[2 * 16 :]
    now = physical[raw - 2 * 10]
    assert (carried[:, now] == raw + 1000 * np.arange(2)[:, None]).all()


def test_recency_keeps_the_sinks_and_the_newest_tokens_of_the_whole_request():
    layout, length = Layout(16, 6, 24, 3, 16), 24 + 5 * 16 + 7
    storage, cache = make_cache(torch.float32, 1, 8, 2, 16, 8, True)
    tables = np.arange(8, dtype=np.int32)[::-1].copy()[None]
    keys, values = prose(1, 2, length, 8, torch.float32, 3)
    key_places, value_places = places(cache, 0, tables[0], length)
    storage.view(-1)[key_places], storage.view(-1)[value_places] = keys[0], values[0]
    due = due_seals(tables, [length], [0], [5], [0])
    saved = np.zeros((1, 128), np.float32)
    chosen = seal_chunks(cache, saved, due, layout, ScoreRule("recency"), np.zeros(1, np.int64), 1)
    stored = stored_tokens(length, layout)
    stay = [0, 1, 2, *range(length - stored + 3, length)]
    key_places, value_places = places(cache, 0, tables[0], stored)
    assert torch.equal(storage.view(-1)[key_places], keys[0][:, stay])
    assert torch.equal(storage.view(-1)[value_places], values[0][:, stay])
    assert (chosen == -1).all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype, heads, replicas", [(torch.float32, 4, 1), (torch.bfloat16, 2, 2)])
def test_ranks_that_share_the_heads_choose_and_move_like_one(dtype, heads, replicas, name):
    layout = Layout(32, 16, 32, 4, 32)
    config = settings(layout, **RULES[name])
    rule = ScoreRule.of(config)
    lengths = [64, 32 + 4 * 32 + 9]
    # Row, tokens, first and last due chunk; the second row seals twice, so that saved scores are used too.
    steps = [(0, 64, 0, 1), (1, 100, 0, 2), (1, lengths[1], 2, 4)]
    tables = np.arange(12).reshape(2, 6).astype(np.int32)
    rows = [prose(2, heads, length, 64, dtype, seed) for seed, length in enumerate(lengths)]
    num_ranks = heads * replicas

    def cache_of(first_head, num_heads):
        storage, cache = make_cache(dtype, 2, 13, num_heads, 32, 64, False)
        for row, (keys, values) in enumerate(rows):
            for layer in range(2):
                key_places, value_places = places(cache, layer, tables[row], lengths[row])
                part = slice(first_head, first_head + num_heads)
                storage.view(-1)[key_places] = keys[layer, part]
                storage.view(-1)[value_places] = values[layer, part]
        return storage, cache, np.zeros((2, 13 * 32), np.float32)

    def seal(cache, saved, gather):
        return [
            seal_chunks(
                cache,
                saved,
                due_seals(tables[row : row + 1], [num_tokens], [first], [last], [0]),
                layout,
                rule,
                np.arange(2),
                1,
                gather,
            )
            for row, num_tokens, first, last in steps
        ]

    whole, whole_cache, whole_saved = cache_of(0, heads)
    expected = seal(whole_cache, whole_saved, None)
    barrier, exchanged = threading.Barrier(num_ranks), [None] * num_ranks

    def run(rank):
        def gather(own):
            exchanged[rank] = own
            barrier.wait(30)
            everyones = np.concatenate(exchanged[::replicas], 3)
            barrier.wait(30)
            return everyones

        storage, cache, saved = cache_of(rank // replicas, 1)
        return storage, seal(cache, saved, gather), saved

    with ThreadPoolExecutor(num_ranks) as pool:
        ranks = list(pool.map(run, range(num_ranks)))
    for rank, (storage, chosen, saved) in enumerate(ranks):
        assert all((own == all_heads).all() for own, all_heads in zip(chosen, expected, strict=True))
        assert np.array_equal(saved, whole_saved)
        assert torch.equal(storage[:, :, 0], whole[:, :, rank // replicas])


@pytest.mark.parametrize("name", RULES)
def test_what_else_a_step_seals_changes_no_bit(name):
    """Each row alone, and all of them in another order over several threads."""
    dtype, heads, dims, block_size, chunk, keep, window, sinks, terms, transposed = CASES[1]
    layout = Layout(chunk, keep, window, sinks, terms)
    rule, lengths = ScoreRule.of(settings(layout, **RULES[name])), [window + chunk, window + 5 * chunk + 7, 3 * window]
    per_row = -(-max(lengths) // block_size)
    tables = np.random.default_rng(0).permutation(3 * per_row).reshape(3, -1).astype(np.int32)

    def sealed(batch, threads):
        storage, cache = make_cache(dtype, 2, 3 * per_row, heads, block_size, dims, transposed)
        saved = np.zeros((2, cache.num_blocks * block_size), np.float32)
        for row in batch:
            for layer, (keys, values) in enumerate(zip(*prose(2, heads, lengths[row], dims, dtype, row), strict=True)):
                key_places, value_places = places(cache, layer, tables[row], lengths[row])
                storage.view(-1)[key_places], storage.view(-1)[value_places] = keys, values
        last = np.array([(lengths[row] - window) // chunk for row in batch])
        none = [0] * len(batch)
        due = due_seals(tables[batch], [lengths[row] for row in batch], none, last, none)
        chosen = np.split(seal_chunks(cache, saved, due, layout, rule, np.arange(2), threads), np.cumsum(last)[:-1], 1)
        scores = saved.reshape(2, -1, block_size)
        blocks = {row: tables[row].astype(np.int64) for row in batch}
        return {
            row: (chosen[i].tolist(), storage[:, blocks[row]].tolist(), scores[:, blocks[row]].tolist())
            for i, row in enumerate(batch)
        }

    alone = sealed([0], 1) | sealed([1], 1) | sealed([2], 1)
    assert sealed([2, 0, 1], 3) == alone == sealed([1, 2, 0], 1)
