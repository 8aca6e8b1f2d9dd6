"""One layer's seal of one request, written to be obviously right: the oracle of the tests. Slow.

Works on a request's tokens in slot order, as plain tensors; `kernels/cpu/seal.c` and `kernels/gpu` do the same
in place in the paged cache for every layer and request of a step at once.
"""

import torch
from torch import Tensor

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.filtering import kept
from vllm_tokenfilter.selectors import RawChunk, chunk_redundancy


def seal_reference(
    keys: Tensor,
    values: Tensor,
    first_redundancy: Tensor | None,
    first_chunk: int,
    last_chunk: int,
    config: FilterConfig,
    layer_index: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Seal chunks `first_chunk` .. `last_chunk` - 1 of one request in one layer.

    Args:
        keys: [num_kv_heads, stored, head_size] in slot order: packed tokens, then raw ones.
        values: same shape.
        first_redundancy: float32 [chunk_size] of `first_chunk`, saved by the seal before; None if it is
            the first chunk the request seals itself, so that nothing raw comes before it.
        first_chunk: the first chunk to seal.
        last_chunk: one past the last chunk to seal; chunk `last_chunk` itself must be complete, and is scored.
        config: the settings; any selector but recency.
        layer_index: index of the layer, from 0.

    Returns:
        keys and values after the seal, the redundancy of chunk `last_chunk` (float32 [chunk_size]) for the next
        seal, and per sealed chunk the offsets that stayed.
    """
    layout = config.layout
    size = layout.chunk_size
    num_packed = first_chunk * layout.kept_per_chunk
    raw_keys, raw_values = keys[:, num_packed:], values[:, num_packed:]
    survivors = [torch.arange(num_packed)]
    choices: list[Tensor] = []
    for chunk in range(first_chunk, last_chunk + 1):
        start = (chunk - first_chunk) * size
        # LagKV looks at the chunk that follows, so nothing known at the seal before helps it.
        if chunk == first_chunk and first_redundancy is not None and config.selector != "lagkv":
            scores = first_redundancy
        else:
            history = max(0, start - layout.anchor_terms)
            following = slice(start + size, start + 2 * size)
            scores = chunk_redundancy(
                RawChunk(
                    keys=raw_keys[:, history : start + size],
                    values=raw_values[:, history : start + size],
                    num_before=start - history,
                    next_keys=raw_keys[:, following] if chunk < last_chunk else None,
                    next_values=raw_values[:, following] if chunk < last_chunk else None,
                    first_position=chunk * size,
                    layer_index=layer_index,
                ),
                config,
            )
        if chunk == last_chunk:
            survivors.append(torch.arange(num_packed + start, keys.shape[1]))
            slots = torch.cat(survivors)
            return keys[:, slots], values[:, slots], scores, choices
        stay = kept(scores, layout.kept_per_chunk, max(0, min(size, layout.sink_tokens - chunk * size)))
        choices.append(stay)
        survivors.append(num_packed + start + stay)
    raise AssertionError("unreachable: the loop returns at last_chunk")
