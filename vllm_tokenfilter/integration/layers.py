"""Which layers are filtered, and with which KV-cache spec; decided once, when the model's weights are loaded.

vLLM asks a layer's backend class for the spec, without saying which layer asks. So each filtered layer gets a class
that knows its layout; layers that stay dense keep vLLM's own spec, and form KV-cache groups of their own.

Source: vllm/model_executor/layers/attention/attention.py (`get_kv_cache_spec`, `process_weights_after_loading`).
"""

import functools
from collections.abc import Sequence

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
from vllm_tokenfilter.integration.counters import DenseReason
from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
from vllm_tokenfilter.layout import Layout


def sort_layers(
    vllm_config: VllmConfig, config: FilterConfig, layer_names: Sequence[str] | None = None
) -> tuple[dict[int, Attention], dict[str, list[int]]]:
    """The filtered layers by index, and the dense ones' indices by reason.

    A layer that reads another layer's cache is sorted as that layer is, and listed only if dense.

    Args:
        vllm_config: the configuration that holds the model's layers.
        config: our settings.
        layer_names: only these layers; None for all.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention, None if layer_names is None else list(layer_names))
    filtered: dict[int, Attention] = {}
    dense: dict[str, list[int]] = {}
    for name, layer in sorted(layers.items(), key=lambda item: extract_layer_index(item[0])):
        owner = layer.kv_sharing_target_layer_name
        index = extract_layer_index(owner or name)
        if (reason := _dense_reason(layer, index, vllm_config, config)) is not None:
            dense.setdefault(str(reason), []).append(extract_layer_index(name))
        elif owner is None:
            filtered[index] = layer
    return filtered, dense


def give_filtered_layers_their_spec(
    filtered: dict[int, Attention], vllm_config: VllmConfig, config: FilterConfig
) -> None:
    """Let filtered layers ask for blocks by what they store.

    Args:
        filtered: see `sort_layers`.
        vllm_config: the configuration in force.
        config: our settings.
    """
    max_step_tokens = longest_step(vllm_config)
    layouts = config.layouts(num_layers(vllm_config))
    for index, layer in filtered.items():
        layer.attn_backend = _backend_of_filtered_layers(layer.attn_backend, layouts[index], max_step_tokens)


def sort_skipping(
    vllm_config: VllmConfig, config: FilterConfig, layer_names: Sequence[str] | None = None
) -> tuple[dict[int, Attention], dict[str, list[int]]]:
    """The layers that skip attention, by index, and by reason those that should but cannot.

    Args:
        vllm_config: the configuration that holds the model's layers.
        config: our settings.
        layer_names: only these layers; None for all.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention, None if layer_names is None else list(layer_names))
    units = config.skip_units(num_layers(vllm_config))
    skipping: dict[int, Attention] = {}
    unable: dict[str, list[int]] = {}
    for name, layer in sorted(layers.items(), key=lambda item: extract_layer_index(item[0])):
        index = extract_layer_index(name)
        if not units[index]:
            continue
        if layer.kv_sharing_target_layer_name is not None:
            reason: DenseReason | None = DenseReason.SHARED_CACHE
        elif getattr(layer.impl, "sinks", None) is not None and config.attention_skipping.substitute == "window":
            reason = DenseReason.LEARNED_SINKS
        else:
            reason = _cache_reason(layer, vllm_config)
        if reason is None:
            skipping[index] = layer
        else:
            unable.setdefault(str(reason), []).append(index)
    return skipping, unable


def num_layers(vllm_config: VllmConfig) -> int:
    """Layers of the whole model, over all pipeline ranks."""
    return int(vllm_config.model_config.get_total_num_hidden_layers())


def longest_step(vllm_config: VllmConfig) -> int:
    """The most tokens of one request that one step computes.

    `long_prefill_token_threshold` is no bound: vLLM lifts it for a request that is alone, which must fit too.

    Source: vllm/v1/core/sched/scheduler.py (`schedule`).
    """
    return min(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len)


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


def _dense_reason(layer: Attention, index: int, vllm_config: VllmConfig, config: FilterConfig) -> DenseReason | None:
    if (reason := _cache_reason(layer, vllm_config)) is not None:
        return reason
    if config.pruning_ratio == 0:
        return DenseReason.RATIO_ZERO
    return DenseReason.CONFIGURED if config.layouts(num_layers(vllm_config))[index] is None else None


def _cache_reason(layer: Attention, vllm_config: VllmConfig) -> DenseReason | None:
    """Why the layer's cache is none we can work on, whatever the settings."""
    spec = layer.get_kv_cache_spec(vllm_config)
    if layer.sliding_window is not None or isinstance(spec, SlidingWindowSpec):
        return DenseReason.SLIDING_WINDOW
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return DenseReason.CHUNKED_LOCAL
    if type(spec) not in (FullAttentionSpec, FilteredAttentionSpec):
        return DenseReason.OTHER_CACHE
    return DenseReason.ALIBI if layer.impl.alibi_slopes is not None else None
