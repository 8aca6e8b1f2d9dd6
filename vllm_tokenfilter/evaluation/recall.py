"""Recall over long contexts: facts hidden in real prose, asked for at the end. This is where filtering hurts first.

Every trial draws its prose, its facts and their places from a seeded generator. Repeated filler would hide the damage,
so the prose is running text. The answer is scored token by token as given (teacher forcing): the share of its tokens
the model ranks first, and their mean log-probability.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_tokenfilter.evaluation.tails import score_tails

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

KINDS = ("passkey", "key_value", "copy")

_NAMES = [
    "amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "indigo",
    "juniper", "kestrel", "lagoon", "maple", "nectar", "onyx", "pebble", "quartz", "raven",
    "saffron", "tundra", "umber", "violet", "willow", "xenon", "yarrow", "zephyr",
]  # fmt: skip


@dataclass(frozen=True)
class RecallTrial:
    """One question."""

    tokens: list[int]  #: the whole text with the answer at its end.
    num_answer: int  #: tokens of the answer.


def make_trials(
    kind: str, tokenizer: Any, prose: list[int], length: int, depth: float, count: int, seed: int
) -> list[RecallTrial]:
    """Trials of one of KINDS, with `length` tokens before the answer; the same seed gives the same trials.

    `prose` is token ids of running text, many times `length`. `depth` is where the fact stands: 0 at the start of the
    text, 1 right before the question.
    """
    draw = random.Random(f"{kind} {length} {depth} {seed}")
    return [_TRIALS[kind](tokenizer, prose, length, depth, draw) for _ in range(count)]


def _passkey(tokenizer: Any, prose: list[int], length: int, depth: float, draw: random.Random) -> RecallTrial:
    key = "".join(draw.choice("0123456789") for _ in range(5))
    fact = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
    return _hide(tokenizer, prose, length, depth, draw, fact, "\n\nWhat is the pass key? The pass key is", f" {key}")


def _key_value(tokenizer: Any, prose: list[int], length: int, depth: float, draw: random.Random) -> RecallTrial:
    names = draw.sample(_NAMES, 4)
    codes = ["".join(draw.choice("0123456789") for _ in range(4)) for _ in names]
    facts = " ".join(f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True))
    wanted = draw.randrange(len(names))
    question = f"\n\nWhat is the code of {names[wanted]}? The code of {names[wanted]} is"
    return _hide(tokenizer, prose, length, depth, draw, f"\n\n{facts}\n\n", question, f" {codes[wanted]}")


def _copy(tokenizer: Any, prose: list[int], length: int, depth: float, draw: random.Random) -> RecallTrial:
    words = " ".join(draw.choice(_NAMES) for _ in range(12))
    fact = f"\n\nThe list is: {words}.\n\n"
    return _hide(tokenizer, prose, length, depth, draw, fact, "\n\nOnce more, the list is:", f" {words}")


def _hide(tokenizer: Any, prose: list[int], length: int, depth: float, draw: random.Random, *parts: str) -> RecallTrial:
    """The trial of a fact, a question and an answer."""
    fact_ids, question_ids, answer_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    num_prose = length - len(fact_ids) - len(question_ids)
    start = draw.randrange(len(prose) - num_prose)
    text = prose[start : start + num_prose]
    place = round(depth * num_prose)
    return RecallTrial([*text[:place], *fact_ids, *text[place:], *question_ids, *answer_ids], len(answer_ids))


_TRIALS: dict[str, Callable[..., RecallTrial]] = {"passkey": _passkey, "key_value": _key_value, "copy": _copy}


def measure(
    scorer: "ScoringEngine", trials: list[RecallTrial], step_tokens: int, advance: Callable[[], None]
) -> tuple[dict[str, float], list[float]]:
    """Ask every question with the filter's present settings: the values of a cell, and each one's token accuracy.

    Arguments as in `score_tails`, the trials being its texts.
    """
    texts, lengths = [trial.tokens for trial in trials], [trial.num_answer for trial in trials]
    answers = score_tails(scorer, texts, lengths, step_tokens, advance)
    accuracy = [sum(answer.hits) / len(answer.hits) for answer in answers]
    mean = sum(accuracy) / len(accuracy)
    variance = sum((x - mean) ** 2 for x in accuracy) / max(1, len(accuracy) - 1)
    return {
        "token_accuracy": mean,
        "standard_error": (variance / len(accuracy)) ** 0.5,
        "whole_answers": sum(x == 1 for x in accuracy) / len(accuracy),
        "answer_logprob": sum(sum(answer.logprobs) / len(answer.logprobs) for answer in answers) / len(answers),
    }, accuracy
