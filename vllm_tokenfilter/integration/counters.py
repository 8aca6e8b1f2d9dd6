"""What the filter did, counted in the worker: plain integers, added to once per step.

Counts are per KV-cache group of this worker. A "row" is one request in one step. Token counts are positions of
sequences, so they do not grow with the number of layers; multiply by the filtered layers for entries of the cache.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_tokenfilter.layer_plan import DenseReason


@dataclass
class StepCounters:
    """Totals since start.

    Attributes:
        tokens_seen: tokens computed by steps of the group.
        tokens_sealed: positions in chunks that were sealed.
        tokens_pruned: positions among them that left the cache.
        rows_filtered: rows that read a filtered cache.
        rows_dense: rows that read every token, by reason.
        seals: kernel calls.
        seal_seconds: time spent in them; on a GPU the device's, see `gpu/clock.py`.
        attentions_decided: attentions of a token in a layer that skips, once the warm-up is over.
        attentions_skipped: attentions among them that were skipped.
        reads_dense: cache entries (a token in a layer) that rows of one new token would have read without us.
        reads_filtered: entries among them that were left after KV filtering.
        reads_done: entries among those that were left after skipping.
    """

    tokens_seen: int = 0
    tokens_sealed: int = 0
    tokens_pruned: int = 0
    rows_filtered: int = 0
    rows_dense: Counter[str] = field(default_factory=Counter)
    seals: int = 0
    seal_seconds: float = 0.0
    attentions_decided: int = 0
    attentions_skipped: int = 0
    reads_dense: int = 0
    reads_filtered: int = 0
    reads_done: int = 0

    def count_rows(self, rows: int, filtered: int) -> None:
        """Add a step's rows, `filtered` of which read a cache from which something was removed; the rest are short."""
        self.rows_filtered += filtered
        if filtered < rows:
            self.rows_dense[DenseReason.SHORT] += rows - filtered

    def count_sealed(self, sealed: int, pruned: int) -> None:
        """Add the positions of chunks that one seal sealed, and those among them that it pruned."""
        self.tokens_sealed += sealed
        self.tokens_pruned += pruned

    def count_reads(self, dense: int, filtered: int, num_layers: int, num_skipping: int) -> None:
        """Add the cache entries that a step's rows of one new token read.

        Args:
            dense: what a layer would read without us.
            filtered: what it reads after KV filtering.
            num_layers: layers of the group.
            num_skipping: those that skip attention, whose reads are counted where it is decided.
        """
        self.reads_dense += dense * num_layers
        self.reads_filtered += filtered * num_layers
        self.reads_done += filtered * (num_layers - num_skipping)

    def copy(self) -> "StepCounters":
        """The totals as they are now."""
        return replace(self, rows_dense=self.rows_dense.copy())

    def as_dict(self) -> dict[str, Any]:
        """The totals as plain types."""
        return {**vars(self), "rows_dense": {str(reason): count for reason, count in self.rows_dense.items()}}
