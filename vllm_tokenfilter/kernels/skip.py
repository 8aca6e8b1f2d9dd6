"""The Python side of the CPU kernels of attention skipping: what they are told, checked and handed to skip.c.

Called once per layer of a step, so what a step's layers share is made once (`SkipRows`).

Source: docs/skipping.md (the decision, the substitutes).
"""

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_tokenfilter.config import SKIP_UNITS, FilterConfig
from vllm_tokenfilter.kernels.build import load_kernel
from vllm_tokenfilter.kernels.cpu import FUSION_CODES, PagedCache, pointer

#: A debt of this many tokens moves the level by the whole ratio range: small against 1000 tokens, large against noise.
PATIENCE = 8
#: Scores the threshold is a quantile of: what is always raw, and enough of it.
_MOST_HISTORY = 256


@dataclass(frozen=True)
class SkipRule:
    """How a layer decides and substitutes.

    Attributes:
        terms: predecessors an anchor averages.
        fusion: a key of FUSION_CODES.
        decay: the anchor's decay per token, and that of the substitute "running_output".
        history: most recent scores the threshold is a quantile of.
        warmup: first positions that are never skipped.
        sinks: first slots the substitute "window" attends to.
        window: newest slots it attends to, the token's own among them.
    """

    terms: int
    fusion: str
    decay: float
    history: int
    warmup: int
    sinks: int
    window: int

    @classmethod
    def of(cls, config: FilterConfig) -> "SkipRule":
        """The rule for these settings."""
        skipping = config.attention_skipping
        return cls(
            terms=config.anchor_terms,
            fusion=config.fusion,
            decay=config.anchor_decay,
            history=min(config.recent_window, _MOST_HISTORY),
            warmup=skipping.warmup_tokens,
            sinks=config.sink_tokens,
            window=skipping.skip_window,
        )

    @functools.cached_property
    def struct(self) -> ctypes.Structure:
        """The same for the kernels."""
        return _Rule(
            self.terms,
            FUSION_CODES[self.fusion],
            self.history,
            self.warmup,
            self.sinks,
            self.window,
            SKIP_UNITS,
            PATIENCE,
            self.decay,
            self.decay**self.terms,
        )


@dataclass(frozen=True)
class SkipRows:
    """A step's rows.

    Attributes:
        block_tables: int32 [num_rows, max_blocks], the rows' blocks in order.
        starts: int64 [num_rows + 1], first token of each row in the step, and the number of tokens.
        slots: int64 [num_rows], slot of the row's first new token.
        raw: int64 [num_rows], slot from which on the row's tokens are raw.
        positions: int64 [num_rows], position of the row's first new token.
    """

    block_tables: NDArray[np.int32]
    starts: NDArray[np.int64]
    slots: NDArray[np.int64]
    raw: NDArray[np.int64]
    positions: NDArray[np.int64]

    @functools.cached_property
    def struct(self) -> ctypes.Structure:
        """The same for the kernels; valid as long as this object."""
        return _Rows(
            pointer(self.block_tables, np.int32),
            self.block_tables.shape[1],
            len(self.slots),
            *(pointer(array, np.int64) for array in (self.starts, self.slots, self.raw, self.positions)),
        )


class Decisions:
    """What a layer decided; written anew by every layer of a step, so that a step allocates once.

    Attributes:
        skipped: uint8 [num_tokens], 1 where the attention is skipped.
        whole: int32 [num_rows], what a row attends to if it is not skipped.
        lengths: int32 [num_rows], what it attends to now: 1 in a skipped row of one token.
        totals: int64 [3]: tokens skipped; skipped rows of one token; what all rows of one token read.
    """

    def __init__(self, num_tokens: int, whole: NDArray[np.int32], near: int = 1) -> None:
        """Make room.

        Args:
            num_tokens: tokens of the step.
            whole: see above.
            near: what a skipped row of one token still reads, at most.
        """
        self.skipped, self.whole = np.empty(num_tokens, np.uint8), whole
        self.lengths, self.totals = np.empty_like(whole), np.empty(3, np.int64)
        self.addresses = (
            pointer(self.whole, np.int32),
            pointer(self.skipped, np.uint8),
            pointer(self.lengths, np.int32),
            pointer(self.totals, np.int64),
            ctypes.c_int64(near),
        )


def decide_skips(
    cache: PagedCache,
    rule: SkipRule,
    rows: SkipRows,
    layer: int,
    ratio_units: int,
    kept: NDArray[np.int64],
    num_threads: int,
    into: Decisions | None = None,
) -> NDArray[np.uint8]:
    """Decide for every token of a step, all of them in the cache, whether one layer skips its attention.

    Args:
        cache: the layers' cache.
        rule: how to decide.
        rows: the step.
        layer: index into the cache's layers.
        ratio_units: the layer's ratio in 1 / SKIP_UNITS.
        kept: int64 [num_blocks * block_size] of this layer, by physical slot: score and debt of raw tokens, updated.
        num_threads: threads of PyTorch's pool to run on.
        into: of the step, written; None: new ones.

    Returns:
        uint8 [num_tokens], 1 where the attention is skipped.
    """
    into = into or Decisions(int(rows.starts[-1]), np.ones(len(rows.slots), np.int32))
    load_kernel().decide_skips(
        ctypes.byref(cache.struct),
        ctypes.byref(rule.struct),
        ctypes.byref(rows.struct),
        ctypes.c_int64(layer),
        ctypes.c_int64(ratio_units),
        pointer(kept, np.int64),
        *into.addresses,
        ctypes.c_int64(num_threads),
    )
    return into.skipped


def attend_window(
    cache: PagedCache,
    rule: SkipRule,
    rows: SkipRows,
    layer: int,
    skipped: NDArray[np.uint8],
    queries: NDArray[np.float32],
    scale: float,
    softcap: float,
    num_threads: int,
) -> NDArray[np.float32]:
    """Attention of skipped tokens to the sinks and the newest stored tokens only, in one layer.

    Args:
        cache: the layers' cache.
        rule: sinks and window.
        rows: the step.
        layer: index into the cache's layers.
        skipped: uint8 [num_tokens], from `decide_skips`.
        queries: float32 [num_tokens, num_heads, head_size].
        scale: of the scores.
        softcap: of the scores; 0 for none.
        num_threads: threads of PyTorch's pool to run on.

    Returns:
        float32 [num_tokens, num_heads, head_size]; of tokens that are not skipped, anything.
    """
    out = np.empty_like(queries)
    load_kernel().attend_window(
        ctypes.byref(cache.struct),
        ctypes.byref(rule.struct),
        ctypes.byref(rows.struct),
        ctypes.c_int64(layer),
        pointer(skipped, np.uint8),
        ctypes.c_int64(queries.shape[1] // cache.num_kv_heads),
        ctypes.c_float(scale),
        ctypes.c_float(softcap),
        pointer(queries, np.float32),
        pointer(out, np.float32),
        ctypes.c_int64(num_threads),
    )
    return out


def average_outputs(
    cache: PagedCache,
    rule: SkipRule,
    rows: SkipRows,
    skipped: NDArray[np.uint8],
    means: NDArray[np.float32],
    outputs: NDArray[np.float32],
    num_threads: int,
) -> None:
    """Put the decayed mean of a layer's outputs in place of the skipped ones.

    Args:
        cache: the layers' cache.
        rule: the decay.
        rows: the step.
        skipped: uint8 [num_tokens], from `decide_skips`.
        means: float32 [num_blocks, num_heads * head_size + 1] of this layer, by the block of a request's newest token;
            updated.
        outputs: float32 [num_tokens, num_heads * head_size], changed in place.
        num_threads: threads of PyTorch's pool to run on.
    """
    load_kernel().average_outputs(
        ctypes.byref(cache.struct),
        ctypes.byref(rule.struct),
        ctypes.byref(rows.struct),
        pointer(skipped, np.uint8),
        pointer(means, np.float32),
        ctypes.c_int64(outputs.shape[1]),
        pointer(outputs, np.float32),
        ctypes.c_int64(num_threads),
    )


class _Rule(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("terms", "fusion", "history", "warmup", "sinks", "window", "units", "patience")
        ),
        *((name, ctypes.c_float) for name in ("decay", "dropped")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("starts", "slots", "raw", "positions")),
    )
