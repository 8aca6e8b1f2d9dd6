"""The GPU's step arithmetic: what is stored, and where new tokens go, for a batch whose lengths only the device knows.

One launch per step and KV-cache group, a program per request. It is the device's form of layout.py: tests hold the two
together. Everything it writes lies in buffers that stay where they are, because CUDA graphs read them.

Names: C tokens of a chunk, K kept, W the recent window, TILE entries at a time.

Source: docs/layout.md; integration/cpu/block_tables.py (`shared_chunks_of`: how a row tells what it took over sealed).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_tokenfilter.layout import Layout, shares_prefixes

#: Entries at a time: rows of 128k tokens have thousands, and each turn waits for memory.
TILE = 2048
#: Shared chunks of a row that owns nothing (padding, a dummy run): more than any length seals.
NO_SEALS = 1 << 30


@dataclass(frozen=True)
class StepBuffers:
    """What the forward reads each step, where CUDA graphs expect it; made once per KV-cache group.

    Attributes:
        stored_lens: int32 [max_num_reqs], slots that attention reads.
        shared_chunks: int32 [max_num_reqs], chunks taken over sealed, or NO_SEALS.
        clean_tables: int32 [max_num_reqs, max_blocks], rows without marks; [1, 1] where no prefixes are shared.
    """

    stored_lens: Tensor
    shared_chunks: Tensor
    clean_tables: Tensor

    @classmethod
    def make(cls, max_num_reqs: int, max_blocks: int, device: torch.device) -> "StepBuffers":
        """Buffers for a group; `max_blocks` is 0 where no prefixes are shared."""
        shapes = (max_num_reqs,), (max_num_reqs,), (max_num_reqs, max_blocks) if max_blocks else (1, 1)
        return cls(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))


def adjust_step(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    slot_mapping: Tensor,
    buffers: StepBuffers,
    layout: Layout,
    block_size: int,
    mark_blocks: int,
) -> None:
    """Fill `buffers` and rewrite `slot_mapping` in place for a step; one launch.

    Tensors as in `adjust_step_kernel`. `block_size` is the tokens per entry of the block table, `mark_blocks` the
    entries of the mark behind what was taken over: 0 where no prefixes are shared under any layout.
    """
    assert query_start_loc.dtype == seq_lens.dtype == block_tables.dtype == torch.int32
    assert slot_mapping.dtype == torch.int64 and block_tables.stride(1) == 1
    adjust_step_kernel[(seq_lens.shape[0],)](
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=block_tables,
        block_tables_stride=block_tables.stride(0),
        slot_mapping=slot_mapping,
        stored_lens=buffers.stored_lens,
        shared_chunks=buffers.shared_chunks,
        clean_tables=buffers.clean_tables,
        clean_tables_stride=buffers.clean_tables.stride(0),
        C=layout.chunk_size,
        K=layout.kept_per_chunk,
        W=layout.recent_window,
        BLOCK_SIZE=block_size,
        MARK_BLOCKS=mark_blocks,
        MARKED=mark_blocks > 0 and shares_prefixes(layout, block_size * mark_blocks),
        NO_SEALS=NO_SEALS,
        TILE=TILE,
        num_warps=8,
    )


@triton.jit
def adjust_step_kernel(
    query_start_loc,  # int32 [num_reqs + 1]
    seq_lens,  # int32 [num_reqs], tokens once the step is done
    block_tables,  # int32 [num_reqs, block_tables_stride]
    block_tables_stride,
    slot_mapping,  # int64 [num_tokens], rewritten
    stored_lens,  # int32 [num_reqs], out: slots the step's attention reads
    shared_chunks,  # int32 [num_reqs], out: chunks taken over sealed; NO_SEALS for a row that owns nothing
    clean_tables,  # int32 [num_reqs, clean_tables_stride], out: rows without marks
    clean_tables_stride,
    C: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BLOCK_SIZE: tl.constexpr, MARK_BLOCKS: tl.constexpr,
    MARKED: tl.constexpr, NO_SEALS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (num_reqs,). A row without tokens, or whose tokens go nowhere (a dummy run's), is left as it is.

    Where prefixes are shared (MARKED), a row may hold a mark behind the chunks it took over (MARK_BLOCKS null entries):
    it is counted, and left out of `clean_tables`.
    """
    row = tl.program_id(0)
    start = tl.load(query_start_loc + row)
    query_len = tl.load(query_start_loc + row + 1) - start
    seq_len = tl.load(seq_lens + row)
    computed = seq_len - query_len
    lanes = tl.arange(0, TILE)
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    if query_len <= 0:
        tl.store(stored_lens + row, seq_len)
        tl.store(shared_chunks + row, NO_SEALS)
        return
    if tl.load(slot_mapping + start) < 0:
        tl.store(stored_lens + row, seq_len)
        tl.store(shared_chunks + row, NO_SEALS)
        return
    shared = computed * 0
    mark = computed * 0 + 2147483647  # the entry the mark lies at
    if MARKED:
        blocks_per_chunk: tl.constexpr = K // BLOCK_SIZE
        chunks = computed // C + 1
        first = chunks
        begin = computed * 0
        # Only behind a chunk can a mark lie. All rows are copied below, marked or not: graphs read the one table.
        while (begin < chunks) & (first == chunks):
            places = begin + lanes
            blocks = tl.load(block_table + places * blocks_per_chunk, mask=places < chunks, other=1)
            first = tl.min(tl.where(blocks == 0, places, chunks), 0)
            begin += TILE
        shared = tl.where(first < chunks, first, 0)
        mark = tl.where(shared > 0, shared * blocks_per_chunk, mark)
    sealed = tl.maximum(tl.maximum(computed - W, 0) // C, shared)
    removed = sealed * (C - K)
    tl.store(stored_lens + row, seq_len - removed)
    tl.store(shared_chunks + row, shared)
    if MARK_BLOCKS > 0:
        clean = clean_tables + row.to(tl.int64) * clean_tables_stride
        used = (seq_len - removed + BLOCK_SIZE - 1) // BLOCK_SIZE
        for begin in range(0, used, TILE):
            entries = begin + lanes
            source = entries + tl.where(entries >= mark, MARK_BLOCKS, 0)
            tl.store(clean + entries, tl.load(block_table + source, mask=entries < used, other=0), mask=entries < used)
    if removed > 0:
        for begin in range(0, query_len, TILE):
            tokens = begin + lanes
            slots = computed - removed + tokens
            entries = slots // BLOCK_SIZE
            source = entries + tl.where(entries >= mark, MARK_BLOCKS, 0)
            blocks = tl.load(block_table + source, mask=tokens < query_len, other=0).to(tl.int64)
            tl.store(slot_mapping + start + tokens, blocks * BLOCK_SIZE + slots % BLOCK_SIZE, mask=tokens < query_len)
