"""The first kernel of a seal: every due chunk's scores in every KV head and layer.

Names: C tokens of a chunk, K kept, M terms of an anchor, D head size, TILE tokens at a time.

Source: docs/algorithm.md (redundancy); selectors.py is the readable form.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from vllm_tokenfilter.kernels import rules
from vllm_tokenfilter.kernels.gpu.cache import GpuCache, bits_pointer, load_tile, physical_slots, token_offsets
from vllm_tokenfilter.kernels.gpu.due import PER_SEAL, DueSealsOnDevice, due_chunks
from vllm_tokenfilter.kernels.gpu.similarity import cosine
from vllm_tokenfilter.layout import Layout

ANCHOR, RANDOM, KEYDIFF, KEY_NORM, VALUE_KEY_NORM = (
    tl.constexpr(rules.SELECTOR_CODES[name]) for name in rules.GPU_SELECTORS
)
#: Tokens that a program of a seal takes at a time; with more, registers spill (tests/kernels/gpu/test_compile.py).
SEAL_TILE = 16


def score_chunks(
    cache: GpuCache, due: DueSealsOnDevice, layout: Layout, rule: rules.ScoreRule
) -> tuple[Tensor, Tensor]:
    """Score the due chunks and each row's next one in every layer; arguments as in `seal.seal_chunks`.

    Returns:
        float32 [num_layers, num_tasks, num_kv_heads, 2 (key, value), C], the heads' scores (of one head for "random",
        which looks at none), and float32 [num_layers, num_tasks, C], what an earlier seal saved for a row's first
        chunk. Each holds what the other does not.
    """
    num_layers, num_tasks = len(cache.layer_addresses), due.plan.num_tasks
    num_heads = 1 if rule.selector == "random" else cache.num_kv_heads
    known = cache.saved_redundancy.new_empty(num_layers, num_tasks, layout.chunk_size)
    head_scores = cache.saved_redundancy.new_empty(num_layers, num_tasks, num_heads, 2, layout.chunk_size)
    score_kernel[(num_tasks, num_heads, num_layers)](
        **cache.arguments,
        **due.arguments,
        layer_indices=cache.layer_indices,
        task_rows=due.of_tasks[0],
        task_chunks=due.of_tasks[1],
        num_tasks=num_tasks,
        saved_redundancy=cache.saved_redundancy,
        saved_stride=cache.saved_redundancy.stride(0),
        known=known,
        head_scores=head_scores,
        decay_log2=0.0 if rule.selector == "keydiff" else math.log2(rule.decay),
        seed=rule.seed,
        C=layout.chunk_size,
        K=layout.kept_per_chunk,
        M=layout.anchor_terms,
        TILE=SEAL_TILE,
        SELECTOR=rules.SELECTOR_CODES[rule.selector],
        num_warps=4 if cache.head_size <= 128 else 8,
    )
    return head_scores, known


@triton.jit
def _unit(x):
    """Rows of x scaled to length one; zero stays zero."""
    length = tl.sqrt(tl.sum(x * x, 1))
    return x / tl.where(length > 0, length, 1.0)[:, None]


@triton.jit
def _random(position, layer_index, seed):
    """The hash of selectors.random_scores."""
    x = (position.to(tl.int64) * 2654435761 + (layer_index + 1) * 40503 + seed * 97) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.float32) / 16777216.0


@triton.jit(do_not_specialize=PER_SEAL, do_not_specialize_on_alignment=PER_SEAL)
def score_kernel(
    block_tables, block_tables_stride, first_chunk, last_chunk, shared_chunks,  # see DueSealsOnDevice
    layer_addresses, block_stride, head_stride, token_stride,  # see GpuCache
    layer_indices,  # int64 [num_layers]
    task_rows,  # int32 [num_tasks]
    task_chunks,  # int32 [num_tasks]
    num_tasks,
    saved_redundancy,  # float32 [num_layers, saved_stride], by physical slot
    saved_stride,
    known,  # float32 [num_layers, num_tasks, C], out
    head_scores,  # float32 [num_layers, num_tasks, num_heads, 2, C], out
    decay_log2,
    seed,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, SELECTOR: tl.constexpr, ENCODING: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Grid (num_tasks, num_heads, num_layers): the scores of one chunk in one head."""
    task, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, chunk = tl.load(task_rows + task), tl.load(task_chunks + task)
    first, last, first_is_known = due_chunks(row, first_chunk, last_chunk, shared_chunks)
    if (chunk < first) | (chunk > last) | (last <= first):
        return
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    removed = first * (C - K)
    lanes, dims = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    place = layer.to(tl.int64) * num_tasks + task
    if first_is_known & (chunk == first):
        if head == 0:
            saved = saved_redundancy + layer.to(tl.int64) * saved_stride
            for begin in range(0, C, TILE):
                offsets = begin + lanes
                inside = offsets < C
                slots = physical_slots(chunk * C + offsets - removed, inside, block_table, BLOCK_SIZE)
                earlier = tl.load(saved + slots, mask=inside, other=0.0)
                tl.store(known + place * C + offsets, earlier, mask=inside)
        return
    base = bits_pointer(tl.load(layer_addresses + layer), ENCODING, ALIGNMENT)
    out = head_scores + (place * tl.num_programs(1) + head) * 2 * C
    for begin in range(0, C, TILE):
        offsets = begin + lanes
        inside = offsets < C
        position = chunk * C + offsets
        key_score = tl.zeros([TILE], tl.float32)
        value_score = tl.zeros([TILE], tl.float32)
        if SELECTOR == RANDOM:
            key_score = _random(position, tl.load(layer_indices + layer), seed)
        else:
            places = token_offsets(
                position - removed, inside, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE
            )
            keys = load_tile(base, places, inside, dims, D, ENCODING)
            if SELECTOR == KEYDIFF:
                keys = _unit(keys)
            if SELECTOR != KEY_NORM:
                values = load_tile(base + D, places, inside, dims, D, ENCODING)
            if SELECTOR == KEY_NORM:
                key_score = tl.sqrt(tl.sum(keys * keys, 1))
            elif SELECTOR == VALUE_KEY_NORM:
                norm = tl.sqrt(tl.sum(keys * keys, 1))
                key_score = -tl.sqrt(tl.sum(values * values, 1)) / tl.maximum(norm, 1e-20)
            else:
                key_anchor = tl.zeros([TILE, BLOCK_D], tl.float32)
                value_anchor = tl.zeros([TILE, BLOCK_D], tl.float32)
                # The predecessors that any token of the tile averages, a tile at a time, nearest last.
                for back in range((M + TILE - 1) // TILE * TILE, -1, -TILE):
                    before = chunk * C + begin - back + lanes
                    there = (before >= first * C) & (before < chunk * C + C)
                    distance = position[:, None] - before[None, :]
                    weight = tl.exp2((distance - 1).to(tl.float32) * decay_log2)
                    weight = tl.where((distance >= 1) & (distance <= M) & there[None, :], weight, 0.0)
                    slots = tl.where(there, before - removed, 0)
                    places = token_offsets(
                        slots, there, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE
                    )
                    earlier = load_tile(base, places, there, dims, D, ENCODING)
                    if SELECTOR == KEYDIFF:
                        earlier = _unit(earlier)
                    key_anchor += tl.dot(weight, earlier, input_precision="ieee")
                    if SELECTOR == ANCHOR:
                        earlier = load_tile(base + D, places, there, dims, D, ENCODING)
                        value_anchor += tl.dot(weight, earlier, input_precision="ieee")
                key_score = cosine(keys, key_anchor, 1)
                if SELECTOR == ANCHOR:
                    value_score = cosine(values, value_anchor, 1)
        tl.store(out + offsets, key_score, mask=inside)
        tl.store(out + C + offsets, value_score, mask=inside)
