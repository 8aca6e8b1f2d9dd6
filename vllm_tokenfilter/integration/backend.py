"""The backend TOKEN_FILTERING: vLLM's stock CPU backend with other `seq_lens` and `slot_mapping`.

Runs in the worker, once per step and KV-cache group, before the forward:

1. the seals that the previous step made due are run (`sealing.seal`);
2. rows that hold removed tokens get `seq_lens` = stored tokens + new tokens, and their new tokens get the slots behind
   the stored ones;
3. the stock builder makes its metadata from that, and the stock kernel runs unchanged;
4. what this step makes due is noted for the next one.

A step in which no row is longer than the window and a chunk passes through untouched.

A KV-cache group in service holds filtered layers only or dense layers only. Layers can also be mixed in one group whose
blocks follow the length (`TokenFilteringMetadataBuilder.use`), which measures quality for many settings in one engine.

Source: vllm/v1/attention/backends/cpu_attn.py, vllm/v1/worker/gpu_model_runner.py (`_build_attention_metadata`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
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
from vllm_tokenfilter.integration import refusals, sealing, status
from vllm_tokenfilter.integration.counters import DenseReason, StepCounters
from vllm_tokenfilter.integration.kv_cache import FilteredAttentionSpec, shared_chunks_of
from vllm_tokenfilter.integration.layers import give_filtered_layers_their_spec, sort_layers
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.kernels.build import load_kernel
from vllm_tokenfilter.layout import removed_tokens, shares_prefixes

logger = init_logger("vllm.tokenfilter")

_SORTED = "_token_filtering_sorted"


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
    """Metadata of a group that holds filtered and dense layers: the filtered layers', with the dense layers' beside it.

    Attributes:
        dense: what the stock builder made of the unchanged step.
    """

    dense: CPUAttentionMetadata | None = None


class TokenFilteringImpl(CPUAttentionBackendImpl):
    """The stock implementation; a layer that stays dense inside a filtered group takes the dense metadata.

    Attributes:
        filtered: set by the metadata builder, which knows the layer's index; dense until then.
    """

    filtered = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """See `AttentionImpl`; the first layer to get here, all being built, sorts the model's layers."""
        super().process_weights_after_loading(act_dtype)
        _sort_all_layers_once(self._vllm_config)

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """See `CPUAttentionBackendImpl.forward`."""
        if not self.filtered:
            attn_metadata = getattr(attn_metadata, "dense", None) or attn_metadata
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """See `CPUAttentionBackendImpl.do_kv_cache_update`."""
        if not self.filtered:
            metadata = get_forward_context().attn_metadata
            own = metadata.get(layer.layer_name) if isinstance(metadata, dict) else None
            dense = getattr(own, "dense", None)
            slot_mapping = slot_mapping if dense is None else dense.slot_mapping
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


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
        # A worker process leaves through multiprocessing, which runs no atexit handlers but these.
        Finalize(self, _log_totals, args=(self.counters,), exitpriority=10)

    def use(self, config: FilterConfig) -> None:
        """Filter by these settings from now on; only while no request is running. The counters go on."""
        self.config, self.layout = config, config.layout
        self._due: sealing.DueSeals | None = None
        self._cache: sealing.FilteredCache | None = None
        self._filtered, self._dense = sort_layers(self.vllm_config, config, self.layer_names)
        for name, layer in get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names).items():
            layer.impl.filtered = extract_layer_index(layer.kv_sharing_target_layer_name or name) in self._filtered
        # Chunks can come sealed from the prefix cache only where blocks follow what is stored.
        self._shares = bool(
            isinstance(self.kv_cache_spec, FilteredAttentionSpec)
            and self.vllm_config.cache_config.enable_prefix_caching
            and shares_prefixes(self.layout, self.block_size)
        )
        if self._filtered:
            load_kernel()  # now, so that no request waits for the compiler

    def status(self) -> dict[str, Any]:
        """Settings in force and totals of this group; see `WorkerStatus.token_filtering_status`."""
        return status.describe(self.config, list(self._filtered), self._dense, self.counters.as_dict())

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
        num_computed = seq_lens - query_lens
        shared, common = self._take_out_marks(common, num_computed)
        removed = removed_tokens(num_computed, self.layout, shared)
        self._count(query_lens, removed)
        if not self._filtered:
            return super().build(common_prefix_len, common, fast_build)

        self._due = sealing.due_seals(
            seq_lens, num_computed, shared, common.block_table_tensor.numpy(), self.block_size, self.layout
        )
        if not removed.any():
            return super().build(common_prefix_len, common, fast_build)

        dense = None
        if self._dense:
            unchanged = common.replace(slot_mapping=common.slot_mapping.clone())
            dense = super().build(common_prefix_len, unchanged, fast_build)
        stored = seq_lens - removed
        self._rewrite_slots(common, query_lens, num_computed - removed)
        metadata = super().build(
            common_prefix_len,
            common.replace(
                seq_lens=torch.from_numpy(stored.astype(np.int32)).to(common.seq_lens.dtype),
                max_seq_len=int(stored.max()),
            ),
            fast_build,
        )
        return metadata if dense is None else TokenFilteringMetadata(**vars(metadata), dense=dense)

    def _take_out_marks(
        self, common: CommonAttentionMetadata, num_computed: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], CommonAttentionMetadata]:
        """Chunks each row took over sealed, int64 [num_reqs], and the step without the marks behind them."""
        if not self._shares:
            return np.zeros_like(num_computed), common
        tables = common.block_table_tensor.numpy()
        shared = shared_chunks_of(tables, num_computed, self.block_size, self.layout)
        rows = np.flatnonzero(shared)
        if not len(rows):
            return shared, common
        tables = tables.copy()  # the original is the runner's, and lives on
        for row, mark in zip(rows, shared[rows] * self.layout.kept_per_chunk // self.block_size, strict=True):
            tables[row, mark:-1] = tables[row, mark + 1 :]
        return shared, common.replace(block_table_tensor=torch.from_numpy(tables))

    def _rewrite_slots(
        self, common: CommonAttentionMetadata, query_lens: NDArray[np.int64], first_slots: NDArray[np.int64]
    ) -> None:
        """Point the step's new tokens at the slots behind what is stored, in place: the forward holds the same tensor.

        Args:
            common: the step.
            query_lens: [num_reqs].
            first_slots: [num_reqs], the slot of each row's first new token.
        """
        rows = np.repeat(np.arange(len(query_lens)), query_lens)
        starts = np.cumsum(query_lens) - query_lens
        slots = np.arange(len(rows)) - starts[rows] + first_slots[rows]
        blocks = common.block_table_tensor.numpy()[rows, slots // self.block_size].astype(np.int64)
        physical = blocks * self.block_size + slots % self.block_size
        common.slot_mapping[: len(rows)] = torch.from_numpy(physical)

    def _count(self, query_lens: NDArray[np.int64], removed: NDArray[np.int64]) -> None:
        self.counters.tokens_seen += int(query_lens.sum())
        if not self._filtered:
            self.counters.rows_dense[next(iter(self._dense))] += len(query_lens)
            return
        # A filtered row reads a cache from which tokens were removed before this step.
        num_filtered = int(np.count_nonzero(removed))
        self.counters.rows_filtered += num_filtered
        if num_filtered < len(removed):
            self.counters.rows_dense[DenseReason.SHORT] += len(removed) - num_filtered

    def _seal_due(self) -> None:
        due, self._due = self._due, None
        if due is None:
            return
        if self._cache is None:
            layers = list(self._filtered.values())
            self._cache = sealing.FilteredCache.over(
                list(self._filtered), [layer.kv_cache for layer in layers], self.isa
            )
        started = time.perf_counter()
        sealed = sealing.seal(due, self._cache, self.config)
        self.counters.seals += 1
        self.counters.seal_seconds += time.perf_counter() - started
        self.counters.tokens_sealed += due.num_chunks * self.layout.chunk_size
        self.counters.tokens_pruned += due.num_chunks * self.layout.removed_per_chunk
        if self.observer is not None:
            self.observer(due, sealed)


def _sort_all_layers_once(vllm_config: VllmConfig) -> None:
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    if any(getattr(layer, _SORTED, False) for layer in layers.values()):
        return
    config = refusals.require_supported(vllm_config)
    filtered, dense = sort_layers(vllm_config, config)
    give_filtered_layers_their_spec(filtered, vllm_config, config)
    for layer in layers.values():
        setattr(layer, _SORTED, True)
    logger.info("%s", status.start_block(config, list(filtered), dense, CPUAttentionBackend.get_name(), vllm_config))


def _log_totals(counters: StepCounters) -> None:
    if counters.tokens_seen:
        logger.info("%s", status.totals_line(counters.as_dict()))
