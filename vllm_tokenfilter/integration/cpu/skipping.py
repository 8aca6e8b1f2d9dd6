"""Attention skipping on the CPU backend: the paper's own mechanism, layer by layer inside a step's forward.

Made by the metadata builder for a set of layers of one layout. In each layer's forward, when the step's keys and
values are in the cache: decide for every token, let vLLM's kernel attend for those that are not skipped, and put the
substitute in place of the rest. A skipped row that decodes reads one entry of the cache instead of all; what attends
for it otherwise is our own kernel. In a prefill row the same decisions change the output and save nothing.

What a decision needs from the past is carried from step to step by physical slot (score and debt) or block (anchors,
the mean of outputs), so that aborts, preemption, reuse of blocks and prefix caching need no bookkeeping: whoever gets a
block next writes before it reads. A seal moves it along with the raw tokens.

Source: vllm/v1/attention/backends/cpu_attn.py (`CPUAttentionBackendImpl.forward`, `build`).
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch
import vllm.envs as envs
from numpy.typing import NDArray
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.cpu.cache_view import view_paged_cache
from vllm_tokenfilter.kernels.cpu import skip
from vllm_tokenfilter.kernels.cpu.cache import BFLOAT16, FLOAT32, PagedCache
from vllm_tokenfilter.kernels.cpu.seal import DueSeals
from vllm_tokenfilter.kernels.rules import SkipRule
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import Layout, removed_tokens, sealed_chunks

#: How the kernels read and write a tensor; of other dtypes they get copies.
_ENCODINGS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


class SkippingLayers:
    """The layers of one layout that skip, with what is carried of their raw tokens from step to step."""

    def __init__(self, layers: Mapping[int, Attention], plan: LayerPlan, isa: str, config: FilterConfig) -> None:
        """Allocate address space for the pool; memory is used only where tokens are.

        `layers` are all of the layout with a cache of their own, by index in the model; `plan` says which of them skip,
        and which share. `isa` is the instruction-set name of their CPU kernels.
        """
        self.rule, self.substitute = SkipRule.of(config), config.attention_skipping.substitute
        self.paged: PagedCache = view_paged_cache([layer.kv_cache for layer in layers.values()], isa)
        self.units = {row.index: row.skip_units for row in plan.rows}
        self.places = {index: place for place, index in enumerate(layers)}
        self.carried = np.zeros((len(layers), self.paged.num_blocks * self.paged.block_size), np.int64)
        self.anchors = np.zeros((len(layers), self.paged.num_blocks, self.paged.anchor_width), np.float32)
        self._means: NDArray[np.float32] | None = None

    def means(self, width: int) -> NDArray[np.float32]:
        """Means of outputs, float32 [num_layers, num_blocks, width + 1]; made when the first layer needs them."""
        if self._means is None:
            self._means = np.zeros((len(self.places), self.paged.num_blocks, width + 1), np.float32)
        return self._means

    def follow(self, due: DueSeals, layout: Layout) -> None:
        """Let what is carried by block follow the newest tokens of the rows that were just sealed."""
        plan, rows, size = due.plan, np.arange(len(due.plan.rows)), self.paged.block_size
        newest = plan.num_tokens - 1 - plan.first_chunk * layout.removed_per_chunk
        moved = newest - (plan.last_chunk - plan.first_chunk) * layout.removed_per_chunk
        target, source = (due.block_tables[rows, slots // size] for slots in (moved, newest))
        for carried in (self.anchors, self._means):
            if carried is not None:
                carried[:, target] = carried[:, source]


@dataclass
class CpuSkipStep:
    """One step of the layers of one layout."""

    layers: SkippingLayers  #: the layers.
    state: skip.SkipState  #: the same for the kernels.
    read_lens: torch.Tensor  #: `state.read_lens` as vLLM's kernel takes them.
    warm: int  #: tokens of the step behind the warm-up.
    #: Stock metadata of the step with other `seq_lens`; may be the same object in every layer.
    metadata_for: Callable[[torch.Tensor], Any]
    counters: StepCounters  #: of the group.

    @classmethod
    def of(
        cls,
        layers: SkippingLayers,
        block_tables: NDArray[np.int32],
        num_computed: NDArray[np.int64],
        query_lens: NDArray[np.int64],
        shared_chunks: NDArray[np.int64],
        layout: Layout | None,
        metadata_for: Callable[[torch.Tensor], Any],
        counters: StepCounters,
    ) -> "CpuSkipStep":
        """Describe a step: each row's blocks without marks, its tokens before the step and in it.

        `shared_chunks` are those it took over sealed from the prefix cache. `layout` is None if the layers keep every
        token.
        """
        if layout is None:
            removed = raw = np.zeros_like(num_computed)
        else:
            removed = removed_tokens(num_computed, layout, shared_chunks)
            raw = sealed_chunks(num_computed, layout, shared_chunks) * layout.kept_per_chunk
        starts = np.zeros(len(query_lens) + 1, np.int64)
        np.cumsum(query_lens, out=starts[1:])
        slots = num_computed - removed
        rows = skip.SkipRows(
            block_tables=np.ascontiguousarray(block_tables), starts=starts, slots=slots, raw=raw, positions=num_computed
        )
        cold = np.clip(layers.rule.warmup - num_computed, 0, query_lens)
        state = skip.SkipState(
            layers.paged,
            layers.rule,
            rows,
            layers.carried,
            layers.anchors,
            torch.get_num_threads(),
            (slots + query_lens).astype(np.int32),
            layers.substitute,
        )
        warm = int((query_lens - cold).sum())
        return cls(layers, state, torch.from_numpy(state.read_lens), warm, metadata_for, counters)

    def forward(
        self,
        index: int,
        attend: Callable[[Any], Any],
        metadata: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        softcap: float,
    ) -> None:
        """Attend in one layer, into `output`: like query, [num_tokens, num_heads, head_size], perhaps padded, or flat.

        `attend` runs vLLM's kernel with the metadata it is given; `metadata` is the step's where nothing is skipped.
        `softcap` 0 is none.
        """
        # Called in every layer of a decode step, which finds the interpreter's caches full of keys and values: every
        # line here costs several times what it costs elsewhere.
        place, state = self.layers.places[index], self.state
        skip.decide_skips(state, place, self.layers.units[index])
        num_skipped, num_idle, num_read = state.totals.tolist()
        attend(self.metadata_for(self.read_lens) if num_idle else metadata)
        self.counters.attentions_decided += self.warm
        self.counters.attentions_skipped += num_skipped
        self.counters.reads_done += num_read
        substitute = self.layers.substitute
        if substitute == "running_output":
            self._average_outputs(place, output)
        elif num_skipped == 0:
            return
        elif substitute == "none":
            assert output.is_contiguous()
            skip.clear_skipped(state, output.data_ptr(), output.stride(0) * output.element_size())
        elif substitute == "window":
            self._attend_window(place, query, output, scale, softcap)
        else:
            assert_never(substitute)

    def _attend_window(
        self, place: int, query: torch.Tensor, output: torch.Tensor, scale: float, softcap: float
    ) -> None:
        paged = self.layers.paged
        if (encoding := _ENCODINGS.get(output.dtype)) is None:
            whole = output.float()
            self._attend_window(place, query.float(), whole, scale, softcap)
            output.copy_(whole)
            return
        assert output.is_contiguous() and query.stride(1) == query.shape[2] == len(paged.key_dims)
        group = query.shape[1] // paged.num_kv_heads
        addresses = query.data_ptr(), query.stride(0), output.data_ptr(), output.stride(0)
        skip.attend_window(self.state, place, group, scale, softcap, *addresses, encoding)

    def _average_outputs(self, place: int, output: torch.Tensor) -> None:
        count, width = len(self.state.skipped), output[0].numel()
        flat = output.view(len(output), width)[:count]
        outputs = flat.float().contiguous()
        skip.average_outputs(self.state, self.layers.means(width)[place], outputs.numpy())
        mask = torch.from_numpy(self.state.skipped).view(torch.bool)[:, None]
        torch.where(mask, outputs.to(flat.dtype), flat, out=flat)


@dataclass
class SkippingMetadata(CPUAttentionMetadata):
    """What the stock builder made, with the step for layers that skip attention."""

    skip: CpuSkipStep | None = None


def with_other_lengths(
    builder: CPUAttentionMetadataBuilder, metadata: CPUAttentionMetadata, num_reqs: int
) -> Callable[[torch.Tensor], CPUAttentionMetadata]:
    """Makes metadata of a step with other `seq_lens`; the next call overwrites it.

    Called in every layer, where the stock builder's description of a step would take as long as its schedule, the
    only thing in it that depends on the lengths.
    """
    made = copy.copy(metadata)
    schedule = functools.partial(
        ops.cpu_attn_get_scheduler_metadata,
        num_reqs=num_reqs,
        num_heads=builder.num_heads,
        num_kv_heads=builder.num_kv_heads,
        head_dim=builder.head_dim,
        dtype=builder.dtype,
        query_start_loc=metadata.query_start_loc,
        causal=metadata.causal,
        sliding_window_size=builder.window_size,
        isa=builder.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        dynamic_causal=metadata.dynamic_causal,
        kv_cache_dtype=builder.kv_cache_dtype,
    )

    def with_lengths(seq_lens: torch.Tensor) -> CPUAttentionMetadata:
        made.seq_lens, made.scheduler_metadata = seq_lens, schedule(seq_lens=seq_lens)
        return made

    return with_lengths
