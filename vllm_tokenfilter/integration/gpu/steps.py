"""One KV-cache group's steps on a GPU: lengths, slots and due seals, whatever attention backend reads them.

The device does the arithmetic (`kernels/gpu/lengths.py`), into buffers that stay where they are. The host decides only
whether anything is to be launched, from lengths it has anyway: without speculative decoding, which is refused, vLLM's
"upper bound" of the lengths is exact, async scheduling included. Nothing here waits for the device.

What a row took over from the prefix cache is read off the block table, which only the device has. The host goes by the
length alone: it may launch for a chunk that came sealed, and the device then does nothing; and the host's counts take
the last of the chunks that were taken over for chunks sealed here, at most recent_window tokens of a request.

Imports no vLLM: `RunnerStep` is the part of its step metadata that is used.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.gpu.clock import SealClock
from vllm_tokenfilter.kernels.gpu import seal
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.gpu.lengths import StepBuffers, adjust_step
from vllm_tokenfilter.kernels.plan import DuePlan, plan_between
from vllm_tokenfilter.kernels.rules import ScoreRule
from vllm_tokenfilter.layout import Layout, sealed_chunks


class RunnerStep(Protocol):
    """What vLLM's runners say of a step; `cpu` tensors are host copies, the others may lie on the device."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor | None
    is_prefilling: Tensor | None
    max_seq_len: int
    num_reqs: int
    block_table_tensor: Tensor
    slot_mapping: Tensor


@dataclass
class HostLengths:
    """A step's lengths as the host knows them, int32 [num_reqs]; valid during the step, whose buffers they look at."""

    seq_lens: NDArray[np.int32]  #: tokens once the step is done.
    num_computed: NDArray[np.int32]  #: tokens before it.
    #: bool, rows of requests. Others pad the step or belong to a dummy run: a request that has computed nothing yet is
    #: prefilling, a dummy is not.
    real: NDArray[np.bool_]
    num_real: int  #: rows of requests.
    decoding: NDArray[np.bool_]  #: those of them with one new token.
    num_tokens: int  #: new tokens of all of them.
    dense_reads: int  #: tokens that a layer reads for those that decode, if it keeps every one.
    by_layout: dict[tuple[Layout, int], "LayoutStep"] = field(default_factory=dict)  #: see `LayoutStep.of`.

    @classmethod
    def of(cls, step: RunnerStep) -> "HostLengths":
        """Read the host's copies; nothing is waited for."""
        bound, num_reqs = step.seq_lens_cpu_upper_bound, step.num_reqs
        assert bound is not None, "the runner gives no host copy of the lengths"
        seq_lens, starts = bound.numpy()[:num_reqs], step.query_start_loc_cpu.numpy()[: num_reqs + 1]
        query_lens = starts[1:] - starts[:-1]
        num_computed, real = seq_lens - query_lens, query_lens > 0
        if step.is_prefilling is not None and num_computed.min() == 0:
            known = num_computed > 0
            # vLLM's V2 runner pads a decode batch up to its CUDA graph's, but not this.
            prefilling = step.is_prefilling.numpy()[:num_reqs]
            known[: len(prefilling)] |= prefilling
            real &= known
        decoding = real & (query_lens == 1)
        num_tokens, dense_reads = int(query_lens[real].sum()), int(seq_lens[decoding].sum())
        return cls(seq_lens, num_computed, real, int(np.count_nonzero(real)), decoding, num_tokens, dense_reads)


@dataclass
class LayoutStep:
    """What a step means for every KV-cache group of one layout: the groups differ in their block tables alone."""

    stored: Tensor  #: int32 [num_reqs] on the host: slots that attention reads.
    max_stored: int  #: the largest of them.
    plan: DuePlan | None  #: what the step makes due.
    filtered_rows: int  #: rows of requests of which something was sealed.
    reads: int  #: tokens that a layer reads for the rows that decode.
    due: DueSealsOnDevice | None = None  #: what the first of the groups copied.

    @classmethod
    def of(cls, lengths: HostLengths, layout: Layout, block_size: int) -> "LayoutStep":
        """The same value for every group that asks during a step."""
        found = lengths.by_layout.get((layout, block_size))
        if found is None:
            first, last = sealed_chunks(np.stack((lengths.num_computed, lengths.seq_lens)), layout)
            stored = lengths.seq_lens - first * layout.removed_per_chunk
            if lengths.num_real < len(stored):
                last = np.where(lengths.real, last, first)  # rows that own nothing are not due
            found = lengths.by_layout[layout, block_size] = cls(
                torch.from_numpy(stored),
                int(stored.max()),
                plan_between(first, last, lengths.seq_lens, block_size, layout) if layout.removed_per_chunk else None,
                int(np.count_nonzero(first[lengths.real])),
                int(stored[lengths.decoding].sum()),
            )
        return found


class StepsInCommon:
    """The step that the groups of a model are at: what the first of them works out serves the others.

    Both of vLLM's runners take a new view of the host's lengths for each step and hand that one to every group. It is
    kept until the next comes, so that nothing else can be taken for it; and no group is given the same step twice.
    """

    def __init__(self) -> None:
        self._bound: Tensor | None = None
        self._lengths: HostLengths
        self._asked: set[int] = set()

    def lengths(self, step: RunnerStep, group: object) -> HostLengths:
        """The step's lengths, as a group asks for them once a step."""
        if step.seq_lens_cpu_upper_bound is not self._bound or id(group) in self._asked:
            self._lengths, self._bound, self._asked = HostLengths.of(step), step.seq_lens_cpu_upper_bound, set()
        self._asked.add(id(group))
        return self._lengths


@dataclass(frozen=True)
class Adjusted:
    """What the inner builder is given in place of the step's own.

    Attributes:
        seq_lens: int32 [num_reqs] on the device: slots that attention reads.
        seq_lens_cpu_upper_bound: int32 [num_reqs]; exact where no prefixes are shared.
        max_seq_len: the largest of them, or what the step said for a dummy run.
        block_table_tensor: int32 [num_reqs, max_blocks], without marks.
    """

    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor
    max_seq_len: int
    block_table_tensor: Tensor


class FilteredSteps:
    """The steps of a group of filtered layers. Its state: what the step before made due, and what a seal saves.

    Attributes:
        counters: what was done.
        readers: layers that read the cache of those it seals.
        clock: what brings `counters.seal_seconds` up to date.
    """

    def __init__(
        self,
        config: FilterConfig,
        layout: Layout,
        block_size: int,
        mark_blocks: int,
        max_num_reqs: int,
        max_blocks: int,
        device: torch.device,
        open_cache: Callable[[], GpuCache],
        gather_heads: Callable[[Tensor], Tensor] | None = None,
        common: StepsInCommon | None = None,
    ) -> None:
        """Prepare.

        Args:
            config: the settings.
            layout: where the group's tokens lie.
            block_size: tokens per entry of the block table.
            mark_blocks: entries of the mark behind what a row took over; 0 where no prefixes are shared, whatever the
                layout.
            max_num_reqs: most rows of a step, padding included.
            max_blocks: entries of a block-table row.
            device: where the step's tensors lie.
            open_cache: called once, when the KV cache exists.
            gather_heads: see `kernels.gpu.seal.seal_chunks`.
            common: of the model's groups; None for a group by itself.
        """
        self.config, self.layout = config, layout
        self.counters, self.readers = StepCounters(), 0
        self.clock = SealClock(self.counters, device)
        self._block_size, self._mark_blocks = block_size, mark_blocks
        self._buffers = StepBuffers.make(max_num_reqs, max_blocks if mark_blocks else 0, device)
        self._rule = ScoreRule.of(config)
        self._open_cache, self._gather_heads = open_cache, gather_heads
        self._cache: GpuCache | None = None
        self._due: DueSealsOnDevice | None = None
        self._after_seal: Callable[[DueSealsOnDevice], None] | None = None
        self._layers_skipping, self._dense_reason = 0, ""
        self._common = common or StepsInCommon()

    def use(self, config: FilterConfig, layout: Layout | None, dense_reason: str) -> None:
        """Go on with another layout, None: every token is kept, for this reason; only while no request is running.

        What CUDA graphs captured reads the same buffers: what depends on the layout is launched outside of them.
        """
        self.config, self._due, self._dense_reason = config, None, dense_reason
        self.layout = layout or dataclasses.replace(self.layout, kept_per_chunk=self.layout.chunk_size)
        if layout is not None and self._cache is not None:
            seal.warm_up(self._cache, layout, self._rule, self._gather_heads)

    def followed_by(self, after_seal: Callable[[DueSealsOnDevice], None], layers_skipping: int) -> None:
        """Call back after each seal, in the stream's order; so many of the layers skip attention."""
        self._after_seal, self._layers_skipping = after_seal, layers_skipping

    def shared_chunks(self, num_reqs: int) -> Tensor:
        """Chunks that the rows of the adjusted step took over sealed, int32 [num_reqs]; NO_SEALS for dummies."""
        return self._buffers.shared_chunks[:num_reqs]

    def adjust(self, step: RunnerStep, capturing: bool = False) -> Adjusted:
        """Seal what the step before made due, and say what this one's attention is to read.

        `step.slot_mapping` is rewritten in place: the forward holds the same tensor.

        Args:
            step: the step.
            capturing: whether a CUDA graph is being captured: nothing is counted then, or made due.
        """
        if self._cache is None:
            # In the first dummy run, so that no request waits for it.
            self._cache = self._open_cache()
            seal.warm_up(self._cache, self.layout, self._rule, self._gather_heads)
        self._seal_due(self._cache)
        num_reqs, buffers = step.num_reqs, self._buffers
        adjust_step(
            step.query_start_loc,
            step.seq_lens[:num_reqs],
            step.block_table_tensor[:num_reqs],
            step.slot_mapping,
            buffers,
            self.layout,
            self._block_size,
            self._mark_blocks,
        )
        table = buffers.clean_tables[:num_reqs] if self._mark_blocks else step.block_table_tensor
        lengths = self._common.lengths(step, self)
        of_layout = LayoutStep.of(lengths, self.layout, self._block_size)
        max_seq_len = step.max_seq_len
        if not capturing and lengths.num_real:
            self._count(lengths, of_layout, len(self._cache.layer_addresses) + self.readers)
            if (plan := of_layout.plan) is not None:
                shared_chunks = buffers.shared_chunks[:num_reqs]
                self._due = DueSealsOnDevice.snapshot(plan, table, shared_chunks, of_layout.due)
                of_layout.due = of_layout.due or self._due
            max_seq_len = of_layout.max_stored
        return Adjusted(buffers.stored_lens[:num_reqs], of_layout.stored, max_seq_len, table)

    @property
    def anything_due(self) -> bool:
        """Whether the last step left chunks to seal."""
        return self._due is not None

    def _count(self, lengths: HostLengths, of_layout: LayoutStep, num_layers: int) -> None:
        self.counters.tokens_seen += lengths.num_tokens
        self.counters.count_reads(lengths.dense_reads, of_layout.reads, num_layers, self._layers_skipping)
        if self.layout.removed_per_chunk:
            self.counters.count_rows(lengths.num_real, of_layout.filtered_rows)
        else:
            self.counters.rows_dense[self._dense_reason] += lengths.num_real

    def _seal_due(self, cache: GpuCache) -> None:
        due, self._due = self._due, None
        if due is None:
            return
        with self.clock.measure():
            self.seal(due, cache)
            if self._after_seal is not None:
                self._after_seal(due)
        self.counters.seals += 1
        chunks = due.plan.num_chunks
        self.counters.count_sealed(chunks * self.layout.chunk_size, chunks * self.layout.removed_per_chunk)

    def seal(self, due: DueSealsOnDevice, cache: GpuCache) -> Tensor:
        """Seal; see `kernels.gpu.seal.seal_chunks`."""
        return seal.seal_chunks(cache, due, self.layout, self._rule, self._gather_heads)
