"""The GPU kernels against the readable reference, over shapes, strides and types.

Here in Triton's interpreter; tests/gpu/test_kernels.py runs the same tests on a GPU, with another `device`.
"""

from typing import get_args

import numpy as np
import pytest
import torch

from tests.kernels.cpu import test_seal as cpu_caches
from vllm_tokenfilter.config import FilterConfig, Fusion
from vllm_tokenfilter.kernels.cpu.seal import seal_chunks
from vllm_tokenfilter.kernels.plan import plan_seals
from vllm_tokenfilter.kernels.reference import seal_reference
from vllm_tokenfilter.kernels.rules import ScoreRule
from vllm_tokenfilter.layout import Layout, removed_tokens, stored_tokens

pytest.importorskip("triton")

from vllm_tokenfilter.kernels.gpu import lengths as gpu_lengths
from vllm_tokenfilter.kernels.gpu import seal as gpu
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.gpu.lengths import NO_SEALS, StepBuffers, adjust_step

pytestmark = pytest.mark.usefixtures("interpreted")

FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
CANARY = 117.0


def make_layers(dtype, num_layers, num_blocks, num_heads, block_size, head_size, heads_first, device="cpu"):
    """Per layer [num_blocks, num_heads, block_size, 2 * head_size] full of canaries, with gaps between blocks.

    `heads_first` is vLLM's layout LBHNC, else LBNHC: heads of one token lie side by side.
    """
    layers = []
    for _ in range(num_layers):
        if heads_first:
            storage = torch.full((num_blocks, 2, num_heads, block_size, 2 * head_size), CANARY).to(dtype).to(device)
            layers.append(storage[:, 0])
        else:
            storage = torch.full((num_blocks, 2, block_size, num_heads, 2 * head_size), CANARY).to(dtype).to(device)
            layers.append(storage[:, 0].transpose(1, 2))
    return layers


def bits(x):
    return x.view(torch.uint8) if x.dtype in FP8 else x


def read(cache, table, num_tokens):
    """Keys and values of slots 0 .. num_tokens-1, [num_heads, num_tokens, head_size]."""
    slots, size = torch.arange(num_tokens), cache.shape[2]
    blocks = torch.as_tensor(table)[slots // size].long()
    tokens = bits(cache)[blocks, :, slots % size].view(cache.dtype).transpose(0, 1).cpu()
    half = cache.shape[3] // 2
    return tokens[..., :half], tokens[..., half:]


def write(cache, table, start, keys, values):
    slots, size = torch.arange(start, start + keys.shape[1]), cache.shape[2]
    blocks = torch.as_tensor(table)[slots // size].long()
    bits(cache)[blocks, :, slots % size] = bits(torch.cat([keys, values], -1)).transpose(0, 1).to(cache.device)


def prose(num_heads, num_tokens, head_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(num_heads, num_tokens, head_size, generator=generator).cumsum(1) * 0.2
    noise = torch.randn(num_heads, num_tokens, head_size, generator=generator)
    return drift.to(dtype), (noise + drift).to(dtype)


def settings(layout, **rule):
    return FilterConfig(
        pruning_ratio=layout.removed_per_chunk / layout.chunk_size,
        chunk_size=layout.chunk_size,
        recent_window=layout.recent_window,
        sink_tokens=layout.sink_tokens,
        anchor_terms=layout.anchor_terms,
        **rule,
    )


def seal(layers, tables, lengths, computed, shared, layout, rule, cache=None, gather=None):
    """Seal what a step from `computed` to `lengths` made due; returns row -> chunk -> kept [num_layers, K]."""
    cache = cache or GpuCache.over(layers, list(range(len(layers))), layers[0].dtype)
    plan = plan_seals(np.array(computed), np.array(lengths), cache.block_size, layout)
    device = layers[0].device
    tables, shared = torch.from_numpy(tables).to(device), torch.tensor(shared, dtype=torch.int32, device=device)
    kept = gpu.seal_chunks(cache, DueSealsOnDevice.snapshot(plan, tables, shared), layout, rule, gather).cpu()
    found, task = {}, 0
    for row, first, last in zip(plan.rows, plan.first_chunk, plan.last_chunk, strict=True):
        found[int(row)] = {chunk: kept[:, task + chunk - first] for chunk in range(first, last)}
        assert (kept[:, task + last - first] == -1).all()
        task += last - first + 1
    return cache, found


CASES = [
    # dtype, heads, head size, block size, layout of heads, chunk, kept, window, sinks, terms
    (torch.bfloat16, 3, 64, 32, True, 64, 32, 64, 4, 64),
    (torch.float16, 2, 80, 16, False, 48, 36, 64, 36, 48),
    (torch.float32, 1, 128, 128, True, 32, 8, 40, 0, 7),
    (torch.bfloat16, 5, 96, 64, False, 24, 1, 33, 1, 1),
    (torch.float8_e4m3fn, 2, 64, 16, True, 64, 32, 64, 4, 64),
    (torch.float8_e5m2, 2, 256, 16, False, 32, 16, 32, 4, 32),
]
RULES = {
    **{fusion: {"fusion": fusion} for fusion in get_args(Fusion)},
    **{selector: {"selector": selector} for selector in ("random", "keydiff", "key_norm", "value_key_norm")},
}


SMALL = (torch.bfloat16, 3, 32, 16, True, 32, 16, 32, 4, 32)


@pytest.mark.parametrize("case, name", [(case, "variance_aware") for case in CASES] + [(SMALL, name) for name in RULES])
def test_a_seal_equals_the_reference_and_touches_no_other_slot(case, name, device):
    dtype, heads, dims, block_size, heads_first, chunk, keep, window, sinks, terms = case
    layout = Layout(chunk, keep, window, sinks, terms)
    config = settings(layout, **RULES[name])
    lengths = [window + chunk, window - 1, window + 3 * chunk + 5]
    per_row = -(-max(lengths) // block_size)
    layers = make_layers(dtype, 2, 3 * per_row + 2, heads, block_size, dims, heads_first, device)
    tables = np.random.default_rng(0).permutation(3 * per_row + 2)[: 3 * per_row].reshape(3, -1).astype(np.int32)
    texts = [[prose(heads, n, dims, dtype, 10 * row + layer) for layer in range(2)] for row, n in enumerate(lengths)]
    for row, text in enumerate(texts):
        for layer, (keys, values) in zip(layers, text, strict=True):
            write(layer, tables[row], 0, keys, values)
    before = [bits(layer).clone() for layer in layers]

    cache, found = seal(layers, tables, lengths, [0, 0, 0], [0, 0, 0], layout, ScoreRule.of(config))

    assert sorted(found) == [0, 2], "a row below the window and a chunk is left alone"
    for row in (0, 2):
        last = (lengths[row] - window) // chunk
        assert sorted(found[row]) == list(range(last))
        for index, (keys, values) in enumerate(texts[row]):
            want_keys, want_values, scores, choice = seal_reference(keys, values, None, 0, last, config, index)
            for c in range(last):
                assert found[row][c][index].tolist() == choice[c].tolist()
            stored = stored_tokens(lengths[row], layout)
            got_keys, got_values = read(layers[index], tables[row], stored)
            assert torch.equal(bits(got_keys.contiguous()), bits(want_keys.contiguous()))
            assert torch.equal(bits(got_values.contiguous()), bits(want_values.contiguous()))
            slots = last * keep + np.arange(chunk)
            physical = tables[row][slots // block_size].astype(np.int64) * block_size + slots % block_size
            got = cache.saved_redundancy[index].cpu()[torch.from_numpy(physical)]
            torch.testing.assert_close(got, scores, atol=5e-5, rtol=1e-5)
    for layer, old in zip(layers, before, strict=True):
        gaps = torch.as_strided(layer, layer.shape, layer.stride(), layer.stride(0) // 2)
        assert (gaps.float() == torch.tensor(CANARY).to(dtype).float().item()).all(), "written between blocks"
        mine = torch.zeros(layer.shape[0], dtype=torch.bool, device=device)
        mine[tables[[0, 2]].ravel()] = True
        assert torch.equal(bits(layer)[~mine], old[~mine])


@pytest.mark.parametrize("selector", ["anchor", "keydiff", "random", "value_key_norm"])
def test_the_cpu_path_chooses_the_same_tokens(selector, device):
    layout, heads, dims, size, length = Layout(64, 32, 64, 4, 64), 3, 64, 16, 700
    num_blocks, rule, last = -(-length // size), ScoreRule(selector), (length - 64) // 64
    table = np.random.default_rng(2).permutation(num_blocks).astype(np.int32)[None]
    keys, values = prose(heads, length, dims, torch.bfloat16, 13)
    storage, cache = cpu_caches.make_cache(torch.bfloat16, 1, num_blocks, heads, size, dims, True)
    key_places, value_places = cpu_caches.places(cache, 0, table[0], length)
    storage.view(-1)[key_places], storage.view(-1)[value_places] = keys, values
    due = cpu_caches.due_seals(table, [length], [0], [last], [0])
    saved = np.zeros((1, num_blocks * size), np.float32)
    on_cpu = seal_chunks(cache, saved, due, layout, rule, np.zeros(1, np.int64), 1)[0]
    layers = make_layers(torch.bfloat16, 1, num_blocks, heads, size, dims, True, device)
    write(layers[0], table[0], 0, keys, values)
    _, found = seal(layers, table, [length], [0], [0], layout, rule)
    assert [found[0][chunk][0].tolist() for chunk in range(last)] == on_cpu.tolist()


def in_steps(ends, selector, device):
    layout, heads, dims, size = Layout(64, 24, 100, 4, 50), 2, 32, 16
    total = ends[-1]
    num_blocks = -(-total // size)
    layers = make_layers(torch.bfloat16, 1, num_blocks, heads, size, dims, True, device)
    table = np.arange(num_blocks, dtype=np.int32)[::-1].copy()[None]
    keys, values = prose(heads, total, dims, torch.bfloat16, 7)
    cache, computed, kept = None, 0, {}
    for end in ends:
        write(layers[0], table[0], stored_tokens(computed, layout), keys[:, computed:end], values[:, computed:end])
        if (end - 100) // 64 > max(0, (computed - 100) // 64):
            cache, found = seal(layers, table, [end], [computed], [0], layout, ScoreRule(selector), cache)
            kept.update({chunk: choice[0].tolist() for chunk, choice in found[0].items()})
        computed = end
    return kept, read(layers[0], table[0], stored_tokens(total, layout))[0].clone()


@pytest.mark.parametrize("selector", ["anchor", "keydiff"])
@pytest.mark.parametrize("steps", [[*range(64, 420, 64), 420], [100, 300, 301, 420], [163, 164, 165, 228, 420]])
def test_what_stays_does_not_depend_on_how_the_sequence_is_cut_into_steps(steps, selector, device):
    whole, whole_keys = in_steps([420], selector, device)
    kept, keys = in_steps(steps, selector, device)
    assert kept == whole
    assert torch.equal(keys, whole_keys)


@pytest.mark.parametrize("shared, computed", [(3, 192), (3, 200), (5, 320)])
def test_chunks_taken_over_sealed_are_left_alone_and_the_next_has_no_predecessors(shared, computed, device):
    layout, size, dims, last = Layout(64, 32, 64, 4, 64), 16, 64, 5
    length = last * 64 + 64
    layers = make_layers(torch.float32, 1, 24, 2, size, dims, False, device)
    table = np.arange(24, dtype=np.int32)[::-1].copy()[None]
    stored = stored_tokens(computed, layout, shared) + length - computed
    keys, values = prose(2, stored, dims, torch.float32, 5)
    write(layers[0], table[0], 0, keys, values)
    _, found = seal(layers, table, [length], [computed], [shared], layout, ScoreRule())
    if shared >= last:
        want_keys = keys
    else:
        want_keys, _, _, choice = seal_reference(keys, values, None, shared, last, settings(layout))
        for c in range(shared, last):
            assert found[0][c][0].tolist() == choice[c - shared].tolist()
    got, _ = read(layers[0], table[0], stored_tokens(length, layout, shared))
    assert torch.equal(got, want_keys)
    assert all((found[0][c] == -1).all() for c in found[0] if c < shared)


def test_of_equal_redundancies_the_older_tokens_stay_and_no_number_goes_first(device):
    layout = Layout(16, 5, 16, 2, 16)
    layers = make_layers(torch.float32, 1, 4, 2, 16, 16, False, device)
    layers[0].fill_(0.0)
    table = np.arange(4, dtype=np.int32)[None]
    _, found = seal(layers, table, [32], [0], [0], layout, ScoreRule())
    assert found[0][0][0].tolist() == [0, 1, 2, 3, 4]
    layers[0].fill_(0.0)
    layers[0][0, :, 3] = float("nan")
    _, found = seal(layers, table, [32], [0], [0], layout, ScoreRule("key_norm"))
    assert found[0][0][0].tolist() == [0, 1, 2, 4, 5]


def test_two_ranks_with_half_the_heads_each_choose_as_one_with_all(device):
    layout, heads, dims, length = Layout(64, 32, 64, 4, 64), 4, 64, 200
    table = np.arange(20, dtype=np.int32)[None]
    keys, values = prose(heads, length, dims, torch.bfloat16, 11)
    whole = make_layers(torch.bfloat16, 1, 20, heads, 16, dims, True, device)
    write(whole[0], table[0], 0, keys, values)
    _, all_heads = seal(whole, table, [length], [0], [0], layout, ScoreRule())
    sent = []
    ranks = [make_layers(torch.bfloat16, 1, 20, 2, 16, dims, True, device) for _ in range(2)]

    def fill():
        for rank, layers in enumerate(ranks):
            part = slice(2 * rank, 2 * rank + 2)
            write(layers[0], table[0], 0, keys[part], values[part])

    fill()
    for layers in ranks:  # what each rank would send
        seal(layers, table, [length], [0], [0], layout, ScoreRule(), gather=lambda x: sent.append(x.clone()) or x)
    fill()
    for layers in ranks:
        _, found = seal(layers, table, [length], [0], [0], layout, ScoreRule(), gather=lambda _: torch.cat(sent, 2))
        assert {c: k.tolist() for c, k in found[0].items()} == {c: k.tolist() for c, k in all_heads[0].items()}


@pytest.mark.parametrize("tile", [16, gpu_lengths.TILE])
@pytest.mark.parametrize("mark_blocks", [0, 1, 2])
def test_the_devices_lengths_slots_and_tables_are_those_of_the_layout(mark_blocks, tile, device, monkeypatch):
    monkeypatch.setattr(gpu_lengths, "TILE", tile)
    layout, size = Layout(64, 32, 96, 4, 64), 16
    shared = [0, 2, 0, 1, 0, 0, 0, 19, 0]
    # 480 has just sealed a chunk, 159 is one short of it; the last two look at more chunks than a short tile holds.
    computed = [0, 128, 480, 70, 159, 0, 0, 64 * 22, 64 * 22]
    queries = [40, 60, 1, 200, 1, 7, 0, 1, 1]  # of the third row from the end on: a dummy run's row, padding, two more
    if not mark_blocks:
        shared = [0] * len(shared)
    width, rng = 64, np.random.default_rng(1)
    tables = np.zeros((9, width), np.int32)
    clean_want = []
    for row in range(9):
        own = rng.integers(1, 900, width).astype(np.int32)
        clean_want.append(own)
        if shared[row]:
            at = shared[row] * 2
            mark = [0] if mark_blocks == 1 else [0, 1]  # a null block of two kernel blocks
            tables[row] = [*own[:at], *mark, *own[at:]][:width]
        else:
            tables[row] = own
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    seq_lens = np.array(computed) + queries
    slots = torch.full((int(starts[-1]) + 3,), 5, dtype=torch.int64, device=device)
    slots[starts[5] : starts[6]] = -1
    old = slots.clone()
    buffers = StepBuffers.make(9, width if mark_blocks else 0, device)
    adjust_step(
        torch.from_numpy(starts).to(device),
        torch.from_numpy(seq_lens.astype(np.int32)).to(device),
        torch.from_numpy(tables).to(device),
        slots,
        buffers,
        layout,
        size,
        mark_blocks,
    )
    for row in range(9):
        begin, end = starts[row], starts[row + 1]
        if row in (5, 6):
            assert buffers.stored_lens[row] == seq_lens[row] and buffers.shared_chunks[row] == NO_SEALS
            assert torch.equal(slots[begin:end], old[begin:end])
            continue
        removed = removed_tokens(computed[row], layout, shared[row])
        assert buffers.shared_chunks[row] == shared[row]
        assert buffers.stored_lens[row] == seq_lens[row] - removed
        if not removed:
            assert torch.equal(slots[begin:end], old[begin:end])
            continue
        want = computed[row] - removed + np.arange(queries[row])
        assert slots[begin:end].tolist() == (clean_want[row][want // size].astype(int) * size + want % size).tolist()
        if mark_blocks:
            used = -(-int(seq_lens[row] - removed) // size)
            assert buffers.clean_tables[row, :used].tolist() == clean_want[row][:used].tolist()
    assert torch.equal(slots[int(starts[-1]) :], old[int(starts[-1]) :])


def test_layers_that_lie_differently_are_refused():
    one = make_layers(torch.bfloat16, 1, 4, 2, 16, 64, True)
    other = make_layers(torch.bfloat16, 1, 4, 2, 16, 64, False)
    with pytest.raises(ValueError, match="strides"):
        GpuCache.over(one + other, [0, 1], torch.bfloat16)


@pytest.mark.parametrize("name", RULES)
def test_what_else_a_step_seals_changes_no_bit(name, device):
    """Each row alone, and all of them in another order."""
    dtype, heads, dims, block_size, heads_first, chunk, keep, window, sinks, terms = SMALL
    layout = Layout(chunk, keep, window, sinks, terms)
    rule, lengths = ScoreRule.of(settings(layout, **RULES[name])), [window + chunk, window + 3 * chunk + 5, 3 * window]
    per_row = -(-max(lengths) // block_size)
    tables = np.random.default_rng(0).permutation(3 * per_row).reshape(3, -1).astype(np.int32)

    def sealed(batch):
        layers = make_layers(dtype, 2, 3 * per_row, heads, block_size, dims, heads_first, device)
        for row in batch:
            for index, layer in enumerate(layers):
                write(layer, tables[row], 0, *prose(heads, lengths[row], dims, dtype, 10 * row + index))
        none = [0] * len(batch)
        cache, found = seal(layers, tables[batch], [lengths[row] for row in batch], none, none, layout, rule)
        scores = cache.saved_redundancy.view(2, -1, block_size).cpu()
        return {
            row: (
                [found[i][chunk].tolist() for chunk in sorted(found[i])],
                [layer[tables[row]].tolist() for layer in layers],
                scores[:, tables[row]].tolist(),
            )
            for i, row in enumerate(batch)
        }

    assert sealed([2, 0, 1]) == sealed([0]) | sealed([1]) | sealed([2])


@pytest.mark.parametrize("begin, width, alignment", [(0, 128, 16), (1, 128, 2), (4, 128, 8), (0, 12, 4)])
def test_a_cache_says_what_all_its_tokens_addresses_are_multiples_of(begin, width, alignment):
    storage = torch.empty(4 * 2 * 16 * width + 8, dtype=torch.bfloat16)
    first = (-storage.data_ptr() % 16) // 2
    cache = storage[first + begin :][: 4 * 2 * 16 * width].view(4, 2, 16, width)
    assert GpuCache.over([cache], [0], torch.bfloat16).alignment == alignment
