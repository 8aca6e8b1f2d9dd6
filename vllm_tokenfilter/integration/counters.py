"""What the filter did, counted in the worker: plain integers, added to once per step.

Counts are per KV-cache group of this worker. A "row" is one request in one step. Token counts are positions of
sequences, so they do not grow with the number of layers; multiply by the filtered layers for entries of the cache.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Annotated, Any, get_type_hints

from vllm_tokenfilter.layer_plan import DenseReason


class Merge(Enum):
    """How a counter of parts of a model, of ranks and of engines becomes one: engines always add up."""

    TOKENS = auto()  #: the same in all parts and ranks
    MEANS = auto()  #: a mean over the layers of all parts; the same in all ranks
    CALLS = auto()  #: added up over parts and ranks
    PER_LAYER = auto()  #: added up over parts; the same in all ranks


@dataclass
class StepCounters:
    """Totals since start; each says how it merges."""

    tokens_seen: Annotated[int, Merge.TOKENS] = 0  #: tokens computed by steps of the group.
    tokens_sealed: Annotated[int, Merge.MEANS] = 0  #: positions in chunks that were sealed.
    tokens_pruned: Annotated[int, Merge.MEANS] = 0  #: positions among them that left the cache.
    rows_filtered: Annotated[int, Merge.TOKENS] = 0  #: rows that read a filtered cache.
    #: Rows that read every token, by reason.
    rows_dense: Annotated[Counter[str], Merge.TOKENS] = field(default_factory=Counter)
    seals: Annotated[int, Merge.CALLS] = 0  #: kernel calls.
    seal_seconds: Annotated[float, Merge.CALLS] = 0.0  #: time spent in them; on a GPU the device's, see `gpu/clock.py`.
    #: Attentions of a token in a layer that skips, once the warm-up is over.
    attentions_decided: Annotated[int, Merge.PER_LAYER] = 0
    attentions_skipped: Annotated[int, Merge.PER_LAYER] = 0  #: attentions among them that were skipped.
    #: Cache entries (a token in a layer) that rows of one new token would have read without us.
    reads_dense: Annotated[int, Merge.PER_LAYER] = 0
    reads_filtered: Annotated[int, Merge.PER_LAYER] = 0  #: entries among them that were left after KV filtering.
    reads_done: Annotated[int, Merge.PER_LAYER] = 0  #: entries among those that were left after skipping.

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


def merged_as(rule: Merge) -> tuple[str, ...]:
    """The counters that merge by this rule; AttributeError where one has none."""
    hints = get_type_hints(StepCounters, include_extras=True)
    return tuple(name for name, hint in hints.items() if rule in hint.__metadata__)
