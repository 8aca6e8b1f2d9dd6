"""What a step made due, on the device: the plan's integers, and the rows' block tables before the next step's arrive.

What is due is decided on the host from lengths; which chunks came sealed from the prefix cache is known on the device
alone, so a program whose chunk is none of the request's own does nothing (`due_chunks`).
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_tokenfilter.kernels.gpu.lengths import NO_SEALS
from vllm_tokenfilter.kernels.plan import DuePlan
from vllm_tokenfilter.layout import Layout

#: Arguments that differ from seal to seal: Triton must not compile anew for them while requests wait.
PER_SEAL = [
    "block_tables", "block_tables_stride", "num_tokens", "first_chunk", "last_chunk", "shared_chunks", "first_task",
    "task_rows", "task_chunks", "num_tasks",
]  # fmt: skip


@dataclass(frozen=True)
class DueSealsOnDevice:
    """A plan with what it needs of the step on the device, copied before the next step overwrites it.

    A task is a chunk to look at: each due one, and of each row the one behind them, which is only scored.
    """

    plan: DuePlan  #: the host's side.
    block_tables: Tensor  #: int32 [num_due_rows, num_blocks].
    shared_chunks: Tensor  #: int32 [num_due_rows].
    #: Each int32 [num_due_rows]: a row's index in the step, `num_tokens`, `first_chunk`, `last_chunk`, first task.
    of_rows: tuple[Tensor, ...]
    of_tasks: tuple[Tensor, ...]  #: each int32 [num_tasks]: row and chunk.

    @classmethod
    def snapshot(
        cls, plan: DuePlan, block_tables: Tensor, shared_chunks: Tensor, alike: "DueSealsOnDevice | None" = None
    ) -> "DueSealsOnDevice":
        """Copy the due rows of a step; asynchronous.

        With `alike`, a copy of the same step for another group of the layout, only block tables are copied: a request
        has taken over the same chunks in both.
        """
        tables = block_tables[:, : plan.num_blocks]
        if alike is not None:
            return cls(
                plan, tables.index_select(0, alike.of_rows[0]), alike.shared_chunks, alike.of_rows, alike.of_tasks
            )
        counts = plan.last_chunk - plan.first_chunk + 1
        first_task = counts.cumsum() - counts
        task_rows = np.repeat(np.arange(len(counts)), counts)
        task_chunks = np.arange(len(task_rows)) - (first_task - plan.first_chunk)[task_rows]
        packed = plan.rows, plan.num_tokens, plan.first_chunk, plan.last_chunk, first_task, task_rows, task_chunks
        host = torch.from_numpy(np.concatenate(packed, dtype=np.int32, casting="same_kind"))
        device = block_tables.device
        # From pinned memory the copy needs no wait; PyTorch keeps the memory until the copy is done.
        integers = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        parts = integers.split([len(counts)] * 5 + [len(task_rows)] * 2)
        tables, shared_chunks = tables.index_select(0, parts[0]), shared_chunks.index_select(0, parts[0])
        return cls(plan, tables, shared_chunks, parts[:5], parts[5:])

    @classmethod
    def nothing(cls, layout: Layout, device: torch.device) -> "DueSealsOnDevice":
        """One chunk that the device finds to be none of its row's own: to have kernels compiled before a request."""
        chunk = np.zeros(1, np.int64)
        plan = DuePlan(chunk, chunk + layout.first_seal, chunk, chunk + 1, 1)
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        return cls.snapshot(plan, table, torch.full_like(table[0], NO_SEALS))

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What every kernel of a seal takes of the rows."""
        return {
            "block_tables": self.block_tables,
            "block_tables_stride": self.block_tables.stride(0),
            "first_chunk": self.of_rows[2],
            "last_chunk": self.of_rows[3],
            "shared_chunks": self.shared_chunks,
        }


@triton.jit
def due_chunks(row, first_chunk, last_chunk, shared_chunks):
    """First due chunk of a row, one past the last, and whether the first was scored by an earlier seal.

    What the host found due is only what the length says: chunks taken over sealed are none of the row's own.
    """
    shared = tl.load(shared_chunks + row)
    first = tl.maximum(tl.load(first_chunk + row), shared)
    last = tl.maximum(tl.load(last_chunk + row), shared)
    return first, last, first > shared
