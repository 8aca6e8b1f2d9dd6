"""Attention skipping on the GPU: decide, layer by layer inside a step's forward, whose attention is skipped.

In each layer that skips, when the step's keys and values are in the cache: `decide`, then vLLM's own kernel over the
lengths it wrote, then `substitutes.put_substitute`. Nothing here waits for the device. All grids follow from the
batch's shape alone, and what differs by data differs inside a program, so that a CUDA graph can hold a whole layer.

A token that goes nowhere (padding, a dummy run's) has a negative slot and is left alone by every kernel. Ranks and
debts are integers, as on CPU: only the scores are floating point.

Names: D head size, M terms of an anchor, TILE tokens at a time, BLOCK_R a power of two of at least the rows' number.

Source: docs/skipping.md (the decision); tests/reference.py (`decide`) is the readable form.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from vllm_tokenfilter.config import SKIP_UNITS, Substitute
from vllm_tokenfilter.kernels.gpu.cache import bits_pointer, load_tile, physical_slots, token_offsets, widen
from vllm_tokenfilter.kernels.gpu.carry import CarriedOnDevice, follow_seals
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.gpu.rows import SkipBuffers, SkipRowsOnDevice, row_of
from vllm_tokenfilter.kernels.gpu.similarity import cosine, fuse
from vllm_tokenfilter.kernels.rules import FUSION_CODES, PATIENCE, SkipRule
from vllm_tokenfilter.layout import Layout

#: What a row of `totals` holds: attentions decided and skipped, cache entries read.
DECIDED, SKIPPED, READ = (tl.constexpr(index) for index in range(3))


def decide(
    carried: CarriedOnDevice,
    rule: SkipRule,
    step: SkipRowsOnDevice,
    buffers: SkipBuffers,
    layer: int,
    ratio_units: int,
    substitute: Substitute,
) -> None:
    """Decide for every token of a step, all of them in the cache, whether one layer skips its attention. Two launches.

    Fills `buffers.skipped` and `buffers.read_lens`, adds to `buffers.totals`.

    Args:
        carried: the cache, and what is carried for its tokens, updated.
        rule: how to decide.
        step: the step.
        buffers: described by `rows.describe_rows`.
        layer: index into the cache's layers.
        ratio_units: the layer's ratio in 1 / SKIP_UNITS.
        substitute: what stands for a skipped attention.
    """
    cache, capacity = carried.cache, buffers.skipped.shape[0]
    assert step.num_tokens <= capacity, "more tokens than the buffers were made for"
    compare_tokens_kernel[(step.num_tokens, cache.num_kv_heads)](
        **cache.arguments,
        **step.arguments,
        **buffers.arguments,
        layer=layer,
        num_reqs=step.num_reqs,
        head_scores=buffers.head_scores,
        decay_log2=math.log2(rule.decay),
        M=rule.terms,
        BLOCK_R=triton.next_power_of_2(buffers.rows.shape[1]),
        TILE=32,
        CAPACITY=capacity,
        num_warps=4,
    )
    decide_rows_kernel[(step.num_reqs,)](
        **step.arguments,
        **buffers.arguments,
        head_scores=buffers.head_scores,
        num_heads=cache.num_kv_heads,
        scores=cache.saved_redundancy,
        debts=carried.debts,
        carried_stride=carried.debts.stride(0),
        layer=layer,
        ratio=ratio_units,
        warmup_tokens=rule.warmup,
        skipped_reads=rule.skipped_reads(substitute),
        stored_lens=step.stored_lens,
        read_lens=buffers.read_lens,
        below=buffers.below,
        skipped=buffers.skipped,
        totals=buffers.totals,
        HISTORY=rule.history,
        UNITS=SKIP_UNITS,
        PATIENCE=PATIENCE,
        BLOCK_SIZE=cache.block_size,
        BLOCK_N=triton.next_power_of_2(rule.history),
        TILE=1 if step.decoding else 32,
        CAPACITY=capacity,
        FUSION=FUSION_CODES[rule.fusion],
        num_warps=1 if step.decoding else 4,
    )


def warm_up(
    carried: CarriedOnDevice,
    rule: SkipRule,
    step: SkipRowsOnDevice,
    buffers: SkipBuffers,
    substitute: Substitute,
    layout: Layout | None,
) -> None:
    """Launch what no dummy step of a decode batch launches, so that no request waits for Triton's compiler.

    A decision for a prefill step of tokens that go nowhere, and a seal that finds nothing of its own to do; arguments
    as in `decide` and `rows.describe_rows`.
    """
    nowhere = torch.full_like(step.slot_mapping, -1)
    decide(carried, rule, replace(step, slot_mapping=nowhere, decoding=False), buffers, 0, 0, substitute)
    if layout is not None:
        follow_seals(carried, DueSealsOnDevice.nothing(layout, nowhere.device), layout)


@triton.jit(do_not_specialize=["layer", "num_reqs"])
def compare_tokens_kernel(
    layer_addresses, block_stride, head_stride, token_stride,  # see GpuCache
    query_start_loc, slot_mapping, block_tables, block_tables_stride,  # see SkipRowsOnDevice
    rows, rows_stride,  # see SkipBuffers
    layer,
    num_reqs,
    head_scores,  # float32 [num_heads, 2, CAPACITY], out
    decay_log2,
    M: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr, ENCODING: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, num_heads): cosine of a token's key, and of its value, to the anchor of the raw ones before."""
    token, head = tl.program_id(0), tl.program_id(1)
    if tl.load(slot_mapping + token) < 0:
        return
    row = row_of(token, query_start_loc, num_reqs, BLOCK_R)
    slot = tl.load(rows + row) + token - tl.load(query_start_loc + row)
    before = tl.minimum(slot - tl.load(rows + rows_stride + row), M)
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    base = bits_pointer(tl.load(layer_addresses + layer), ENCODING, ALIGNMENT)
    lanes, dims = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    key_anchor = tl.zeros([BLOCK_D], tl.float32)
    value_anchor = tl.zeros([BLOCK_D], tl.float32)
    for nearer in range(0, before, TILE):
        distance = nearer + lanes + 1
        there = distance <= before
        weight = tl.where(there, tl.exp2((distance - 1).to(tl.float32) * decay_log2), 0.0)
        earlier = tl.where(there, slot - distance, 0)
        places = token_offsets(earlier, there, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE)
        key_anchor += tl.sum(weight[:, None] * load_tile(base, places, there, dims, D, ENCODING), 0)
        value_anchor += tl.sum(weight[:, None] * load_tile(base + D, places, there, dims, D, ENCODING), 0)
    place = token_offsets(slot, slot >= 0, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE)
    key = widen(tl.load(base + place + dims, mask=dims < D, other=0), ENCODING)
    value = widen(tl.load(base + D + place + dims, mask=dims < D, other=0), ENCODING)
    tl.store(head_scores + head * 2 * CAPACITY + token, cosine(key, key_anchor, 0))
    tl.store(head_scores + head * 2 * CAPACITY + CAPACITY + token, cosine(value, value_anchor, 0))


@triton.jit(do_not_specialize=["layer", "ratio"])
def decide_rows_kernel(
    query_start_loc, slot_mapping, block_tables, block_tables_stride,  # see SkipRowsOnDevice
    rows, rows_stride,  # see SkipBuffers
    head_scores,  # float32 [num_heads, 2, CAPACITY]
    num_heads,
    scores,  # float32 [num_layers, carried_stride], by physical slot, updated
    debts,  # int32 [num_layers, carried_stride], likewise, in 1 / UNITS of a token
    carried_stride,
    layer,
    ratio,  # in 1 / UNITS
    warmup_tokens,
    skipped_reads,  # cache entries that a skipped row reads at most
    stored_lens,  # int32 [num_reqs], slots that a row attends to if it is not skipped
    read_lens,  # int32 [num_reqs], out: what vLLM's kernel attends to
    below,  # int32 [CAPACITY], scratch
    skipped,  # int32 [CAPACITY], out: 1 where a token's attention is skipped
    totals,  # int64 [num_reqs, 3], added to
    HISTORY: tl.constexpr, UNITS: tl.constexpr, PATIENCE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr, FUSION: tl.constexpr,
):  # fmt: skip
    """Grid (num_reqs,): decide for a row's tokens in their order; right for every TILE, which only makes it quick."""
    row = tl.program_id(0)
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    stored_len = tl.load(stored_lens + row)
    tl.store(read_lens + row, stored_len)
    if count <= 0:
        return
    if tl.load(slot_mapping + start) < 0:
        return
    first, raw = tl.load(rows + row), tl.load(rows + rows_stride + row)
    position = tl.load(rows + 2 * rows_stride + row)
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    scores += layer.to(tl.int64) * carried_stride
    debts += layer.to(tl.int64) * carried_stride
    lanes, back = tl.arange(0, TILE), 1 + tl.arange(0, BLOCK_N)
    has_past = first > raw
    last_slot = tl.maximum(first - 1, 0)
    debt = tl.load(debts + physical_slots(last_slot, has_past, block_table, BLOCK_SIZE), mask=has_past, other=0)
    num_skipped = count * 0
    for begin in range(0, count, TILE):
        offsets = begin + lanes
        inside = offsets < count
        own = fuse(head_scores, start + offsets, inside, num_heads, CAPACITY, FUSION)
        tl.store(scores + tl.load(slot_mapping + start + offsets, mask=inside, other=0), own, mask=inside)
        # The tile's tokens look at each other's scores too.
        tl.debug_barrier()
        seen = tl.minimum(first - raw + offsets, HISTORY)
        there = inside[:, None] & (back[None, :] <= seen[:, None])
        slots = tl.where(there, first + offsets[:, None] - back[None, :], 0)
        earlier = tl.load(scores + physical_slots(slots, there, block_table, BLOCK_SIZE), mask=there, other=0.0)
        ahead = there & (earlier < own[:, None])
        tl.store(below + start + offsets, tl.sum(ahead.to(tl.int32), 1), mask=inside)
        tl.debug_barrier()
        for offset in range(begin, tl.minimum(begin + TILE, count)):
            rank = tl.load(below + start + offset)
            of = tl.minimum(first - raw + offset, HISTORY)
            level = ratio * PATIENCE + debt
            warm = position + offset >= warmup_tokens
            above = rank * (UNITS * PATIENCE) >= of * (UNITS * PATIENCE - level)
            skip = (warm & (of > 0) & (level > 0) & above).to(tl.int32)
            debt = tl.where(warm, debt + ratio - skip * UNITS, 0)
            num_skipped += skip
            tl.store(skipped + start + offset, skip)
            tl.store(debts + tl.load(slot_mapping + start + offset), debt)
    cold = tl.minimum(tl.maximum(warmup_tokens - position, 0), count)
    tl.store(totals + row * 3 + DECIDED, tl.load(totals + row * 3 + DECIDED) + count - cold)
    tl.store(totals + row * 3 + SKIPPED, tl.load(totals + row * 3 + SKIPPED) + num_skipped)
    if count == 1:
        reads = tl.where(num_skipped > 0, tl.minimum(stored_len, skipped_reads), stored_len)
        tl.store(totals + row * 3 + READ, tl.load(totals + row * 3 + READ) + reads)
        tl.store(read_lens + row, tl.where(num_skipped > 0, 1, stored_len))
