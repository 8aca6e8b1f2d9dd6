"""Which tokens go: the paper's redundancy of a token, from anchors to the kept set. Reads top to bottom.

High redundancy means the token says nothing new: **high redundancy goes, low redundancy stays.** Everything is
a pure function of the raw keys and values of a token and its last `anchor_terms` predecessors, in float32.

Shapes: T tokens in order of position, H KV heads of this rank, D head size, C tokens of a chunk, K kept.

Source: arXiv 2512.07090 (joint key-value similarity to running anchors, variance-aware fusion over heads);
docs/algorithm.md says what is published and what is our reading.
"""

from typing import assert_never

import torch
from torch import Tensor

from vllm_tokenfilter.config import Fusion


def anchors(x: Tensor, decay: float, terms: int) -> Tensor:
    """The running anchor each token is compared with: the decayed mean of its predecessors.

    Args:
        x: keys (after RoPE) or values, float32 [H, T, D].
        decay: weight lost per token of distance.
        terms: predecessors that count.

    Returns:
        float32 [H, T, D]; row t averages rows t-1 .. t-terms with weights decay**(j-1). Row 0 is zero. Only the
        direction matters to a cosine, so the sum is not divided by the weights.
    """
    num_tokens = x.shape[1]
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None, :]
    weights = torch.where((distance >= 1) & (distance <= terms), decay ** (distance - 1.0), 0.0)
    return weights.to(x.dtype) @ x


def similarity(x: Tensor, anchor: Tensor) -> Tensor:
    """Cosine of each token to its anchor, [H, T] from two [H, T, D]; zero where either vector is zero."""
    norms = (x * x).sum(-1) * (anchor * anchor).sum(-1)
    return (x * anchor).sum(-1) * torch.where(norms > 0, norms, torch.inf).rsqrt()


def fuse(key_similarity: Tensor, value_similarity: Tensor, fusion: Fusion) -> Tensor:
    """One redundancy per token from the similarities of all heads, [T] from two [H, T].

    `variance_aware` weighs key and value by the other's variance over heads, so that the one the heads agree on
    counts more; where neither varies (one head, say) it is the plain mean.
    """
    key, value = key_similarity.mean(0), value_similarity.mean(0)
    match fusion:
        case "key":
            return key
        case "value":
            return value
        case "mean":
            return 0.5 * (key + value)
        case "variance_aware":
            key_variance = key_similarity.var(0, correction=0)
            value_variance = value_similarity.var(0, correction=0)
            total = key_variance + value_variance
            key_weight = torch.where(total > 0, value_variance / torch.where(total > 0, total, 1.0), 0.5)
            return key_weight * key + (1 - key_weight) * value
    assert_never(fusion)


def redundancy(keys: Tensor, values: Tensor, *, decay: float, terms: int, fusion: Fusion) -> Tensor:
    """How little each token adds to its predecessors, float32 [T] in [-1, 1]; high goes, low stays.

    Args:
        keys: raw keys as the cache holds them (after RoPE), [H, T, D], any float type.
        values: raw values, same shape.
        decay: see `anchors`.
        terms: see `anchors`; a token needs that many predecessors in the input to be scored as in a longer one.
        fusion: see `fuse`.
    """
    keys, values = keys.float(), values.float()
    return fuse(
        similarity(keys, anchors(keys, decay, terms)), similarity(values, anchors(values, decay, terms)), fusion
    )


def kept(redundancy: Tensor, kept_per_chunk: int, num_sinks: int) -> Tensor:
    """What stays of one chunk: its least redundant tokens; of equals the older; its first `num_sinks` always.

    Args:
        redundancy: [C], the chunk's tokens in order.
        kept_per_chunk: K <= C.
        num_sinks: sink tokens inside this chunk, <= K.

    Returns:
        int64 [K], offsets inside the chunk, ascending.
    """
    ranked = redundancy.clone()
    ranked[:num_sinks] = -torch.inf
    return ranked.sort(stable=True).indices[:kept_per_chunk].sort().values
