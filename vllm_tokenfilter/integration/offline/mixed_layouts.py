"""Any settings in one engine: layers of several layouts share a KV-cache group, and change their layout between runs.

In service each layout has a KV-cache group of its own, whose blocks follow what it stores. An engine that measures many
settings starts dense instead, so that its blocks follow the length and any layout fits. The layers of each layout then
become an attention group, which vLLM gives metadata of its own. Only where new tokens are written is one tensor for the
whole KV-cache group in vLLM; here each layer writes where its own metadata says.

Source: vllm/v1/worker/utils.py (`AttentionGroup`), vllm/v1/worker/gpu_model_runner.py (`initialize_attn_backend`,
`_build_attention_metadata`, `_model_forward`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.cpu.builder import TokenFilteringMetadataBuilder
from vllm_tokenfilter.integration.cpu.sealing import SealedChunks
from vllm_tokenfilter.integration.layers import plan_layers
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import Layout


class OfflineBuilder(TokenFilteringMetadataBuilder):
    """Makes the metadata of the layers of one layout, beside those of others in the same KV-cache group."""

    #: Called with what every seal chose; None if nobody watches.
    observer: Callable[[SealedChunks], None] | None = None
    in_totals = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """See `TokenFilteringMetadataBuilder.build`; leaves `common_attn_metadata` as it is."""
        slots = common_attn_metadata.slot_mapping.clone()
        return super().build(common_prefix_len, common_attn_metadata.replace(slot_mapping=slots), fast_build)

    def seal_due(self) -> SealedChunks | None:
        """See `TokenFilteringMetadataBuilder.seal_due`."""
        sealed = super().seal_due()
        if sealed is not None and self.observer is not None:
            self.observer(sealed)
        return sealed


class MixedLayouts:
    """The attention groups of an engine in this process that started dense."""

    def __init__(self, runner: Any) -> None:
        """Let every layer of the worker's model runner write where its own metadata says."""
        self._runner = runner
        self._whole = [list(groups) for groups in runner.attn_groups]
        forward = runner._model_forward

        def forward_with_own_slots(*args: Any, **kwargs: Any) -> Any:
            context = get_forward_context()
            if context.attn_metadata is not None:
                context.slot_mapping = {name: own.slot_mapping for name, own in context.attn_metadata.items()}
            return forward(*args, **kwargs)

        runner._model_forward = forward_with_own_slots

    def use(self, config: FilterConfig) -> None:
        """Filter by these settings from now on; only while no request is running. Counters start anew."""
        plan = plan_layers(self._runner.vllm_config, config)
        for groups, whole in zip(self._runner.attn_groups, self._whole, strict=True):
            groups[:] = [part for group in whole for part in self._split(group, config, plan)]

    def builders(self) -> list[OfflineBuilder]:
        """The builders since the last `use`, in the order of their layouts' first layers."""
        groups = (group for groups in self._runner.attn_groups for group in groups)
        return [builder for group in groups for builder in group.metadata_builders]

    def _split(self, group: AttentionGroup, config: FilterConfig, plan: LayerPlan) -> list[AttentionGroup]:
        vllm_config, device = self._runner.vllm_config, self._runner.device
        layouts = {row.index: row.layout for row in plan.rows}
        alike: dict[Layout | None, list[str]] = {}
        for name in sorted(group.layer_names, key=extract_layer_index):
            alike.setdefault(layouts[extract_layer_index(name)], []).append(name)
        parts = []
        for names in alike.values():
            builder = OfflineBuilder(group.metadata_builders[0].kv_cache_spec, names, vllm_config, device)
            builder.use(config, plan)
            parts.append(dataclasses.replace(group, layer_names=names, metadata_builders=[builder]))
        return parts
