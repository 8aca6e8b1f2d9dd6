"""Cosine to an anchor, and the fusion of the heads' scores of keys and values into one redundancy per token.

Source: docs/algorithm.md (redundancy); filtering.py is the readable form.
"""

import triton
import triton.language as tl

from vllm_tokenfilter.kernels import rules

VARIANCE_AWARE, MEAN, KEY, VALUE = map(tl.constexpr, rules.FUSION_CODES.values())


@triton.jit
def cosine(x, anchor, AXIS: tl.constexpr):
    """Cosine of x to the anchor along an axis; zero where either is zero."""
    norms = tl.sum(x * x, AXIS) * tl.sum(anchor * anchor, AXIS)
    return tl.where(norms > 0, tl.sum(x * anchor, AXIS) / tl.sqrt(tl.where(norms > 0, norms, 1.0)), 0.0)


@triton.jit
def fuse(head_scores, offsets, inside, num_heads, C: tl.constexpr, FUSION: tl.constexpr):
    """One redundancy per token from the heads' scores [num_heads, 2, C]."""
    key_mean = tl.zeros_like(offsets).to(tl.float32)
    value_mean = tl.zeros_like(offsets).to(tl.float32)
    for head in range(num_heads):
        key_mean += tl.load(head_scores + head * 2 * C + offsets, mask=inside, other=0.0)
        value_mean += tl.load(head_scores + head * 2 * C + C + offsets, mask=inside, other=0.0)
    key_mean /= num_heads
    value_mean /= num_heads
    if FUSION == KEY:
        return key_mean
    elif FUSION == VALUE:
        return value_mean
    elif FUSION == MEAN:
        return 0.5 * (key_mean + value_mean)
    else:
        tl.static_assert(FUSION == VARIANCE_AWARE)
        key_variance = tl.zeros_like(key_mean)
        value_variance = tl.zeros_like(key_mean)
        for head in range(num_heads):
            key = tl.load(head_scores + head * 2 * C + offsets, mask=inside, other=0.0) - key_mean
            value = tl.load(head_scores + head * 2 * C + C + offsets, mask=inside, other=0.0) - value_mean
            key_variance += key * key
            value_variance += value * value
        total = key_variance + value_variance
        weight = tl.where(total > 0, value_variance / tl.where(total > 0, total, 1.0), 0.5)
        return weight * key_mean + (1 - weight) * value_mean
