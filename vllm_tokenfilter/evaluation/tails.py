"""The end of a text scored token by token as given (teacher forcing): answers to questions, endings of sentences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine


@dataclass
class Tail:
    """The last tokens of one text, from the first to the last."""

    logprobs: list[float] = field(default_factory=list)  #: of each, nats.
    hits: list[bool] = field(default_factory=list)  #: whether each was the likeliest.


def score_tails(
    scorer: "ScoringEngine",
    texts: Sequence[list[int]],
    lengths: Sequence[int],
    step_tokens: int,
    advance: Callable[[], None],
) -> list[Tail]:
    """Score the last `lengths[i]` tokens of each text, fewer than it has, with the filter's present settings.

    Texts, as token ids, are fed in steps of `step_tokens`; `advance` is called once one is done.
    """
    tails = [Tail() for _ in texts]

    def consume(index: int, start: int, hidden: torch.Tensor) -> None:
        text, tail = texts[index], tails[index]
        # The token at position p is predicted by the hidden state at p - 1.
        first = max(start, len(text) - lengths[index] - 1)
        end = min(start + len(hidden), len(text) - 1)
        if first >= end:
            return
        logprobs = scorer.logits(hidden[first - start : end - start]).log_softmax(-1)
        targets = torch.tensor(text[first + 1 : end + 1])
        tail.hits += (logprobs.argmax(-1) == targets).tolist()
        tail.logprobs += logprobs.gather(1, targets[:, None])[:, 0].tolist()
        if end == len(text) - 1:
            advance()

    scorer.feed(texts, step_tokens, consume)
    return tails
