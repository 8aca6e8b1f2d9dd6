"""The CPU kernels of attention skipping: what they are told, checked and handed to skip.c and substitutes.c.

Called once per layer of a step, so what a step's layers share is made once (`SkipRows`, `SkipState`).

Source: docs/skipping.md (the decision, the substitutes).
"""

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_tokenfilter.config import SKIP_UNITS, Substitute
from vllm_tokenfilter.kernels.cpu.build import load_kernel
from vllm_tokenfilter.kernels.cpu.cache import PagedCache, pointer, structure
from vllm_tokenfilter.kernels.rules import FUSION_CODES, PATIENCE, SkipRule


@dataclass(frozen=True)
class SkipRows:
    """A step's rows."""

    block_tables: NDArray[np.int32]  #: int32 [num_rows, max_blocks], the rows' blocks in order.
    starts: NDArray[np.int64]  #: int64 [num_rows + 1], first token of each row in the step, and the number of tokens.
    slots: NDArray[np.int64]  #: int64 [num_rows], slot of the row's first new token.
    raw: NDArray[np.int64]  #: int64 [num_rows], slot from which on the row's tokens are raw.
    positions: NDArray[np.int64]  #: int64 [num_rows], position of the row's first new token.

    @functools.cached_property
    def struct(self) -> ctypes.Structure:
        """`struct skip_rows` of skip.h; valid as long as this object."""
        return structure(
            pointer(self.block_tables, np.int32),
            self.block_tables.shape[1],
            len(self.slots),
            *(pointer(array, np.int64) for array in (self.starts, self.slots, self.raw, self.positions)),
        )


class SkipState:
    """A step of the layers of one layout, and what the layer at hand decided.

    Made once a step: what a layer's calls are told in Python takes longer than what they do.

    Attributes:
        rows: the step's rows.
        carried: int64 [num_layers, num_blocks * block_size], by physical slot: score and debt of raw tokens.
        skipped: uint8 [num_tokens], 1 where the attention is skipped.
        stored_lens: int32 [num_rows], what a row attends to if it is not skipped.
        read_lens: int32 [num_rows], what it attends to now: 1 in a skipped row of one token.
        totals: int64 [3]: tokens skipped; skipped rows of one token; what all rows of one token read.
        kernels: the compiled ones.
    """

    def __init__(
        self,
        cache: PagedCache,
        rule: SkipRule,
        rows: SkipRows,
        carried: NDArray[np.int64],
        anchors: NDArray[np.float32],
        num_threads: int,
        stored_lens: NDArray[np.int32] | None = None,
        substitute: Substitute = "none",
    ) -> None:
        """Make room, for kernels that run on `num_threads` threads of PyTorch's pool.

        `anchors` is float32 [num_layers, num_blocks, 2 * num_kv_heads * head_size]: of keys and values, by the block of
        a request's newest token. Without `stored_lens` nothing is attended.
        """
        self.rows, self.carried = rows, carried
        self.stored_lens = np.ones(len(rows.slots), np.int32) if stored_lens is None else stored_lens
        self.skipped = np.empty(int(rows.starts[-1]), np.uint8)
        self.read_lens, self.totals = np.empty_like(self.stored_lens), np.empty(3, np.int64)
        self.kernels = _kernels()
        self._parts = cache, rule, anchors  # the struct, `skip_state` of skip.h, points into them
        self._struct = structure(
            cache.struct,
            _rule_struct(rule),
            rows.struct,
            pointer(carried, np.int64),
            pointer(anchors, np.float32),
            pointer(self.stored_lens, np.int32),
            pointer(self.skipped, np.uint8),
            pointer(self.read_lens, np.int32),
            pointer(self.totals, np.int64),
            carried.shape[1],
            anchors.shape[1] * anchors.shape[2],
            rule.skipped_reads(substitute),
            num_threads,
        )
        self.address = ctypes.addressof(self._struct)


def decide_skips(state: SkipState, layer: int, ratio_units: int) -> NDArray[np.uint8]:
    """Decide for every token of a step, all of them in the cache, whether one layer skips its attention.

    Written into `state` (`skipped` is returned), with what is carried for its tokens. `layer` is an index into the
    cache's layers, `ratio_units` the layer's ratio in 1 / SKIP_UNITS.
    """
    state.kernels.decide_skips(state.address, layer, ratio_units)
    return state.skipped


def clear_skipped(state: SkipState, out: int, row_bytes: int) -> None:
    """Put zeros in place of the skipped tokens' outputs.

    `out` is the address of one row per token, `row_bytes` long; nothing lies between rows.
    """
    state.kernels.clear_skipped(state.address, out, row_bytes)


def attend_window(
    state: SkipState,
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

    `group` is the query heads of one KV head; `softcap` 0 is none. `query` and `out` are the addresses of queries and
    outputs, [num_tokens, num_heads * head_size], `encoding` is that of both, FLOAT32 or BFLOAT16, and the strides are
    the elements from one token to the next. The skipped tokens' rows are written, the others stay.
    """
    state.kernels.attend_window(
        state.address, layer, group, scale, softcap, query, query_stride, out, out_stride, encoding
    )


def average_outputs(state: SkipState, means: NDArray[np.float32], outputs: NDArray[np.float32]) -> None:
    """Put the decayed mean of a layer's outputs in place of the skipped ones.

    Args:
        state: with the layer's decisions.
        means: float32 [num_blocks, num_heads * head_size + 1] of this layer, by the block of a request's newest token;
            updated.
        outputs: float32 [num_tokens, num_heads * head_size], changed in place.
    """
    state.kernels.average_outputs(
        state.address, pointer(means, np.float32), outputs.shape[1], pointer(outputs, np.float32)
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


@functools.cache
def _rule_struct(rule: SkipRule) -> ctypes.Structure:
    """`struct skip_rule` of skip.h."""
    numbers = rule.terms, FUSION_CODES[rule.fusion], rule.history, rule.warmup, rule.sinks, rule.window
    return structure(*numbers, SKIP_UNITS, PATIENCE, rule.decay, rule.decay**rule.terms)
