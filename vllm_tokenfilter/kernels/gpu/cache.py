"""vLLM's paged cache on a GPU as the kernels see it: where every element lies, and how its bits become a float.

Elements are read as raw bits and widened here, so that one code serves float32, bfloat16, float16 and both fp8 formats
on every generation of GPU. The per-tensor scale of an fp8 cache is left to who needs it: no selector's order depends
on it.

Names: D head size, TILE tokens at a time.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT32, BFLOAT16, FLOAT16, FP8_E4M3, FP8_E5M2 = (tl.constexpr(code) for code in range(5))
#: How the kernels widen an element.
ENCODINGS = {
    torch.float32: FLOAT32.value,
    torch.bfloat16: BFLOAT16.value,
    torch.float16: FLOAT16.value,
    torch.float8_e4m3fn: FP8_E4M3.value,
    torch.float8_e5m2: FP8_E5M2.value,
}


@dataclass(frozen=True)
class GpuCache:
    """Where the filtered layers' cache lies; layers share strides and type, not necessarily one allocation.

    Element d of token i of block b in KV head h lies, counted in elements from the layer's address, at
    `b * block_stride + h * head_stride + i * token_stride + d` for keys; values follow `head_size` further on.

    Attributes:
        layer_addresses: int64 [num_layers] on the device.
        layer_indices: int64 [num_layers] on the device, the layers' indices in the model.
        saved_redundancy: float32 [num_layers, num_blocks * block_size] on the device, by physical slot: what an
            earlier seal scored and a later one needs.
        encoding: a value of ENCODINGS.
        element_size: bytes.
        num_kv_heads: KV heads of this rank.
        block_size: tokens per block.
        head_size: elements of a key.
        block_stride: see above; head_stride, token_stride likewise.
        alignment: bytes, at most 16, that every token's address is a multiple of.
    """

    layer_addresses: Tensor
    layer_indices: Tensor
    saved_redundancy: Tensor
    encoding: int
    element_size: int
    num_kv_heads: int
    block_size: int
    head_size: int
    block_stride: int
    head_stride: int
    token_stride: int
    alignment: int

    @classmethod
    def over(cls, caches: list[Tensor], layer_indices: list[int], dtype: torch.dtype) -> "GpuCache":
        """View layers' caches.

        Args:
            caches: per layer [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides but the last.
            layer_indices: the layers' indices in the model.
            dtype: what the elements are (an fp8 cache is allocated as bytes).

        Raises:
            ValueError: layers differ, or a token's keys and values do not lie side by side.
        """
        first = caches[0]
        alike = all(cache.shape == first.shape and cache.stride() == first.stride() for cache in caches)
        if not alike or first.stride(3) != 1 or dtype not in ENCODINGS or first.element_size() != dtype.itemsize:
            raise ValueError(f"a KV cache of shape {tuple(first.shape)}, strides {first.stride()}, type {dtype}")
        num_blocks, num_kv_heads, block_size, width = first.shape
        block_stride, head_stride, token_stride, _ = first.stride()
        addresses, size = [cache.data_ptr() for cache in caches], dtype.itemsize
        return cls(
            torch.tensor(addresses, dtype=torch.int64, device=first.device),
            torch.tensor(layer_indices, dtype=torch.int64, device=first.device),
            torch.zeros(len(caches), num_blocks * block_size, dtype=torch.float32, device=first.device),
            ENCODINGS[dtype],
            size,
            num_kv_heads,
            block_size,
            width // 2,
            block_stride,
            head_stride,
            token_stride,
            math.gcd(16, *addresses, *(size * step for step in (width // 2, block_stride, head_stride, token_stride))),
        )

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What every kernel that reads elements takes."""
        return {
            "layer_addresses": self.layer_addresses,
            "block_stride": self.block_stride,
            "head_stride": self.head_stride,
            "token_stride": self.token_stride,
            "D": self.head_size,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_D": triton.next_power_of_2(self.head_size),
            "ENCODING": self.encoding,
            "ALIGNMENT": self.alignment,
        }


@triton.jit
def bits_pointer(address, ENCODING: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The address as a pointer to the raw bits of an element; what is known of it decides how wide accesses are."""
    if ENCODING == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.uint32))
    elif (ENCODING == BFLOAT16) | (ENCODING == FLOAT16):
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(pointer, ALIGNMENT)


@triton.jit
def widen(bits, ENCODING: tl.constexpr):
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
def physical_slots(slots, valid, block_table, BLOCK_SIZE: tl.constexpr):
    """Slots of the pool, int64, of a request's slots; `block_table` is its row."""
    blocks = tl.load(block_table + slots // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return blocks * BLOCK_SIZE + slots % BLOCK_SIZE


@triton.jit
def token_offsets(slots, valid, block_table, head, block_stride, head_stride, token_stride, BLOCK_SIZE: tl.constexpr):
    """Element offsets of tokens in one head of a layer, int64; `slots` are logical, `block_table` the request's row."""
    blocks = tl.load(block_table + slots // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return blocks * block_stride + head * head_stride + (slots % BLOCK_SIZE).to(tl.int64) * token_stride


@triton.jit
def load_tile(base, offsets, valid, dims, D: tl.constexpr, ENCODING: tl.constexpr):
    """Tokens at `offsets`, float32 [TILE, BLOCK_D]; zero where nothing is valid."""
    mask = valid[:, None] & (dims < D)[None, :]
    bits = tl.load(base + offsets[:, None] + dims[None, :], mask=mask, other=0)
    return widen(bits, ENCODING)
