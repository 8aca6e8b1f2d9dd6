"""What a step makes due, from its lengths alone: the host's side of a seal on any device.

Source: docs/layout.md.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_tokenfilter.layout import Layout, sealed_chunks


@dataclass(frozen=True)
class DuePlan:
    """The rows of a step that have chunks to seal; arrays of integers, with an entry per such row."""

    rows: NDArray[Any]  #: rows of the step.
    num_tokens: NDArray[Any]  #: computed tokens once the step is done.
    first_chunk: NDArray[Any]  #: first due chunk.
    last_chunk: NDArray[Any]  #: one past the last due chunk.
    num_blocks: int  #: entries of the block table the rows use.

    @functools.cached_property
    def num_chunks(self) -> int:
        """Chunks due over all rows."""
        return int((self.last_chunk - self.first_chunk).sum())

    @property
    def num_tasks(self) -> int:
        """Chunks to look at: of each row also the one behind its due chunks, which is scored ahead."""
        return self.num_chunks + len(self.rows)


def plan_seals(
    num_computed: NDArray[np.int64],
    seq_lens: NDArray[np.int64],
    block_size: int,
    layout: Layout,
    shared_chunks: NDArray[np.int64] | int = 0,
) -> DuePlan | None:
    """What a step makes due, or None.

    Args:
        num_computed: [num_reqs], tokens before the step.
        seq_lens: [num_reqs], tokens once it is done.
        block_size: tokens per block.
        layout: the layout's integers.
        shared_chunks: [num_reqs], chunks known to have come sealed from the prefix cache.
    """
    first = sealed_chunks(num_computed, layout, shared_chunks)
    return plan_between(first, sealed_chunks(seq_lens, layout, shared_chunks), seq_lens, block_size, layout)


def plan_between(
    first: NDArray[Any], last: NDArray[Any], seq_lens: NDArray[Any], block_size: int, layout: Layout
) -> DuePlan | None:
    """The same from the chunks sealed before the step and those sealed once it is done, [num_reqs]."""
    rows = (last > first).nonzero()[0]
    if not len(rows):
        return None
    first, num_tokens = first[rows], seq_lens[rows]
    # The step wrote its tokens raw behind what was stored before it.
    highest = int((num_tokens - first * layout.removed_per_chunk).max())
    return DuePlan(rows, num_tokens, first, last[rows], -(-highest // block_size))
