"""Attention skipping on a GPU: what a KV-cache group's builder and its layers' forward add to vLLM's own.

The builder attaches a `SkipStepOnDevice` to the metadata it returns. In the forward of a layer that skips, once the
step's keys and values are in the cache: two launches decide, on the device, whose attention is skipped, and write the
lengths that vLLM's kernel attends to, 1 for a decoding row that is skipped; then vLLM's kernel runs over these lengths;
then one launch puts the substitute in place of skipped outputs. No data reaches the host, and no Python depends on it:
with TRITON_ATTN, whose kernels read lengths from the device and plan nothing ahead, a full CUDA graph holds all of it.
Other backends of vLLM plan from the step's lengths before the forward, and are refused.

Source: vllm/model_executor/layers/attention/attention.py (`unified_attention_with_output`),
vllm/v1/attention/backends/triton_attn.py (`TritonAttentionMetadata.seq_lens`, `TritonAttentionImpl.forward`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.kernels.gpu import skip
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.carry import CarriedOnDevice, bytes_of_means, follow_seals
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.gpu.rows import SkipBuffers, SkipRowsOnDevice, describe_rows
from vllm_tokenfilter.kernels.gpu.substitutes import put_substitute
from vllm_tokenfilter.kernels.rules import SkipRule
from vllm_tokenfilter.layout import Layout

#: The attribute of vLLM's metadata that holds a `SkipStepOnDevice`.
_STEP = "token_filtering_step"


@dataclass(frozen=True)
class SkipStepOnDevice:
    """A step of the layers that skip.

    Attributes:
        rows: as the kernels read it.
        shortened: vLLM's metadata with the lengths that the running layer attends to.
    """

    rows: SkipRowsOnDevice
    shortened: Any


class SkippingGroup:
    """The layers of a KV-cache group that skip, and what is carried for their tokens."""

    def __init__(
        self,
        config: FilterConfig,
        layers: dict[int, Attention],
        units: Mapping[int, int],
        layout: Layout | None,
        max_num_reqs: int,
        max_num_tokens: int,
        device: torch.device,
        counters: StepCounters,
        open_cache: Callable[[], GpuCache],
    ) -> None:
        """Prepare, and tell the layers' implementations.

        Args:
            config: the settings.
            layers: those that skip, by index in the model.
            units: see `LayerRow.skip_units`, by index in the model.
            layout: where their tokens lie; None if they keep every token.
            max_num_reqs: most rows of a step, padding included.
            max_num_tokens: most tokens of a step, padding included.
            device: where the step's tensors lie.
            counters: of the group; `settle` brings them up to date.
            open_cache: called once, when the KV cache exists, for a view of their caches in the order of `layers`.
        """
        self._rule, self._layout, self._open_cache = SkipRule.of(config), layout, open_cache
        self._substitute = config.attention_skipping.substitute
        self._units = [units[index] for index in layers]
        first = next(iter(layers.values()))
        self._mean_width = first.num_heads * first.head_size if self._substitute == "running_output" else 0
        self._buffers = SkipBuffers.make(max_num_reqs, max_num_tokens, first.num_kv_heads, device)
        self._carried: CarriedOnDevice | None = None
        self._counters, self._settled = counters, (0, 0, 0)
        for place, layer in enumerate(layers.values()):
            layer.impl.skipping = (self, place)

    def use(self, layout: Layout | None) -> None:
        """Go on with another layout, None: every token is kept; only while no request is running."""
        self._layout = layout

    def attach(self, metadata: Any, step: Any, seq_lens: Tensor, shared_chunks: Tensor | None) -> None:
        """Make vLLM's metadata of a step known to skip by; one launch.

        Args:
            metadata: what the inner builder made: over what the layers store.
            step: vLLM's own metadata of the step, `slot_mapping` adjusted.
            seq_lens: int32 [num_reqs] on the device, tokens once the step is done.
            shared_chunks: int32 [num_reqs], chunks taken over sealed; None where nothing is filtered.
        """
        num_reqs = seq_lens.shape[0]
        describe_rows(step.query_start_loc, seq_lens, shared_chunks, self._buffers, self._layout)
        rows = SkipRowsOnDevice(
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            metadata.slot_mapping,
            num_reqs,
            metadata.num_actual_tokens,
            metadata.max_query_len == 1,
        )
        if self._carried is None:
            # In the first dummy run, so that no request waits for it.
            self._carried = self._open()
            skip.warm_up(self._carried, self._rule, rows, self._buffers, self._substitute, self._layout)
        shortened = dataclasses.replace(metadata, seq_lens=self._buffers.read_lens[:num_reqs])
        setattr(metadata, _STEP, SkipStepOnDevice(rows, shortened))

    def decide(self, place: int, step: SkipStepOnDevice) -> None:
        """Decide for a step's tokens in one layer, by its place among those that skip; see `skip.decide`."""
        assert self._carried is not None
        skip.decide(self._carried, self._rule, step.rows, self._buffers, place, self._units[place], self._substitute)

    def put_substitute(
        self,
        place: int,
        step: SkipStepOnDevice,
        query: Tensor,
        output: Tensor,
        scale: float,
        softcap: float,
        layer: Attention,
    ) -> None:
        """Replace the outputs of skipped attentions in one layer; see `put_substitute`."""
        assert self._carried is not None
        group = self._carried, self._rule, step.rows, self._buffers, place, self._substitute
        put_substitute(*group, query, output, scale, softcap, layer._k_scale, layer._v_scale)

    def follow(self, due: DueSealsOnDevice) -> None:
        """Let what is carried for tokens follow a seal."""
        if self._carried is not None:
            assert self._layout is not None
            follow_seals(self._carried, due, self._layout)

    def settle(self) -> None:
        """Add to the counters what the device counted since; waits for the device."""
        counted = tuple(self._buffers.totals.sum(0).tolist())
        decided, skipped, read = (now - before for now, before in zip(counted, self._settled, strict=True))
        self._counters.attentions_decided += decided
        self._counters.attentions_skipped += skipped
        self._counters.reads_done += read
        self._settled = counted

    def _open(self) -> CarriedOnDevice:
        cache = self._open_cache()
        if self._mean_width:
            needed, device = bytes_of_means(cache, self._mean_width), cache.saved_redundancy.device
            free = torch.accelerator.get_memory_info(device)[0]
            if needed > free:
                raise UnsupportedError(
                    [
                        "attention_skipping.substitute=running_output keeps a mean for each KV block, "
                        f"{needed / 2**30:.2f} GiB beside the KV cache, and {free / 2**30:.2f} GiB are free; lower "
                        "gpu_memory_utilization, or use window."
                    ]
                )
        return CarriedOnDevice.over(cache, self._mean_width)


class SkippingImpl:
    """Mixed in before an attention implementation of vLLM's: a layer may skip attention.

    Attributes:
        skipping: the group, and the layer's place in it; None if the layer does not skip. Set by the metadata builder.
    """

    skipping: tuple[SkippingGroup, int] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._may_skip = refusals.settings_of(self._token_filtering_config).attention_skipping.ratio > 0  # type: ignore[attr-defined]
        if self._may_skip:
            # Substitutes are computed from queries, and written as outputs, in the model's own type.
            self.supports_quant_query_input = False

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """See `AttentionImpl.fused_output_quant_supported`."""
        supported: bool = super().fused_output_quant_supported(quant_key)  # type: ignore[misc]
        return supported and not self._may_skip

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """See `TritonAttentionImpl.forward`; nothing in here depends on what the device holds."""
        inner: Any = super()
        if self.skipping is None or attn_metadata is None:
            attended: Tensor = inner.forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return attended
        (group, place), step = self.skipping, getattr(attn_metadata, _STEP)
        group.decide(place, step)
        inner.forward(layer, query, key, value, kv_cache, step.shortened, output, *args, **kwargs)
        group.put_substitute(place, step, query, output, self.scale, self.logits_soft_cap, layer)  # type: ignore[attr-defined]
        return output
