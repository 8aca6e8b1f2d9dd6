"""What gpu_attention.py measures: vLLM's decode kernels over a paged cache, our step before them, and timers.

Source: vllm/v1/attention/backends/triton_attn.py and flash_attn.py (how the kernels are called).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.kernels.plan import DuePlan, plan_seals
from vllm_tokenfilter.layout import Layout

if TYPE_CHECKING:  # imported where they are used, once Triton knows whether it interprets
    from vllm_tokenfilter.integration.gpu.steps import FilteredSteps
    from vllm_tokenfilter.kernels.gpu.cache import GpuCache
    from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice

Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """The attention of a model on one GPU."""

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token in one layer's cache."""
        return self.kv_heads * 2 * self.head_size * dtype.itemsize


def interpret_triton() -> None:
    """Let Triton's interpreter run our kernels and vLLM's, on a CPU; before either is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    try:
        from vllm import triton_utils
    except ImportError:
        return
    # Without a GPU vLLM puts placeholders there.
    triton_utils.triton, triton_utils.tl = triton, triton.language


class Kernel:
    """A decode kernel of vLLM's, one query token per request; `unavailable` says why it cannot run here, or nothing."""

    name: str
    unavailable = ""

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        self._starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self._scale = shape.head_size**-0.5

    def attend(self, query: Tensor, cache: Tensor, seq_lens: Tensor, longest: int, table: Tensor, out: Tensor) -> None:
        """One layer; `cache` is [num_blocks, kv_heads, block_size, 2 * head_size]."""
        raise NotImplementedError

    def _common(
        self, query: Tensor, cache: Tensor, seq_lens: Tensor, longest: int, table: Tensor, out: Tensor
    ) -> dict[str, Any]:
        """What both kernels take under the same names; arguments as in `attend`."""
        keys, values = cache.transpose(1, 2).split(query.shape[2], dim=-1)
        return dict(
            q=query,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=self._starts,
            max_seqlen_q=1,
            seqused_k=seq_lens,
            max_seqlen_k=longest,
            softmax_scale=self._scale,
            causal=True,
            block_table=table,
            softcap=0,
        )


class TritonAttention(Kernel):
    """vLLM's unified Triton kernel, as TRITON_ATTN calls it for decoding."""

    name = "TRITON_ATTN"

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        super().__init__(shape, batch, device)
        try:
            from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
            from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        except ImportError as error:
            self.unavailable = f"vLLM's Triton kernel cannot be imported: {error}"
            return
        self._unified_attention = unified_attention
        threshold = MIN_LAUNCH_GRID_SIZE_2D // shape.kv_heads
        parts = (threshold, shape.query_heads, NUM_PAR_SOFTMAX_SEGMENTS)
        width = 1 << (shape.head_size - 1).bit_length()
        self._segments = {
            "seq_threshold_3D": threshold,
            "num_par_softmax_segments": NUM_PAR_SOFTMAX_SEGMENTS,
            "softmax_segm_output": torch.empty(*parts, width, dtype=torch.float32, device=device),
            "softmax_segm_max": torch.empty(parts, dtype=torch.float32, device=device),
            "softmax_segm_expsum": torch.empty(parts, dtype=torch.float32, device=device),
        }

    def attend(self, query: Tensor, cache: Tensor, seq_lens: Tensor, longest: int, table: Tensor, out: Tensor) -> None:
        """See `Kernel.attend`."""
        self._unified_attention(
            **self._common(query, cache, seq_lens, longest, table, out),
            window_size=(-1, -1),
            q_descale=None,
            k_descale=None,
            v_descale=None,
            **self._segments,
        )


class FlashAttention(Kernel):
    """The FlashAttention that vLLM brings, as FLASH_ATTN calls it for decoding."""

    name = "FLASH_ATTN"

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        super().__init__(shape, batch, device)
        if device.type != "cuda":
            self.unavailable = "FlashAttention has no kernels for a CPU"
            return
        try:
            from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
        except ImportError as error:
            self.unavailable = f"vLLM's FlashAttention cannot be imported: {error}"
            return
        self._flash_attention = flash_attn_varlen_func
        self._version = get_flash_attn_version(head_size=shape.head_size)
        if self._version is None:
            self.unavailable = "vLLM has no FlashAttention for this GPU"

    def attend(self, query: Tensor, cache: Tensor, seq_lens: Tensor, longest: int, table: Tensor, out: Tensor) -> None:
        """See `Kernel.attend`."""
        self._flash_attention(
            **self._common(query, cache, seq_lens, longest, table, out),
            window_size=[-1, -1],
            fa_version=self._version,
        )


KERNELS: tuple[type[Kernel], ...] = (TritonAttention, FlashAttention)


@dataclass(frozen=True)
class Step:
    """A step as `steps.RunnerStep` describes it."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor | None
    is_prefilling: Tensor | None
    max_seq_len: int
    num_reqs: int
    block_table_tensor: Tensor
    slot_mapping: Tensor


class Requests:
    """A batch of requests of one length, in a paged cache full of noise, laid out as vLLM does by default (LBNHC).

    Attributes:
        caches: per layer [num_blocks, kv_heads, block_size, 2 * head_size].
        table: int32 [batch, blocks of a row], blocks in no order.
    """

    def __init__(
        self,
        shape: Shape,
        layers: int,
        batch: int,
        tokens: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._device, self._batch, self._block_size = device, batch, block_size
        per_row = -(-tokens // block_size)
        sizes = (layers, batch * per_row, block_size, shape.kv_heads, 2 * shape.head_size)
        storage = torch.empty(sizes, dtype=dtype, device=device)
        for layer in storage:
            layer.normal_()
        self.caches = [layer.transpose(1, 2) for layer in storage]
        order = np.random.default_rng(0).permutation(batch * per_row).astype(np.int32)
        self.table = torch.from_numpy(order.reshape(batch, per_row)).to(device)

    def steps(self, config: FilterConfig) -> "tuple[FilteredSteps, GpuCache]":
        """Our side of these requests' steps."""
        from vllm_tokenfilter.integration.gpu.steps import FilteredSteps
        from vllm_tokenfilter.kernels.gpu.cache import GpuCache

        cache = GpuCache.over(self.caches, list(range(len(self.caches))), self.caches[0].dtype)
        rows, blocks = self.table.shape
        return FilteredSteps(
            config, config.layout, self._block_size, 0, rows, blocks, self._device, lambda: cache
        ), cache

    def decode_step(self, computed: int) -> Step:
        """One new token for each."""
        starts = torch.arange(self._batch + 1, dtype=torch.int32)
        lengths = torch.full((self._batch,), computed + 1, dtype=torch.int32)
        return Step(
            starts.to(self._device),
            starts,
            lengths.to(self._device),
            lengths,
            torch.zeros(self._batch, dtype=torch.bool),
            computed + 1,
            self._batch,
            self.table,
            torch.zeros(self._batch, dtype=torch.int64, device=self._device),
        )

    def plain_attention(self, query: Tensor, seq_len: int) -> Tensor:
        """The first row's attention over `seq_len` slots of the last layer's first KV head, in plain PyTorch.

        Args:
            query: [batch, query_heads, head_size].
            seq_len: slots read.

        Returns:
            float32 [query heads of one KV head, head_size].
        """
        cache, slots = self.caches[-1], torch.arange(seq_len, device=self._device)
        stored = cache[self.table[0, slots // self._block_size].long(), 0, slots % self._block_size].float()
        keys, values = stored.split(query.shape[2], dim=-1)
        own = query[0, : query.shape[1] // cache.shape[1]].float()
        return (own @ keys.T * query.shape[2] ** -0.5).softmax(-1) @ values

    def due(self, config: FilterConfig, computed: int, new: int, rows: int) -> "DueSealsOnDevice":
        """What a step of `new` tokens for each of the first `rows` requests makes due."""
        from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice

        done = np.full(rows, computed, np.int64)
        plan = plan_seals(done, done + new, self._block_size, config.layout)
        assert plan is not None, f"nothing is due between {computed} and {computed + new} tokens"
        shared = torch.zeros(rows, dtype=torch.int32, device=self._device)
        return DueSealsOnDevice.snapshot(plan, self.table[:rows], shared)


def seal_bytes_floor(cache: "GpuCache", plan: DuePlan, layout: Layout) -> int:
    """Bytes a seal of this plan must move at least, by a selector that reads keys and values.

    Each scored chunk and the predecessors of the first are read once; each token that changes its slot is read once
    and written once. Scores, block tables and lengths are small beside it and not counted.
    """
    per_token = len(cache.layer_addresses) * cache.num_kv_heads * 2 * cache.head_size * cache.element_size
    tokens = 0
    for num_tokens, first, last in zip(plan.num_tokens, plan.first_chunk, plan.last_chunk, strict=True):
        scored = last - first + (first == 0)
        tokens += scored * layout.chunk_size + (layout.anchor_terms if first else 0)
        # The kept tokens of chunk 0 mostly stay where they are; from the next on, all move.
        moved = (last - first) * layout.kept_per_chunk + num_tokens - last * layout.chunk_size
        tokens += 2 * (moved - (layout.kept_per_chunk if first == 0 else 0))
    return int(tokens) * per_token


class DeviceTimer:
    """Seconds the device takes, launches not counted: it is kept busy until the host has launched everything."""

    _BUSY_CYCLES = 10_000_000

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, run: Run) -> float:
        """Time one run."""
        torch.cuda._sleep(self._BUSY_CYCLES)
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


class HostTimer:
    """Seconds that pass, for the interpreter."""

    def seconds(self, run: Run) -> float:
        """Time one run."""
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


def graph_of(run: Run, device: torch.device) -> Run:
    """The launches of `run` as one CUDA graph, as vLLM decodes; where there are none, `run` itself."""
    run()  # compiles
    if device.type != "cuda":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth(device: torch.device, timer: DeviceTimer | HostTimer, size: int) -> float:
    """Bytes a second of a plain copy of `size` bytes, read and written ones counted; the best of five."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(timer.seconds(lambda: target.copy_(source)) for _ in range(5))
