"""Recall over long contexts: facts hidden in real prose, asked for at the end. This is where filtering hurts first.

Every trial draws its prose, its facts and their places from a seeded generator. Repeated filler would hide the damage,
so the prose is running text. The answer is scored token by token as given (teacher forcing): the share of its tokens
the model ranks first, and their mean log-probability.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

KINDS = ("passkey", "key_value", "copy")

_NAMES = [
    "amber",
    "basalt",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "garnet",
    "harbor",
    "indigo",
    "juniper",
    "kestrel",
    "lagoon",
    "maple",
    "nectar",
    "onyx",
    "pebble",
    "quartz",
    "raven",
    "saffron",
    "tundra",
    "umber",
    "violet",
    "willow",
    "xenon",
    "yarrow",
    "zephyr",
]


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        tokens: the whole text with the answer at its end.
        num_answer: tokens of the answer.
    """

    tokens: list[int]
    num_answer: int


def make_trials(
    kind: str, tokenizer: Any, prose: list[int], length: int, depth: float, count: int, seed: int
) -> list[Trial]:
    """Seeded trials of one kind.

    Args:
        kind: one of KINDS.
        tokenizer: the model's.
        prose: token ids of running text, many times `length`.
        length: tokens of the text before the answer.
        depth: where the fact stands: 0 at the start of the text, 1 right before the question.
        count: trials.
        seed: of the generator; the same seed gives the same trials.
    """
    draw = random.Random(f"{kind} {length} {depth} {seed}")
    return [_TRIALS[kind](tokenizer, prose, length, depth, draw) for _ in range(count)]


def _passkey(tokenizer: Any, prose: list[int], length: int, depth: float, draw: random.Random) -> Trial:
    key = "".join(draw.choice("0123456789") for _ in range(5))
    fact = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
    return _hide(tokenizer, prose, length, depth, draw, fact, "\n\nWhat is the pass key? The pass key is", f" {key}")


def _key_value(tokenizer: Any, prose: list[int], length: int, depth: float, draw: random.Random) -> Trial:
    names = draw.sample(_NAMES, 4)
    codes = ["".join(draw.choice("0123456789") for _ in range(4)) for _ in names]
    facts = " ".join(f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True))
    wanted = draw.randrange(len(names))
    question = f"\n\nWhat is the code of {names[wanted]}? The code of {names[wanted]} is"
    return _hide(tokenizer, prose, length, depth, draw, f"\n\n{facts}\n\n", question, f" {codes[wanted]}")


def _copy(tokenizer: Any, prose: list[int], length: int, depth: float, draw: random.Random) -> Trial:
    words = " ".join(draw.choice(_NAMES) for _ in range(12))
    fact = f"\n\nThe list is: {words}.\n\n"
    return _hide(tokenizer, prose, length, depth, draw, fact, "\n\nOnce more, the list is:", f" {words}")


def _hide(
    tokenizer: Any,
    prose: list[int],
    length: int,
    depth: float,
    draw: random.Random,
    fact: str,
    question: str,
    answer: str,
) -> Trial:
    fact_ids, question_ids, answer_ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (fact, question, answer)
    )
    num_prose = length - len(fact_ids) - len(question_ids)
    start = draw.randrange(len(prose) - num_prose)
    text = prose[start : start + num_prose]
    place = round(depth * num_prose)
    return Trial([*text[:place], *fact_ids, *text[place:], *question_ids, *answer_ids], len(answer_ids))


_TRIALS: dict[str, Callable[..., Trial]] = {"passkey": _passkey, "key_value": _key_value, "copy": _copy}


def score_trials(
    scorer: "ScoringEngine", trials: list[Trial], step_tokens: int, advance: Callable[[], None]
) -> list[tuple[float, float]]:
    """Share of each answer's tokens ranked first, and their mean log-probability in nats.

    Args:
        scorer: the engine.
        trials: the questions.
        step_tokens: tokens of each step.
        advance: called once a trial is done.
    """
    hits: list[list[bool]] = [[] for _ in trials]
    logprobs: list[list[float]] = [[] for _ in trials]

    def consume(index: int, start: int, hidden: torch.Tensor) -> None:
        trial = trials[index]
        # The token at position p is predicted by the hidden state at p - 1.
        first = max(start, len(trial.tokens) - trial.num_answer - 1)
        end = min(start + len(hidden), len(trial.tokens) - 1)
        if first >= end:
            return
        scores = scorer.logits(hidden[first - start : end - start]).log_softmax(-1)
        targets = torch.tensor(trial.tokens[first + 1 : end + 1])
        hits[index].extend((scores.argmax(-1) == targets).tolist())
        logprobs[index].extend(scores.gather(1, targets[:, None])[:, 0].tolist())
        if len(hits[index]) == trial.num_answer:
            advance()

    scorer.feed([trial.tokens for trial in trials], step_tokens, consume)
    return [(sum(hit) / len(hit), sum(lp) / len(lp)) for hit, lp in zip(hits, logprobs, strict=True)]


def summarise(results: list[tuple[float, float]]) -> tuple[dict[str, float], list[float]]:
    """Values of a cell and its samples: each trial's token accuracy."""
    accuracy = [hit for hit, _ in results]
    mean = sum(accuracy) / len(accuracy)
    variance = sum((x - mean) ** 2 for x in accuracy) / max(1, len(accuracy) - 1)
    return {
        "token_accuracy": mean,
        "standard_error": (variance / len(accuracy)) ** 0.5,
        "whole_answers": sum(x == 1 for x in accuracy) / len(accuracy),
        "answer_logprob": sum(lp for _, lp in results) / len(results),
    }, accuracy
