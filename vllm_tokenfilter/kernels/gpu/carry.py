"""What attention skipping carries from step to step on the GPU, and how it follows tokens that a seal moves.

Nothing here waits for the device. Everything a CUDA graph reads or writes is made once and stays where it is.

Names: C tokens of a chunk, K kept, TILE tokens or columns at a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_tokenfilter.kernels.gpu.cache import GpuCache, physical_slots
from vllm_tokenfilter.kernels.gpu.due import PER_SEAL, DueSealsOnDevice, due_chunks
from vllm_tokenfilter.layout import Layout

#: Columns of a mean of outputs that one program takes.
MEAN_TILE = 128


@dataclass(frozen=True)
class CarriedOnDevice:
    """The cache of the layers that skip, and what is carried for its tokens from step to step.

    Attributes:
        cache: the layers' cache; its `saved_redundancy` holds the tokens' scores.
        debts: int32 [num_layers, num_blocks * block_size], by physical slot, in 1 / SKIP_UNITS of a token.
        means: float32 [num_layers, num_blocks, num_heads * head_size], by the block of a request's newest token;
            None but for the substitute "running_output".
        weights: float32 [num_layers, num_blocks, tiles of a mean].
    """

    cache: GpuCache
    debts: Tensor
    means: Tensor | None
    weights: Tensor | None

    @classmethod
    def over(cls, cache: GpuCache, mean_width: int) -> "CarriedOnDevice":
        """Carry nothing yet; `mean_width` is num_heads * head_size where means are carried, else 0."""
        scores = cache.saved_redundancy
        debts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        if not mean_width:
            return cls(cache, debts, None, None)
        pool = (scores.shape[0], scores.shape[1] // cache.block_size)
        means = torch.zeros(*pool, mean_width, dtype=torch.float32, device=scores.device)
        weights = torch.zeros(*pool, -(-mean_width // MEAN_TILE), dtype=torch.float32, device=scores.device)
        return cls(cache, debts, means, weights)


def bytes_of_means(cache: GpuCache, mean_width: int) -> int:
    """What `CarriedOnDevice.over` allocates for means of outputs."""
    num_layers, num_slots = cache.saved_redundancy.shape
    return 4 * num_layers * (num_slots // cache.block_size) * (mean_width + -(-mean_width // MEAN_TILE))


def follow_seals(carried: CarriedOnDevice, due: DueSealsOnDevice, layout: Layout) -> None:
    """Let what is carried for tokens follow them to where a seal moved them; one or two launches."""
    num_rows, num_layers = len(due.plan.rows), carried.debts.shape[0]
    sizes = {"C": layout.chunk_size, "K": layout.kept_per_chunk, "BLOCK_SIZE": carried.cache.block_size}
    carry_scores_kernel[(num_rows, num_layers)](
        **due.arguments,
        num_tokens=due.of_rows[1],
        scores=carried.cache.saved_redundancy,
        debts=carried.debts,
        carried_stride=carried.debts.stride(0),
        TILE=128,
        **sizes,
    )
    if carried.means is not None and carried.weights is not None:
        carry_means_kernel[(num_rows, num_layers, carried.weights.shape[2])](
            **due.arguments,
            num_tokens=due.of_rows[1],
            means=carried.means,
            weights=carried.weights,
            num_blocks=carried.means.shape[1],
            WIDTH=carried.means.shape[2],
            TILE=MEAN_TILE,
            **sizes,
        )


@triton.jit(do_not_specialize=PER_SEAL, do_not_specialize_on_alignment=PER_SEAL)
def carry_scores_kernel(
    block_tables, block_tables_stride, first_chunk, last_chunk, shared_chunks,  # see DueSealsOnDevice
    num_tokens,  # int32 [num_rows]
    scores,  # float32 [num_layers, carried_stride]
    debts,  # int32 [num_layers, carried_stride]
    carried_stride,
    C: tl.constexpr, K: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows, num_layers): score and debt of raw tokens follow them to the slots a seal moved them to.

    Tokens move to lower slots and in order, so nothing is overwritten before it is read.
    """
    row, layer = tl.program_id(0), tl.program_id(1)
    first, last, _known = due_chunks(row, first_chunk, last_chunk, shared_chunks)
    if last <= first:
        return
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    scores += layer.to(tl.int64) * carried_stride
    debts += layer.to(tl.int64) * carried_stride
    length = tl.load(num_tokens + row)
    for begin in range(last * C, length, TILE):
        position = begin + tl.arange(0, TILE)
        valid = position < length
        old = tl.where(valid, position - first * (C - K), 0)
        new = tl.where(valid, position - last * (C - K), 0)
        origin = physical_slots(old, valid, block_table, BLOCK_SIZE)
        goal = physical_slots(new, valid, block_table, BLOCK_SIZE)
        score = tl.load(scores + origin, mask=valid, other=0.0)
        debt = tl.load(debts + origin, mask=valid, other=0)
        tl.debug_barrier()
        tl.store(scores + goal, score, mask=valid)
        tl.store(debts + goal, debt, mask=valid)


@triton.jit(do_not_specialize=PER_SEAL, do_not_specialize_on_alignment=PER_SEAL)
def carry_means_kernel(
    block_tables, block_tables_stride, first_chunk, last_chunk, shared_chunks,  # see DueSealsOnDevice
    num_tokens,  # int32 [num_rows]
    means,  # float32 [num_layers, num_blocks, WIDTH]
    weights,  # float32 [num_layers, num_blocks, num_tiles]
    num_blocks,
    C: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows, num_layers, cdiv(WIDTH, TILE)): the mean follows a request's newest token to another block."""
    row, layer, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, _known = due_chunks(row, first_chunk, last_chunk, shared_chunks)
    if last <= first:
        return
    block_table = block_tables + row.to(tl.int64) * block_tables_stride
    newest = tl.load(num_tokens + row) - 1
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    origin = layer.to(tl.int64) * num_blocks + tl.load(block_table + (newest - first * (C - K)) // BLOCK_SIZE)
    goal = layer.to(tl.int64) * num_blocks + tl.load(block_table + (newest - last * (C - K)) // BLOCK_SIZE)
    mean = tl.load(means + origin * WIDTH + columns, mask=inside, other=0.0)
    tl.store(means + goal * WIDTH + columns, mean, mask=inside)
    weight = tl.load(weights + origin * tl.num_programs(2) + tile)
    tl.store(weights + goal * tl.num_programs(2) + tile, weight)
