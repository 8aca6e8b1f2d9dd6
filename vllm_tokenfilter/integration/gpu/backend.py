"""TOKEN_FILTERING on NVIDIA GPUs: a subclass of vLLM's own backend with other lengths, slots and block tables.

For each backend of vLLM that can be inside there is a class `OVER_<name>`, made on first use. Everything vLLM asks a
backend (its name, layouts, block sizes, CUDA graph support) is answered by the one inside. Two hooks are ours:

- the metadata builder hands the inner builder an adjusted step (`gpu_step.FilteredSteps`);
- the implementation sorts the model's layers once all weights are loaded, as on CPU, and may skip attention
  (`gpu_skipping.SkippingImpl`).

A KV-cache group holds filtered layers only or dense layers only, so a builder adjusts every step or none.

Source: vllm/v1/attention/backends/triton_attn.py, flash_attn.py, flashinfer.py; vllm/platforms/cuda.py
(`get_attn_backend_cls`); vllm/v1/worker/gpu/attn_utils.py (`build_attn_metadata`); vllm/v1/worker/gpu_model_runner.py
(`_build_attention_metadata`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.integration import refusals, status
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.gpu.skipping import SkippingGroup, SkippingImpl
from vllm_tokenfilter.integration.gpu.steps import FilteredSteps, HostLengths
from vllm_tokenfilter.integration.layers import num_layers, sort_layers, sort_skipping
from vllm_tokenfilter.integration.lifecycle import SortingImpl, log_totals_at_end
from vllm_tokenfilter.kernels.gpu.seal import GpuCache
from vllm_tokenfilter.layout import shares_prefixes

#: vLLM's backends that can be inside.
INNER_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
_FP8_TYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class FilteringBuilder:
    """Mixed in before a metadata builder of vLLM's. The only state is in `FilteredSteps`.

    Attributes:
        inner_name: the backend inside.
        counters: what was done; see `StepCounters`.
    """

    inner_name: str
    #: Metadata of one group must not be carried over to another: groups read other lengths.
    supports_update_block_table = False
    _skipping: SkippingGroup | None = None
    _layers_skipping: Sequence[int] = ()

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.config = refusals.require_supported(vllm_config)
        self._vllm_config = vllm_config
        self._filtered, self._dense = sort_layers(vllm_config, self.config, layer_names)
        self._capturing = False
        self._steps = self._make_steps(kv_cache_spec, vllm_config, device) if self._filtered else None
        self.counters = self._steps.counters if self._steps else StepCounters()
        skipping, self._unskipped = sort_skipping(vllm_config, self.config, layer_names)
        self._layers_skipping = list(skipping)
        if skipping:
            self._skipping = self._make_skipping(skipping, vllm_config, device)
            if self._steps:
                self._steps.followed_by(self._skipping.follow, len(skipping))
        clock = self._steps.clock if self._steps else None
        settles = [own.settle for own in (clock, self._skipping) if own is not None]
        self._settle = functools.partial(_settle_all, settles)
        log_totals_at_end(self, self.counters, self._settle)

    def _make_skipping(
        self, skipping: dict[int, Attention], vllm_config: VllmConfig, device: torch.device
    ) -> SkippingGroup:
        return SkippingGroup.of(
            self.config,
            skipping,
            self.config.skip_units(num_layers(vllm_config)),
            self._steps.layout if self._steps else None,
            vllm_config,
            device,
            self.counters,
            functools.partial(
                _open_cache, list(skipping), list(skipping.values()), vllm_config.cache_config.cache_dtype
            ),
        )

    def _make_steps(self, kv_cache_spec: AttentionSpec, vllm_config: VllmConfig, device: torch.device) -> FilteredSteps:
        cache_config, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        block_size = kv_cache_spec.block_size
        # All layers of a filtered group have one layout.
        layout = self.config.layouts(num_layers(vllm_config))[next(iter(self._filtered))]
        assert layout is not None
        shares = cache_config.enable_prefix_caching and shares_prefixes(layout, cache_config.block_size)
        if shares and self.inner_name == "FLASHINFER":
            raise UnsupportedError(
                [
                    "enable_prefix_caching=True cannot be had over FLASHINFER, which plans on the host with lengths "
                    "that only the device knows after a hit; use --no-enable-prefix-caching, or another inner_backend."
                ]
            )
        return FilteredSteps(
            self.config,
            layout,
            block_size,
            # vLLM may cut its blocks into smaller ones for the kernels; the mark is one of its blocks.
            cache_config.block_size // block_size if shares else 0,
            scheduler.max_num_seqs + 1,
            -(-vllm_config.model_config.max_model_len // block_size) + 1,
            device,
            functools.partial(
                _open_cache, list(self._filtered), list(self._filtered.values()), cache_config.cache_dtype
            ),
            functools.partial(_gather_heads, vllm_config.model_config.get_total_num_kv_heads())
            if vllm_config.parallel_config.tensor_parallel_size > 1
            else None,
        )

    def status(self) -> dict[str, Any]:
        """Settings in force and totals of this group; see `worker.WorkerStatus`."""
        self._settle()
        mode = self._vllm_config.compilation_config.cudagraph_mode
        return {
            **status.describe(
                self.config,
                list(self._filtered),
                self._dense,
                list(self._layers_skipping),
                self._unskipped,
                num_layers(self._vllm_config),
                self.counters.as_dict(),
            ),
            "inner_backend": self.inner_name,
            "cudagraph_mode": mode.name if mode is not None else "NONE",
        }

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
        metadata = inner.build(
            0,  # packed tokens are no common prefix
            common.replace(**vars(adjusted), _num_computed_tokens_cache=None),
            fast_build,
            **kwargs,
        )
        if skipping is not None:
            skipping.attach(metadata, common, seq_lens, self._steps.shared_chunks(common.num_reqs))
        return metadata

    def _count_dense(self, common: CommonAttentionMetadata) -> None:
        lengths = HostLengths.of(common)
        if self._capturing or not lengths.real.any():
            return
        self.counters.tokens_seen += int((lengths.seq_lens - lengths.num_computed)[lengths.real].sum())
        self.counters.rows_dense[next(iter(self._dense))] += int(lengths.real.sum())
        decoding = lengths.real & (lengths.seq_lens - lengths.num_computed == 1)
        reads, layers = int(lengths.seq_lens[decoding].sum()), sum(len(own) for own in self._dense.values())
        self.counters.count_reads(reads, reads, layers, len(self._layers_skipping))


@functools.cache
def backend_over(name: str) -> type[AttentionBackend]:
    """The backend TOKEN_FILTERING over one of vLLM's; `dispatch.OVER_<name>` is where vLLM finds it again."""
    inner = AttentionBackendEnum[name].get_class()
    attributes = {"inner_name": name, "__module__": __name__}
    builder = type(f"FilteringBuilderOver{name}", (FilteringBuilder, inner.get_builder_cls()), dict(attributes))
    impl = type(f"ImplOver{name}", (SkippingImpl, SortingImpl, inner.get_impl_cls()), dict(attributes))
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


def _open_cache(layer_indices: list[int], layers: list[Attention], cache_dtype: str) -> GpuCache:
    """The layers' KV cache as the kernels see it.

    Raises:
        UnsupportedError: it lies otherwise than the kernels can follow.
    """
    caches = [layer.kv_cache for layer in layers]
    heads, width = layers[0].num_kv_heads, 2 * layers[0].head_size
    try:
        if caches[0].dim() != 4 or caches[0].shape[1] != heads or caches[0].shape[3] != width:
            raise ValueError(f"a KV cache of shape {tuple(caches[0].shape)}")
        return GpuCache.over(caches, layer_indices, _FP8_TYPES.get(cache_dtype, caches[0].dtype))
    except ValueError as error:
        raise UnsupportedError(
            [f"kv_cache_dtype={cache_dtype} gives {error}, which is not known; use kv_cache_dtype=auto."]
        ) from error


def _gather_heads(total_kv_heads: int, scores: torch.Tensor) -> torch.Tensor:
    """Every head's scores, in the model's order, from this rank's [num_layers, num_tasks, num_kv_heads, 2, C]."""
    gathered: torch.Tensor = get_tp_group().all_gather(scores, dim=2)
    # KV heads that are fewer than ranks are repeated on neighbouring ranks.
    return gathered[:, :, :: gathered.shape[2] // total_kv_heads]


def _settle_all(settles: list[Callable[[], None]]) -> None:
    for settle in settles:
        settle()
