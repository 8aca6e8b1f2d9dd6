"""How many blocks a request holds in filtered layers, and which of them requests share: the KV-cache manager.

vLLM's scheduler asks a manager per KV-cache group; ours answers from the layout, which is a pure function of the
length, so nothing in the scheduler is patched: admission, preemption, start-up sizing and the reported capacity follow.

**Prefix caching.** The kept tokens of a sealed chunk are final and depend only on the tokens up to the chunk's end.
Where they fill whole blocks (`shares_prefixes`), each is cached under the hash of that prefix and its place in the
chunk. Raw blocks are never shared. A request that finds `m` chunks continues at token m * chunk_size, so its row of the
block table is

    m chunks' sealed blocks | the null block | its own blocks: raw tokens, sealed in place later

The null block is a mark for the worker, which can read `m` off the row and needs no other word from the scheduler (see
`cpu/block_tables.py`); it holds no tokens and is taken out before attention sees the row. At least the recent window is
computed anew, so the newest tokens are raw again.

**When a chunk is cached.** A step's due seals run before the next step's forward. When step s is scheduled, the chunks
that were due before it are therefore sealed before any request of step s reads them: those, and no later ones, are
cached then. What a request's last step made due is sealed before the next step too, and cached when the request leaves.

Source: vllm/v1/core/single_type_kv_cache_manager.py, vllm/v1/core/kv_cache_coordinator.py, vllm/v1/core/block_pool.py,
vllm/v1/kv_cache_interface.py; docs/memory.md.
"""

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_tokenfilter.layout import Layout, peak_slots, sealed_chunks, shares_prefixes, stored_tokens

# Cached blocks are found by hash and group. A chunk's blocks have one hash, so each place in the chunk counts as a
# group of its own, this far from the next: more than any model has groups, small enough for the four bytes of the key.
_PLACE_STRIDE = 1 << 16


class FilteredAttentionManager(SingleTypeKVCacheManager):
    """Gives a request the blocks that `stored_tokens` before a step and the step's own tokens need, and no more.

    A row of the worker's block table only grows, so what a long prefill step needed stays with the request as room for
    its own output.

    Attributes:
        kv_cache_spec: a `FilteredAttentionSpec`, whose module registers this class and so imports this one.
    """

    kv_cache_spec: Any

    def __init__(self, kv_cache_spec: KVCacheSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.use(kv_cache_spec)
        # What the step that is being scheduled needs, between the question for its size and the allocation.
        self._blocks_needed: dict[str, int] = {}
        self._shared_chunks: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        # Tokens of each request once its last scheduled step is done, for `block_usage`.
        self._num_tokens: dict[str, int] = {}

    def use(self, kv_cache_spec: Any) -> None:
        """Give blocks by this spec's layout from now on; only while no request holds blocks and nothing is cached."""
        self.kv_cache_spec = kv_cache_spec
        self._layout: Layout = kv_cache_spec.layout
        self._blocks_per_chunk = max(1, self._layout.kept_per_chunk // self.block_size)
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
            shared_chunks = self._shared_chunks.get(request_id, len(taken_over) // self._blocks_per_chunk)
            stored = stored_tokens(total_computed_tokens, self._layout, shared_chunks)
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
        if (request := self._requests.pop(request_id, None)) is not None:
            self._cache_sealed(request)
        for noted in (self._shared_chunks, self._blocks_needed, self._num_tokens):
            noted.pop(request_id, None)
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
        layout: Layout = kv_cache_spec.layout  # type: ignore[attr-defined]
        unit, num_chunks, limit = block_pool.hash_block_size, 0, 0
        found: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        places = range(layout.kept_per_chunk // kv_cache_spec.block_size)
        if shares_prefixes(layout, kv_cache_spec.block_size):
            # By the length of the whole request, and not by `max_length`, which the other groups shorten.
            limit = min(max_length // layout.chunk_size, sealed_chunks(len(block_hashes) * unit, layout))
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

    def _num_held(self, request_id: str) -> int:
        """Blocks of the request, the mark not counted."""
        return len(self.req_to_blocks.get(request_id, ())) - (request_id in self._shared_chunks)

    def _cache_sealed(self, request: Request) -> None:
        name, layout = request.request_id, self._layout
        hashed = len(request.block_hashes) * self.block_pool.hash_block_size // layout.chunk_size
        sealed = min(sealed_chunks(request.num_computed_tokens, layout, self._shared_chunks.get(name, 0)), hashed)
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
