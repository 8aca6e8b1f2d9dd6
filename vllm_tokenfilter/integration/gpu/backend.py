"""TOKEN_FILTERING on NVIDIA GPUs: a subclass of vLLM's own backend with other lengths, slots and block tables.

For each backend of vLLM that can be inside there is a class `OVER_<name>`, made on first use. Everything vLLM asks a
backend (its name, layouts, block sizes, CUDA graph support) is answered by the one inside. Two hooks are ours:

- the metadata builder hands the inner builder an adjusted step (`steps.FilteredSteps`);
- the implementation plans the model's layers once all weights are loaded, as on CPU, and may skip attention
  (`skipping.SkippingImpl`).

A KV-cache group holds filtered layers only or dense layers only, so a builder adjusts every step or none.

Source: vllm/v1/attention/backends/triton_attn.py, flash_attn.py, flashinfer.py; vllm/platforms/cuda.py
(`get_attn_backend_cls`); vllm/v1/worker/gpu/attn_utils.py (`build_attn_metadata`); vllm/v1/worker/gpu_model_runner.py
(`_build_attention_metadata`).
"""

import copy
import functools
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.gpu.skipping import SkippingGroup, SkippingImpl
from vllm_tokenfilter.integration.gpu.steps import FilteredSteps, StepsInCommon
from vllm_tokenfilter.integration.layers import layers_by_index, total_kv_heads
from vllm_tokenfilter.integration.lifecycle import CountingBuilder, PlanningImpl, planned_model
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import shares_prefixes

#: vLLM's backends that can be inside.
INNER_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
_FP8_TYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class FilteringBuilder(CountingBuilder):
    """Mixed in before a metadata builder of vLLM's. The only state is in `FilteredSteps`."""

    #: Metadata of one group must not be carried over to another: groups read other lengths.
    supports_update_block_table = False
    _skipping: SkippingGroup | None = None
    _num_skipping = 0

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.config, model = refusals.require_supported(vllm_config), planned_model(vllm_config)
        layers = layers_by_index(vllm_config, layer_names)
        self.plan = model.plan.only(layers)
        self._dense_reason = next(iter(self.plan.dense), "")
        self._capturing = False
        self._common: StepsInCommon = model.shared.setdefault(StepsInCommon, StepsInCommon())
        filtered = {index: layers[index] for index in self.plan.filtered}
        skipping = {index: layers[index] for index in self.plan.skipping}
        self._num_skipping = len(skipping)
        self._steps = self._make_steps(filtered, kv_cache_spec, vllm_config, device) if filtered else None
        self.counters = self._steps.counters if self._steps else StepCounters()
        if self._steps:
            self._steps.readers = len(self.plan.rows) - len(filtered)
        if skipping:
            scheduler = vllm_config.scheduler_config
            captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
            self._skipping = SkippingGroup(
                self.config,
                skipping,
                {row.index: row.skip_units for row in self.plan.rows},
                self._steps.layout if self._steps else None,
                scheduler.max_num_seqs + 1,
                max(scheduler.max_num_batched_tokens, *captured),
                device,
                self.counters,
                functools.partial(_open_cache, skipping),
            )
            if self._steps:
                self._steps.followed_by(self._skipping.follow, self._num_skipping)
        clock = self._steps.clock if self._steps else None
        self.settles = [own.settle for own in (clock, self._skipping) if own is not None]
        model.count(self)

    def _make_steps(
        self,
        filtered: dict[int, Attention],
        kv_cache_spec: AttentionSpec,
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> FilteredSteps:
        cache_config, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        block_size = kv_cache_spec.block_size
        # All layers of a filtered group have one layout.
        (layout,) = self.plan.layouts
        shares = cache_config.enable_prefix_caching and shares_prefixes(layout, cache_config.block_size)
        return FilteredSteps(
            self.config,
            layout,
            block_size,
            # vLLM may cut its blocks into smaller ones for the kernels; the mark is one of its blocks.
            cache_config.block_size // block_size if shares else 0,
            scheduler.max_num_seqs + 1,
            -(-vllm_config.model_config.max_model_len // block_size) + 1,
            device,
            functools.partial(_open_cache, filtered),
            functools.partial(_gather_heads, total_kv_heads(vllm_config, next(iter(filtered))))
            if vllm_config.parallel_config.tensor_parallel_size > 1
            else None,
            self._common,
        )

    def use(self, config: FilterConfig, plan: LayerPlan) -> None:
        """See `TokenFilteringMetadataBuilder.use`; a group that started filtered goes on through its buffers."""
        self.config, self.plan = config, plan.only(self.plan.indices)
        self._dense_reason, layout = next(iter(self.plan.dense), ""), next(iter(self.plan.layouts), None)
        if self._steps is not None:
            self._steps.use(config, layout, self._dense_reason)
            if self._skipping is not None:
                self._skipping.use(layout)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """See `AttentionMetadataBuilder.build_for_cudagraph_capture`; leaves nothing due."""
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._capturing = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """See `AttentionMetadataBuilder.build`; `common_attn_metadata.slot_mapping` is rewritten in place."""
        common = common_attn_metadata
        inner: Any = super()
        skipping, seq_lens = self._skipping, common.seq_lens[: common.num_reqs]
        if self._steps is None:
            self._count_dense(common)
            metadata = inner.build(common_prefix_len, common, fast_build, **kwargs)
            if skipping is not None:
                skipping.attach(metadata, common, seq_lens, None)
            return metadata
        adjusted = self._steps.adjust(common, self._capturing)
        changed = copy.copy(common)
        vars(changed).update(vars(adjusted), _num_computed_tokens_cache=None)
        # Packed tokens are no common prefix.
        metadata = inner.build(0, changed, fast_build, **kwargs)
        if skipping is not None:
            skipping.attach(metadata, common, seq_lens, self._steps.shared_chunks(common.num_reqs))
        return metadata

    def _count_dense(self, common: CommonAttentionMetadata) -> None:
        lengths = self._common.lengths(common, self)
        if self._capturing or not lengths.num_real:
            return
        self.counters.tokens_seen += lengths.num_tokens
        self.counters.rows_dense[self._dense_reason] += lengths.num_real
        self.counters.count_reads(lengths.dense_reads, lengths.dense_reads, len(self.plan.rows), self._num_skipping)


@functools.cache
def backend_over(name: str) -> type[AttentionBackend]:
    """The backend TOKEN_FILTERING over one of vLLM's; `dispatch.OVER_<name>` is where vLLM finds it again."""
    inner = AttentionBackendEnum[name].get_class()
    attributes = {"inner_name": name, "__module__": __name__}
    builder = type(f"FilteringBuilderOver{name}", (FilteringBuilder, inner.get_builder_cls()), dict(attributes))
    impl = type(f"ImplOver{name}", (SkippingImpl, PlanningImpl, inner.get_impl_cls()), dict(attributes))
    return type(
        f"OVER_{name}",
        (inner,),
        {
            "__module__": "vllm_tokenfilter.integration.dispatch",
            "__doc__": f"{name} that reads, for each request, only the tokens its layers still store.",
            "get_builder_cls": staticmethod(lambda: builder),
            "get_impl_cls": staticmethod(lambda: impl),
        },
    )


def _open_cache(layers: dict[int, Attention]) -> GpuCache:
    """The KV cache of a group's layers as the kernels see it; vLLM may give its type to some layers only.

    Raises:
        UnsupportedError: it lies otherwise than the kernels can follow.
    """
    caches, first = [layer.kv_cache for layer in layers.values()], next(iter(layers.values()))
    heads, width, cache_dtype = first.num_kv_heads, 2 * first.head_size, first.kv_cache_dtype
    try:
        if caches[0].dim() != 4 or caches[0].shape[1] != heads or caches[0].shape[3] != width:
            raise ValueError(f"a KV cache of shape {tuple(caches[0].shape)}")
        return GpuCache.over(caches, list(layers), _FP8_TYPES.get(cache_dtype, caches[0].dtype))
    except ValueError as error:
        raise UnsupportedError(
            [f"kv_cache_dtype={cache_dtype} gives {error}, which is not supported; use kv_cache_dtype=auto."]
        ) from error


def _gather_heads(total_kv_heads: int, scores: torch.Tensor) -> torch.Tensor:
    """Every head's scores, in the model's order, from this rank's [num_layers, num_tasks, num_kv_heads, 2, C]."""
    gathered: torch.Tensor = get_tp_group().all_gather(scores, dim=2)
    # KV heads that are fewer than ranks are repeated on neighbouring ranks.
    return gathered[:, :, :: gathered.shape[2] // total_kv_heads]
