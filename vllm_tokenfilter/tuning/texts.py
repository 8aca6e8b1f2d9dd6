"""What tune asks: questions whose answers lie far back, and running text, made up here from a seed."""

import random
from dataclasses import dataclass
from typing import Any

from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation import perplexity, recall

#: Questions are made with another seed than those `eval` asks by default.
SEED = 1000
#: Tokens at the end of a text that are computed again; questions and answers are shorter.
TAIL = 40
_KINDS = ("passkey", "key_value")
_DEPTHS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class TuningText:
    """A text whose end is scored."""

    kind: str  #: of recall.KINDS, or "prose".
    tokens: list[int]  #: ids.
    num_scored: int  #: tokens at the end that are predicted.


def make_texts(tokenizer: Any, prose: list[int], length: int, trials: int, seed: int = SEED) -> list[TuningText]:
    """Questions of every kind and depth, `trials` of each, and as much running text; see `recall.make_trials`."""
    texts = []
    for kind in _KINDS:
        for depth in _DEPTHS:
            made = recall.make_trials(kind, tokenizer, prose, length, depth, trials, seed)
            texts += [TuningText(kind, trial.tokens, trial.num_answer) for trial in made]
    windows = perplexity.windows_of(prose, length, 0)
    if not windows:
        raise EvaluationError(f"length={length} is longer than the text ({len(prose)} tokens); use a shorter one.")
    windows = random.Random(seed).sample(windows, min(len(texts), len(windows)))
    return texts + [TuningText("prose", window, TAIL - 1) for window in windows]
