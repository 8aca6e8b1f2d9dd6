"""The CPU sealing kernel: score, select and compact in place, over every layer and request of a step at once.

Compiled by Numba, whose OpenMP threads are the pool PyTorch already runs on. One task is one (layer, request):
it reads each raw token once, widens it to float32, carries the anchors along as a recurrence instead of a sum,
and moves the surviving tokens to their slots. The number of operations does not depend on the anchor's length.

The recurrence starts afresh in every chunk, so a chunk's redundancies are the same bits whether it is sealed alone
or with others. `kernels/reference.py` is the readable form; tests hold the two together.

Source: docs/algorithm.md (redundancy), docs/layout.md (slots).
"""

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from vllm_tokenfilter.layout import Layout

#: Codes of the fusion strategies inside the kernel.
FUSION_CODES = {"variance_aware": 0, "mean": 1, "key": 2, "value": 3}

#: How the kernel widens an element: float32 bits, bfloat16 bits, or a 65536-entry table (float16).
FLOAT32, BFLOAT16, TABLE16 = 0, 1, 2

# Sums may be reordered to use vector registers; NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


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


def use_threads(num_threads: int) -> None:
    """Let the kernel run on `num_threads` threads of the process's OpenMP pool; only the first call decides.

    PyTorch and Numba load the same OpenMP library, so no second pool competes for the cores. Numba would count
    the cores of the calling thread, which vLLM has pinned to one.
    """
    if numba.np.ufunc.parallel._is_initialized:
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
        return
    numba.config.THREADING_LAYER = "omp"
    numba.config.NUMBA_NUM_THREADS = num_threads


def seal_chunks(
    cache: PagedCache,
    saved_redundancy: NDArray[np.float32],
    block_tables: NDArray[np.int32],
    num_tokens: NDArray[np.int64],
    first_chunks: NDArray[np.int64],
    last_chunks: NDArray[np.int64],
    layout: Layout,
    decay: float,
    fusion: str,
) -> NDArray[np.int32]:
    """Seal the due chunks of a step in every layer; the cache and `saved_redundancy` change in place.

    Args:
        cache: the layers' cache.
        saved_redundancy: float32 [num_layers, num_blocks * block_size] by physical slot: what an earlier seal
            scored and a later one needs.
        block_tables: [num_rows, max_blocks], the rows' blocks in order.
        num_tokens: [num_rows], computed tokens of each row, all of them in the cache.
        first_chunks: [num_rows], first due chunk of each row.
        last_chunks: [num_rows], one past the last due chunk; above the first.
        layout: the layout's integers.
        decay: the anchor's decay per token.
        fusion: a key of FUSION_CODES.

    Returns:
        int32 [num_layers, num_due_chunks, kept_per_chunk]: the offsets inside each chunk that stayed, ascending,
        ordered by row, then chunk.
    """
    assert layout.anchor_terms <= layout.chunk_size <= layout.recent_window
    assert (first_chunks < last_chunks).all()
    num_layers = len(cache.layer_starts)
    ends = np.cumsum(last_chunks - first_chunks)
    chosen = np.empty((num_layers, int(ends[-1]), layout.kept_per_chunk), np.int32)
    _seal(
        cache.elements,
        cache.encoding,
        cache.widen_table,
        cache.layer_starts,
        cache.block_stride,
        cache.head_stride,
        cache.num_kv_heads,
        cache.key_tokens,
        cache.key_dims,
        cache.value_tokens,
        cache.value_dims,
        saved_redundancy,
        block_tables,
        num_tokens,
        first_chunks,
        last_chunks,
        ends,
        layout.chunk_size,
        layout.kept_per_chunk,
        layout.sink_tokens,
        layout.anchor_terms,
        np.float32(decay),
        np.float32(decay**layout.anchor_terms),
        FUSION_CODES[fusion],
        chosen,
    )
    return chosen


@numba.njit(inline="always")
def _widen(bits, encoding, table):  # type: ignore[no-untyped-def]
    if encoding == FLOAT32:
        return np.uint32(bits).view(np.float32)
    if encoding == BFLOAT16:
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return table[bits]


@numba.njit(cache=True, fastmath=_FASTMATH)
def _cosines(previous, current, has_previous, terms, decay, dropped, out):  # type: ignore[no-untyped-def]
    """Cosine of each token of `current` [C, D] to the anchor of its last `terms` predecessors, into out [C]."""
    size, dims = current.shape
    anchor = np.zeros(dims, np.float32)
    if has_previous:
        for t in range(size - terms, size):
            for d in range(dims):
                anchor[d] = decay * anchor[d] + previous[t, d]
    for t in range(size):
        dot = np.float32(0)
        own = np.float32(0)
        other = np.float32(0)
        for d in range(dims):
            dot += current[t, d] * anchor[d]
            own += current[t, d] * current[t, d]
            other += anchor[d] * anchor[d]
        norms = own * other
        out[t] = dot / np.sqrt(norms) if norms > 0 else np.float32(0)
        if t >= terms:
            for d in range(dims):
                anchor[d] = decay * anchor[d] + current[t, d] - dropped * current[t - terms, d]
        elif has_previous:
            for d in range(dims):
                anchor[d] = decay * anchor[d] + current[t, d] - dropped * previous[size + t - terms, d]
        else:
            for d in range(dims):
                anchor[d] = decay * anchor[d] + current[t, d]


@numba.njit(cache=True)
def _fuse(key, value, fusion, out):  # type: ignore[no-untyped-def]
    """Redundancy of each token, into out [C], from the heads' cosines key, value [H, C]."""
    heads, size = key.shape
    for t in range(size):
        key_mean = np.float32(0)
        value_mean = np.float32(0)
        for h in range(heads):
            key_mean += key[h, t]
            value_mean += value[h, t]
        key_mean /= np.float32(heads)
        value_mean /= np.float32(heads)
        weight = np.float32(0.5)
        if fusion == 0:
            key_variance = np.float32(0)
            value_variance = np.float32(0)
            for h in range(heads):
                key_variance += (key[h, t] - key_mean) ** 2
                value_variance += (value[h, t] - value_mean) ** 2
            total = key_variance + value_variance
            if total > 0:
                weight = value_variance / total
        elif fusion == 2:
            weight = np.float32(1)
        elif fusion == 3:
            weight = np.float32(0)
        out[t] = weight * key_mean + (np.float32(1) - weight) * value_mean


@numba.njit(parallel=True, cache=True, fastmath=_FASTMATH)
def _seal(  # type: ignore[no-untyped-def]
    elements,
    encoding,
    table,
    layer_starts,
    block_stride,
    head_stride,
    num_heads,
    key_tokens,
    key_dims,
    value_tokens,
    value_dims,
    saved,
    block_tables,
    num_tokens,
    first_chunks,
    last_chunks,
    ends,
    size,
    keep,
    sinks,
    terms,
    decay,
    dropped,
    fusion,
    chosen,
):
    num_rows = len(num_tokens)
    block_size = len(key_tokens)
    dims = len(key_dims)
    for task in numba.prange(len(layer_starts) * num_rows):
        layer = task // num_rows
        row = task % num_rows
        first = first_chunks[row]
        last = last_chunks[row]
        blocks = block_tables[row]
        start = layer_starts[layer]
        # Before the seal the raw token at position p lies in slot p - removed; after it, in p - removed_after.
        removed = first * (size - keep)
        removed_after = last * (size - keep)
        count = last - first + 1

        # 1. Score: every chunk from the first unscored one to the one after the last due, all of them raw.
        redundancy = np.empty((count, size), np.float32)
        unscored = 0
        if first > 0:
            unscored = 1
            for i in range(size):
                slot = first * size + i - removed
                redundancy[0, i] = saved[layer, blocks[slot // block_size] * block_size + slot % block_size]
        key_cosines = np.empty((count, num_heads, size), np.float32)
        value_cosines = np.empty((count, num_heads, size), np.float32)
        tiles = np.empty((4, size, dims), np.float32)
        for head in range(num_heads):
            for c in range(count):
                parity = c & 1
                keys = tiles[parity]
                values = tiles[2 + parity]
                for i in range(size):
                    slot = (first + c) * size + i - removed
                    inside = slot % block_size
                    base = start + blocks[slot // block_size] * block_stride + head * head_stride
                    key_base = base + key_tokens[inside]
                    value_base = base + value_tokens[inside]
                    for d in range(dims):
                        keys[i, d] = _widen(elements[key_base + key_dims[d]], encoding, table)
                    for d in range(dims):
                        values[i, d] = _widen(elements[value_base + value_dims[d]], encoding, table)
                if c >= unscored:
                    _cosines(tiles[1 - parity], keys, c > 0, terms, decay, dropped, key_cosines[c, head])
                    _cosines(tiles[3 - parity], values, c > 0, terms, decay, dropped, value_cosines[c, head])
        for c in range(unscored, count):
            _fuse(key_cosines[c], value_cosines[c], fusion, redundancy[c])

        # 2. Select: the least redundant stay; the sort is stable, so of equals the older does.
        out = ends[row] - (last - first)
        for c in range(last - first):
            ranked = redundancy[c].copy()
            for i in range(min(size, max(0, sinks - (first + c) * size))):
                ranked[i] = -np.inf
            order = np.argsort(ranked, kind="mergesort")
            stays = np.sort(order[:keep])
            for i in range(keep):
                chosen[layer, out + c, i] = stays[i]

        # 3. Compact: no token moves to a higher slot, so moving them in order overwrites nothing still needed.
        num_kept = (last - first) * keep
        num_rest = num_tokens[row] - last * size
        for head in range(num_heads):
            head_start = start + head * head_stride
            for i in range(num_kept + num_rest):
                target = first * keep + i
                if i < num_kept:
                    c = i // keep
                    source = (first + c) * size + chosen[layer, out + c, i % keep] - removed
                else:
                    source = last * size + (i - num_kept) - removed
                if source == target:
                    continue
                source_base = head_start + blocks[source // block_size] * block_stride
                target_base = head_start + blocks[target // block_size] * block_stride
                from_key = source_base + key_tokens[source % block_size]
                to_key = target_base + key_tokens[target % block_size]
                for d in range(dims):
                    elements[to_key + key_dims[d]] = elements[from_key + key_dims[d]]
                from_value = source_base + value_tokens[source % block_size]
                to_value = target_base + value_tokens[target % block_size]
                for d in range(dims):
                    elements[to_value + value_dims[d]] = elements[from_value + value_dims[d]]

        # 4. Keep the scores of the next chunk: its predecessors are about to be packed.
        for i in range(size):
            slot = last * size + i - removed_after
            saved[layer, blocks[slot // block_size] * block_size + slot % block_size] = redundancy[count - 1, i]
