"""Where a filtered layer's tokens lie: integer arithmetic that is a pure function of the length.

Because the counts depend on nothing but the number of computed tokens, the scheduler, every worker and
every tensor-parallel rank agree on them without talking. The same code serves Python ints, NumPy arrays
and torch tensors. A layer's slots, as half-open intervals, once `n` tokens are computed (`s` = sealed):

| slots                       | state  | holds                                                    |
|-----------------------------|--------|----------------------------------------------------------|
| [0, s * kept_per_chunk)     | packed | the kept tokens of chunks 0 .. s-1, in order of position |
| [s * kept_per_chunk, stored)| raw    | positions [s * chunk_size, n), all of them               |

Source: docs/layout.md; the design's section "Sealing: the layout".
"""

from dataclasses import dataclass
from typing import Any, TypeVar

#: int, or an integer NumPy array, or an integer torch tensor: the result has the argument's type and shape.
Length = TypeVar("Length", int, Any)


@dataclass(frozen=True)
class Layout:
    """The integers that fix the layout; made once from the configuration.

    Attributes:
        chunk_size: tokens sealed together, C.
        kept_per_chunk: tokens of each chunk that stay, K, with 1 <= K <= C.
        recent_window: newest tokens that are never sealed, W >= C.
        sink_tokens: first tokens of the sequence that always stay, <= K.
        anchor_terms: earlier tokens that one anchor averages, M <= C.
    """

    chunk_size: int
    kept_per_chunk: int
    recent_window: int
    sink_tokens: int
    anchor_terms: int

    @property
    def removed_per_chunk(self) -> int:
        """Tokens that leave the cache with each sealed chunk, C - K."""
        return self.chunk_size - self.kept_per_chunk

    @property
    def effective_ratio(self) -> float:
        """Share of a sealed chunk that is removed: the pruning ratio after rounding to whole tokens."""
        return self.removed_per_chunk / self.chunk_size

    @property
    def first_seal(self) -> int:
        """The shortest length, in tokens, at which a chunk is sealed."""
        return self.recent_window + self.chunk_size


def sealed_chunks(num_tokens: Length, layout: Layout) -> Length:
    """Chunks sealed once `num_tokens` positions are computed; >= 0."""
    chunks = (num_tokens - layout.recent_window) // layout.chunk_size
    return chunks * (chunks > 0)


def removed_tokens(num_tokens: Length, layout: Layout) -> Length:
    """Tokens a filtered layer has dropped once `num_tokens` positions are computed and sealed."""
    return sealed_chunks(num_tokens, layout) * layout.removed_per_chunk


def stored_tokens(num_tokens: Length, layout: Layout) -> Length:
    """Tokens a filtered layer holds once `num_tokens` positions are computed; never above num_tokens."""
    return num_tokens - removed_tokens(num_tokens, layout)


def raw_slot(position: Length, num_computed_tokens: Length, layout: Layout) -> Length:
    """The slot of a raw token: its place in the request's block table, counted in tokens.

    Args:
        position: position in the sequence, at least chunk_size * sealed_chunks(num_computed_tokens).
        num_computed_tokens: tokens computed before the step that reads or writes the slot.
        layout: the layout's integers.
    """
    return position - removed_tokens(num_computed_tokens, layout)


def due_chunks(num_computed_tokens: int, num_new_tokens: int, layout: Layout) -> range:
    """Chunks that a step makes due: complete, older than the recent window and not sealed yet.

    Args:
        num_computed_tokens: tokens computed before the step.
        num_new_tokens: tokens the step computes.
        layout: the layout's integers.
    """
    return range(
        sealed_chunks(num_computed_tokens, layout),
        sealed_chunks(num_computed_tokens + num_new_tokens, layout),
    )
