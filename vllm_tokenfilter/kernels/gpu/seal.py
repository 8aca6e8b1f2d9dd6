"""Sealing on the GPU: a step's due chunks in every layer, scored, chosen and compacted in the paged cache.

Two launches, `score` and `compact`. Between them tensor-parallel ranks exchange the heads' scores, which makes the
choice the same for every number of ranks. Nothing here waits for the device.

Source: docs/algorithm.md (redundancy), docs/layout.md (slots); kernels/reference.py is the readable form.
"""

from collections.abc import Callable

from torch import Tensor

from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.compact import compact_chunks
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.gpu.score import score_chunks
from vllm_tokenfilter.kernels.rules import MAX_CHUNK_SIZE, ScoreRule
from vllm_tokenfilter.layout import Layout


def seal_chunks(
    cache: GpuCache,
    due: DueSealsOnDevice,
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
    assert layout.anchor_terms <= layout.chunk_size <= min(layout.recent_window, MAX_CHUNK_SIZE)
    head_scores, known = score_chunks(cache, due, layout, rule)
    if gather_heads is not None and rule.selector != "random":
        head_scores = gather_heads(head_scores).contiguous()
    return compact_chunks(cache, due, layout, rule, head_scores, known)


def warm_up(
    cache: GpuCache, layout: Layout, rule: ScoreRule, gather_heads: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Launch a seal that finds nothing of its own to do, so that no request waits for Triton's compiler.

    Every tensor-parallel rank does it at the same moment; arguments as in `seal_chunks`.
    """
    due = DueSealsOnDevice.nothing(layout, cache.saved_redundancy.device)
    seal_chunks(cache, due, layout, rule, gather_heads)
