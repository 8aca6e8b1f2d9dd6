"""Due seals: what a step left to do, and the one kernel call that does it before the next step's forward.

The list of due seals is the previous step's metadata and nothing else, so aborts, preemption and reuse of blocks need
no bookkeeping: sealing blocks that were just freed is harmless, because whoever gets them next writes after it.
No maths here: arithmetic is in layout.py, scoring and moving in kernels/.

Tensor parallelism splits the KV heads over ranks, and a token's redundancy is a mean over all of them. So each rank
scores its heads, all get every head's scores (one small all-gather per seal and group), and each chooses from the same
numbers in the same order: the choice is the same bits as without tensor parallelism.

Source: vllm/distributed/parallel_state.py (`get_tp_group`), vllm/model_executor/models/llama.py (KV heads that are
fewer than ranks are repeated on neighbouring ranks).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.cpu.cache_view import view_paged_cache
from vllm_tokenfilter.kernels.cpu.cache import PagedCache
from vllm_tokenfilter.kernels.cpu.seal import DueSeals, seal_chunks
from vllm_tokenfilter.kernels.rules import ScoreRule
from vllm_tokenfilter.layout import Layout


@dataclass(frozen=True)
class SealedChunks:
    """What a seal chose."""

    layer_indices: list[int]  #: the filtered layers, in the order of `kept`.
    #: int32 [num_filtered_layers, num_due_chunks, kept_per_chunk], offsets inside the chunk that stay.
    kept: NDArray[np.int32]


@dataclass(frozen=True)
class FilteredCache:
    """The filtered layers' cache and the scores kept between seals."""

    layer_indices: list[int]  #: the filtered layers, in order.
    paged: PagedCache  #: where their elements lie.
    #: float32 [num_filtered_layers, num_blocks * block_size] by physical slot. Address space for the pool, memory only
    #: where a chunk waits to be sealed.
    saved_redundancy: NDArray[np.float32]
    total_kv_heads: int  #: KV heads of each of them, over all tensor-parallel ranks.

    @classmethod
    def over(cls, layers: Mapping[int, Attention], isa: str, total_kv_heads: int) -> "FilteredCache":
        """View the caches of layers, by index in the model; see `view_paged_cache`."""
        paged = view_paged_cache([layer.kv_cache for layer in layers.values()], isa)
        saved = np.zeros((len(layers), paged.num_blocks * paged.block_size), np.float32)
        return cls(list(layers), paged, saved, total_kv_heads)


def seal(
    due: DueSeals, cache: FilteredCache, layout: Layout, config: FilterConfig, carried: NDArray[np.int64] | None = None
) -> SealedChunks:
    """Seal in place, in every filtered layer of one layout, what the step before made due; see `seal_chunks`."""
    kept = seal_chunks(
        cache.paged,
        cache.saved_redundancy,
        due,
        layout,
        ScoreRule.of(config),
        np.array(cache.layer_indices, np.int64),
        torch.get_num_threads(),
        None if cache.paged.num_kv_heads == cache.total_kv_heads else functools.partial(_gather_heads, cache),
        carried,
    )
    return SealedChunks(cache.layer_indices, kept)


def _gather_heads(cache: FilteredCache, scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every head's scores, in the model's order, from this rank's [num_layers, num_chunks, 2, num_kv_heads, C]."""
    group = get_tp_group()
    num_layers, num_chunks, two, heads, size = scores.shape
    everywhere = torch.empty(group.world_size, *scores.shape)
    torch.distributed.all_gather(list(everywhere), torch.from_numpy(scores), group=group.cpu_group)
    replicas = group.world_size * heads // cache.total_kv_heads
    distinct = everywhere[::replicas].permute(1, 2, 3, 0, 4, 5)
    return distinct.reshape(num_layers, num_chunks, two, cache.total_kv_heads, size).contiguous().numpy()
