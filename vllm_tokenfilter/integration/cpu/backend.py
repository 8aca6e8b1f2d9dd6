"""The backend TOKEN_FILTERING: vLLM's stock CPU backend with other `seq_lens` and `slot_mapping`.

Runs in the worker, once per step and KV-cache group, before the forward:

1. the seals that the previous step made due are run (`sealing.seal`);
2. rows that hold removed tokens get `seq_lens` = stored tokens + new tokens, and their new tokens get the slots behind
   the stored ones;
3. the stock builder makes its metadata from that, and the stock kernel runs unchanged (`skipping` says for which rows);
4. what this step makes due is noted for the next one.

A step in which no row is longer than the window and a chunk passes through untouched.

A KV-cache group in service holds layers of one layout, or dense layers only. Layers can also be mixed in one group
whose blocks follow the length (`TokenFilteringMetadataBuilder.use`), which measures quality for many settings in one
engine: then the group is several `_Part`s, and each layer takes the metadata of its own.

Source: vllm/v1/attention/backends/cpu_attn.py, vllm/v1/worker/gpu_model_runner.py (`_build_attention_metadata`).
"""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import vllm.envs as envs
from numpy.typing import NDArray
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import refusals, status
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.cpu import sealing
from vllm_tokenfilter.integration.cpu.block_tables import point_new_tokens_at, shared_chunks_of, without_marks
from vllm_tokenfilter.integration.cpu.skipping import SkippingLayers, SkipStep
from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
from vllm_tokenfilter.integration.layers import num_layers, sort_layers, sort_skipping
from vllm_tokenfilter.integration.lifecycle import SortingImpl, log_totals_at_end
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.kernels.cpu.build import load_kernel
from vllm_tokenfilter.layout import Layout, removed_tokens, shares_prefixes


class TokenFilteringBackend(CPUAttentionBackend):
    """CPU_ATTN that reads, for each request, only the tokens its layers still store."""

    @staticmethod
    def get_name() -> str:
        """The name layers report."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["TokenFilteringImpl"]:
        """The per-layer implementation."""
        return TokenFilteringImpl

    @staticmethod
    def get_builder_cls() -> type["TokenFilteringMetadataBuilder"]:
        """The per-step metadata builder."""
        return TokenFilteringMetadataBuilder


@dataclass
class TokenFilteringMetadata(CPUAttentionMetadata):
    """What the stock builder made, with what some layers need besides.

    Attributes:
        skip: the step for layers that skip attention.
        parts: of a group whose layers lie in several ways, by layout (None: dense): each part's own metadata.
    """

    skip: SkipStep | None = None
    parts: dict[Layout | None, "TokenFilteringMetadata"] | None = None


class TokenFilteringImpl(SortingImpl, CPUAttentionBackendImpl):
    """The stock implementation; a layer takes the metadata of its own layout, and may skip attention.

    Attributes:
        layout: where the layer's tokens lie; None: it keeps every token.
        skips: index of the layer in the model if it skips attention, else None.
        mixed: whether its group holds layers that lie otherwise, so that it must pick its own metadata.

    All are set by the metadata builder, which knows the layer's index.
    """

    inner_name = CPUAttentionBackend.get_name()
    layout: Layout | None = None
    skips: int | None = None
    mixed = False

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See `CPUAttentionBackendImpl.forward`."""
        # Called in every layer of a step, whose caches hold keys and values by then: no line here is cheap.
        stock = super().forward
        if self.skips is None and not self.mixed:
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        own = self._own(attn_metadata)
        if self.skips is None or own is None or (skip := getattr(own, "skip", None)) is None:
            return stock(layer, query, key, value, kv_cache, own, output, *args, **kwargs)
        skip.forward(
            self.skips,
            lambda metadata: stock(layer, query, key, value, kv_cache, metadata, output, *args, **kwargs),
            own,
            query,
            output,
            self.scale,
            self.logits_soft_cap,
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """See `CPUAttentionBackendImpl.do_kv_cache_update`."""
        if self.mixed:
            metadata = get_forward_context().attn_metadata
            common = metadata.get(layer.layer_name) if isinstance(metadata, dict) else None
            if getattr(common, "parts", None) is not None:
                slot_mapping = self._own(common).slot_mapping
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def _own(self, metadata: Any) -> Any:
        parts = getattr(metadata, "parts", None)
        return metadata if parts is None else parts[self.layout]


@dataclass
class _Part:
    """The layers of a group that lie alike.

    Attributes:
        layout: where their tokens lie; None: they keep every token.
        layers: by index in the model, ascending.
        skipping_layers: indices of those that skip attention.
        due: what the step before made due.
        cache: the layers' cache, from the first seal on.
        skipping: what is kept of their raw tokens, from the first step that may skip on.
    """

    layout: Layout | None
    layers: dict[int, Attention]
    skipping_layers: list[int]
    due: sealing.DueSeals | None = None
    cache: sealing.FilteredCache | None = None
    skipping: SkippingLayers | None = None


class TokenFilteringMetadataBuilder(CPUAttentionMetadataBuilder):
    """Makes one group's metadata each step; the only state is what the step before made due, and the counters.

    Attributes:
        observer: called with every seal and what it chose; None in service.
    """

    observer: Callable[[sealing.DueSeals, sealing.SealedChunks], None] | None = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.counters = StepCounters()
        self.use(refusals.require_supported(vllm_config))
        log_totals_at_end(self, self.counters)

    def use(self, config: FilterConfig) -> None:
        """Filter by these settings from now on; only while no request is running. The counters go on."""
        self.config = config
        self._num_layers = num_layers(self.vllm_config)
        self._filtered, self._dense = sort_layers(self.vllm_config, config, self.layer_names)
        skipping, self._unskipped = sort_skipping(self.vllm_config, config, self.layer_names)
        layouts = config.layouts(self._num_layers)
        lying: dict[Layout | None, dict[int, Attention]] = {}
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        for name, layer in sorted(layers.items(), key=lambda item: extract_layer_index(item[0])):
            owner = extract_layer_index(layer.kv_sharing_target_layer_name or name)
            index = extract_layer_index(name)
            layer.impl.layout = layouts[owner] if owner in self._filtered else None
            layer.impl.skips = index if index in skipping else None
            own = lying.setdefault(layer.impl.layout, {})
            if index == owner:
                own[index] = layer
        self.parts = [
            _Part(layout, own, [index for index in own if index in skipping]) for layout, own in lying.items()
        ]
        for layer in layers.values():
            layer.impl.mixed = len(self.parts) > 1
        # Chunks can come sealed from the prefix cache only where blocks follow what is stored.
        self._shared_layout = (
            self.parts[0].layout
            if isinstance(self.kv_cache_spec, FilteredAttentionSpec)
            and self.vllm_config.cache_config.enable_prefix_caching
            and self.parts[0].layout is not None
            and shares_prefixes(self.parts[0].layout, self.block_size)
            else None
        )
        if self._filtered or skipping:
            load_kernel()  # now, so that no request waits for the compiler

    def status(self) -> dict[str, Any]:
        """Settings in force and totals of this group; see `worker.WorkerStatus`."""
        skipping = sorted(index for part in self.parts for index in part.skipping_layers)
        return status.describe(
            self.config,
            list(self._filtered),
            self._dense,
            skipping,
            self._unskipped,
            self._num_layers,
            self.counters.as_dict(),
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """See `AttentionMetadataBuilder.build`; `common_attn_metadata.slot_mapping` is overwritten in place."""
        common = common_attn_metadata
        self._seal_due()
        # A dummy or profiling run writes nowhere, reads nothing of value and must leave nothing due.
        if int(common.slot_mapping[0]) < 0:
            return super().build(common_prefix_len, common, fast_build)

        seq_lens = common.seq_lens.numpy().astype(np.int64)
        query_lens = np.diff(common.query_start_loc_cpu.numpy()).astype(np.int64)
        shared, common = self._take_out_marks(common, seq_lens - query_lens)
        step = _Step(common_prefix_len, common, fast_build, seq_lens, query_lens, seq_lens - query_lens, shared)
        self.counters.tokens_seen += int(query_lens.sum())
        if len(self.parts) == 1:
            return self._build_part(self.parts[0], step)
        made = {part.layout: self._build_part(part, step.with_slots_of_its_own()) for part in self.parts}
        first = next(iter(made.values()))
        return TokenFilteringMetadata(**{**vars(first), "parts": made})

    def _build_part(self, part: _Part, step: "_Step") -> CPUAttentionMetadata:
        """The metadata of the layers that lie alike; overwrites the step's slot mapping in place."""
        common = step.common
        removed = (
            np.zeros_like(step.num_computed)
            if part.layout is None
            else removed_tokens(step.num_computed, part.layout, step.shared)
        )
        self._count(part, step, removed)
        if part.layout is not None:
            tables = common.block_table_tensor.numpy()
            part.due = sealing.due_seals(
                step.seq_lens, step.num_computed, step.shared, tables, self.block_size, part.layout
            )
            if removed.any():
                stored = step.seq_lens - removed
                first_slots = step.num_computed - removed
                point_new_tokens_at(first_slots, step.query_lens, tables, self.block_size, common.slot_mapping)
                common = common.replace(
                    seq_lens=torch.from_numpy(stored.astype(np.int32)).to(common.seq_lens.dtype),
                    max_seq_len=int(stored.max()),
                )
        metadata = super().build(step.common_prefix_len, common, step.fast_build)
        if not part.skipping_layers:
            return metadata
        skip = SkipStep.of(
            self._skipping_of(part),
            common.block_table_tensor.numpy(),
            step.num_computed,
            step.query_lens,
            step.shared,
            part.layout,
            self._other_lengths(metadata, common.num_reqs),
            self.counters,
        )
        return TokenFilteringMetadata(**vars(metadata), skip=skip)

    def _other_lengths(
        self, metadata: CPUAttentionMetadata, num_reqs: int
    ) -> Callable[[torch.Tensor], CPUAttentionMetadata]:
        """Makes metadata of the step with other `seq_lens`; the next call overwrites it.

        Called in every layer, where the stock builder's description of a step would take as long as its schedule, the
        only thing in it that depends on the lengths.
        """
        made = copy.copy(metadata)
        schedule = functools.partial(
            ops.cpu_attn_get_scheduler_metadata,
            num_reqs=num_reqs,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=metadata.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )

        def with_lengths(seq_lens: torch.Tensor) -> CPUAttentionMetadata:
            made.seq_lens, made.scheduler_metadata = seq_lens, schedule(seq_lens=seq_lens)
            return made

        return with_lengths

    def _take_out_marks(
        self, common: CommonAttentionMetadata, num_computed: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], CommonAttentionMetadata]:
        """Chunks each row took over sealed, int64 [num_reqs], and the step without the marks behind them."""
        layout = self._shared_layout
        if layout is None:
            return np.zeros_like(num_computed), common
        tables = common.block_table_tensor.numpy()
        shared = shared_chunks_of(tables, num_computed, self.block_size, layout)
        if not shared.any():
            return shared, common
        tables = without_marks(tables, shared, self.block_size, layout)
        return shared, common.replace(block_table_tensor=torch.from_numpy(tables))

    def _count(self, part: _Part, step: "_Step", removed: NDArray[np.int64]) -> None:
        decoding = step.query_lens == 1
        dense, filtered = int(step.seq_lens[decoding].sum()), int((step.seq_lens - removed)[decoding].sum())
        self.counters.count_reads(dense, filtered, len(part.layers), len(part.skipping_layers))
        if not self._filtered:
            self.counters.rows_dense[next(iter(self._dense))] += len(step.query_lens)
            return
        if part is not next(part for part in self.parts if part.layout is not None):
            return
        # A filtered row reads a cache from which tokens were removed before this step.
        self.counters.count_rows(len(removed), int(np.count_nonzero(removed)))

    def _skipping_of(self, part: _Part) -> SkippingLayers:
        if part.skipping is None:
            part.skipping = SkippingLayers(
                list(part.layers),
                [layer.kv_cache for layer in part.layers.values()],
                self.isa,
                self.config,
                self._num_layers,
            )
        return part.skipping

    def _seal_due(self) -> None:
        for part in self.parts:
            due, part.due = part.due, None
            if due is None:
                continue
            assert part.layout is not None
            if part.cache is None:
                layers = list(part.layers.values())
                part.cache = sealing.FilteredCache.over(
                    list(part.layers),
                    [layer.kv_cache for layer in layers],
                    self.isa,
                    self.vllm_config.model_config.get_total_num_kv_heads(),
                )
            started = time.perf_counter()
            carried = None if part.skipping is None else part.skipping.kept
            sealed = sealing.seal(due, part.cache, part.layout, self.config, carried)
            if part.skipping is not None:
                part.skipping.follow(due, part.layout)
            self.counters.seals += 1
            self.counters.seal_seconds += time.perf_counter() - started
            self.counters.count_sealed(
                due.num_chunks * part.layout.chunk_size,
                due.num_chunks * part.layout.removed_per_chunk,
                len(part.layers) / len(self._filtered),
            )
            if self.observer is not None:
                self.observer(due, sealed)


@dataclass(frozen=True)
class _Step:
    """One call of `build`; arrays int64 [num_reqs]."""

    common_prefix_len: int
    common: CommonAttentionMetadata
    fast_build: bool
    seq_lens: NDArray[np.int64]
    query_lens: NDArray[np.int64]
    num_computed: NDArray[np.int64]
    shared: NDArray[np.int64]

    def with_slots_of_its_own(self) -> "_Step":
        """The same step with a slot mapping that may be overwritten without the other parts' seeing it."""
        return replace(self, common=self.common.replace(slot_mapping=self.common.slot_mapping.clone()))
