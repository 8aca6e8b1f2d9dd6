"""The GPU kernels' Python side: what they are told, checked and launched. Nothing here waits for the device.

Triton is imported on first use: machines without it never get here.

Source: docs/algorithm.md (redundancy), docs/layout.md (slots).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_tokenfilter.kernels.plan import DuePlan
from vllm_tokenfilter.kernels.rules import MAX_CHUNK_SIZE, SELECTOR_CODES, ScoreRule
from vllm_tokenfilter.layout import Layout

#: Shared chunks of a row that owns nothing (padding, a dummy run): more than any length seals.
NO_SEALS = 1 << 30
#: How the kernel widens an element.
ENCODINGS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}


@dataclass(frozen=True)
class GpuCache:
    """Where the filtered layers' cache lies; layers share strides and type, not necessarily one allocation.

    Element d of token i of block b in KV head h lies, counted in elements from the layer's address, at
    `b * block_stride + h * head_stride + i * token_stride + d` for keys; values follow `head_size` further on.

    Attributes:
        layer_addresses: int64 [num_layers] on the device.
        layer_indices: int64 [num_layers] on the device, the layers' indices in the model.
        saved_redundancy: float32 [num_layers, num_blocks * block_size] on the device, by physical slot: what an
            earlier seal scored and a later one needs.
        encoding: a value of ENCODINGS.
        element_size: bytes.
        num_kv_heads: KV heads of this rank.
        block_size: tokens per block.
        head_size: elements of a key.
        block_stride: see above; head_stride, token_stride likewise.
    """

    layer_addresses: Tensor
    layer_indices: Tensor
    saved_redundancy: Tensor
    encoding: int
    element_size: int
    num_kv_heads: int
    block_size: int
    head_size: int
    block_stride: int
    head_stride: int
    token_stride: int

    @classmethod
    def over(cls, caches: list[Tensor], layer_indices: list[int], dtype: torch.dtype) -> "GpuCache":
        """View layers' caches.

        Args:
            caches: per layer [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides but the last.
            layer_indices: the layers' indices in the model.
            dtype: what the elements are (an fp8 cache is allocated as bytes).

        Raises:
            ValueError: layers differ, or a token's keys and values do not lie side by side.
        """
        first = caches[0]
        alike = all(cache.shape == first.shape and cache.stride() == first.stride() for cache in caches)
        if not alike or first.stride(3) != 1 or dtype not in ENCODINGS or first.element_size() != dtype.itemsize:
            raise ValueError(f"a KV cache of shape {tuple(first.shape)}, strides {first.stride()}, type {dtype}")
        num_blocks, num_kv_heads, block_size, width = first.shape
        return cls(
            torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.int64, device=first.device),
            torch.tensor(layer_indices, dtype=torch.int64, device=first.device),
            torch.zeros(len(caches), num_blocks * block_size, dtype=torch.float32, device=first.device),
            ENCODINGS[dtype],
            dtype.itemsize,
            num_kv_heads,
            block_size,
            width // 2,
            *first.stride()[:3],
        )


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
        integers = {"dtype": torch.int32, "device": device}
        tables = (max_num_reqs, max_blocks) if max_blocks else (1, 1)
        return cls(
            torch.zeros(max_num_reqs, **integers),  # type: ignore[call-overload]
            torch.zeros(max_num_reqs, **integers),  # type: ignore[call-overload]
            torch.zeros(tables, **integers),  # type: ignore[call-overload]
        )


def adjust_step(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    buffers: StepBuffers,
    layout: Layout,
    block_size: int,
    mark_blocks: int,
) -> None:
    """Fill `buffers` and rewrite `slot_mapping` in place for a step; one launch.

    Args:
        query_start_loc: int32 [num_reqs + 1].
        seq_lens: int32 [num_reqs], tokens once the step is done.
        block_table: int32 [num_reqs, max_blocks].
        slot_mapping: int64 [num_tokens].
        buffers: see `StepBuffers`.
        layout: the layout's integers.
        block_size: tokens per entry of the block table.
        mark_blocks: entries of the mark behind what was taken over; 0 where no prefixes are shared.
    """
    from vllm_tokenfilter.kernels.gpu.triton_lengths import step_lengths

    assert query_start_loc.dtype == seq_lens.dtype == block_table.dtype == torch.int32
    assert slot_mapping.dtype == torch.int64 and block_table.stride(1) == 1
    step_lengths[(seq_lens.shape[0],)](
        query_start_loc,
        seq_lens,
        block_table,
        block_table.stride(0),
        slot_mapping,
        buffers.stored_lens,
        buffers.shared_chunks,
        buffers.clean_tables,
        buffers.clean_tables.stride(0),
        C=layout.chunk_size,
        K=layout.kept_per_chunk,
        W=layout.recent_window,
        BLOCK_SIZE=block_size,
        MARK_BLOCKS=mark_blocks,
        SHARES=mark_blocks > 0,
        NO_SEALS=NO_SEALS,
        TILE=128,
    )


@dataclass(frozen=True)
class DueSeals:
    """A plan with what it needs of the step on the device, copied before the next step overwrites it.

    Attributes:
        plan: the host's side.
        tables: int32 [num_due_rows, num_blocks].
        shared_chunks: int32 [num_due_rows].
        integers: int32, `rows`, `num_tokens`, `first_chunk`, `last_chunk`, the rows' first tasks, then `task_rows`,
            `task_chunks`.
    """

    plan: DuePlan
    tables: Tensor
    shared_chunks: Tensor
    integers: Tensor

    @classmethod
    def snapshot(cls, plan: DuePlan, block_table: Tensor, shared_chunks: Tensor) -> "DueSeals":
        """Copy the due rows of a step; asynchronous."""
        counts = plan.last_chunk - plan.first_chunk + 1
        task_rows = np.repeat(np.arange(len(counts)), counts)
        begins = np.cumsum(counts) - counts
        task_chunks = np.arange(len(task_rows)) - begins[task_rows] + plan.first_chunk[task_rows]
        packed = np.concatenate(
            [plan.rows, plan.num_tokens, plan.first_chunk, plan.last_chunk, begins, task_rows, task_chunks]
        ).astype(np.int32)
        device = block_table.device
        host = torch.from_numpy(packed)
        # From pinned memory the copy needs no wait; PyTorch keeps the memory until the copy is done.
        integers = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        rows = integers[: len(plan.rows)]
        return cls(
            plan,
            block_table[:, : plan.num_blocks].index_select(0, rows),
            shared_chunks.index_select(0, rows),
            integers,
        )


def seal_chunks(
    cache: GpuCache,
    due: DueSeals,
    layout: Layout,
    rule: ScoreRule,
    gather_heads: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Seal the due chunks in every layer; the cache and its saved redundancies change in place. Two launches.

    Args:
        cache: the layers' cache.
        due: what to seal.
        layout: the layout's integers; chunks of at most MAX_CHUNK_SIZE.
        rule: how tokens are ranked; a selector of GPU_SELECTORS.
        gather_heads: joins the ranks' scores [num_layers, num_tasks, num_kv_heads, 2, chunk_size] over dimension 2;
            None where this rank has all heads.

    Returns:
        int32 [num_layers, num_tasks, kept_per_chunk] on the device: the offsets inside each chunk that stayed; -1 for a
        task whose chunk was not sealed (every row's last one is only scored).
    """
    import triton

    from vllm_tokenfilter.kernels.gpu import triton_seal

    assert layout.anchor_terms <= layout.chunk_size <= min(layout.recent_window, MAX_CHUNK_SIZE)
    plan, device = due.plan, due.tables.device
    num_rows, num_tasks, num_layers = len(plan.rows), plan.num_tasks, len(cache.layer_addresses)
    _, num_tokens, first, last, begins = due.integers[: 5 * num_rows].view(5, num_rows)
    task_rows, task_chunks = due.integers[5 * num_rows :].view(2, num_tasks)
    block_d = triton.next_power_of_2(cache.head_size)
    tile = 32 if block_d <= 128 else 16
    block_c = max(16, triton.next_power_of_2(layout.chunk_size))
    scored_heads = 1 if rule.selector == "random" else cache.num_kv_heads
    known = torch.empty(num_layers, num_tasks, layout.chunk_size, dtype=torch.float32, device=device)
    scores = torch.empty(num_layers, num_tasks, scored_heads, 2, layout.chunk_size, dtype=torch.float32, device=device)
    kept = torch.full((num_layers, num_tasks, layout.kept_per_chunk), -1, dtype=torch.int32, device=device)
    strides = (cache.block_stride, cache.head_stride, cache.token_stride)
    decay = 1.0 if rule.selector == "keydiff" else rule.decay
    triton_seal._score[(num_tasks, scored_heads, num_layers)](
        cache.layer_addresses,
        cache.layer_indices,
        due.tables,
        due.tables.stride(0),
        task_rows,
        task_chunks,
        first,
        last,
        due.shared_chunks,
        *strides,
        cache.saved_redundancy,
        cache.saved_redundancy.stride(0),
        known,
        scores,
        float(np.log2(decay)),
        rule.seed,
        num_tasks,
        C=layout.chunk_size,
        K=layout.kept_per_chunk,
        M=layout.anchor_terms,
        D=cache.head_size,
        BLOCK_SIZE=cache.block_size,
        BLOCK_D=block_d,
        TILE=tile,
        SELECTOR=SELECTOR_CODES[rule.selector],
        ENCODING=cache.encoding,
        num_warps=4,
    )
    if gather_heads is not None and rule.selector != "random":
        scores = gather_heads(scores).contiguous()
    redundancy = torch.empty(num_layers, num_rows, cache.num_kv_heads, block_c, dtype=torch.float32, device=device)
    triton_seal._compact[(num_rows, cache.num_kv_heads, num_layers)](
        cache.layer_addresses,
        due.tables,
        due.tables.stride(0),
        num_tokens,
        begins,
        first,
        first,
        last,
        due.shared_chunks,
        *strides,
        cache.saved_redundancy,
        cache.saved_redundancy.stride(0),
        known,
        scores,
        scores.shape[2],
        redundancy,
        kept,
        num_tasks,
        layout.sink_tokens,
        C=layout.chunk_size,
        K=layout.kept_per_chunk,
        D=cache.head_size,
        BLOCK_SIZE=cache.block_size,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
        TILE=tile,
        FUSION=rule.fusion_code,
        ENCODING=cache.encoding,
        num_warps=4,
    )
    return kept


def warm_up(
    cache: GpuCache, layout: Layout, rule: ScoreRule, gather_heads: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Launch a seal that finds nothing of its own to do, so that no request waits for Triton's compiler.

    Every tensor-parallel rank does it at the same moment; arguments as in `seal_chunks`.
    """
    chunk = np.zeros(1, np.int64)
    plan = DuePlan(chunk, chunk + layout.first_seal, chunk, chunk + 1, 1)
    integers = {"dtype": torch.int32, "device": cache.saved_redundancy.device}
    nothing = torch.full((1,), NO_SEALS, **integers)  # type: ignore[call-overload]
    table = torch.zeros(1, 1, **integers)  # type: ignore[call-overload]
    seal_chunks(cache, DueSeals.snapshot(plan, table, nothing), layout, rule, gather_heads)


def seal_bytes_floor(cache: GpuCache, plan: DuePlan, layout: Layout) -> int:
    """Bytes a seal of this plan must move at least, by a selector that reads keys and values.

    Each scored chunk and the predecessors of the first are read once; each token that changes its slot is read once
    and written once. Scores, block tables and lengths are small beside it and not counted.
    """
    per_token = len(cache.layer_addresses) * cache.num_kv_heads * 2 * cache.head_size * cache.element_size
    tokens = 0
    for num_tokens, first, last in zip(plan.num_tokens, plan.first_chunk, plan.last_chunk, strict=True):
        scored = last - first + (first == 0)
        tokens += scored * layout.chunk_size + (layout.anchor_terms if first else 0)
        # The kept tokens of chunk 0 mostly stay where they are; from the next on, all move.
        moved = (last - first) * layout.kept_per_chunk + num_tokens - last * layout.chunk_size
        tokens += 2 * (moved - (layout.kept_per_chunk if first == 0 else 0))
    return int(tokens) * per_token
