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
from vllm_tokenfilter.kernels.cpu.build import load_kernel
from vllm_tokenfilter.kernels.cpu.seal import FUSION_CODES, PagedCache, pointer

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


class Step:
    """A step of the layers of one layout, and what the layer at hand decided.

    Made once a step: what a layer's calls are told in Python takes longer than what they do.

    Attributes:
        cache: the layers' cache.
        rule: how to decide.
        rows: the step's rows.
        kept: int64 [num_layers, num_blocks * block_size], by physical slot: score and debt of raw tokens.
        anchors: float32 [num_layers, num_blocks, 2 * num_kv_heads * head_size]: of keys and values, by the block of a
            request's newest token.
        skipped: uint8 [num_tokens], 1 where the attention is skipped.
        whole: int32 [num_rows], what a row attends to if it is not skipped.
        lengths: int32 [num_rows], what it attends to now: 1 in a skipped row of one token.
        totals: int64 [3]: tokens skipped; skipped rows of one token; what all rows of one token read.
        kernels: the compiled ones.
    """

    def __init__(
        self,
        cache: PagedCache,
        rule: SkipRule,
        rows: SkipRows,
        kept: NDArray[np.int64],
        anchors: NDArray[np.float32],
        num_threads: int,
        whole: NDArray[np.int32] | None = None,
        near: int = 1,
    ) -> None:
        """Make room.

        Args:
            cache: see above.
            rule: see above.
            rows: see above.
            kept: see above.
            anchors: see above.
            num_threads: threads of PyTorch's pool to run on.
            whole: see above; None where nothing is attended.
            near: what a skipped row of one token still reads, at most.
        """
        self.cache, self.rule, self.rows, self.kept, self.anchors = cache, rule, rows, kept, anchors
        self.whole = np.ones(len(rows.slots), np.int32) if whole is None else whole
        self.skipped = np.empty(int(rows.starts[-1]), np.uint8)
        self.lengths, self.totals = np.empty_like(self.whole), np.empty(3, np.int64)
        self.kernels = _kernels()
        self._struct = _Step(
            *(ctypes.addressof(part.struct) for part in (cache, rule, rows)),
            pointer(kept, np.int64),
            pointer(anchors, np.float32),
            pointer(self.whole, np.int32),
            pointer(self.skipped, np.uint8),
            pointer(self.lengths, np.int32),
            pointer(self.totals, np.int64),
            kept.shape[1],
            anchors.shape[1] * anchors.shape[2],
            near,
            num_threads,
        )
        self.address = ctypes.addressof(self._struct)


def decide_skips(step: Step, layer: int, ratio_units: int) -> NDArray[np.uint8]:
    """Decide for every token of a step, all of them in the cache, whether one layer skips its attention.

    Args:
        step: the step; what is decided is written into it, and what is kept of its tokens.
        layer: index into the cache's layers.
        ratio_units: the layer's ratio in 1 / SKIP_UNITS.

    Returns:
        `step.skipped`.
    """
    step.kernels.decide_skips(step.address, layer, ratio_units)
    return step.skipped


def clear_skipped(step: Step, out: int, row_bytes: int) -> None:
    """Put zeros in place of the skipped tokens' outputs.

    Args:
        step: with the layer's decisions.
        out: address of one row per token, `row_bytes` long; nothing lies between rows.
        row_bytes: see above.
    """
    step.kernels.clear_skipped(step.address, out, row_bytes)


def attend_window(
    step: Step,
    layer: int,
    group: int,
    scale: float,
    softcap: float,
    query: int,
    query_stride: int,
    out: int,
    out_stride: int,
    encoding: int,
) -> None:
    """Attention of skipped tokens to the sinks and the newest stored tokens only, in one layer.

    Args:
        step: with the layer's decisions.
        layer: index into the cache's layers.
        group: query heads of one KV head.
        scale: of the scores.
        softcap: of the scores; 0 for none.
        query: address of the queries, [num_tokens, num_heads * head_size].
        query_stride: elements from one token's queries to the next.
        out: address of the outputs, like the queries; the skipped tokens' rows are written, the others stay.
        out_stride: likewise.
        encoding: of both, FLOAT32 or BFLOAT16.
    """
    step.kernels.attend_window(
        step.address, layer, group, scale, softcap, query, query_stride, out, out_stride, encoding
    )


def average_outputs(step: Step, means: NDArray[np.float32], outputs: NDArray[np.float32]) -> None:
    """Put the decayed mean of a layer's outputs in place of the skipped ones.

    Args:
        step: with the layer's decisions.
        means: float32 [num_blocks, num_heads * head_size + 1] of this layer, by the block of a request's newest token;
            updated.
        outputs: float32 [num_tokens, num_heads * head_size], changed in place.
    """
    step.kernels.average_outputs(
        step.address, pointer(means, np.float32), outputs.shape[1], pointer(outputs, np.float32)
    )


@functools.cache
def _kernels() -> ctypes.CDLL:
    address, number = ctypes.c_void_p, ctypes.c_int64
    library = load_kernel()
    for name, arguments in {
        "decide_skips": (number, number),
        "clear_skipped": (address, number),
        "attend_window": (number, number, *[ctypes.c_float] * 2, address, number, address, number, number),
        "average_outputs": (address, number, address),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = (address, *arguments), None
    return library


class _Step(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("cache", "rule", "rows", "kept", "anchors", "whole", "skipped", "lengths", "totals")
        ),
        *((name, ctypes.c_int64) for name in ("kept_stride", "anchors_stride", "near", "num_threads")),
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
