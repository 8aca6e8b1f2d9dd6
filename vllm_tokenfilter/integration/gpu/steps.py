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
from dataclasses import dataclass
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
from vllm_tokenfilter.kernels.plan import plan_seals
from vllm_tokenfilter.kernels.rules import ScoreRule
from vllm_tokenfilter.layout import Layout, removed_tokens


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


@dataclass(frozen=True)
class HostLengths:
    """A step's lengths as the host knows them, int64 [num_reqs].

    Attributes:
        seq_lens: tokens once the step is done.
        num_computed: tokens before it.
        real: bool, rows of requests. Others pad the step or belong to a dummy run: a request that has computed nothing
            yet is prefilling, a dummy is not.
    """

    seq_lens: NDArray[np.int64]
    num_computed: NDArray[np.int64]
    real: NDArray[np.bool_]

    @classmethod
    def of(cls, step: RunnerStep) -> "HostLengths":
        """Read the host's copies; nothing is waited for."""
        bound, num_reqs = step.seq_lens_cpu_upper_bound, step.num_reqs
        assert bound is not None, "the runner gives no host copy of the lengths"
        seq_lens = bound[:num_reqs].numpy().astype(np.int64)
        query_lens = np.diff(step.query_start_loc_cpu[: num_reqs + 1].numpy()).astype(np.int64)
        num_computed, real = seq_lens - query_lens, query_lens > 0
        if step.is_prefilling is not None:
            # vLLM's V2 runner pads a decode batch up to its CUDA graph's, but not this.
            prefilling = np.zeros(num_reqs, bool)
            prefilling[: len(step.is_prefilling)] = step.is_prefilling[:num_reqs].numpy()
            real &= (num_computed > 0) | prefilling
        return cls(seq_lens, num_computed, real)


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
        """
        self.config, self.layout = config, layout
        self.counters = StepCounters()
        self.clock = SealClock(self.counters, device)
        self._block_size, self._mark_blocks = block_size, mark_blocks
        self._buffers = StepBuffers.make(max_num_reqs, max_blocks if mark_blocks else 0, device)
        self._rule = ScoreRule.of(config)
        self._open_cache, self._gather_heads = open_cache, gather_heads
        self._cache: GpuCache | None = None
        self._due: DueSealsOnDevice | None = None
        self._after_seal: Callable[[DueSealsOnDevice], None] | None = None
        self._layers_skipping, self._dense_reason = 0, ""

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
        lengths = HostLengths.of(step)
        seq_lens, num_computed, real = lengths.seq_lens, lengths.num_computed, lengths.real
        removed = removed_tokens(num_computed, self.layout)
        max_seq_len = step.max_seq_len
        if not capturing and real.any():
            self._count(seq_lens[real], num_computed[real], removed[real], len(self._cache.layer_addresses))
            # Rows that own nothing must not look due.
            own, done = np.where(real, num_computed, 0), np.where(real, seq_lens, 0)
            plan = plan_seals(own, done, self._block_size, self.layout)
            if plan is not None and self.layout.removed_per_chunk:
                self._due = DueSealsOnDevice.snapshot(plan, table, buffers.shared_chunks[:num_reqs])
            max_seq_len = int((seq_lens - removed).max())
        stored = torch.from_numpy((seq_lens - removed).astype(np.int32))
        return Adjusted(buffers.stored_lens[:num_reqs], stored, max_seq_len, table)

    @property
    def anything_due(self) -> bool:
        """Whether the last step left chunks to seal."""
        return self._due is not None

    def _count(
        self,
        seq_lens: NDArray[np.int64],
        num_computed: NDArray[np.int64],
        removed: NDArray[np.int64],
        num_layers: int,
    ) -> None:
        query_lens = seq_lens - num_computed
        self.counters.tokens_seen += int(query_lens.sum())
        decoding = query_lens == 1
        dense, filtered = int(seq_lens[decoding].sum()), int((seq_lens - removed)[decoding].sum())
        self.counters.count_reads(dense, filtered, num_layers, self._layers_skipping)
        if self.layout.removed_per_chunk:
            self.counters.count_rows(len(removed), int(np.count_nonzero(removed)))
        else:
            self.counters.rows_dense[self._dense_reason] += len(removed)

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
