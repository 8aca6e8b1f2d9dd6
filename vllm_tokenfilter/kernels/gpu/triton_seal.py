"""The GPU sealing kernels: a step's due chunks in every layer, scored, chosen and compacted in the paged cache.

Two launches. `_score` gives every (chunk, head, layer) its similarities; `_compact` fuses them over heads, ranks the
chunk and moves the survivors, one program per (request, head, layer): heads share no memory, so nothing races.
Between the two, tensor-parallel ranks exchange the heads' scores, which makes the choice the same for every number of
ranks. What is due is decided on the host from lengths; which chunks came sealed from the prefix cache is known on the
device alone, so a program whose chunk is none of the request's own does nothing.

Elements are read as raw bits and widened here, so that one code serves float32, bfloat16, float16 and both fp8 formats
on every generation of GPU. The per-tensor scale of an fp8 cache is left out: no selector's order depends on it.

Names: C tokens of a chunk, K kept, M terms of an anchor, D head size, H heads of this rank, TILE tokens at a time.

Source: docs/algorithm.md (redundancy), docs/layout.md (slots); kernels/reference.py is the readable form.
"""

import triton
import triton.language as tl

FLOAT32, BFLOAT16, FLOAT16, FP8_E4M3, FP8_E5M2 = (tl.constexpr(code) for code in range(5))
ANCHOR, RANDOM, KEYDIFF, KEY_NORM, VALUE_KEY_NORM = (tl.constexpr(code) for code in range(5))
VARIANCE_AWARE, MEAN, KEY, VALUE = (tl.constexpr(code) for code in range(4))

# What differs from seal to seal: Triton must not compile anew for it while requests wait.
_PER_SEAL = [
    "tables", "table_stride", "num_tasks", "task_rows", "task_chunks", "num_tokens_ptr", "first_task_ptr", "asked_ptr",
    "first_ptr", "last_ptr", "own_ptr",
]  # fmt: skip


@triton.jit
def _bits_pointer(address, ENCODING: tl.constexpr):
    """The address as a pointer to the raw bits of an element."""
    if ENCODING == FLOAT32:
        return address.to(tl.pointer_type(tl.uint32))
    elif (ENCODING == BFLOAT16) | (ENCODING == FLOAT16):
        return address.to(tl.pointer_type(tl.uint16))
    else:
        return address.to(tl.pointer_type(tl.uint8))


@triton.jit
def _widen(bits, ENCODING: tl.constexpr):
    """Raw bits as float32, exactly."""
    if ENCODING == FLOAT32:
        return bits.to(tl.float32, bitcast=True)
    elif ENCODING == BFLOAT16:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif ENCODING == FLOAT16:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif ENCODING == FP8_E5M2:
        return (bits.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # The exponent's bias is 7, not 15: a factor of 256, exact for subnormal numbers too.
        sign = (bits.to(tl.uint16) & 0x80) << 8
        magnitude = (bits.to(tl.uint16) & 0x7F) << 7
        return (sign | magnitude).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _token_offsets(slots, valid, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE: tl.constexpr):
    """Element offsets of tokens in one head of a layer, int64; `slots` are logical, `table` the request's row."""
    blocks = tl.load(table + slots // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return blocks * block_stride + head * head_stride + (slots % BLOCK_SIZE).to(tl.int64) * token_stride


@triton.jit
def _load_tile(base, offsets, valid, dims, D: tl.constexpr, ENCODING: tl.constexpr):
    """Tokens at `offsets`, float32 [TILE, BLOCK_D]; zero where nothing is valid."""
    mask = valid[:, None] & (dims < D)[None, :]
    bits = tl.load(base + offsets[:, None] + dims[None, :], mask=mask, other=0)
    return _widen(bits, ENCODING)


@triton.jit
def _unit(x):
    """Rows of x scaled to length one; zero stays zero."""
    length = tl.sqrt(tl.sum(x * x, 1))
    return x / tl.where(length > 0, length, 1.0)[:, None]


@triton.jit
def _similarity(x, anchor):
    """Cosine of each row of x to that of anchor; zero where either is zero."""
    norms = tl.sum(x * x, 1) * tl.sum(anchor * anchor, 1)
    return tl.where(norms > 0, tl.sum(x * anchor, 1) / tl.sqrt(tl.where(norms > 0, norms, 1.0)), 0.0)


@triton.jit
def _random(position, layer_index, seed):
    """The hash of selectors.random_scores."""
    x = (position.to(tl.int64) * 2654435761 + (layer_index + 1) * 40503 + seed * 97) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.float32) / 16777216.0


@triton.jit
def _due(row, first_ptr, last_ptr, own_ptr):
    """First and last due chunk of a row, and whether the first was scored by an earlier seal.

    What the host found due is only what the length says: chunks taken over sealed are none of the row's own.
    """
    own = tl.load(own_ptr + row)
    first = tl.maximum(tl.load(first_ptr + row), own)
    last = tl.maximum(tl.load(last_ptr + row), own)
    return first, last, first > own


@triton.jit(do_not_specialize=_PER_SEAL, do_not_specialize_on_alignment=_PER_SEAL)
def _score(
    layer_addresses,  # int64 [num_layers]
    layer_indices,  # int64 [num_layers]
    tables,  # int32 [num_rows, table_stride]
    table_stride,
    task_rows,  # int32 [num_tasks]
    task_chunks,  # int32 [num_tasks]
    first_ptr,  # int32 [num_rows]
    last_ptr,  # int32 [num_rows]
    own_ptr,  # int32 [num_rows]
    block_stride,
    head_stride,
    token_stride,
    saved,  # float32 [num_layers, saved_stride], by physical slot
    saved_stride,
    known,  # float32 [num_layers, num_tasks, C]
    scores,  # float32 [num_layers, num_tasks, num_heads, 2, C]
    decay_log2,
    seed,
    num_tasks,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    SELECTOR: tl.constexpr,
    ENCODING: tl.constexpr,
):
    """Grid (num_tasks, num_heads, num_layers): the similarities of one chunk in one head."""
    task, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, chunk = tl.load(task_rows + task), tl.load(task_chunks + task)
    first, last, first_is_known = _due(row, first_ptr, last_ptr, own_ptr)
    if (chunk < first) | (chunk > last) | (last <= first):
        return
    table = tables + row.to(tl.int64) * table_stride
    removed = first * (C - K)
    lanes, dims = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    place = layer.to(tl.int64) * num_tasks + task
    if first_is_known & (chunk == first):
        if head == 0:
            for begin in range(0, C, TILE):
                offsets = begin + lanes
                inside = offsets < C
                slots = chunk * C + offsets - removed
                blocks = tl.load(table + slots // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
                physical = layer.to(tl.int64) * saved_stride + blocks * BLOCK_SIZE + slots % BLOCK_SIZE
                tl.store(known + place * C + offsets, tl.load(saved + physical, mask=inside, other=0.0), mask=inside)
        return
    base = _bits_pointer(tl.load(layer_addresses + layer), ENCODING)
    out = scores + (place * tl.num_programs(1) + head) * 2 * C
    for begin in range(0, C, TILE):
        offsets = begin + lanes
        inside = offsets < C
        position = chunk * C + offsets
        key_score = tl.zeros([TILE], tl.float32)
        value_score = tl.zeros([TILE], tl.float32)
        if SELECTOR == RANDOM:
            key_score = _random(position, tl.load(layer_indices + layer), seed)
        else:
            places = _token_offsets(
                position - removed, inside, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE
            )
            keys = _load_tile(base, places, inside, dims, D, ENCODING)
            if SELECTOR == KEYDIFF:
                keys = _unit(keys)
            if SELECTOR != KEY_NORM:
                values = _load_tile(base + D, places, inside, dims, D, ENCODING)
            if SELECTOR == KEY_NORM:
                key_score = tl.sqrt(tl.sum(keys * keys, 1))
            elif SELECTOR == VALUE_KEY_NORM:
                norm = tl.sqrt(tl.sum(keys * keys, 1))
                key_score = -tl.sqrt(tl.sum(values * values, 1)) / tl.maximum(norm, 1e-20)
            else:
                key_anchor = tl.zeros([TILE, BLOCK_D], tl.float32)
                value_anchor = tl.zeros([TILE, BLOCK_D], tl.float32)
                # The predecessors that any token of the tile averages, a tile at a time, nearest last.
                for back in range((M + TILE - 1) // TILE * TILE, -1, -TILE):
                    before = chunk * C + begin - back + lanes
                    there = (before >= first * C) & (before < chunk * C + C)
                    distance = position[:, None] - before[None, :]
                    weight = tl.exp2((distance - 1).to(tl.float32) * decay_log2)
                    weight = tl.where((distance >= 1) & (distance <= M) & there[None, :], weight, 0.0)
                    from_slots = tl.where(there, before - removed, 0)
                    places = _token_offsets(
                        from_slots, there, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE
                    )
                    earlier = _load_tile(base, places, there, dims, D, ENCODING)
                    if SELECTOR == KEYDIFF:
                        earlier = _unit(earlier)
                    key_anchor += tl.dot(weight, earlier, input_precision="ieee")
                    if SELECTOR == ANCHOR:
                        earlier = _load_tile(base + D, places, there, dims, D, ENCODING)
                        value_anchor += tl.dot(weight, earlier, input_precision="ieee")
                key_score = _similarity(keys, key_anchor)
                if SELECTOR == ANCHOR:
                    value_score = _similarity(values, value_anchor)
        tl.store(out + offsets, key_score, mask=inside)
        tl.store(out + C + offsets, value_score, mask=inside)


@triton.jit
def _fuse(scores, offsets, inside, num_heads, C: tl.constexpr, FUSION: tl.constexpr):
    """One redundancy per token from the heads' scores [num_heads, 2, C]."""
    key_mean = tl.zeros_like(offsets).to(tl.float32)
    value_mean = tl.zeros_like(offsets).to(tl.float32)
    for head in range(num_heads):
        key_mean += tl.load(scores + head * 2 * C + offsets, mask=inside, other=0.0)
        value_mean += tl.load(scores + head * 2 * C + C + offsets, mask=inside, other=0.0)
    key_mean /= num_heads
    value_mean /= num_heads
    if FUSION == KEY:
        return key_mean
    elif FUSION == VALUE:
        return value_mean
    elif FUSION == MEAN:
        return 0.5 * (key_mean + value_mean)
    else:
        key_variance = tl.zeros_like(key_mean)
        value_variance = tl.zeros_like(key_mean)
        for head in range(num_heads):
            key = tl.load(scores + head * 2 * C + offsets, mask=inside, other=0.0) - key_mean
            value = tl.load(scores + head * 2 * C + C + offsets, mask=inside, other=0.0) - value_mean
            key_variance += key * key
            value_variance += value * value
        total = key_variance + value_variance
        weight = tl.where(total > 0, value_variance / tl.where(total > 0, total, 1.0), 0.5)
        return weight * key_mean + (1 - weight) * value_mean


@triton.jit
def _move(
    base, table, head, sources, targets, valid, dims, block_stride, head_stride, token_stride,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Move tokens to other slots. All are read before any is written: other warps read what this one writes over."""
    mask = valid[:, None] & (dims < D)[None, :]
    origin = _token_offsets(sources, valid, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE)
    goal = _token_offsets(targets, valid, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE)
    keys = tl.load(base + origin[:, None] + dims[None, :], mask=mask, other=0)
    values = tl.load(base + D + origin[:, None] + dims[None, :], mask=mask, other=0)
    tl.debug_barrier()
    tl.store(base + goal[:, None] + dims[None, :], keys, mask=mask)
    tl.store(base + D + goal[:, None] + dims[None, :], values, mask=mask)


@triton.jit(do_not_specialize=_PER_SEAL, do_not_specialize_on_alignment=_PER_SEAL)
def _compact(
    layer_addresses,  # int64 [num_layers]
    tables,  # int32 [num_rows, table_stride]
    table_stride,
    num_tokens_ptr,  # int32 [num_rows]
    first_task_ptr,  # int32 [num_rows], the row's first task
    asked_ptr,  # int32 [num_rows], the chunk of that task
    first_ptr,  # int32 [num_rows]
    last_ptr,  # int32 [num_rows]
    own_ptr,  # int32 [num_rows]
    block_stride,
    head_stride,
    token_stride,
    saved,  # float32 [num_layers, saved_stride]
    saved_stride,
    known,  # float32 [num_layers, num_tasks, C]
    scores,  # float32 [num_layers, num_tasks, num_scored_heads, 2, C]
    num_scored_heads,
    redundancy,  # float32 [num_layers, num_rows, num_heads, BLOCK_C], scratch
    kept,  # int32 [num_layers, num_tasks, K], offsets that stay; untouched where nothing was due
    num_tasks,
    sinks,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    FUSION: tl.constexpr,
    ENCODING: tl.constexpr,
):
    """Grid (num_rows, num_heads, num_layers): choose what stays of a row's due chunks and move one head of it.

    No token moves to a higher slot and tokens are moved in order, so nothing is overwritten before it is read.
    """
    row, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, first_is_known = _due(row, first_ptr, last_ptr, own_ptr)
    if last <= first:
        return
    base = _bits_pointer(tl.load(layer_addresses + layer), ENCODING)
    table = tables + row.to(tl.int64) * table_stride
    removed = first * (C - K)
    task_of_chunk_zero = tl.load(first_task_ptr + row) - tl.load(asked_ptr + row)
    everything, lanes, dims = tl.arange(0, BLOCK_C), tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    inside = everything < C
    scratch = redundancy + ((layer.to(tl.int64) * tl.num_programs(0) + row) * tl.num_programs(1) + head) * BLOCK_C
    for chunk in range(first, last + 1):
        place = layer.to(tl.int64) * num_tasks + task_of_chunk_zero + chunk
        if first_is_known & (chunk == first):
            fused = tl.load(known + place * C + everything, mask=inside, other=0.0)
        else:
            fused = _fuse(scores + place * num_scored_heads * 2 * C, everything, inside, num_scored_heads, C, FUSION)
        if chunk == last:
            # Its predecessors are about to be packed: the next seal needs these. One head writes for all.
            if head == 0:
                slots = chunk * C + everything - last * (C - K)
                blocks = tl.load(table + slots // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
                physical = layer.to(tl.int64) * saved_stride + blocks * BLOCK_SIZE + slots % BLOCK_SIZE
                tl.store(saved + physical, fused, mask=inside)
        else:
            is_sink = chunk * C + everything < sinks
            ranked = tl.where(fused == fused, fused, float("inf"))  # what is no number goes first
            ranked = tl.where(is_sink, float("-inf"), ranked)
            # Every head ranks the same stored numbers, so all make the same choice.
            tl.debug_barrier()
            tl.store(scratch + everything, ranked)
            tl.debug_barrier()
            rank = tl.zeros([BLOCK_C], tl.int32)
            for begin in range(0, C, TILE):
                other = begin + lanes
                theirs = tl.load(scratch + other, mask=other < C, other=float("inf"))
                ahead = (theirs[None, :] < ranked[:, None]) | (
                    (theirs[None, :] == ranked[:, None]) & (other[None, :] < everything[:, None])
                )
                rank += tl.sum((ahead & (other < C)[None, :]).to(tl.int32), 1)
            stays = (inside & (rank < K)).to(tl.int32)
            order = tl.cumsum(stays, 0) - 1
            # Where each token goes, or -1; read back a tile at a time.
            tl.debug_barrier()
            tl.store(scratch + everything, tl.where(stays > 0, order, -1).to(tl.float32))
            tl.debug_barrier()
            if head == 0:
                tl.store(kept + place * K + order, everything, mask=stays > 0)
            for begin in range(0, C, TILE):
                offsets = begin + lanes
                goal = tl.load(scratch + offsets, mask=offsets < C, other=-1.0).to(tl.int32)
                _move(
                    base, table, head, chunk * C + offsets - removed, chunk * K + goal, goal >= 0, dims,
                    block_stride, head_stride, token_stride, D, BLOCK_SIZE,
                )  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr + row)
    for begin in range(last * C, num_tokens, TILE):
        position = begin + lanes
        _move(
            base, table, head, position - removed, position - last * (C - K), position < num_tokens, dims,
            block_stride, head_stride, token_stride, D, BLOCK_SIZE,
        )  # fmt: skip
