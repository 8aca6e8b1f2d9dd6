"""Where the filter meets vLLM: the step's metadata, with other `seq_lens` and `slot_mapping` than vLLM would give.

Runs in the worker, once per step and KV-cache group, before the forward:

1. the seals that the previous step made due are run (`sealing.seal`);
2. rows that hold removed tokens get `seq_lens` = stored tokens + new tokens, and their new tokens get the slots behind
   the stored ones;
3. the stock builder makes its metadata from that, and the stock kernel runs unchanged (`skipping` says for which rows);
4. what this step makes due is noted for the next one.

A step in which no row is longer than the window and a chunk passes through untouched.

Source: vllm/v1/attention/backends/cpu_attn.py, vllm/v1/worker/gpu_model_runner.py (`_build_attention_metadata`).
"""

import time

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.cpu import block_tables, sealing
from vllm_tokenfilter.integration.cpu.skipping import CpuSkipStep, SkippingLayers, SkippingMetadata, with_other_lengths
from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
from vllm_tokenfilter.integration.layers import layers_by_index, total_kv_heads
from vllm_tokenfilter.integration.lifecycle import CountingBuilder, planned_model
from vllm_tokenfilter.kernels.cpu.build import load_kernel
from vllm_tokenfilter.kernels.cpu.seal import DueSeals
from vllm_tokenfilter.kernels.plan import plan_seals
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import removed_tokens, shares_prefixes


class TokenFilteringMetadataBuilder(CountingBuilder, CPUAttentionMetadataBuilder):
    """Makes the metadata of one group of layers, which have one layout or keep every token; see `CountingBuilder`.

    Attributes:
        layout: where the group's tokens lie; None: it keeps every token.
        skipping_layers: indices of the layers that skip attention.
        due: what the step before made due.
        skipping: what is carried of raw tokens for skipping, from the first step that may skip on.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.counters = StepCounters()
        model = planned_model(vllm_config)
        self.use(refusals.require_supported(vllm_config), model.plan)
        if self.in_totals:
            model.count(self)

    def use(self, config: FilterConfig, plan: LayerPlan) -> None:
        """Filter by these settings, and the plan they make of all layers; only while no request is running."""
        layers = layers_by_index(self.vllm_config, self.layer_names)
        self.config, self.plan = config, plan.only(layers)
        for row in self.plan.rows:
            layers[row.index].impl.skips = row.index if row.skip_units else None
        self._layers = {row.index: layers[row.index] for row in self.plan.rows if row.reads is None}
        self.skipping_layers, self._dense_reason = self.plan.skipping, next(iter(self.plan.dense), "")
        self.layout = next(iter(self.plan.layouts), None)
        self.due: DueSeals | None = None
        self.skipping: SkippingLayers | None = None
        self._cache: sealing.FilteredCache | None = None
        # Chunks can come sealed from the prefix cache only where blocks follow what is stored.
        self._shares = (
            self.layout is not None
            and isinstance(self.kv_cache_spec, FilteredAttentionSpec)
            and self.vllm_config.cache_config.enable_prefix_caching
            and shares_prefixes(self.layout, self.block_size)
        )
        if self.layout is not None or self.skipping_layers:
            load_kernel()  # now, so that no request waits for the compiler

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """See `AttentionMetadataBuilder.build`; `common_attn_metadata.slot_mapping` is overwritten in place."""
        common, layout = common_attn_metadata, self.layout
        self.seal_due()
        # A dummy or profiling run writes nowhere, reads nothing of value and must leave nothing due.
        if int(common.slot_mapping[0]) < 0:
            return super().build(common_prefix_len, common, fast_build)

        seq_lens = common.seq_lens.numpy().astype(np.int64)
        query_lens = np.diff(common.query_start_loc_cpu.numpy()).astype(np.int64)
        num_computed = seq_lens - query_lens
        tables = common.block_table_tensor.numpy()
        shared_chunks = removed = np.zeros_like(num_computed)
        if layout is not None:
            if self._shares:
                shared_chunks = block_tables.shared_chunks_of(tables, num_computed, self.block_size, layout)
                if shared_chunks.any():
                    tables = block_tables.without_marks(tables, shared_chunks, self.block_size, layout)
                    common = common.replace(block_table_tensor=torch.from_numpy(tables))
            removed = removed_tokens(num_computed, layout, shared_chunks)
            plan = plan_seals(num_computed, seq_lens, self.block_size, layout, shared_chunks)
            if plan is not None:
                self.due = DueSeals.snapshot(plan, tables, shared_chunks)
            if removed.any():
                first_slots, stored = num_computed - removed, seq_lens - removed
                block_tables.rewrite_slots(common.slot_mapping, first_slots, query_lens, tables, self.block_size)
                common = common.replace(
                    seq_lens=torch.from_numpy(stored.astype(np.int32)).to(common.seq_lens.dtype),
                    max_seq_len=int(stored.max()),
                )
        self._count(seq_lens, query_lens, removed)
        metadata = super().build(common_prefix_len, common, fast_build)
        if not self.skipping_layers:
            return metadata
        if self.skipping is None:
            self.skipping = SkippingLayers(self._layers, self.plan, self.isa, self.config)
        skip = CpuSkipStep.of(
            self.skipping,
            tables,
            num_computed,
            query_lens,
            shared_chunks,
            layout,
            with_other_lengths(self, metadata, common.num_reqs),
            self.counters,
        )
        return SkippingMetadata(**vars(metadata), skip=skip)

    def seal_due(self) -> sealing.SealedChunks | None:
        """Seal what the step before made due; what was chosen, or None where nothing was due."""
        due, self.due = self.due, None
        if due is None:
            return None
        layout = self.layout
        assert layout is not None
        if self._cache is None:
            heads = total_kv_heads(self.vllm_config, next(iter(self._layers)))
            self._cache = sealing.FilteredCache.over(self._layers, self.isa, heads)
        started = time.perf_counter()
        carried = None if self.skipping is None else self.skipping.carried
        sealed = sealing.seal(due, self._cache, layout, self.config, carried)
        if self.skipping is not None:
            self.skipping.follow(due, layout)
        self.counters.seals += 1
        self.counters.seal_seconds += time.perf_counter() - started
        chunks = due.plan.num_chunks
        self.counters.count_sealed(chunks * layout.chunk_size, chunks * layout.removed_per_chunk)
        return sealed

    def _count(self, seq_lens: NDArray[np.int64], query_lens: NDArray[np.int64], removed: NDArray[np.int64]) -> None:
        self.counters.tokens_seen += int(query_lens.sum())
        decoding = query_lens == 1
        dense, filtered = int(seq_lens[decoding].sum()), int((seq_lens - removed)[decoding].sum())
        self.counters.count_reads(dense, filtered, len(self.plan.rows), len(self.skipping_layers))
        if self.layout is None:
            self.counters.rows_dense[self._dense_reason] += len(query_lens)
        else:
            # A filtered row reads a cache from which tokens were removed before this step.
            self.counters.count_rows(len(removed), int(np.count_nonzero(removed)))
