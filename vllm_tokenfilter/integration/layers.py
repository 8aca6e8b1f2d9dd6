"""The layer plan of a model in vLLM, and the KV-cache spec that filtered layers get; once weights are loaded.

vLLM asks a layer's backend class for the spec, without saying which layer asks. So each filtered layer gets a class
that knows its layout; layers that stay dense keep vLLM's own spec, and form KV-cache groups of their own.

Source: vllm/model_executor/layers/attention/attention.py (`get_kv_cache_spec`, `process_weights_after_loading`);
vllm/v1/worker/gpu/attn_utils.py (`init_attn_backend`), vllm/v1/worker/utils.py
(`add_kv_sharing_layers_to_kv_cache_groups`).
"""

import functools
from collections.abc import Sequence
from typing import Literal

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
from vllm_tokenfilter.layer_plan import LayerFacts, LayerPlan
from vllm_tokenfilter.layout import Layout


def plan_layers(vllm_config: VllmConfig, config: FilterConfig) -> LayerPlan:
    """The plan of the layers that this process holds: all of the model, or those of its pipeline stage."""
    facts = {index: _facts(layer, vllm_config) for index, layer in layers_by_index(vllm_config).items()}
    return LayerPlan.of(config, num_layers(vllm_config), facts)


def layers_by_index(vllm_config: VllmConfig, names: Sequence[str] | None = None) -> dict[int, Attention]:
    """The attention layers by index in the model, ascending; only those of these names, or all."""
    layers = get_layers_from_vllm_config(vllm_config, Attention, None if names is None else list(names))
    return dict(sorted((extract_layer_index(name), layer) for name, layer in layers.items()))


def give_filtered_layers_their_spec(plan: LayerPlan, vllm_config: VllmConfig) -> None:
    """Let filtered layers ask for blocks by what they store; one that reads their cache joins their attention group."""
    layers, max_step_tokens = layers_by_index(vllm_config), longest_step(vllm_config)
    for row in plan.rows:
        if row.layout is not None:
            layer = layers[row.index]
            layer.attn_backend = _backend_of_filtered_layers(layer.attn_backend, row.layout, max_step_tokens)


def num_layers(vllm_config: VllmConfig) -> int:
    """Layers of the whole model, over all pipeline ranks."""
    return int(vllm_config.model_config.get_total_num_hidden_layers())


def total_kv_heads(vllm_config: VllmConfig, layer: int) -> int:
    """KV heads of a layer, by its index, over all tensor-parallel ranks; Gemma 4's layers differ."""
    return int(vllm_config.model_config.model_arch_config[layer].total_num_kv_heads)


def longest_step(vllm_config: VllmConfig) -> int:
    """The most tokens of one request that one step computes; see `scheduler.py`."""
    scheduler, longest = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    return min(scheduler.long_prefill_token_threshold or longest, scheduler.max_num_batched_tokens, longest)


@functools.cache
def _backend_of_filtered_layers(
    backend: type[AttentionBackend], layout: Layout, max_step_tokens: int
) -> type[AttentionBackend]:
    class FilteredLayersBackend(backend):  # type: ignore[misc, valid-type]
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            spec = super().customize_spec(spec)
            if type(spec) is not FullAttentionSpec:
                return spec
            return replace_as(
                spec,
                FilteredAttentionSpec,
                drop=("sliding_window", "attention_chunk_size", "non_causal"),
                layout=layout,
                max_step_tokens=max_step_tokens,
            )

    return FilteredLayersBackend


def _facts(layer: Attention, vllm_config: VllmConfig) -> LayerFacts:
    owner = layer.kv_sharing_target_layer_name
    return LayerFacts(
        kind=_kind(layer, vllm_config),
        alibi=getattr(layer.impl, "alibi_slopes", None) is not None,
        learned_sinks=getattr(layer.impl, "sinks", None) is not None,
        reads=None if owner is None else extract_layer_index(owner),
    )


def _kind(layer: Attention, vllm_config: VllmConfig) -> Literal["full", "sliding", "chunked", "other"]:
    spec, owner = layer.get_kv_cache_spec(vllm_config), layer.kv_sharing_target_layer_name
    if layer.sliding_window is not None or isinstance(spec, SlidingWindowSpec):
        return "sliding"
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return "chunked"
    # Readers with other query heads than the owner's get a metadata builder of their own, which seals nothing.
    if owner is not None and vllm_config.compilation_config.static_forward_context[owner].num_heads != layer.num_heads:
        return "other"
    return "full" if type(spec) in (FullAttentionSpec, FilteredAttentionSpec) else "other"
