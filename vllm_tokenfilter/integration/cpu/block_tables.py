"""A step's rows of the block table on the host: what they took over sealed, and the slots of their new tokens.

Source: vllm/v1/worker/gpu_model_runner.py (`_build_attention_metadata`); `kv_cache_manager.py` (the mark).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_tokenfilter.layout import Layout


def shared_chunks_of(
    block_tables: NDArray[np.int32], num_computed: NDArray[np.int64], block_size: int, layout: Layout
) -> NDArray[np.int64]:
    """Chunks each row took over from the prefix cache, read off the null block behind them.

    No other row looks like that: its first null entry, if it has one, lies behind the slots it uses, and a mark there
    would stand for more tokens than it has computed.

    Args:
        block_tables: [num_rows, max_blocks]; what lies behind a row's own blocks is arbitrary.
        num_computed: [num_rows], tokens computed before the step.
        block_size: tokens per block.
        layout: a layout that `shares_prefixes`.

    Returns:
        int64 [num_rows], 0 where nothing was taken over.
    """
    blocks_per_chunk = layout.kept_per_chunk // block_size
    most = int(num_computed.max()) // layout.chunk_size
    null = block_tables[:, : most * blocks_per_chunk + 1] == 0
    first = null.argmax(1).astype(np.int64)
    chunks = first // blocks_per_chunk
    marked = (first % blocks_per_chunk == 0) & null.any(1) & (chunks * layout.chunk_size <= num_computed)
    return np.where(marked, chunks, 0)


def without_marks(
    block_tables: NDArray[np.int32], shared_chunks: NDArray[np.int64], block_size: int, layout: Layout
) -> NDArray[np.int32]:
    """The block tables with each row's mark taken out; a copy, since the original is the runner's and lives on.

    Arguments as in `shared_chunks_of`, and what it returned.
    """
    rows, tables = np.flatnonzero(shared_chunks), block_tables.copy()
    for row, mark in zip(rows, shared_chunks[rows] * layout.kept_per_chunk // block_size, strict=True):
        tables[row, mark:-1] = tables[row, mark + 1 :]
    return tables


def rewrite_slots(
    slot_mapping: torch.Tensor,
    first_slots: NDArray[np.int64],
    query_lens: NDArray[np.int64],
    block_tables: NDArray[np.int32],
    block_size: int,
) -> None:
    """Give a step's new tokens the slots from `first_slots` on, in place: the forward holds the same tensor.

    Args:
        slot_mapping: int64 [num_tokens], the new tokens' places in the cache; written.
        first_slots: [num_rows], the slot of each row's first new token.
        query_lens: [num_rows], new tokens.
        block_tables: [num_rows, max_blocks] without marks.
        block_size: tokens per block.
    """
    rows = np.repeat(np.arange(len(query_lens)), query_lens)
    starts = np.cumsum(query_lens) - query_lens
    slots = np.arange(len(rows)) - starts[rows] + first_slots[rows]
    blocks = block_tables[rows, slots // block_size].astype(np.int64)
    slot_mapping[: len(rows)] = torch.from_numpy(blocks * block_size + slots % block_size)
