"""How many blocks a filtered layer asks for, and which of them requests share: our KV-cache spec and its manager.

vLLM's scheduler asks a manager per KV-cache group; ours answers from the layout, which is a pure function of the
length, so nothing in the scheduler is patched: admission, preemption, start-up sizing and the reported capacity follow.

**Prefix caching.** The kept tokens of a sealed chunk are final and depend only on the tokens up to the chunk's end.
Where they fill whole blocks (`shares_prefixes`), each is cached under the hash of that prefix and its place in the
chunk. Raw blocks are never shared. A request that finds `m` chunks continues at token m * chunk_size, so its row of the
block table is

    m chunks' sealed blocks | the null block | its own blocks: raw tokens, sealed in place later

The null block is a mark for the worker, which can read `m` off the row and needs no other word from the scheduler (see
`shared_chunks_of`); it holds no tokens and is taken out before attention sees the row. At least the recent window is
computed anew, so the newest tokens are raw again.

**When a chunk is cached.** A step's due seals run before the next step's forward. When step s is scheduled, the chunks
that were due before it are therefore sealed before any request of step s reads them: those, and no later ones, are
cached then. What a request's last step made due is sealed before the next step too, and is cached when the request
leaves.

Source: vllm/v1/core/single_type_kv_cache_manager.py, vllm/v1/core/kv_cache_coordinator.py, vllm/v1/core/block_pool.py,
vllm/v1/kv_cache_interface.py; docs/memory.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_tokenfilter.layout import Layout, peak_slots, sealed_chunks, shares_prefixes, stored_tokens

# Cached blocks are found by hash and group. A chunk's blocks have one hash, so each place in the chunk counts as a
# group of its own, this far from the next: more than any model has groups, small enough for the four bytes of the key.
_PLACE_STRIDE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FilteredAttentionSpec(AttentionSpec):
    """The cache of a filtered layer; layers of one layout form a KV-cache group of their own.

    No `FullAttentionSpec`: vLLM shortens what such a group found in the prefix cache by itself, counting a block as
    `block_size` tokens.

    Attributes:
        layout: where the layer's tokens lie.
        max_step_tokens: the most tokens of a request that one step computes.
    """

    layout: Layout
    max_step_tokens: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one request of the longest allowed length, at its peak."""
        slots = peak_slots(vllm_config.model_config.max_model_len, self.max_step_tokens, self.layout)
        return cdiv(slots, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether one block table serves all these layers: those of one layout."""
        return all(
            isinstance(spec, FilteredAttentionSpec)
            and (spec.layout, spec.max_step_tokens) == (self.layout, self.max_step_tokens)
            for spec in kv_cache_specs.values()
        )


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


class FilteredAttentionManager(SingleTypeKVCacheManager):
    """Gives a request the blocks that `stored_tokens` before a step and the step's own tokens need, and no more.

    A row of the worker's block table only grows, so what a long prefill step needed stays with the request as room for
    its own output.

    Attributes:
        kv_cache_spec: a `FilteredAttentionSpec`.
    """

    kv_cache_spec: FilteredAttentionSpec

    def __init__(self, kv_cache_spec: KVCacheSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.use(self.kv_cache_spec)
        # What the step that is being scheduled needs, between the question for its size and the allocation.
        self._blocks_needed: dict[str, int] = {}
        self._shared_chunks: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        # Tokens of each request once its last scheduled step is done, for `block_usage`.
        self._num_tokens: dict[str, int] = {}

    def use(self, kv_cache_spec: FilteredAttentionSpec) -> None:
        """Give blocks by this spec's layout from now on; only while no request holds blocks and nothing is cached."""
        self.kv_cache_spec, self._layout = kv_cache_spec, kv_cache_spec.layout
        self._shares = self.enable_caching and shares_prefixes(self._layout, self.block_size)

    def block_usage(self) -> tuple[int, int]:
        """Blocks that requests hold, and that they would hold if nothing were filtered; shared ones for each."""
        names = [name for name, blocks in self.req_to_blocks.items() if blocks]
        held = sum(self._num_held(name) for name in names)
        return held, sum(cdiv(self._num_tokens[name], self.block_size) for name in names)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """See `SingleTypeKVCacheManager.get_num_blocks_to_allocate`.

        Asked whether a whole sequence fits (`apply_admission_cap`), the answer is its peak over all steps.
        """
        taken_over = [block for block in new_computed_blocks if not block.is_null]
        if apply_admission_cap:
            needed = cdiv(peak_slots(num_tokens, self.kv_cache_spec.max_step_tokens, self._layout), self.block_size)
        else:
            shared = self._shared_chunks.get(request_id, len(taken_over) // self._blocks_per_chunk)
            stored = stored_tokens(total_computed_tokens, self._layout, shared)
            needed = cdiv(stored + num_tokens - total_computed_tokens, self.block_size)
            self._blocks_needed[request_id] = needed
            self._num_tokens[request_id] = num_tokens
        missing = needed - self._num_held(request_id) - len(taken_over)
        return max(missing, 0) + self._get_num_evictable_blocks(taken_over)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """See `SingleTypeKVCacheManager.add_local_computed_blocks`; the last of the blocks is the mark."""
        assert num_external_computed_tokens == 0 and not self.req_to_blocks[request_id]
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        self.req_to_blocks[request_id].extend(new_computed_blocks)
        if new_computed_blocks:
            self._shared_chunks[request_id] = num_local_computed_tokens // self._layout.chunk_size
        self.num_cached_block[request_id] = self._shared_chunks.get(request_id, 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """See `SingleTypeKVCacheManager.allocate_new_blocks`."""
        missing = self._blocks_needed.pop(request_id) - self._num_held(request_id)
        if missing <= 0:
            return []
        new_blocks = self.block_pool.get_new_blocks(missing)
        self.req_to_blocks[request_id].extend(new_blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new_blocks)
        return new_blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Cache the chunks that are sealed before the step that is being scheduled; `num_tokens` counts that step."""
        if self._shares:
            self._requests[request.request_id] = request
            self._cache_sealed(request)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See `SingleTypeKVCacheManager.pop_blocks_for_free`; what the last step made due is cached before."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._cache_sealed(request)
        self._shared_chunks.pop(request_id, None)
        self._blocks_needed.pop(request_id, None)
        self._num_tokens.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """See `SingleTypeKVCacheManager.find_longest_cache_hit`; a hit ends with the mark, ahead of the window."""
        assert isinstance(kv_cache_spec, FilteredAttentionSpec)
        layout, unit = kv_cache_spec.layout, block_pool.hash_block_size
        found: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        if not shares_prefixes(layout, kv_cache_spec.block_size):
            return found, 0
        places = range(layout.kept_per_chunk // kv_cache_spec.block_size)
        # By the length of the whole request, and not by `max_length`, which the other groups shorten.
        limit = min(max_length // layout.chunk_size, sealed_chunks(len(block_hashes) * unit, layout))
        num_chunks = 0
        while num_chunks < limit:
            chunk_hash = block_hashes[(num_chunks + 1) * layout.chunk_size // unit - 1]
            keys = [group + place * _PLACE_STRIDE for group in kv_cache_group_ids for place in places]
            blocks = block_pool.get_cached_block(chunk_hash, keys)
            if blocks is None:
                break
            for index, group in enumerate(found):
                group.extend(blocks[index * len(places) : (index + 1) * len(places)])
            num_chunks += 1
        if num_chunks:
            for group in found:
                group.append(block_pool.null_block)
        return found, num_chunks * layout.chunk_size

    @property
    def _blocks_per_chunk(self) -> int:
        return max(1, self._layout.kept_per_chunk // self.block_size)

    def _num_held(self, request_id: str) -> int:
        """Blocks of the request, the mark not counted."""
        return len(self.req_to_blocks.get(request_id, ())) - (request_id in self._shared_chunks)

    def _cache_sealed(self, request: Request) -> None:
        name, layout = request.request_id, self._layout
        shared = self._shared_chunks.get(name, 0)
        hashed = len(request.block_hashes) * self.block_pool.hash_block_size // layout.chunk_size
        sealed = min(sealed_chunks(request.num_computed_tokens, layout, shared), hashed)
        done = self.num_cached_block.get(name, 0)
        if sealed > done:
            # The mark lies between the blocks taken over and the request's own.
            blocks = [block for block in self.req_to_blocks[name] if not block.is_null]
            for place in range(self._blocks_per_chunk):
                self.block_pool.cache_full_blocks(
                    request=request,
                    blocks=blocks[place : sealed * self._blocks_per_chunk : self._blocks_per_chunk],
                    num_cached_blocks=done,
                    num_full_blocks=sealed,
                    block_size=layout.chunk_size,
                    kv_cache_group_id=self.kv_cache_group_id + place * _PLACE_STRIDE,
                )
        self.num_cached_block[name] = max(sealed, done)


# Registering first would hide vLLM's own specs. Every process that unpickles a spec of ours imports this module.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(FilteredAttentionSpec, FilteredAttentionManager)
