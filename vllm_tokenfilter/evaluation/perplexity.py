"""Perplexity, and how far the next-token distribution moves from dense, on windows of running text.

Windows do not overlap, each is scored alone from its second token on. The dense distribution of a window is kept as
its last hidden states (a hundredth of its logits) and spread out again when another method is compared with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine


@dataclass
class WindowScores:
    """Sums over the scored positions of one window."""

    count: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


def windows_of(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """The first `count` whole windows of `length` tokens; all of them if count is 0."""
    starts = range(0, len(tokens) - length + 1, length)
    return [tokens[start : start + length] for start in (starts[:count] if count else starts)]


def measure(
    scorer: "ScoringEngine",
    windows: list[list[int]],
    step_tokens: int,
    dense: list[torch.Tensor],
    advance: Callable[[], None],
) -> tuple[dict[str, float], list[float]]:
    """Score every window with the filter's present settings: the values of a cell, and each window's mean loss in nats.

    Arguments as in `score_tails`, the windows being its texts. `dense` holds the dense model's last hidden states,
    one [num_tokens, hidden_size] per window: filled if empty (the settings must then be dense), compared with if not.
    """
    scores = [WindowScores() for _ in windows]
    record = not dense
    if record:
        dense.extend(torch.empty(0) for _ in windows)

    def consume(index: int, start: int, hidden: torch.Tensor) -> None:
        window, score = windows[index], scores[index]
        targets = torch.tensor(window[start + 1 : start + 1 + len(hidden)])
        if record:
            if not len(dense[index]):
                dense[index] = torch.empty(len(window), hidden.shape[1], dtype=hidden.dtype)
            dense[index][start : start + len(hidden)] = hidden
        if not len(targets):
            return
        logprobs = scorer.logits(hidden[: len(targets)]).log_softmax(-1)
        score.count += len(targets)
        score.nll -= float(logprobs.gather(1, targets[:, None]).sum())
        if record:
            score.agreed += len(targets)
        else:
            base = scorer.logits(dense[index][start : start + len(targets)]).log_softmax(-1)
            score.kl += float((base.exp() * (base - logprobs)).sum())
            score.agreed += int((base.argmax(-1) == logprobs.argmax(-1)).sum())
        if score.count == len(window) - 1:
            advance()

    scorer.feed(windows, step_tokens, consume)
    count = sum(score.count for score in scores)
    values = {
        "perplexity": math.exp(sum(score.nll for score in scores) / count),
        "kl": sum(score.kl for score in scores) / count,
        "top1_agreement": sum(score.agreed for score in scores) / count,
    }
    return values, [score.nll / score.count for score in scores]
