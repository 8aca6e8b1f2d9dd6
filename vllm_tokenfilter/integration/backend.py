"""The backend TOKEN_FILTERING: vLLM's stock CPU backend with other `seq_lens` and `slot_mapping`.

Runs in the worker, once per step and KV-cache group, before the forward:

1. the seals that the previous step made due are run (`sealing.seal`);
2. rows that hold removed tokens get `seq_lens` = stored tokens + new tokens, and their new tokens get the slots behind
   the stored ones;
3. the stock builder makes its metadata from that, and the stock kernel runs unchanged;
4. what this step makes due is noted for the next one.

A step in which no row is longer than the window and a chunk passes through untouched.

Source: vllm/v1/attention/backends/cpu_attn.py, vllm/v1/worker/gpu_model_runner.py (`_build_attention_metadata`).
"""

import time
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig, get_layers_from_vllm_config
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
from vllm.v1.kv_cache_interface import AttentionSpec, ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import refusals, sealing, status
from vllm_tokenfilter.integration.counters import DenseReason, StepCounters
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.kernels.build import load_kernel
from vllm_tokenfilter.layout import removed_tokens

logger = init_logger("vllm.tokenfilter")


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
    """Makes one group's metadata each step; the only state is what the step before made due, and the counters."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.counters = StepCounters()
        self.use(refusals.require_supported(vllm_config))
        logger.info(
            "%s", status.start_block(self.config, list(self._filtered), self._dense, CPUAttentionBackend.get_name())
        )
        # A worker process leaves through multiprocessing, which runs no atexit handlers but these.
        Finalize(self, _log_totals, args=(self.counters,), exitpriority=10)

    def use(self, config: FilterConfig) -> None:
        """Filter by these settings from now on; only while no request is running. The counters go on."""
        self.config, self.layout = config, config.layout
        self._due: sealing.DueSeals | None = None
        self._cache: sealing.FilteredCache | None = None
        self._filtered, self._dense = self._sort_layers()
        if self._filtered:
            load_kernel()  # now, so that no request waits for the compiler

    def status(self) -> dict[str, Any]:
        """Settings in force and totals of this group; see `WorkerStatus.token_filtering_status`."""
        return status.describe(self.config, list(self._filtered), self._dense, self.counters.as_dict())

    def _sort_layers(self) -> tuple[dict[int, Attention], dict[str, list[int]]]:
        """The filtered layers by index, and the dense ones' indices by reason; tells each layer which it is."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        filtered: dict[int, Attention] = {}
        dense: dict[str, list[int]] = {}
        for name, layer in sorted(layers.items(), key=lambda item: extract_layer_index(item[0])):
            owner = layer.kv_sharing_target_layer_name
            index = extract_layer_index(owner or name)
            reason = self._dense_reason(layer, index)
            layer.impl.filtered = reason is None
            if reason is not None:
                dense.setdefault(str(reason), []).append(extract_layer_index(name))
            elif owner is None:
                filtered[index] = layer
        return filtered, dense

    def _dense_reason(self, layer: Attention, index: int) -> DenseReason | None:
        spec = self.kv_cache_spec
        if layer.sliding_window is not None or isinstance(spec, SlidingWindowSpec):
            return DenseReason.SLIDING_WINDOW
        if isinstance(spec, ChunkedLocalAttentionSpec):
            return DenseReason.CHUNKED_LOCAL
        if type(spec) is not FullAttentionSpec:
            return DenseReason.OTHER_CACHE
        if layer.impl.alibi_slopes is not None:
            return DenseReason.ALIBI
        if self.layout.removed_per_chunk == 0:
            return DenseReason.RATIO_ZERO
        return None if self.config.filters_layer(index) else DenseReason.CONFIGURED

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
        self._count(seq_lens, query_lens)
        if not self._filtered or seq_lens.max() < self.layout.first_seal:
            return super().build(common_prefix_len, common, fast_build)

        num_computed = seq_lens - query_lens
        self._due = sealing.due_seals(
            seq_lens, num_computed, common.block_table_tensor.numpy(), self.block_size, self.layout
        )
        removed = removed_tokens(num_computed, self.layout)
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

    def _count(self, seq_lens: NDArray[np.int64], query_lens: NDArray[np.int64]) -> None:
        self.counters.tokens_seen += int(query_lens.sum())
        if not self._filtered:
            self.counters.rows_dense[next(iter(self._dense))] += len(seq_lens)
            return
        # A filtered row reads a cache from which tokens were removed before this step.
        short = int((seq_lens - query_lens < self.layout.first_seal).sum())
        self.counters.rows_filtered += len(seq_lens) - short
        if short:
            self.counters.rows_dense[DenseReason.SHORT] += short

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
        sealing.seal(due, self._cache, self.config)
        self.counters.seals += 1
        self.counters.seal_seconds += time.perf_counter() - started
        self.counters.tokens_sealed += due.num_chunks * self.layout.chunk_size
        self.counters.tokens_pruned += due.num_chunks * self.layout.removed_per_chunk


def _log_totals(counters: StepCounters) -> None:
    if counters.tokens_seen:
        logger.info("%s", status.totals_line(counters.as_dict()))
