"""The GPU kernels of attention skipping: skip.c for the device, layer by layer inside a step's forward.

`describe_rows` runs once a step, ahead of the forward. In each layer that skips, when the step's keys and values are
in the cache: `compare_tokens` and `decide_rows`, then vLLM's own kernel over the lengths that `decide_rows` wrote,
then one of `put_zero`, `attend_window`, `average_outputs`. All grids follow from the batch's shape alone, and what
differs by data differs inside a program, so that a CUDA graph can hold a whole layer.

A token that goes nowhere (padding, a dummy run's) has a negative slot and is left alone by every kernel. Ranks and
debts are integers, as on CPU: only the scores are floating point.

Names: D head size, M terms of an anchor, TILE tokens at a time, BLOCK_R a power of two above the number of rows.

Source: docs/skipping.md (the decision, the substitutes); kernels/skip.c is the readable form.
"""

import triton
import triton.language as tl

from vllm_tokenfilter.kernels.gpu.triton_seal import (
    FP8_E4M3,
    _bits_pointer,
    _due,
    _fuse,
    _load_tile,
    _token_offsets,
    _widen,
)

#: What a row of `totals` holds, besides the row's own number: attentions decided and skipped, cache entries read.
DECIDED, SKIPPED, READ = (tl.constexpr(index) for index in range(3))

# What differs from seal to seal: Triton must not compile anew for it while requests wait.
_PER_SEAL = ["tables", "table_stride", "num_tokens_ptr", "first_ptr", "last_ptr", "own_ptr"]


@triton.jit
def _row_of(token, query_start_loc, num_reqs, BLOCK_R: tl.constexpr):
    """The row that a token of the step belongs to."""
    lanes = tl.arange(0, BLOCK_R)
    ends = tl.load(query_start_loc + 1 + lanes, mask=lanes < num_reqs, other=2147483647)
    return tl.sum((ends <= token).to(tl.int32), 0)


@triton.jit
def describe_rows(
    query_start_loc,  # int32 [num_reqs + 1]
    seq_lens,  # int32 [num_reqs], tokens once the step is done
    shared_chunks,  # int32 [num_reqs], chunks taken over sealed; unused where nothing is filtered
    rows,  # int32 [3, rows_stride], out: slot of the first new token, first raw slot, position of the first new token
    rows_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """Grid (num_reqs,): where a row's tokens lie before the step's own are written."""
    row = tl.program_id(0)
    query_len = tl.load(query_start_loc + row + 1) - tl.load(query_start_loc + row)
    computed = tl.load(seq_lens + row) - query_len
    sealed = computed * 0
    if FILTERED:
        shared = tl.load(shared_chunks + row)
        # A row that owns nothing has more shared chunks than tokens.
        sealed = tl.maximum(tl.maximum(computed - W, 0) // C, tl.where(shared > computed, 0, shared))
    tl.store(rows + row, computed - sealed * (C - K))
    tl.store(rows + rows_stride + row, sealed * K)
    tl.store(rows + 2 * rows_stride + row, computed)


@triton.jit
def _cosine(x, anchor):
    """Cosine of two vectors; zero where either is zero."""
    norms = tl.sum(x * x, 0) * tl.sum(anchor * anchor, 0)
    return tl.where(norms > 0, tl.sum(x * anchor, 0) / tl.sqrt(tl.where(norms > 0, norms, 1.0)), 0.0)


@triton.jit(do_not_specialize=["layer", "num_reqs"])
def compare_tokens(
    layer_addresses,  # int64 [num_layers]
    layer,
    query_start_loc,  # int32 [num_reqs + 1]
    num_reqs,
    rows,  # int32 [3, rows_stride]
    rows_stride,
    slot_mapping,  # int64 [num_tokens]
    tables,  # int32 [num_reqs, table_stride]
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    similarities,  # float32 [num_heads, 2, CAPACITY], out
    decay_log2,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    ENCODING: tl.constexpr,
):
    """Grid (num_tokens, num_heads): cosine of a token's key, and of its value, to the anchor of the raw ones before."""
    token, head = tl.program_id(0), tl.program_id(1)
    if tl.load(slot_mapping + token) < 0:
        return
    row = _row_of(token, query_start_loc, num_reqs, BLOCK_R)
    slot = tl.load(rows + row) + token - tl.load(query_start_loc + row)
    before = tl.minimum(slot - tl.load(rows + rows_stride + row), M)
    table = tables + row.to(tl.int64) * table_stride
    base = _bits_pointer(tl.load(layer_addresses + layer), ENCODING)
    lanes, dims = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    key_anchor = tl.zeros([BLOCK_D], tl.float32)
    value_anchor = tl.zeros([BLOCK_D], tl.float32)
    for nearer in range(0, before, TILE):
        distance = nearer + lanes + 1
        there = distance <= before
        weight = tl.where(there, tl.exp2((distance - 1).to(tl.float32) * decay_log2), 0.0)
        places = _token_offsets(
            tl.where(there, slot - distance, 0), there, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE
        )
        key_anchor += tl.sum(weight[:, None] * _load_tile(base, places, there, dims, D, ENCODING), 0)
        value_anchor += tl.sum(weight[:, None] * _load_tile(base + D, places, there, dims, D, ENCODING), 0)
    place = _token_offsets(slot, slot >= 0, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE)
    key = _widen(tl.load(base + place + dims, mask=dims < D, other=0), ENCODING)
    value = _widen(tl.load(base + D + place + dims, mask=dims < D, other=0), ENCODING)
    tl.store(similarities + head * 2 * CAPACITY + token, _cosine(key, key_anchor))
    tl.store(similarities + head * 2 * CAPACITY + CAPACITY + token, _cosine(value, value_anchor))


@triton.jit(do_not_specialize=["layer", "ratio"])
def decide_rows(
    similarities,  # float32 [num_heads, 2, CAPACITY]
    num_heads,
    query_start_loc,  # int32 [num_reqs + 1]
    rows,  # int32 [3, rows_stride]
    rows_stride,
    slot_mapping,  # int64 [num_tokens]
    tables,  # int32 [num_reqs, table_stride]
    table_stride,
    scores,  # float32 [num_layers, kept_stride], by physical slot, updated
    debts,  # int32 [num_layers, kept_stride], likewise, in 1 / UNITS of a token
    kept_stride,
    layer,
    ratio,  # in 1 / UNITS
    warmup,
    near,  # cache entries that a skipped row reads at most
    seq_lens,  # int32 [num_reqs], slots that a row attends to if it is not skipped
    read_lens,  # int32 [num_reqs], out: what vLLM's kernel attends to
    below,  # int32 [CAPACITY], scratch
    skipped,  # int32 [CAPACITY], out: 1 where a token's attention is skipped
    totals,  # int64 [num_reqs, 3], added to
    HISTORY: tl.constexpr,
    UNITS: tl.constexpr,
    PATIENCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    FUSION: tl.constexpr,
):
    """Grid (num_reqs,): decide for a row's tokens in their order; right for every TILE, which only makes it quick."""
    row = tl.program_id(0)
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    seq_len = tl.load(seq_lens + row)
    tl.store(read_lens + row, seq_len)
    if count <= 0:
        return
    if tl.load(slot_mapping + start) < 0:
        return
    first, raw = tl.load(rows + row), tl.load(rows + rows_stride + row)
    position = tl.load(rows + 2 * rows_stride + row)
    table = tables + row.to(tl.int64) * table_stride
    scores += layer.to(tl.int64) * kept_stride
    debts += layer.to(tl.int64) * kept_stride
    lanes, back = tl.arange(0, TILE), 1 + tl.arange(0, BLOCK_N)
    has_past = first > raw
    last_slot = tl.maximum(first - 1, 0)
    last_block = tl.load(table + last_slot // BLOCK_SIZE, mask=has_past, other=0).to(tl.int64)
    debt = tl.load(debts + last_block * BLOCK_SIZE + last_slot % BLOCK_SIZE, mask=has_past, other=0)
    num_skipped = count * 0
    for begin in range(0, count, TILE):
        offsets = begin + lanes
        inside = offsets < count
        own = _fuse(similarities, start + offsets, inside, num_heads, CAPACITY, FUSION)
        tl.store(scores + tl.load(slot_mapping + start + offsets, mask=inside, other=0), own, mask=inside)
        # The tile's tokens look at each other's scores too.
        tl.debug_barrier()
        seen = tl.minimum(first - raw + offsets, HISTORY)
        there = inside[:, None] & (back[None, :] <= seen[:, None])
        slots = tl.where(there, first + offsets[:, None] - back[None, :], 0)
        blocks = tl.load(table + slots // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        earlier = tl.load(scores + blocks * BLOCK_SIZE + slots % BLOCK_SIZE, mask=there, other=0.0)
        ahead = there & (earlier < own[:, None])
        tl.store(below + start + offsets, tl.sum(ahead.to(tl.int32), 1), mask=inside)
        tl.debug_barrier()
        for offset in range(begin, tl.minimum(begin + TILE, count)):
            rank = tl.load(below + start + offset)
            of = tl.minimum(first - raw + offset, HISTORY)
            level = ratio * PATIENCE + debt
            warm = position + offset >= warmup
            above = rank * (UNITS * PATIENCE) >= of * (UNITS * PATIENCE - level)
            skip = (warm & (of > 0) & (level > 0) & above).to(tl.int32)
            debt = tl.where(warm, debt + ratio - skip * UNITS, 0)
            num_skipped += skip
            tl.store(skipped + start + offset, skip)
            tl.store(debts + tl.load(slot_mapping + start + offset), debt)
    cold = tl.minimum(tl.maximum(warmup - position, 0), count)
    tl.store(totals + row * 3 + DECIDED, tl.load(totals + row * 3 + DECIDED) + count - cold)
    tl.store(totals + row * 3 + SKIPPED, tl.load(totals + row * 3 + SKIPPED) + num_skipped)
    if count == 1:
        reads = tl.where(num_skipped > 0, tl.minimum(seq_len, near), seq_len)
        tl.store(totals + row * 3 + READ, tl.load(totals + row * 3 + READ) + reads)
        tl.store(read_lens + row, tl.where(num_skipped > 0, 1, seq_len))


@triton.jit
def put_zero(
    slot_mapping,  # int64 [num_tokens]
    skipped,  # int32 [CAPACITY]
    output,  # [num_tokens, output_stride], changed in place
    output_stride,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (num_tokens,): the substitute "none"."""
    token = tl.program_id(0)
    if tl.load(slot_mapping + token) < 0:
        return
    if tl.load(skipped + token) == 0:
        return
    lanes = tl.arange(0, TILE)
    for begin in range(0, WIDTH, TILE):
        zero = tl.zeros([TILE], tl.float32).to(output.dtype.element_ty)
        tl.store(output + token.to(tl.int64) * output_stride + begin + lanes, zero, mask=begin + lanes < WIDTH)


@triton.jit(do_not_specialize=["layer", "num_reqs"])
def attend_window(
    query,  # [num_tokens, num_heads, D], rows query_stride apart
    query_stride,
    output,  # like query, rows output_stride apart; changed in place
    output_stride,
    layer_addresses,  # int64 [num_layers]
    layer,
    query_start_loc,  # int32 [num_reqs + 1]
    num_reqs,
    rows,  # int32 [3, rows_stride]
    slot_mapping,  # int64 [num_tokens]
    skipped,  # int32 [CAPACITY]
    tables,  # int32 [num_reqs, table_stride]
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    key_scale,  # float32 [1], of an fp8 cache
    value_scale,  # likewise
    scale,
    softcap,  # 0 for none
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE: tl.constexpr,
    ENCODING: tl.constexpr,
):
    """Grid (num_tokens, num_kv_heads): the substitute "window", for the query heads of one KV head."""
    token, head = tl.program_id(0), tl.program_id(1)
    if tl.load(slot_mapping + token) < 0:
        return
    if tl.load(skipped + token) == 0:
        return
    row = _row_of(token, query_start_loc, num_reqs, BLOCK_R)
    slot = tl.load(rows + row) + token - tl.load(query_start_loc + row)
    table = tables + row.to(tl.int64) * table_stride
    base = _bits_pointer(tl.load(layer_addresses + layer), ENCODING)
    nearest = tl.maximum(slot + 1 - WINDOW, 0)
    sinks = tl.minimum(nearest, SINKS)
    count = sinks + slot + 1 - nearest
    group, lanes, dims = tl.arange(0, BLOCK_G), tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    mine = (group < GROUP)[:, None] & (dims < D)[None, :]
    heads = (head * GROUP + group)[:, None] * D + dims[None, :]
    queries = tl.load(query + token.to(tl.int64) * query_stride + heads, mask=mine, other=0.0).to(tl.float32) * scale
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    near = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for begin in range(0, count, TILE):
        index = begin + lanes
        there = index < count
        slots = tl.where(index < sinks, index, nearest + index - sinks)
        places = _token_offsets(
            tl.where(there, slots, 0), there, table, head, block_stride, head_stride, token_stride, BLOCK_SIZE
        )
        keys = _load_tile(base, places, there, dims, D, ENCODING)
        values = _load_tile(base + D, places, there, dims, D, ENCODING)
        if ENCODING >= FP8_E4M3:
            keys *= tl.load(key_scale)
            values *= tl.load(value_scale)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if softcap > 0:
            logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
        logits = tl.where(there[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(logits - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        near = near * shrink[:, None] + tl.dot(weights, values, input_precision="ieee")
        largest = larger
    result = (near / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + token.to(tl.int64) * output_stride + heads, result, mask=mine)


@triton.jit(do_not_specialize=["layer"])
def average_outputs(
    query_start_loc,  # int32 [num_reqs + 1]
    rows,  # int32 [3, rows_stride]
    rows_stride,
    slot_mapping,  # int64 [num_tokens]
    skipped,  # int32 [CAPACITY]
    tables,  # int32 [num_reqs, table_stride]
    table_stride,
    means,  # float32 [num_layers, num_blocks, WIDTH], by the block of a request's newest token, updated
    weights,  # float32 [num_layers, num_blocks, num_tiles], what the means weigh: a copy for each program
    num_blocks,
    layer,
    output,  # [num_tokens, output_stride], changed in place
    output_stride,
    decay,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (num_reqs, cdiv(WIDTH, TILE)): the substitute "running_output" for a row's tokens in their order."""
    row, tile = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    if count <= 0:
        return
    if tl.load(slot_mapping + start) < 0:
        return
    first = tl.load(rows + row)
    has_past = first > tl.load(rows + rows_stride + row)
    table = tables + row.to(tl.int64) * table_stride
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    before = tl.load(table + tl.maximum(first - 1, 0) // BLOCK_SIZE, mask=has_past, other=0)
    entry = layer.to(tl.int64) * num_blocks + before
    # A mask made of columns alone: a single condition cannot join a mask in Triton's interpreter.
    known = tl.where(has_past, columns, WIDTH) < WIDTH
    mean = tl.load(means + entry * WIDTH + columns, mask=known, other=0.0)
    weight = tl.load(weights + entry * tl.num_programs(1) + tile, mask=has_past, other=0.0)
    for offset in range(0, count):
        token = start + offset
        place = output + token.to(tl.int64) * output_stride + columns
        own = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        skip = tl.load(skipped + token) != 0
        instead = tl.where(weight > 0, mean / tl.where(weight > 0, weight, 1.0), 0.0)
        tl.store(place, instead.to(output.dtype.element_ty), mask=tl.where(skip, columns, WIDTH) < WIDTH)
        mean = tl.where(skip, mean, decay * mean + (1 - decay) * own)
        weight = tl.where(skip, weight, decay * weight + (1 - decay))
        slot = first + offset
        # A full block may be taken over by another request, which goes on from its end.
        if (offset + 1 == count) | ((slot + 1) % BLOCK_SIZE == 0):
            entry = layer.to(tl.int64) * num_blocks + tl.load(table + slot // BLOCK_SIZE)
            tl.store(means + entry * WIDTH + columns, mean, mask=inside)
            tl.store(weights + entry * tl.num_programs(1) + tile, weight)


@triton.jit(do_not_specialize=_PER_SEAL, do_not_specialize_on_alignment=_PER_SEAL)
def carry_kept(
    tables,  # int32 [num_rows, table_stride], as in a seal
    table_stride,
    num_tokens_ptr,  # int32 [num_rows]
    first_ptr,  # int32 [num_rows]
    last_ptr,  # int32 [num_rows]
    own_ptr,  # int32 [num_rows]
    scores,  # float32 [num_layers, kept_stride]
    debts,  # int32 [num_layers, kept_stride]
    kept_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (num_rows, num_layers): what is kept of raw tokens follows them to the slots a seal moved them to.

    Tokens move to lower slots and in order, so nothing is overwritten before it is read.
    """
    row, layer = tl.program_id(0), tl.program_id(1)
    first, last, _known = _due(row, first_ptr, last_ptr, own_ptr)
    if last <= first:
        return
    table = tables + row.to(tl.int64) * table_stride
    scores += layer.to(tl.int64) * kept_stride
    debts += layer.to(tl.int64) * kept_stride
    num_tokens = tl.load(num_tokens_ptr + row)
    for begin in range(last * C, num_tokens, TILE):
        position = begin + tl.arange(0, TILE)
        valid = position < num_tokens
        old = tl.where(valid, position - first * (C - K), 0)
        new = tl.where(valid, position - last * (C - K), 0)
        origin = tl.load(table + old // BLOCK_SIZE, mask=valid, other=0).to(tl.int64) * BLOCK_SIZE + old % BLOCK_SIZE
        goal = tl.load(table + new // BLOCK_SIZE, mask=valid, other=0).to(tl.int64) * BLOCK_SIZE + new % BLOCK_SIZE
        score = tl.load(scores + origin, mask=valid, other=0.0)
        debt = tl.load(debts + origin, mask=valid, other=0)
        tl.debug_barrier()
        tl.store(scores + goal, score, mask=valid)
        tl.store(debts + goal, debt, mask=valid)


@triton.jit(do_not_specialize=_PER_SEAL, do_not_specialize_on_alignment=_PER_SEAL)
def carry_means(
    tables,  # int32 [num_rows, table_stride], as in a seal
    table_stride,
    num_tokens_ptr,  # int32 [num_rows]
    first_ptr,  # int32 [num_rows]
    last_ptr,  # int32 [num_rows]
    own_ptr,  # int32 [num_rows]
    means,  # float32 [num_layers, num_blocks, WIDTH]
    weights,  # float32 [num_layers, num_blocks, num_tiles]
    num_blocks,
    C: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (num_rows, num_layers, cdiv(WIDTH, TILE)): the mean follows a request's newest token to another block."""
    row, layer, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, _known = _due(row, first_ptr, last_ptr, own_ptr)
    if last <= first:
        return
    table = tables + row.to(tl.int64) * table_stride
    newest = tl.load(num_tokens_ptr + row) - 1
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    origin = layer.to(tl.int64) * num_blocks + tl.load(table + (newest - first * (C - K)) // BLOCK_SIZE)
    goal = layer.to(tl.int64) * num_blocks + tl.load(table + (newest - last * (C - K)) // BLOCK_SIZE)
    mean = tl.load(means + origin * WIDTH + columns, mask=inside, other=0.0)
    tl.store(means + goal * WIDTH + columns, mean, mask=inside)
    weight = tl.load(weights + origin * tl.num_programs(2) + tile)
    tl.store(weights + goal * tl.num_programs(2) + tile, weight)
