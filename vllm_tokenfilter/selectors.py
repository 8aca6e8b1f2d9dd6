"""Baselines: other ways to choose what goes, under the same layout and budget, so that like is compared with like.

Each returns the redundancy of one chunk's tokens, float32 [C]: **high goes, low stays**, as in filtering.py. The
published methods choose per head; here a layer's heads share one choice, so their scores are averaged over heads.
`recency` ranks nothing inside a chunk: sealing drops the oldest tokens behind the sinks instead.

Shapes: H KV heads, C tokens of the chunk, D head size, P raw tokens before the chunk that are given (0 <= P).
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.filtering import anchors, redundancy, similarity

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class RawChunk:
    """A complete raw chunk and its surroundings in one layer."""

    keys: Tensor  #: float [H, P + C, D], as the cache holds them (after RoPE).
    values: Tensor  #: same shape.
    num_before: int  #: P.
    next_keys: Tensor | None  #: float [H, C, D], the chunk after it; None while that is incomplete.
    next_values: Tensor | None  #: same shape, or None.
    first_position: int  #: position of the chunk's first token in the sequence.
    layer_index: int  #: index of the layer, from 0.


def chunk_redundancy(chunk: RawChunk, config: FilterConfig) -> Tensor:
    """Redundancy of the chunk's tokens as the settings' selector sees it, float32 [C]."""
    match config.selector:
        case "anchor":
            return redundancy(
                chunk.keys, chunk.values, decay=config.anchor_decay, terms=config.anchor_terms, fusion=config.fusion
            )[chunk.num_before :]
        case "random":
            return random_scores(chunk, config.random_seed)
        case "keydiff":
            return keydiff(chunk, config.anchor_terms)
        case "key_norm":
            return key_norm(chunk)
        case "value_key_norm":
            return value_key_norm(chunk)
        case "lagkv":
            return lagkv(chunk)
        case "recency":
            raise ValueError("recency drops the oldest tokens, whatever they hold")
    assert_never(config.selector)


def random_scores(chunk: RawChunk, seed: int) -> Tensor:
    """Uniform in [0, 1), a hash of position, layer and seed: the floor any method must beat."""
    size = chunk.keys.shape[1] - chunk.num_before
    positions = torch.arange(chunk.first_position, chunk.first_position + size)
    x = (positions * 2654435761 + (chunk.layer_index + 1) * 40503 + seed * 97) & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    x = x ^ (x >> 16)
    return (x >> 8).float() / 2**24


def keydiff(chunk: RawChunk, terms: int) -> Tensor:
    """KeyDiff (arXiv 2504.15364): cosine of a key to the running mean of normalised keys; alike keys go.

    The paper's mean is over the whole cache; ours over the last `terms` predecessors, so that it stays a pure function
    of raw tokens.
    """
    unit = torch.nn.functional.normalize(chunk.keys.float(), dim=-1)
    return similarity(unit, anchors(unit, 1.0, terms)).mean(0)[chunk.num_before :]


def key_norm(chunk: RawChunk) -> Tensor:
    """L2 norm of the key (arXiv 2406.11430): keys of small norm draw attention, so those of large norm go."""
    return _norms(chunk.keys, chunk).mean(0)


def value_key_norm(chunk: RawChunk) -> Tensor:
    """PagedEviction (arXiv 2509.04377): norm of V over norm of K is the importance; the least important go."""
    return -(_norms(chunk.values, chunk) / _norms(chunk.keys, chunk).clamp(min=1e-20)).mean(0)


def _norms(x: Tensor, chunk: RawChunk) -> Tensor:
    """L2 norm of each of the chunk's tokens in each head, float32 [H, C]."""
    norms: Tensor = torch.linalg.vector_norm(x[:, chunk.num_before :].float(), dim=-1)
    return norms


def lagkv(chunk: RawChunk) -> Tensor:
    """LagKV (arXiv 2504.04704): spread over channels once scaled by the next chunk's range; little spread goes."""
    if chunk.next_keys is None or chunk.next_values is None:
        return torch.zeros(chunk.keys.shape[1] - chunk.num_before)  # not known yet
    scores = []
    for x, following in ((chunk.keys, chunk.next_keys), (chunk.values, chunk.next_values)):
        low, high = following.float().amin(1, keepdim=True), following.float().amax(1, keepdim=True)
        width = high - low
        scaled = torch.where(width > 0, (x[:, chunk.num_before :].float() - low) / width, 0.0)
        scores.append(scaled.std(-1, correction=0).softmax(-1).mean(0))
    return -0.5 * (scores[0] + scores[1])
