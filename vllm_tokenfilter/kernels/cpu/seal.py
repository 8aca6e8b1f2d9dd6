"""The CPU sealing kernel's Python side, and what all CPU kernels share: what it is told, checked and handed to seal.c.

Score, select and compact in place, over every layer and request of a step at once; the maths is in seal.c and,
readable, in kernels/reference.py. Compiled for the machine on first use (build.py); needs no memory beyond a few
chunks.

Source: docs/algorithm.md (redundancy), docs/layout.md (slots).
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.kernels.cpu.build import load_kernel
from vllm_tokenfilter.layout import Layout

#: How the kernel widens an element: float32 bits, bfloat16 bits, or a 65536-entry table (float16).
FLOAT32, BFLOAT16, TABLE16 = 0, 1, 2

#: Orders of a block's elements that the kernels have loops for, and the tokens such a loop reads together.
BY_TABLE, BY_TOKEN, BY_DIM, DIM_PAIRS, TOKEN_PAIRS = range(5)
TILE = 16

#: Codes of the fusion strategies and of the selectors inside the kernel.
VARIANCE_AWARE, MEAN, KEY, VALUE = range(4)
FUSION_CODES = {"variance_aware": VARIANCE_AWARE, "mean": MEAN, "key": KEY, "value": VALUE}
ANCHOR, RANDOM, KEYDIFF, KEY_NORM, VALUE_KEY_NORM, LAGKV, RECENCY = range(7)
SELECTOR_CODES = {
    "anchor": ANCHOR,
    "random": RANDOM,
    "keydiff": KEYDIFF,
    "key_norm": KEY_NORM,
    "value_key_norm": VALUE_KEY_NORM,
    "lagkv": LAGKV,
    "recency": RECENCY,
}
# What a call of the kernel does.
WHOLE, SCORE, SEAL = range(3)
# What a rival leaves in place of key and value similarity, and how that becomes one number.
_RIVAL_FUSION = {KEYDIFF: KEY, KEY_NORM: KEY, VALUE_KEY_NORM: KEY, LAGKV: MEAN}


@dataclass(frozen=True)
class ScoreRule:
    """How tokens are ranked.

    Attributes:
        selector: a key of SELECTOR_CODES; see selectors.py.
        fusion: a key of FUSION_CODES, for the selector "anchor".
        decay: the anchor's decay per token.
        seed: of the selector "random".
    """

    selector: str = "anchor"
    fusion: str = "variance_aware"
    decay: float = 0.9
    seed: int = 0

    @classmethod
    def of(cls, config: FilterConfig) -> "ScoreRule":
        """The rule that the settings name."""
        return cls(config.selector, config.fusion, config.anchor_decay, config.random_seed)


@dataclass(frozen=True)
class PagedCache:
    """Where every element of the filtered layers' cache lies, counted in elements of one flat array.

    Element d of token i (inside its block), KV head h, block b, layer l is, for keys, at
    `layer_starts[l] + b * block_stride + h * head_stride + key_tokens[i] + key_dims[d]`; for values likewise.

    Attributes:
        elements: the storage of all layers as raw bits, uint16 or uint32 [num_elements]; written in place.
        encoding: FLOAT32, BFLOAT16 or TABLE16.
        widen_table: float32 [65536] for TABLE16, else [1].
        layer_starts: int64 [num_layers].
        block_stride: elements from one block to the next.
        head_stride: elements from one KV head to the next inside a block.
        num_kv_heads: KV heads of this rank.
        num_blocks: blocks of the pool.
        key_tokens: int64 [block_size]; key_dims: int64 [head_size].
        value_tokens: int64 [block_size]; value_dims: int64 [head_size].
    """

    elements: NDArray[np.unsignedinteger]
    encoding: int
    widen_table: NDArray[np.float32]
    layer_starts: NDArray[np.int64]
    block_stride: int
    head_stride: int
    num_kv_heads: int
    num_blocks: int
    key_tokens: NDArray[np.int64]
    key_dims: NDArray[np.int64]
    value_tokens: NDArray[np.int64]
    value_dims: NDArray[np.int64]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return len(self.key_tokens)

    @property
    def anchor_width(self) -> int:
        """Elements of one anchor of keys and one of values, of all heads."""
        return 2 * self.num_kv_heads * len(self.key_dims)

    @functools.cached_property
    def struct(self) -> ctypes.Structure:
        """The same for the kernels; valid as long as this object."""
        return CacheStruct(
            pointer(self.elements, self.elements.dtype),
            pointer(self.widen_table, np.float32),
            *(
                pointer(array, np.int64)
                for array in (
                    self.layer_starts,
                    self.key_tokens,
                    self.key_dims,
                    self.value_tokens,
                    self.value_dims,
                )
            ),
            self.block_stride,
            self.head_stride,
            self.encoding,
            self.num_kv_heads,
            self.block_size,
            len(self.key_dims),
            element_order(self.key_tokens, self.key_dims),
            element_order(self.value_tokens, self.value_dims),
        )


def seal_chunks(
    cache: PagedCache,
    saved_redundancy: NDArray[np.float32],
    block_tables: NDArray[np.int32],
    num_tokens: NDArray[np.int64],
    first_chunks: NDArray[np.int64],
    last_chunks: NDArray[np.int64],
    own_chunks: NDArray[np.int64],
    layout: Layout,
    rule: ScoreRule,
    layer_indices: NDArray[np.int64],
    num_threads: int,
    gather_heads: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    carried: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Seal the due chunks of a step in every layer; the cache and `saved_redundancy` change in place.

    Args:
        cache: the layers' cache.
        saved_redundancy: float32 [num_layers, num_blocks * block_size] by physical slot: what an earlier seal
            scored and a later one needs.
        block_tables: int32 [num_rows, max_blocks], the rows' blocks in order.
        num_tokens: int64 [num_rows], computed tokens of each row, all of them in the cache.
        first_chunks: int64 [num_rows], first due chunk of each row.
        last_chunks: int64 [num_rows], one past the last due chunk; above the first.
        own_chunks: int64 [num_rows], the first chunk each row seals itself; those before it came sealed.
        layout: the layout's integers.
        rule: how tokens are ranked.
        layer_indices: int64 [num_layers], the layers' indices in the model.
        num_threads: threads of PyTorch's pool to run on.
        gather_heads: where KV heads are split over ranks, makes the scores of all heads from this rank's: float32
            [num_layers, num_scored_chunks, 2, num_kv_heads, chunk_size], keys' scores first. None for one rank.
        carried: int64 [num_layers, num_blocks * block_size] by physical slot, moved along with raw tokens; None if
            nothing is kept of them.

    Returns:
        int32 [num_layers, num_due_chunks, kept_per_chunk]: the offsets inside each chunk that stayed, ascending,
        ordered by row, then chunk; -1 where the selector is "recency", which chooses from the whole request.
    """
    assert layout.anchor_terms <= layout.chunk_size <= layout.recent_window
    assert (first_chunks < last_chunks).all()
    selector = SELECTOR_CODES[rule.selector]
    ends = np.cumsum(last_chunks - first_chunks)
    chosen = np.empty((len(cache.layer_starts), int(ends[-1]), layout.kept_per_chunk), np.int32)
    arguments: tuple[Any, ...] = (
        ctypes.byref(cache.struct),
        ctypes.byref(
            _Rule(
                layout.chunk_size,
                layout.kept_per_chunk,
                layout.sink_tokens,
                layout.anchor_terms,
                selector,
                _RIVAL_FUSION.get(selector, FUSION_CODES[rule.fusion]),
                rule.seed,
                rule.decay,
                rule.decay**layout.anchor_terms,
            )
        ),
        ctypes.byref(
            _Rows(
                pointer(block_tables, np.int32),
                block_tables.shape[1],
                len(block_tables),
                *(pointer(array, np.int64) for array in (num_tokens, first_chunks, last_chunks, own_chunks, ends)),
            )
        ),
        ctypes.c_int64(len(cache.layer_starts)),
        pointer(layer_indices, np.int64),
        pointer(saved_redundancy, np.float32),
        ctypes.c_int64(saved_redundancy.shape[1]),
        None if carried is None else pointer(carried, np.int64),
        pointer(chosen, np.int32),
        ctypes.c_int64(num_threads),
    )
    kernel = load_kernel().seal_chunks
    # Rivals that look at no key or value choose alike on every rank.
    if gather_heads is None or selector in (RANDOM, RECENCY):
        kernel(*arguments, ctypes.c_int64(WHOLE), None, ctypes.c_int64(cache.num_kv_heads))
        return chosen
    num_chunks = int(ends[-1]) + len(block_tables)
    shape = (len(cache.layer_starts), num_chunks, 2, cache.num_kv_heads, layout.chunk_size)
    own = np.zeros(shape, np.float32)
    kernel(*arguments, ctypes.c_int64(SCORE), pointer(own, np.float32), ctypes.c_int64(own.shape[3]))
    scores = gather_heads(own)
    kernel(*arguments, ctypes.c_int64(SEAL), pointer(scores, np.float32), ctypes.c_int64(scores.shape[3]))
    return chosen


def pointer(array: NDArray[Any], dtype: Any) -> ctypes.c_void_p:
    """The address of an array for a kernel, which takes what it is given at its word: so type and order are checked."""
    assert array.dtype == dtype and array.flags.c_contiguous, (array.dtype, dtype, array.flags.c_contiguous)
    return ctypes.c_void_p(array.ctypes.data)


def element_order(tokens: NDArray[np.int64], dims: NDArray[np.int64]) -> int:
    """How a head's tokens lie in a block, as a code of cache.h.

    Args:
        tokens: int64 [block_size], what token i adds to an element's place.
        dims: int64 [head_size], what dimension d adds.
    """
    tile = np.arange(TILE)
    if np.array_equal(dims, np.arange(len(dims))):
        return BY_TOKEN
    if len(tokens) % TILE or len(dims) % TILE:
        return BY_TABLE
    token_tiles, dim_tiles = (x.reshape(-1, TILE) - x[::TILE, None] for x in (tokens, dims))
    if (token_tiles == tile).all():
        return BY_DIM
    pairs = np.arange(len(dims)) // 2 * dims[2] + np.arange(len(dims)) % 2
    if (token_tiles == 2 * tile).all() and np.array_equal(dims, pairs):
        return DIM_PAIRS
    if (np.diff(tokens.reshape(-1, 2)) == 1).all() and (dim_tiles == 2 * tile).all():
        return TOKEN_PAIRS
    return BY_TABLE


class CacheStruct(ctypes.Structure):
    """`struct cache` of cache.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("elements", "table", "layer_starts")),
        *((name, ctypes.c_void_p) for name in ("key_tokens", "key_dims", "value_tokens", "value_dims")),
        *(
            (name, ctypes.c_int64)
            for name in ("block_stride", "head_stride", "encoding", "heads", "block_size", "dims")
        ),
        *((name, ctypes.c_int64) for name in ("key_order", "value_order")),
    )


class _Rule(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "keep", "sinks", "terms", "selector", "fusion", "seed")),
        *((name, ctypes.c_float) for name in ("decay", "dropped")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("num_tokens", "first", "last", "own", "ends")),
    )
