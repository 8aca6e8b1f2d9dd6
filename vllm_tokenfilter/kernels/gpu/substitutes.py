"""What replaces a skipped attention on the GPU, one launch in a layer: zero, attention to the nearest, or a mean.

Names: D head size, TILE tokens or columns at a time, GROUP query heads of one KV head.

Source: docs/skipping.md (the substitutes); tests/reference.py (`_substitute`) is the readable form.
"""

from typing import assert_never

import triton
import triton.language as tl
from torch import Tensor

from vllm_tokenfilter.config import Substitute
from vllm_tokenfilter.kernels.gpu.cache import FP8_E4M3, bits_pointer, load_tile, token_offsets
from vllm_tokenfilter.kernels.gpu.carry import MEAN_TILE, CarriedOnDevice
from vllm_tokenfilter.kernels.gpu.rows import SkipBuffers, SkipRowsOnDevice, row_of
from vllm_tokenfilter.kernels.rules import SkipRule


def put_substitute(
    carried: CarriedOnDevice,
    rule: SkipRule,
    step: SkipRowsOnDevice,
    buffers: SkipBuffers,
    layer: int,
    substitute: Substitute,
    query: Tensor,
    output: Tensor,
    scale: float,
    softcap: float,
    key_scale: Tensor,
    value_scale: Tensor,
) -> None:
    """Replace the outputs of skipped attentions in one layer, which `skip.decide` was called for. One launch.

    Arguments as there, and as in the kernels below. `query` is [>= num_tokens, num_heads, head_size], contiguous but
    for the first dimension; `output` is like it, or flat. The means of outputs in `carried` are updated.
    """
    cache = carried.cache
    width = output.shape[-1] * (output.shape[1] if output.dim() == 3 else 1)
    assert output.stride(-1) == 1 and (output.dim() == 2 or output.stride(1) == output.shape[2])
    outputs = {"output": output, "output_stride": output.stride(0), "skipped": buffers.skipped}
    if substitute == "none":
        put_zero_kernel[(step.num_tokens,)](**outputs, slot_mapping=step.slot_mapping, WIDTH=width, TILE=1024)
    elif substitute == "window":
        assert query.dim() == 3 and query.stride(2) == 1 and query.stride(1) == query.shape[2] == cache.head_size
        group = query.shape[1] // cache.num_kv_heads
        attend_window_kernel[(step.num_tokens, cache.num_kv_heads)](
            **cache.arguments,
            **step.arguments,
            **buffers.arguments,
            **outputs,
            query=query,
            query_stride=query.stride(0),
            layer=layer,
            num_reqs=step.num_reqs,
            key_scale=key_scale,
            value_scale=value_scale,
            scale=scale,
            softcap=float(softcap),
            SINKS=rule.sinks,
            WINDOW=rule.window,
            GROUP=group,
            BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_R=triton.next_power_of_2(buffers.rows.shape[1]),
            TILE=16,
            num_warps=8,
            num_stages=1,
        )
    elif substitute == "running_output":
        assert carried.means is not None and carried.weights is not None and carried.means.shape[2] == width
        average_outputs_kernel[(step.num_reqs, carried.weights.shape[2])](
            **step.arguments,
            **buffers.arguments,
            **outputs,
            means=carried.means,
            weights=carried.weights,
            num_blocks=carried.means.shape[1],
            layer=layer,
            decay=rule.decay,
            WIDTH=width,
            BLOCK_SIZE=cache.block_size,
            TILE=MEAN_TILE,
            num_warps=1,
        )
    else:
        assert_never(substitute)


@triton.jit
def put_zero_kernel(
    slot_mapping,  # int64 [num_tokens]
    skipped,  # int32 [CAPACITY]
    output,  # [num_tokens, output_stride], changed in place
    output_stride,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
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
def attend_window_kernel(
    layer_addresses, block_stride, head_stride, token_stride,  # see GpuCache
    query_start_loc, slot_mapping, block_tables, block_tables_stride,  # see SkipRowsOnDevice
    rows, rows_stride,  # see SkipBuffers
    query,  # [num_tokens, num_heads, D], rows query_stride apart
    query_stride,
    output,  # like query, rows output_stride apart; changed in place
    output_stride,
    layer,
    num_reqs,
    skipped,  # int32 [CAPACITY]
    key_scale,  # float32 [1], of an fp8 cache
    value_scale,  # likewise
    scale,
    softcap,  # 0 for none
    SINKS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr, ENCODING: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, num_kv_heads): the substitute "window", for the query heads of one KV head."""
    token, head = tl.program_id(0), tl.program_id(1)
    if tl.load(slot_mapping + token) < 0:
        return
    if tl.load(skipped + token) == 0:
        return
    row = row_of(token, query_start_loc, num_reqs, BLOCK_R)
    slot = tl.load(rows + row) + token - tl.load(query_start_loc + row)
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    base = bits_pointer(tl.load(layer_addresses + layer), ENCODING, ALIGNMENT)
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
        places = token_offsets(
            tl.where(there, slots, 0), there, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE
        )
        keys = load_tile(base, places, there, dims, D, ENCODING)
        values = load_tile(base + D, places, there, dims, D, ENCODING)
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
def average_outputs_kernel(
    query_start_loc, slot_mapping, block_tables, block_tables_stride,  # see SkipRowsOnDevice
    rows, rows_stride,  # see SkipBuffers
    skipped,  # int32 [CAPACITY]
    means,  # float32 [num_layers, num_blocks, WIDTH], by the block of a request's newest token, updated
    weights,  # float32 [num_layers, num_blocks, num_tiles], what the means weigh: a copy for each program
    num_blocks,
    layer,
    output,  # [num_tokens, output_stride], changed in place
    output_stride,
    decay,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
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
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    before = tl.load(block_table + tl.maximum(first - 1, 0) // BLOCK_SIZE, mask=has_past, other=0)
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
            entry = layer.to(tl.int64) * num_blocks + tl.load(block_table + slot // BLOCK_SIZE)
            tl.store(means + entry * WIDTH + columns, mean, mask=inside)
            tl.store(weights + entry * tl.num_programs(1) + tile, weight)
