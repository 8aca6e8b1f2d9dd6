"""The GPU's step arithmetic: what is stored, and where new tokens go, for a batch whose lengths only the device knows.

One launch per step and KV-cache group, a program per request. It is the device's form of layout.py: tests hold the two
together. Everything it writes lies in buffers that stay where they are, because CUDA graphs read them.

Source: docs/layout.md; integration/cpu/block_tables.py (`shared_chunks_of`: how a row tells what it took over sealed).
"""

import triton
import triton.language as tl


@triton.jit
def step_lengths(
    query_start_loc,  # int32 [num_reqs + 1]
    seq_lens,  # int32 [num_reqs], tokens once the step is done
    tables,  # int32 [num_reqs, table_stride]
    table_stride,
    slot_mapping,  # int64 [num_tokens], rewritten
    stored_lens,  # int32 [num_reqs], out: slots the step's attention reads
    shared_chunks,  # int32 [num_reqs], out: chunks taken over sealed; NO_SEALS for a row that owns nothing
    clean_tables,  # int32 [num_reqs, clean_stride], out: rows without marks
    clean_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MARK_BLOCKS: tl.constexpr,
    SHARES: tl.constexpr,
    NO_SEALS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (num_reqs,). A row without tokens, or whose tokens go nowhere (a dummy run's), is left as it is.

    With SHARES a row may hold a mark behind the chunks it took over (MARK_BLOCKS null entries): it is counted, and left
    out of `clean_tables`.
    """
    row = tl.program_id(0)
    start = tl.load(query_start_loc + row)
    query_len = tl.load(query_start_loc + row + 1) - start
    seq_len = tl.load(seq_lens + row)
    computed = seq_len - query_len
    lanes = tl.arange(0, TILE)
    table = tables + row.to(tl.int64) * table_stride
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
    if SHARES:
        blocks_per_chunk: tl.constexpr = K // BLOCK_SIZE
        limit = computed // C * blocks_per_chunk + 1
        first = limit
        for begin in range(0, limit, TILE):
            entries = begin + lanes
            blocks = tl.load(table + entries, mask=entries < limit, other=1)
            first = tl.minimum(first, tl.min(tl.where((blocks == 0) & (entries < limit), entries, limit), 0))
        found = (first < limit) & (first % blocks_per_chunk == 0)
        shared = tl.where(found, first // blocks_per_chunk, 0)
        mark = tl.where(shared > 0, first, mark)
    sealed = tl.maximum(tl.maximum(computed - W, 0) // C, shared)
    removed = sealed * (C - K)
    tl.store(stored_lens + row, seq_len - removed)
    tl.store(shared_chunks + row, shared)
    if SHARES:
        clean = clean_tables + row.to(tl.int64) * clean_stride
        used = (seq_len - removed + BLOCK_SIZE - 1) // BLOCK_SIZE
        for begin in range(0, used, TILE):
            entries = begin + lanes
            source = entries + tl.where(entries >= mark, MARK_BLOCKS, 0)
            tl.store(clean + entries, tl.load(table + source, mask=entries < used, other=0), mask=entries < used)
    if removed > 0:
        for begin in range(0, query_len, TILE):
            tokens = begin + lanes
            slots = computed - removed + tokens
            entries = slots // BLOCK_SIZE
            source = entries + tl.where(entries >= mark, MARK_BLOCKS, 0)
            blocks = tl.load(table + source, mask=tokens < query_len, other=0).to(tl.int64)
            tl.store(slot_mapping + start + tokens, blocks * BLOCK_SIZE + slots % BLOCK_SIZE, mask=tokens < query_len)
