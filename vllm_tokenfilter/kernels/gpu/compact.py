"""The second kernel of a seal: fuse the heads' scores, choose what stays of each due chunk, and move it.

One program per (request, head, layer): heads share no memory, so nothing races, and all make the same choice.

Names: C tokens of a chunk, K kept, D head size, TILE tokens at a time, BLOCK_C a power of two of at least C.

Source: docs/layout.md (slots); kernels/reference.py is the readable form.
"""

import triton
import triton.language as tl
from torch import Tensor

from vllm_tokenfilter.kernels.gpu.cache import GpuCache, bits_pointer, physical_slots, token_offsets
from vllm_tokenfilter.kernels.gpu.due import PER_SEAL, DueSealsOnDevice, due_chunks
from vllm_tokenfilter.kernels.gpu.score import SEAL_TILE
from vllm_tokenfilter.kernels.gpu.similarity import fuse
from vllm_tokenfilter.kernels.rules import ScoreRule
from vllm_tokenfilter.layout import Layout


def compact_chunks(
    cache: GpuCache, due: DueSealsOnDevice, layout: Layout, rule: ScoreRule, head_scores: Tensor, known: Tensor
) -> Tensor:
    """Choose and move in every layer; see `seal.seal_chunks`.

    `head_scores` is float32 [num_layers, num_tasks, heads of all ranks, 2, C], `known` as `score.score_chunks` made it.
    """
    num_layers, num_rows, num_tasks = len(cache.layer_addresses), len(due.plan.rows), due.plan.num_tasks
    block_c = max(16, triton.next_power_of_2(layout.chunk_size))
    scratch = cache.saved_redundancy.new_empty(num_layers, num_rows, cache.num_kv_heads, block_c)
    kept = due.block_tables.new_full((num_layers, num_tasks, layout.kept_per_chunk), -1)
    compact_kernel[(num_rows, cache.num_kv_heads, num_layers)](
        **cache.arguments,
        **due.arguments,
        num_tokens=due.of_rows[1],
        first_task=due.of_rows[4],
        num_tasks=num_tasks,
        saved_redundancy=cache.saved_redundancy,
        saved_stride=cache.saved_redundancy.stride(0),
        known=known,
        head_scores=head_scores,
        num_scored_heads=head_scores.shape[2],
        scratch=scratch,
        kept=kept,
        sinks=layout.sink_tokens,
        C=layout.chunk_size,
        K=layout.kept_per_chunk,
        BLOCK_C=block_c,
        TILE=SEAL_TILE,
        FUSION=rule.fusion_code,
        num_warps=4,
    )
    return kept


@triton.jit
def _move(
    base, block_table, head, sources, targets, valid, dims, block_stride, head_stride, token_stride,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Move tokens to other slots. All are read before any is written: other warps read what this one writes over."""
    mask = valid[:, None] & (dims < D)[None, :]
    origin = token_offsets(sources, valid, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE)
    goal = token_offsets(targets, valid, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE)
    keys = tl.load(base + origin[:, None] + dims[None, :], mask=mask, other=0)
    values = tl.load(base + D + origin[:, None] + dims[None, :], mask=mask, other=0)
    tl.debug_barrier()
    tl.store(base + goal[:, None] + dims[None, :], keys, mask=mask)
    tl.store(base + D + goal[:, None] + dims[None, :], values, mask=mask)


@triton.jit(do_not_specialize=PER_SEAL, do_not_specialize_on_alignment=PER_SEAL)
def compact_kernel(
    block_tables, block_tables_stride, first_chunk, last_chunk, shared_chunks,  # see DueSealsOnDevice
    layer_addresses, block_stride, head_stride, token_stride,  # see GpuCache
    num_tokens,  # int32 [num_rows]
    first_task,  # int32 [num_rows], the task of the row's first chunk
    num_tasks,
    saved_redundancy,  # float32 [num_layers, saved_stride], updated
    saved_stride,
    known,  # float32 [num_layers, num_tasks, C]
    head_scores,  # float32 [num_layers, num_tasks, num_scored_heads, 2, C]
    num_scored_heads,
    scratch,  # float32 [num_layers, num_rows, num_heads, BLOCK_C]
    kept,  # int32 [num_layers, num_tasks, K], offsets that stay; untouched where nothing was due
    sinks,
    C: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, FUSION: tl.constexpr, ENCODING: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows, num_heads, num_layers): choose what stays of a row's due chunks and move one head of it.

    No token moves to a higher slot and tokens are moved in order, so nothing is overwritten before it is read.
    """
    row, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, first_is_known = due_chunks(row, first_chunk, last_chunk, shared_chunks)
    if last <= first:
        return
    base = bits_pointer(tl.load(layer_addresses + layer), ENCODING, ALIGNMENT)
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    removed = first * (C - K)
    task_of_chunk_zero = tl.load(first_task + row) - tl.load(first_chunk + row)
    everything, lanes, dims = tl.arange(0, BLOCK_C), tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    inside = everything < C
    own = scratch + ((layer.to(tl.int64) * tl.num_programs(0) + row) * tl.num_programs(1) + head) * BLOCK_C
    for chunk in range(first, last + 1):
        place = layer.to(tl.int64) * num_tasks + task_of_chunk_zero + chunk
        if first_is_known & (chunk == first):
            redundancy = tl.load(known + place * C + everything, mask=inside, other=0.0)
        else:
            scores = head_scores + place * num_scored_heads * 2 * C
            redundancy = fuse(scores, everything, inside, num_scored_heads, C, FUSION)
        if chunk == last:
            # Its predecessors are about to be packed: the next seal needs these. One head writes for all.
            if head == 0:
                slots = physical_slots(chunk * C + everything - last * (C - K), inside, block_table, BLOCK_SIZE)
                tl.store(saved_redundancy + layer.to(tl.int64) * saved_stride + slots, redundancy, mask=inside)
        else:
            is_sink = chunk * C + everything < sinks
            ranked = tl.where(redundancy == redundancy, redundancy, float("inf"))  # NaN is the most redundant
            ranked = tl.where(is_sink, float("-inf"), ranked)
            # Every head ranks the same stored numbers, so all make the same choice.
            tl.debug_barrier()
            tl.store(own + everything, ranked)
            tl.debug_barrier()
            rank = tl.zeros([BLOCK_C], tl.int32)
            for begin in range(0, C, TILE):
                other = begin + lanes
                theirs = tl.load(own + other, mask=other < C, other=float("inf"))
                ahead = (theirs[None, :] < ranked[:, None]) | (
                    (theirs[None, :] == ranked[:, None]) & (other[None, :] < everything[:, None])
                )
                rank += tl.sum((ahead & (other < C)[None, :]).to(tl.int32), 1)
            stays = (inside & (rank < K)).to(tl.int32)
            order = tl.cumsum(stays, 0) - 1
            # Where each token goes, or -1; read back a tile at a time.
            tl.debug_barrier()
            tl.store(own + everything, tl.where(stays > 0, order, -1).to(tl.float32))
            tl.debug_barrier()
            if head == 0:
                tl.store(kept + place * K + order, everything, mask=stays > 0)
            for begin in range(0, C, TILE):
                offsets = begin + lanes
                goal = tl.load(own + offsets, mask=offsets < C, other=-1.0).to(tl.int32)
                _move(
                    base, block_table, head, chunk * C + offsets - removed, chunk * K + goal, goal >= 0, dims,
                    block_stride, head_stride, token_stride, D, BLOCK_SIZE,
                )  # fmt: skip
    length = tl.load(num_tokens + row)
    for begin in range(last * C, length, TILE):
        position = begin + lanes
        _move(
            base, block_table, head, position - removed, position - last * (C - K), position < length, dims,
            block_stride, head_stride, token_stride, D, BLOCK_SIZE,
        )  # fmt: skip
