"""What a step makes due, from its lengths alone: the host's side of a seal on any device.

Source: docs/layout.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_tokenfilter.layout import Layout, sealed_chunks, stored_tokens


@dataclass(frozen=True)
class DuePlan:
    """The rows of a step that have chunks to seal; arrays are int64, with an entry per such row."""

    rows: NDArray[np.int64]  #: rows of the step.
    num_tokens: NDArray[np.int64]  #: computed tokens once the step is done.
    first_chunk: NDArray[np.int64]  #: first due chunk.
    last_chunk: NDArray[np.int64]  #: one past the last due chunk.
    num_blocks: int  #: entries of the block table the rows use.

    @property
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
    last = sealed_chunks(seq_lens, layout, shared_chunks)
    rows = np.flatnonzero(last > first)
    if not len(rows):
        return None
    # The step wrote its tokens raw behind what was stored before it.
    highest = (stored_tokens(num_computed, layout, shared_chunks) + seq_lens - num_computed)[rows]
    return DuePlan(rows, seq_lens[rows], first[rows], last[rows], -(-int(highest.max()) // block_size))
