"""What the filter does to one text: per token and layer what stays, how alike it is, and what it costs the prediction.

The text is fed twice with the visibility decoding has, dense and filtered; see integration/scoring.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.filtering import anchors, similarity
from vllm_tokenfilter.inspection.text import InspectedText

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

#: States of a token in a layer.
PRUNED, KEPT, RAW = 0, 1, 2


@dataclass(frozen=True)
class Inspection:
    """One text under one setting."""

    text: InspectedText  #: the tokens.
    layers: list[int]  #: indices of all layers, in order.
    dense_layers: dict[str, list[int]]  #: those that keep every token, by reason.
    #: uint8 [num_layers, num_tokens]: PRUNED, KEPT, or RAW (not sealed, or in a dense layer).
    states: NDArray[np.uint8]
    key_similarity: NDArray[np.float32]  #: float32 [num_layers, num_tokens], to the running anchor, mean over heads.
    value_similarity: NDArray[np.float32]  #: float32, same shape.
    #: float64 [num_tokens - 1], of the token that follows each position, nothing filtered.
    dense_probability: NDArray[np.float64]
    filtered_probability: NDArray[np.float64]  #: float64, same shape, filtered.
    same_choice: NDArray[np.bool_]  #: bool, same shape: both find the same token likeliest.
    #: float64, same shape: divergence of the filtered distribution from the dense one, in nats.
    kl: NDArray[np.float64]

    @property
    def num_filtered_layers(self) -> int:
        """Layers that can prune."""
        return len(self.layers) - sum(len(indices) for indices in self.dense_layers.values())


def inspect_text(engine: "ScoringEngine", text: InspectedText, config: FilterConfig, step_tokens: int) -> Inspection:
    """Feed the text, of at least two tokens, dense and filtered by a ratio above 0, and compare.

    Raises:
        UnsupportedError: the model cannot be served with these settings.
    """
    from vllm_tokenfilter.integration.offline.observing import observe

    targets = torch.tensor(text.ids[1:])
    hidden_states: list[torch.Tensor] = []
    dense, filtered, kl = (torch.zeros(len(targets), dtype=torch.float64) for _ in range(3))
    same = torch.zeros(len(targets), dtype=torch.bool)

    def dense_step(index: int, start: int, hidden: torch.Tensor) -> None:
        hidden_states.append(hidden.clone())
        following = targets[start : start + len(hidden)]
        logprobs = engine.logits(hidden[: len(following)]).double().log_softmax(-1)
        dense[start : start + len(following)] = logprobs.gather(1, following[:, None])[:, 0].exp()

    def filtered_step(index: int, start: int, hidden: torch.Tensor) -> None:
        following = targets[start : start + len(hidden)]
        where = slice(start, start + len(following))
        base = engine.logits(recorded[start : start + len(following)]).double().log_softmax(-1)
        logprobs = engine.logits(hidden[: len(following)]).double().log_softmax(-1)
        filtered[where] = logprobs.gather(1, following[:, None])[:, 0].exp()
        kl[where] = (base.exp() * (base - logprobs)).sum(-1)
        same[where] = base.argmax(-1) == logprobs.argmax(-1)

    engine.use(FilterConfig(pruning_ratio=0.0))
    engine.feed([text.ids], step_tokens, dense_step)
    recorded = torch.cat(hidden_states)
    engine.use(config)
    seen = observe(engine, text.ids, step_tokens, filtered_step)
    layers = sorted(seen.keys)
    states = np.full((len(layers), len(text.ids)), RAW, np.uint8)
    for row, layer in enumerate(layers):
        if (stays := seen.kept.get(layer)) is not None:
            states[row, : len(stays)] = np.where(stays, KEPT, PRUNED)
    keys, values = (
        np.stack([running_similarity(of[layer], config.anchor_decay, config.anchor_terms).mean(0) for layer in layers])
        for of in (seen.keys, seen.values)
    )
    predictions = (of.numpy() for of in (dense, filtered, same, kl))
    return Inspection(text, layers, engine.status().layers.dense, states, keys, values, *predictions)


def running_similarity(x: torch.Tensor, decay: float, terms: int) -> NDArray[np.float32]:
    """Cosine of each token to its anchor, float32 [H, T] from float32 [H, T, D], in pieces that fit the memory."""
    num_tokens, piece = x.shape[1], 512
    parts = []
    for start in range(0, num_tokens, piece):
        before = min(start, terms)
        part = x[:, start - before : start + piece]
        parts.append(similarity(part, anchors(part, decay, terms))[:, before:])
    joined: NDArray[np.float32] = torch.cat(parts, 1).numpy()
    return joined
