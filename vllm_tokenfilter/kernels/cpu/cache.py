"""vLLM's paged cache as the CPU kernels see it: where every element lies, and how a block orders its elements."""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: How the kernels widen an element: float32 bits, bfloat16 bits, or a 65536-entry table (float16).
FLOAT32, BFLOAT16, TABLE16 = range(3)

#: Orders of a block's elements that the kernels have loops for, and the tokens such a loop reads together.
BY_TABLE, BY_TOKEN, BY_DIM, DIM_PAIRS, TOKEN_PAIRS = range(5)
TILE = 16


@dataclass(frozen=True)
class PagedCache:
    """Where every element of the filtered layers' cache lies, counted in elements of one flat array.

    Element d of token i (inside its block), KV head h, block b, layer l is, for keys, at
    `layer_starts[l] + b * block_stride + h * head_stride + key_tokens[i] + key_dims[d]`; for values likewise.
    """

    #: The storage of all layers as raw bits, uint16 or uint32 [num_elements]; written in place.
    elements: NDArray[np.unsignedinteger]
    encoding: int  #: FLOAT32, BFLOAT16 or TABLE16.
    widen_table: NDArray[np.float32]  #: float32 [65536] for TABLE16, else [1].
    layer_starts: NDArray[np.int64]  #: int64 [num_layers].
    block_stride: int  #: elements from one block to the next.
    head_stride: int  #: elements from one KV head to the next inside a block.
    num_kv_heads: int  #: KV heads of this rank.
    num_blocks: int  #: blocks of the pool.
    key_tokens: NDArray[np.int64]  #: int64 [block_size].
    key_dims: NDArray[np.int64]  #: int64 [head_size].
    value_tokens: NDArray[np.int64]  #: int64 [block_size].
    value_dims: NDArray[np.int64]  #: int64 [head_size].

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
        """`struct cache` of cache.h; valid as long as this object."""
        places = self.layer_starts, self.key_tokens, self.key_dims, self.value_tokens, self.value_dims
        return structure(
            pointer(self.elements, self.elements.dtype),
            pointer(self.widen_table, np.float32),
            *(pointer(array, np.int64) for array in places),
            self.block_stride,
            self.head_stride,
            self.encoding,
            self.num_kv_heads,
            self.block_size,
            len(self.key_dims),
            element_order(self.key_tokens, self.key_dims),
            element_order(self.value_tokens, self.value_dims),
        )


def pointer(array: NDArray[Any], dtype: Any) -> ctypes.c_void_p:
    """The address of an array for a kernel, which takes what it is given at its word: so type and order are checked."""
    assert array.dtype == dtype and array.flags.c_contiguous, (array.dtype, dtype, array.flags.c_contiguous)
    return ctypes.c_void_p(array.ctypes.data)


def structure(*values: int | float | ctypes.c_void_p | ctypes.Structure) -> ctypes.Structure:
    """A `struct` of the kernels, its fields in the order of C: int64_t, float, pointers, also to structures."""
    pointed = [
        ctypes.c_void_p(ctypes.addressof(value)) if isinstance(value, ctypes.Structure) else value for value in values
    ]
    return _structure_of(tuple(map(type, pointed)))(*pointed)


@functools.cache
def _structure_of(types: tuple[type, ...]) -> type[ctypes.Structure]:
    of_c: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float, ctypes.c_void_p: ctypes.c_void_p}
    return type("Structure", (ctypes.Structure,), {"_fields_": [(f"_{n}", of_c[kind]) for n, kind in enumerate(types)]})


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
