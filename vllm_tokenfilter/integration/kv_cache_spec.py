"""What a filtered layer's KV cache needs: the spec that the layer hands to vLLM, whose manager is ours.

Source: vllm/v1/kv_cache_interface.py, vllm/v1/kv_cache_spec_registry.py.
"""

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_tokenfilter.integration.kv_cache_manager import FilteredAttentionManager
from vllm_tokenfilter.layout import Layout, peak_slots


@dataclass(frozen=True, kw_only=True)
class FilteredAttentionSpec(AttentionSpec):
    """The cache of a filtered layer; layers of one layout form a KV-cache group of their own.

    No `FullAttentionSpec`: vLLM shortens what such a group found in the prefix cache by itself, counting a block as
    `block_size` tokens.
    """

    layout: Layout  #: where the layer's tokens lie.
    max_step_tokens: int  #: the most tokens of a request that one step computes.

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


# Registering first would hide vLLM's own specs. Every process that unpickles a spec of ours imports this module.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(FilteredAttentionSpec, FilteredAttentionManager)
