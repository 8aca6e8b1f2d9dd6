"""The Python side of the GPU kernels of attention skipping: what they keep, are told and how they are launched.

Nothing here waits for the device, and nothing depends on data: a layer's launches follow from the batch's shape, so a
CUDA graph can hold them. Everything a graph reads or writes is made once (`SkipBuffers`, `KeptOnDevice`) and stays
where it is. Triton is imported on first use.

Source: docs/skipping.md (the decision, the substitutes).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_tokenfilter.config import SKIP_UNITS, Substitute
from vllm_tokenfilter.kernels.gpu.seal import NO_SEALS, DueSeals, GpuCache
from vllm_tokenfilter.kernels.plan import DuePlan
from vllm_tokenfilter.kernels.rules import FUSION_CODES, PATIENCE, SkipRule
from vllm_tokenfilter.layout import Layout

_OUTPUT_TILE = 128


@dataclass(frozen=True)
class SkipBuffers:
    """What a step's layers hand on to each other, where CUDA graphs expect it; made once per KV-cache group.

    Layers run one after the other on one stream, so one buffer serves all layers of a group.

    Attributes:
        rows: int32 [3, max_num_reqs], slot of a row's first new token, its first raw slot, position of that token.
        read_lens: int32 [max_num_reqs], slots that vLLM's kernel attends to in the running layer.
        totals: int64 [max_num_reqs, 3], attentions decided, skipped, and cache entries read by rows of one new token:
            a row's own, so that nothing is added to by two programs at once.
        similarities: float32 [num_kv_heads, 2, max_num_tokens].
        below: int32 [max_num_tokens], how many of the recent scores are below a token's.
        skipped: int32 [max_num_tokens], whose attention the running layer skips; whatever for tokens that go nowhere.
    """

    rows: Tensor
    read_lens: Tensor
    totals: Tensor
    similarities: Tensor
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


@dataclass(frozen=True)
class KeptOnDevice:
    """The cache of the layers that skip, and what is kept of its tokens for their successors.

    Attributes:
        cache: the layers' cache; its `saved_redundancy` holds the tokens' scores.
        debts: int32 [num_layers, num_blocks * block_size], by physical slot, in 1 / SKIP_UNITS of a token.
        means: float32 [num_layers, num_blocks, num_heads * head_size], by the block of a request's newest token;
            None but for the substitute "running_output".
        weights: float32 [num_layers, num_blocks, tiles of a mean].
    """

    cache: GpuCache
    debts: Tensor
    means: Tensor | None
    weights: Tensor | None

    @classmethod
    def over(cls, cache: GpuCache, mean_width: int) -> "KeptOnDevice":
        """Keep nothing yet; `mean_width` is num_heads * head_size where means are kept, else 0."""
        scores = cache.saved_redundancy
        debts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        if not mean_width:
            return cls(cache, debts, None, None)
        pool = (scores.shape[0], scores.shape[1] // cache.block_size)
        means = torch.zeros(*pool, mean_width, dtype=torch.float32, device=scores.device)
        weights = torch.zeros(*pool, -(-mean_width // _OUTPUT_TILE), dtype=torch.float32, device=scores.device)
        return cls(cache, debts, means, weights)


def bytes_of_means(cache: GpuCache, mean_width: int) -> int:
    """What `KeptOnDevice.over` allocates for means of outputs."""
    num_layers, num_slots = cache.saved_redundancy.shape
    return 4 * num_layers * (num_slots // cache.block_size) * (mean_width + -(-mean_width // _OUTPUT_TILE))


@dataclass(frozen=True)
class SkipRowsOnDevice:
    """A step as the forward reads it; tensors on the device, in buffers that stay where they are.

    Attributes:
        query_start_loc: int32 [num_reqs + 1].
        seq_lens: int32 [num_reqs], slots a row attends to if it is not skipped.
        block_table: int32 [num_reqs, max_blocks], without marks.
        slot_mapping: int64 [>= num_tokens]; negative for a token that goes nowhere.
        num_reqs: rows, padding included.
        num_tokens: tokens, padding included.
        decoding: whether no row has more than one token; only how fast it runs depends on it.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_reqs: int
    num_tokens: int
    decoding: bool


def describe_rows(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    shared_chunks: Tensor | None,
    buffers: SkipBuffers,
    layout: Layout | None,
) -> None:
    """Fill `buffers.rows` for a step, once for all its layers; one launch.

    Args:
        query_start_loc: int32 [num_reqs + 1].
        seq_lens: int32 [num_reqs], tokens once the step is done.
        shared_chunks: int32 [num_reqs], chunks taken over sealed, or NO_SEALS; None where nothing is filtered.
        buffers: see `SkipBuffers`.
        layout: where the layers' tokens lie; None if they keep every token.
    """
    from vllm_tokenfilter.kernels.gpu import triton_skip

    assert seq_lens.shape[0] <= buffers.rows.shape[1], "more rows than the buffers were made for"
    triton_skip.describe_rows[(seq_lens.shape[0],)](
        query_start_loc,
        seq_lens,
        seq_lens if shared_chunks is None else shared_chunks,
        buffers.rows,
        buffers.rows.stride(0),
        C=1 if layout is None else layout.chunk_size,
        K=1 if layout is None else layout.kept_per_chunk,
        W=0 if layout is None else layout.recent_window,
        FILTERED=layout is not None,
    )


def decide(
    kept: KeptOnDevice,
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
        kept: the cache, and what is kept of its tokens, updated.
        rule: how to decide.
        step: the step.
        buffers: described by `describe_rows`.
        layer: index into the cache's layers.
        ratio_units: the layer's ratio in 1 / SKIP_UNITS.
        substitute: what stands for a skipped attention.
    """
    import triton

    from vllm_tokenfilter.kernels.gpu import triton_skip

    cache, capacity = kept.cache, buffers.skipped.shape[0]
    assert step.num_tokens <= capacity, "more tokens than the buffers were made for"
    triton_skip.compare_tokens[(step.num_tokens, cache.num_kv_heads)](
        cache.layer_addresses,
        layer,
        step.query_start_loc,
        step.num_reqs,
        buffers.rows,
        buffers.rows.stride(0),
        step.slot_mapping,
        step.block_table,
        step.block_table.stride(0),
        cache.block_stride,
        cache.head_stride,
        cache.token_stride,
        buffers.similarities,
        float(np.log2(rule.decay)),
        M=rule.terms,
        D=cache.head_size,
        BLOCK_SIZE=cache.block_size,
        BLOCK_D=triton.next_power_of_2(cache.head_size),
        BLOCK_R=triton.next_power_of_2(buffers.rows.shape[1]),
        TILE=32,
        CAPACITY=capacity,
        ENCODING=cache.encoding,
        num_warps=4,
    )
    triton_skip.decide_rows[(step.num_reqs,)](
        buffers.similarities,
        cache.num_kv_heads,
        step.query_start_loc,
        buffers.rows,
        buffers.rows.stride(0),
        step.slot_mapping,
        step.block_table,
        step.block_table.stride(0),
        cache.saved_redundancy,
        kept.debts,
        kept.debts.stride(0),
        layer,
        ratio_units,
        rule.warmup,
        rule.skipped_reads(substitute),
        step.seq_lens,
        buffers.read_lens,
        buffers.below,
        buffers.skipped,
        buffers.totals,
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


def put_substitute(
    kept: KeptOnDevice,
    rule: SkipRule,
    step: SkipRowsOnDevice,
    buffers: SkipBuffers,
    layer: int,
    substitute: Substitute,
    query: Tensor,
    output: Tensor,
    scale: float,
    softcap: float,
    key_scale: Tensor,
    value_scale: Tensor,
) -> None:
    """Replace the outputs of skipped attentions in one layer. One launch.

    Args:
        kept: the cache and the means of outputs, updated.
        rule: sinks, window and decay.
        step: the step.
        buffers: filled by `decide` for this layer.
        layer: index into the cache's layers.
        substitute: what stands for a skipped attention.
        query: [>= num_tokens, num_heads, head_size], contiguous but for the first dimension.
        output: like query, or flat; changed in place.
        scale: of the scores.
        softcap: of the scores; 0 for none.
        key_scale: float32, one element, of an fp8 cache's keys.
        value_scale: the same of its values.
    """
    import triton

    from vllm_tokenfilter.kernels.gpu import triton_skip

    cache = kept.cache
    width = output.shape[-1] * (output.shape[1] if output.dim() == 3 else 1)
    assert output.stride(-1) == 1 and (output.dim() == 2 or output.stride(1) == output.shape[2])
    if substitute == "none":
        triton_skip.put_zero[(step.num_tokens,)](
            step.slot_mapping, buffers.skipped, output, output.stride(0), WIDTH=width, TILE=1024
        )
    elif substitute == "window":
        assert query.dim() == 3 and query.stride(2) == 1 and query.stride(1) == query.shape[2] == cache.head_size
        group = query.shape[1] // cache.num_kv_heads
        triton_skip.attend_window[(step.num_tokens, cache.num_kv_heads)](
            query,
            query.stride(0),
            output,
            output.stride(0),
            cache.layer_addresses,
            layer,
            step.query_start_loc,
            step.num_reqs,
            buffers.rows,
            step.slot_mapping,
            buffers.skipped,
            step.block_table,
            step.block_table.stride(0),
            cache.block_stride,
            cache.head_stride,
            cache.token_stride,
            key_scale,
            value_scale,
            scale,
            float(softcap),
            SINKS=rule.sinks,
            WINDOW=rule.window,
            GROUP=group,
            D=cache.head_size,
            BLOCK_SIZE=cache.block_size,
            BLOCK_D=triton.next_power_of_2(cache.head_size),
            BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_R=triton.next_power_of_2(buffers.rows.shape[1]),
            TILE=32,
            ENCODING=cache.encoding,
            num_warps=4,
        )
    else:
        assert kept.means is not None and kept.weights is not None and kept.means.shape[2] == width
        triton_skip.average_outputs[(step.num_reqs, kept.weights.shape[2])](
            step.query_start_loc,
            buffers.rows,
            buffers.rows.stride(0),
            step.slot_mapping,
            buffers.skipped,
            step.block_table,
            step.block_table.stride(0),
            kept.means,
            kept.weights,
            kept.means.shape[1],
            layer,
            output,
            output.stride(0),
            rule.decay,
            WIDTH=width,
            BLOCK_SIZE=cache.block_size,
            TILE=_OUTPUT_TILE,
            num_warps=1,
        )


def follow_seals(kept: KeptOnDevice, due: DueSeals, layout: Layout) -> None:
    """Let what is kept of tokens follow them to where a seal moved them; one or two launches."""
    from vllm_tokenfilter.kernels.gpu import triton_skip

    num_rows = len(due.plan.rows)
    _, num_tokens, first, last, _begins = due.integers[: 5 * num_rows].view(5, num_rows)
    num_layers = kept.debts.shape[0]
    moved = (due.tables, due.tables.stride(0), num_tokens, first, last, due.shared_chunks)
    sizes = {"C": layout.chunk_size, "K": layout.kept_per_chunk, "BLOCK_SIZE": kept.cache.block_size}
    triton_skip.carry_kept[(num_rows, num_layers)](
        *moved, kept.cache.saved_redundancy, kept.debts, kept.debts.stride(0), TILE=128, **sizes
    )
    if kept.means is not None and kept.weights is not None:
        triton_skip.carry_means[(num_rows, num_layers, kept.weights.shape[2])](
            *moved,
            kept.means,
            kept.weights,
            kept.means.shape[1],
            WIDTH=kept.means.shape[2],
            TILE=_OUTPUT_TILE,
            **sizes,
        )


def warm_up(
    kept: KeptOnDevice,
    rule: SkipRule,
    step: SkipRowsOnDevice,
    buffers: SkipBuffers,
    substitute: Substitute,
    layout: Layout | None,
) -> None:
    """Launch what no dummy step of a decode batch launches, so that no request waits for Triton's compiler.

    A decision for a prefill step of tokens that go nowhere, and a seal that finds nothing of its own to do; arguments
    as in `decide` and `describe_rows`.
    """
    nowhere = torch.full_like(step.slot_mapping, -1)
    decide(kept, rule, replace(step, slot_mapping=nowhere, decoding=False), buffers, 0, 0, substitute)
    if layout is not None:
        chunk = np.zeros(1, np.int64)
        plan = DuePlan(chunk, chunk + layout.first_seal, chunk, chunk + 1, 1)
        none_own = torch.full((1,), NO_SEALS, dtype=torch.int32, device=nowhere.device)
        follow_seals(kept, DueSeals.snapshot(plan, torch.zeros_like(none_own)[None], none_own), layout)
