"""Where a filtered layer's tokens lie: integer arithmetic that is a pure function of the length.

Because the counts depend on nothing but the number of computed tokens, the scheduler, every worker and
every tensor-parallel rank agree on them without talking. The same code serves Python ints, NumPy arrays
and torch tensors. A layer's slots, as half-open intervals, once `n` tokens are computed (`s` = sealed):

| slots                       | state  | holds                                                    |
|-----------------------------|--------|----------------------------------------------------------|
| [0, s * kept_per_chunk)     | packed | the kept tokens of chunks 0 .. s-1, in order of position |
| [s * kept_per_chunk, stored)| raw    | positions [s * chunk_size, n), all of them               |

The raw token at position p lies in slot p - removed_tokens(n). A step's tokens are written raw, behind what was stored
before it.

Source: docs/layout.md; the design's section "Sealing: the layout".
"""

from dataclasses import dataclass
from typing import Any, TypeVar

#: int, or an integer NumPy array, or an integer torch tensor: the result has the argument's type and shape.
Length = TypeVar("Length", int, Any)


@dataclass(frozen=True)
class Layout:
    """The integers that fix the layout; made once from the configuration."""

    chunk_size: int  #: tokens sealed together, C.
    kept_per_chunk: int  #: tokens of each chunk that stay, K, with 1 <= K <= C.
    recent_window: int  #: newest tokens that are never sealed, W >= C.
    sink_tokens: int  #: first tokens of the sequence that always stay, <= K.
    anchor_terms: int  #: earlier tokens that one anchor averages, M <= C.

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


def sealed_chunks(num_tokens: Length, layout: Layout, shared_chunks: Length = 0) -> Length:
    """Chunks sealed once `num_tokens` positions are computed; >= 0.

    Args:
        num_tokens: computed tokens.
        layout: the layout's integers.
        shared_chunks: chunks the request took over sealed from the prefix cache; they are sealed from the start.
    """
    chunks = (num_tokens - layout.recent_window) // layout.chunk_size
    if isinstance(shared_chunks, int) and shared_chunks == 0:
        return chunks * (chunks > 0)
    return shared_chunks + (chunks - shared_chunks) * (chunks > shared_chunks)


def removed_tokens(num_tokens: Length, layout: Layout, shared_chunks: Length = 0) -> Length:
    """Tokens a filtered layer has dropped once `num_tokens` positions are computed and sealed; see `sealed_chunks`."""
    return sealed_chunks(num_tokens, layout, shared_chunks) * layout.removed_per_chunk


def stored_tokens(num_tokens: Length, layout: Layout, shared_chunks: Length = 0) -> Length:
    """Tokens a filtered layer holds once `num_tokens` positions are computed; see `sealed_chunks`."""
    return num_tokens - removed_tokens(num_tokens, layout, shared_chunks)


def peak_slots(num_tokens: int, max_step_tokens: int, layout: Layout) -> int:
    """The most slots any step needs on the way to `num_tokens` computed tokens, in steps of at most `max_step_tokens`.

    A step needs what was stored before it and room for its own tokens, which it writes raw. With tokens taken over
    from the prefix cache a request needs no more than that.

    Args:
        num_tokens: >= 1.
        max_step_tokens: >= 1.
        layout: the layout's integers.
    """
    # Before the last full step, or just before the last seal ahead of it, whichever stored more.
    num_computed = max(0, num_tokens - max_step_tokens)
    highest = stored_tokens(num_computed, layout)
    if sealed := sealed_chunks(num_computed, layout):
        highest = max(highest, stored_tokens(layout.recent_window + sealed * layout.chunk_size - 1, layout))
    return highest + min(num_tokens, max_step_tokens)


def next_stop(num_computed: int, num_prompt: int, grid: int, layout: Layout) -> int:
    """Where a request's next step ends, whatever else is served; more than `num_computed`.

    At the prompt's end, or behind it where the next chunk is due: tokens that are computed again then see what they saw
    when they were decoded. Also at each multiple of `grid` tokens, unless that is 0.
    """
    end = num_prompt
    if num_computed >= num_prompt:
        due = num_computed + layout.chunk_size - (num_computed - layout.recent_window) % layout.chunk_size
        end = max(layout.first_seal, due)
    return min(end, (num_computed // grid + 1) * grid) if grid else end


def shares_prefixes(layout: Layout, block_size: int) -> bool:
    """Whether a chunk, and the tokens it keeps, fill whole blocks: then sealed blocks can be shared by prefix."""
    whole = layout.kept_per_chunk % block_size == 0 and layout.chunk_size % block_size == 0
    # Where nothing is removed nothing is sealed.
    return whole and layout.removed_per_chunk > 0
