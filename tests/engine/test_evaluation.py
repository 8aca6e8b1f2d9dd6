"""The evaluation against independent computations: Hugging Face when dense, the reference when filtered."""

import dataclasses
import json
import math

import pytest
import torch

from tests import reference
from vllm_tokenfilter.evaluation import run as evaluation
from vllm_tokenfilter.evaluation import tasks
from vllm_tokenfilter.evaluation.perplexity import windows_of
from vllm_tokenfilter.evaluation.plan import EvaluationPlan

LENGTH = 512


def no_progress(description, units):
    return lambda: None


@pytest.fixture(scope="module")
def plan(model_path, prose, tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "query": "Question: " + prose[i * 700 : i * 700 + 900].replace("\n", " "),
            "choices": ["yes", "no"],
            "gold": i % 2,
        }
        for i in range(6)
    ]
    (folder / "boolq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    short = [{"query": "Question: Where is Rome?", "choices": ["Italy", "Peru"], "gold": 0}] * 2
    (folder / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, short)))
    return EvaluationPlan(
        model=model_path,
        methods=["variance_aware"],
        ratios=[0.5],
        recent_windows=[64],
        chunk_sizes=[64],
        metrics=["perplexity", "tasks", "recall"],
        lengths=[LENGTH],
        windows=2,
        task_names=["boolq", "arc_easy"],
        recall_lengths=[300],
        depths=[0.3],
        trials=4,
        data_dir=folder,
    )


@pytest.fixture(scope="module")
def result(plan, prose, tmp_path_factory):
    return evaluation.run(plan, ("prose", prose), tmp_path_factory.mktemp("result") / "eval.json", no_progress)


@pytest.fixture(scope="module")
def repeated(plan, tiny_model, prose, tmp_path_factory):
    """The same plan for a tiny model, which is a matter of seconds, twice; with the first file."""
    plan = dataclasses.replace(plan, model=tiny_model)
    files = [tmp_path_factory.mktemp("result") / "eval.json" for _ in range(2)]
    return plan, files[0], *(evaluation.run(plan, ("prose", prose), file, no_progress) for file in files)


def cell(found, method, metric):
    return next(cell for cell in found.cells if cell.method == method and cell.metric == metric)


@pytest.fixture(scope="module")
def independent(model_path, prose):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(model_path)(prose, add_special_tokens=False)["input_ids"]
    return model, windows_of(tokens, LENGTH, 2)


def perplexity(logprobs_of, windows):
    total = count = 0
    for window in windows:
        logprobs = logprobs_of(window)[:-1]
        total -= float(logprobs.gather(1, torch.tensor(window[1:])[:, None]).sum())
        count += len(window) - 1
    return math.exp(total / count)


def test_dense_perplexity_is_hugging_faces(result, independent):
    model, windows = independent
    with torch.no_grad():
        want = perplexity(lambda window: model(torch.tensor([window])).logits[0].log_softmax(-1), windows)
    got = cell(result, "dense", "perplexity").values
    assert got["perplexity"] == pytest.approx(want, rel=0.005)
    assert got["kl"] == 0 and got["top1_agreement"] == 1


def test_filtered_perplexity_is_the_references(result, independent):
    model, windows = independent
    steps = [64] * (LENGTH // 64)
    want = perplexity(lambda w: reference.run(model, w, steps, reference.Settings()).logprobs, windows)
    got = cell(result, "variance_aware", "perplexity").values
    assert got["perplexity"] == pytest.approx(want, rel=0.01)
    assert got["perplexity"] != pytest.approx(cell(result, "dense", "perplexity").values["perplexity"], rel=1e-4)
    assert got["kl"] > 0 and got["top1_agreement"] < 1


@pytest.mark.parametrize("metric", ["perplexity", "boolq", "recall"])
def test_filtering_half_changes_the_score_and_says_what_it_removed(result, metric):
    dense, ours = cell(result, "dense", metric), cell(result, "variance_aware", metric)
    assert ours.filter_active and ours.tokens_pruned > 0
    assert not dense.filter_active and dense.tokens_pruned == 0
    if metric != "boolq":  # six rows may be judged alike
        assert ours.values != dense.values


def test_a_task_of_short_prompts_is_reported_as_inactive_not_as_a_result(result):
    from vllm_tokenfilter.reports.tables import evaluation_tables

    ours = cell(result, "variance_aware", "arc_easy")
    assert not ours.filter_active and ours.tokens_pruned == 0
    assert ours.rows_dense["shorter_than_window_and_chunk"] > 0
    rows = dict(evaluation_tables(result.model_dump(mode="json")))[f"arc_easy: {result.model}"]
    assert "filter inactive" in next(row for row in rows if row[0] == "variance_aware")


def test_the_same_seed_gives_exactly_the_same_figures(repeated):
    *_, found, again = repeated
    assert [cell.values for cell in found.cells] == [cell.values for cell in again.cells]
    assert [cell.samples for cell in found.cells] == [cell.samples for cell in again.cells]


def test_an_interrupted_run_resumes_with_what_is_missing(repeated, prose):
    plan, file, found, _ = repeated
    saved = json.loads(file.read_text())
    missing = saved["cells"].pop(7)
    file.write_text(json.dumps(saved))
    measured = []

    def progress(description, units):
        measured.append(description)
        return lambda: None

    resumed = evaluation.run(plan, ("prose", prose), file, progress)
    assert sum(not description.startswith("dense") for description in measured) == 1
    assert resumed.cells[-1].values == missing["values"]
    assert len(resumed.cells) == len(found.cells)


def test_every_local_task_file_is_read_as_lm_eval_asks(tmp_path):
    pytest.importorskip("lm_eval")
    row = {"query": "q", "choices": ["a", "b"], "gold": 0}
    for name, (file, _) in tasks.LOCAL_TASKS.items():
        if file.endswith(".jsonl"):
            (tmp_path / file).write_text(json.dumps(row))
            assert tasks.prepare_task(name, tmp_path)["task"] == name
