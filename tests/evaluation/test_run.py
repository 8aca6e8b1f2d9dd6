"""The grid of an evaluation: what is measured, what is taken from the file, and how a text's end is scored."""

import dataclasses
import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from vllm_tokenfilter.evaluation.plan import EvaluationPlan
from vllm_tokenfilter.evaluation.run import run
from vllm_tokenfilter.evaluation.schema import settings_of
from vllm_tokenfilter.evaluation.tails import score_tails
from vllm_tokenfilter.integration.counters import StepCounters

VOCABULARY = 60


class Tokenizer:
    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


class Engine:
    """In place of a `ScoringEngine`: the likeliest token is the one seen, and filtering flattens the distribution."""

    def __init__(self, *arguments, **options):
        self.tokenizer = Tokenizer()

    def use(self, config):
        self.ratio = config.pruning_ratio
        self.pruned = self.seen = 0

    def status(self):
        counts = {"tokens_seen": self.seen, "tokens_pruned": self.pruned, "rows_dense": Counter(short=self.seen)}
        return SimpleNamespace(counters=StepCounters(**counts))

    def feed(self, sequences, step_tokens, consumer):
        for index, tokens in enumerate(sequences):
            self.seen += len(tokens)
            self.pruned += int(self.ratio * len(tokens))
            for start in range(0, len(tokens), step_tokens):
                rows = torch.tensor(tokens[start : start + step_tokens])
                consumer(index, start, (1 - self.ratio) * torch.nn.functional.one_hot(rows, VOCABULARY))

    def logits(self, hidden):
        return hidden.float()

    def close(self):
        pass


@pytest.fixture
def plan(monkeypatch):
    module = "vllm_tokenfilter.integration.offline.scoring"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(ScoringEngine=Engine))
    return EvaluationPlan(
        model="tiny",
        methods=["variance_aware"],
        ratios=[0.5],
        configs={"a file that says the same": settings_of("variance_aware", 0.5, 64, 64, {})},
        recent_windows=[64],
        chunk_sizes=[64],
        metrics=["perplexity", "recall"],
        lengths=[128],
        windows=2,
        recall_lengths=[300],
        depths=[0.5],
        kinds=["passkey"],
        trials=3,
    )


def measure(plan, out):
    stages = []

    def progress(stage, units):
        stages.append(stage.partition(" (")[0])
        return lambda unit=None: None

    return run(plan, ("prose", "many different words " * 300), out, progress), stages


def test_every_point_is_measured_once_and_a_rerun_measures_nothing(plan, tmp_path):
    out = tmp_path / "eval.json"
    evaluation, stages = measure(plan, out)
    points = ["dense 0", "variance_aware 0.5"]
    assert stages == [f"{point}: {metric}" for point in points for metric in ("perplexity", "recall")]
    text, recall = evaluation.cells[2:]
    assert text.filter_active and text.tokens_seen == 256 and text.tokens_pruned == 128 and text.rows_dense
    assert text.values["kl"] > 0 and len(text.samples) == 2 and len(recall.samples) == 3
    assert evaluation.cells[0].values["kl"] == 0 and not evaluation.cells[0].filter_active
    again, stages = measure(plan, out)
    assert stages == [] and again.cells == evaluation.cells


def test_dense_text_is_read_again_for_a_new_point_to_be_compared_with(plan, tmp_path):
    out = tmp_path / "eval.json"
    before, _ = measure(plan, out)
    after, stages = measure(dataclasses.replace(plan, ratios=[0.5, 0.25]), out)
    assert stages == ["dense 0: perplexity", "variance_aware 0.25: perplexity", "variance_aware 0.25: recall"]
    assert after.cells[:4] == before.cells and len(after.cells) == 6
    assert 0 < after.cells[4].values["kl"] < before.cells[2].values["kl"]


@pytest.mark.parametrize("step", [1, 3, 64])
def test_the_end_of_a_text_is_scored_whatever_the_steps(step):
    engine, done = Engine(), []
    engine.ratio = engine.seen = engine.pruned = 0
    texts, lengths = [[5, 6, 7, 7, 8], [1, 1]], [3, 1]
    tails = score_tails(engine, texts, lengths, step, lambda: done.append(None))
    right = 1 - math.log(math.e + VOCABULARY - 1)
    assert [tail.hits for tail in tails] == [[False, True, False], [True]] and len(done) == 2
    assert tails[0].logprobs == pytest.approx([right - 1, right, right - 1])
