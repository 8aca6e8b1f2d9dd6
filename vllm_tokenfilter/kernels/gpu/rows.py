"""A step's rows as attention skipping reads them on the GPU, and the buffers its kernels hand on to each other.

`describe_rows` runs once a step, ahead of the forward. Everything a CUDA graph reads or writes is made once
(`SkipBuffers`) and stays where it is.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_tokenfilter.layout import Layout


@dataclass(frozen=True)
class SkipBuffers:
    """What a step's layers hand on to each other, where CUDA graphs expect it; made once per KV-cache group.

    Layers run one after the other on one stream, so one buffer serves all layers of a group.

    Attributes:
        rows: int32 [3, max_num_reqs], slot of a row's first new token, its first raw slot, position of that token.
        read_lens: int32 [max_num_reqs], slots that vLLM's kernel attends to in the running layer.
        totals: int64 [max_num_reqs, 3], attentions decided, skipped, and cache entries read by rows of one new token:
            a row's own, so that nothing is added to by two programs at once.
        head_scores: float32 [num_kv_heads, 2, max_num_tokens].
        below: int32 [max_num_tokens], how many of the recent scores are below a token's.
        skipped: int32 [max_num_tokens], whose attention the running layer skips; whatever for tokens that go nowhere.
    """

    rows: Tensor
    read_lens: Tensor
    totals: Tensor
    head_scores: Tensor
    below: Tensor
    skipped: Tensor

    @classmethod
    def make(cls, max_num_reqs: int, max_num_tokens: int, num_kv_heads: int, device: torch.device) -> "SkipBuffers":
        """Buffers for steps of at most so many rows and tokens, padding included."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(3, max_num_reqs),
            zeros(max_num_reqs),
            zeros(max_num_reqs, 3, dtype=torch.int64),
            zeros(num_kv_heads, 2, max_num_tokens, dtype=torch.float32),
            zeros(max_num_tokens),
            zeros(max_num_tokens),
        )

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What every kernel that reads what `describe_rows` wrote takes."""
        return {"rows": self.rows, "rows_stride": self.rows.stride(0)}


@dataclass(frozen=True)
class SkipRowsOnDevice:
    """A step as the forward reads it; tensors on the device, in buffers that stay where they are.

    Attributes:
        query_start_loc: int32 [num_reqs + 1].
        stored_lens: int32 [num_reqs], slots a row attends to if it is not skipped.
        block_tables: int32 [num_reqs, max_blocks], without marks.
        slot_mapping: int64 [>= num_tokens]; negative for a token that goes nowhere.
        num_reqs: rows, padding included.
        num_tokens: tokens, padding included.
        decoding: whether no row has more than one token; only how fast it runs depends on it.
    """

    query_start_loc: Tensor
    stored_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    num_reqs: int
    num_tokens: int
    decoding: bool

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What every kernel that reads the rows' caches takes."""
        return {
            "query_start_loc": self.query_start_loc,
            "slot_mapping": self.slot_mapping,
            "block_tables": self.block_tables,
            "block_tables_stride": self.block_tables.stride(0),
        }


def describe_rows(
    query_start_loc: Tensor, seq_lens: Tensor, shared_chunks: Tensor | None, buffers: SkipBuffers, layout: Layout | None
) -> None:
    """Fill `buffers.rows` for a step, once for all its layers; one launch.

    Tensors as in `describe_rows_kernel`; `shared_chunks` and `layout` are None where the layers keep every token.
    """
    assert seq_lens.shape[0] <= buffers.rows.shape[1], "more rows than the buffers were made for"
    describe_rows_kernel[(seq_lens.shape[0],)](
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        shared_chunks=seq_lens if shared_chunks is None else shared_chunks,
        rows=buffers.rows,
        rows_stride=buffers.rows.stride(0),
        C=1 if layout is None else layout.chunk_size,
        K=1 if layout is None else layout.kept_per_chunk,
        W=0 if layout is None else layout.recent_window,
        FILTERED=layout is not None,
    )


@triton.jit
def describe_rows_kernel(
    query_start_loc,  # int32 [num_reqs + 1]
    seq_lens,  # int32 [num_reqs], tokens once the step is done
    shared_chunks,  # int32 [num_reqs], chunks taken over sealed, or NO_SEALS; unused where nothing is filtered
    rows,  # int32 [3, rows_stride], out: slot of the first new token, first raw slot, position of the first new token
    rows_stride,
    C: tl.constexpr, K: tl.constexpr, W: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Grid (num_reqs,): where a row's tokens lie before the step's own are written."""
    row = tl.program_id(0)
    query_len = tl.load(query_start_loc + row + 1) - tl.load(query_start_loc + row)
    computed = tl.load(seq_lens + row) - query_len
    sealed = computed * 0
    if FILTERED:
        shared = tl.load(shared_chunks + row)
        # A row that owns nothing has more shared chunks than tokens.
        sealed = tl.maximum(tl.maximum(computed - W, 0) // C, tl.where(shared > computed, 0, shared))
    tl.store(rows + row, computed - sealed * (C - K))
    tl.store(rows + rows_stride + row, sealed * K)
    tl.store(rows + 2 * rows_stride + row, computed)


@triton.jit
def row_of(token, query_start_loc, num_reqs, BLOCK_R: tl.constexpr):
    """The row that a token of the step belongs to; BLOCK_R is a power of two of at least `num_reqs`."""
    lanes = tl.arange(0, BLOCK_R)
    ends = tl.load(query_start_loc + 1 + lanes, mask=lanes < num_reqs, other=2147483647)
    return tl.sum((ends <= token).to(tl.int32), 0)
