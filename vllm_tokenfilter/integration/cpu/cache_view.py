"""vLLM's CPU KV cache as one flat array with known element positions; learned once, when the cache exists.

The CPU kernels store the keys and values of a block in an order of their instruction set (AMX, AVX-512, NEON, ...),
not row by row. vLLM's own writer is asked where each element goes: numbered elements are written into a scratch block
and read back. Every known order is a sum of a token part and a dimension part; an order that is not is refused.

Source: vllm/v1/attention/backends/cpu_attn.py (`do_kv_cache_update`), vllm/v1/kv_cache_interface.py
(`create_kv_cache_views`), csrc/cpu/cpu_attn_*.hpp.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import _custom_ops as ops

from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.kernels.cpu.cache import BFLOAT16, FLOAT32, TABLE16, PagedCache

_BITS = {
    torch.float32: (torch.int32, np.uint32, FLOAT32),
    torch.bfloat16: (torch.int16, np.uint16, BFLOAT16),
    torch.float16: (torch.int16, np.uint16, TABLE16),
}


def view_paged_cache(caches: Sequence[torch.Tensor], isa: str) -> PagedCache:
    """The layers' caches as one flat array of raw bits.

    Args:
        caches: one [num_blocks, num_kv_heads, block_size, 2 * head_size] view per layer, all of one storage,
            shape, stride and dtype, as vLLM allocates the layers of one group.
        isa: the instruction-set name of the layers' CPU kernels (`layer.isa`).

    Raises:
        UnsupportedError: the caches share no storage, or their order is unknown.
    """
    first = caches[0]
    storage = first.untyped_storage()
    same = all(
        cache.untyped_storage().data_ptr() == storage.data_ptr()
        and cache.stride() == first.stride()
        and cache.shape == first.shape
        and cache.dtype == first.dtype
        for cache in caches
    )
    if not same or first.dtype not in _BITS:
        raise UnsupportedError(
            f"the KV cache (dtype {first.dtype}) is not laid out in one storage; use kv_cache_dtype=auto on CPU."
        )
    num_blocks, num_kv_heads, block_size, width = first.shape
    if first.stride()[2:] != (width, 1):
        raise UnsupportedError(f"KV cache strides {first.stride()} are unknown; unset VLLM_KV_CACHE_LAYOUT.")
    integer, unsigned, encoding = _BITS[first.dtype]
    flat = torch.empty(0, dtype=integer).set_(storage)  # the whole storage, uncopied
    key_tokens, key_dims, value_tokens, value_dims = _learn_order(first.dtype, block_size, width // 2, isa)
    return PagedCache(
        elements=flat.numpy().view(unsigned),
        encoding=encoding,
        widen_table=_float16_table() if encoding == TABLE16 else np.zeros(1, np.float32),
        layer_starts=np.array([cache.storage_offset() for cache in caches], np.int64),
        block_stride=first.stride(0),
        head_stride=first.stride(1),
        num_kv_heads=num_kv_heads,
        num_blocks=num_blocks,
        key_tokens=key_tokens,
        key_dims=key_dims,
        value_tokens=value_tokens,
        value_dims=value_dims,
    )


def _float16_table() -> NDArray[np.float32]:
    return np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)


def _learn_order(dtype: torch.dtype, block_size: int, head_size: int, isa: str) -> tuple[NDArray, ...]:
    """Token and dimension parts of an element's place inside one head of a block, for keys and for values."""
    count = block_size * head_size
    numbers = torch.arange(count).view(block_size, 1, head_size)
    slots = torch.arange(block_size, dtype=torch.int64)
    found = torch.zeros(2 * count, dtype=torch.int64)
    # bfloat16 holds integers exactly only up to 256, so the numbers are written seven bits at a time.
    for shift in range(0, count.bit_length(), 7):
        part = ((numbers >> shift) & 127).to(dtype)
        block = torch.zeros(1, 1, block_size * 2, head_size, dtype=dtype)
        key_block, value_block = block.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(part, part, key_block, value_block, slots, isa)
        found |= block.flatten().to(torch.int64) << shift
    key_order = _split_order(found[:count], block_size, head_size)
    value_tokens, value_dims = _split_order(found[count:], block_size, head_size)
    return (*key_order, value_tokens + count, value_dims)


def _split_order(found: torch.Tensor, block_size: int, head_size: int) -> tuple[NDArray, NDArray]:
    place = torch.full((block_size * head_size,), -1, dtype=torch.int64)
    place[found] = torch.arange(len(found))
    place = place.view(block_size, head_size)
    tokens, dims = place[:, 0].clone(), place[0] - place[0, 0]
    if (place < 0).any() or not torch.equal(tokens[:, None] + dims, place):
        raise UnsupportedError("this CPU's KV cache order is unknown; run with another block_size or on another CPU.")
    return tokens.numpy(), dims.numpy()
