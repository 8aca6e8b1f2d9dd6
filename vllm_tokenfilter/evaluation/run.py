"""Runs a grid of methods and settings over the metrics, one engine for all, and saves after every cell."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation import perplexity, recall, tasks
from vllm_tokenfilter.evaluation.plan import EvaluationPlan
from vllm_tokenfilter.evaluation.schema import Cell, Evaluation, key_of
from vllm_tokenfilter.local.progress import Advance, Progress

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine


def run(plan: EvaluationPlan, text: tuple[str, str], out: Path, progress: Progress) -> Evaluation:
    """Measure what `out` does not hold yet; it is written after every cell, so an interrupted run resumes.

    The plan is checked; `text` is name and content of the prose.

    Raises:
        EvaluationError: `out` cannot be read or written, or belongs to another model, text or seed.
    """
    evaluation = _resume(plan, text[0], out)
    prepared = {}
    if "tasks" in plan.metrics:
        prepared = {name: tasks.prepare_task(name, plan.data_dir) for name in plan.task_names}
    lengths = {"perplexity": plan.lengths, "recall": [n + 64 for n in plan.recall_lengths], "tasks": [2047]}
    longest = max([64, *(length for metric in plan.metrics for length in lengths[metric])])
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

    scorer = ScoringEngine(plan.model, max_model_len=longest + 1, max_num_seqs=8, max_step_tokens=64)
    try:
        metrics = _Metrics(plan, scorer, text[1], prepared)
        done = {cell.key for cell in evaluation.cells}
        for method, config in plan.points():
            scorer.use(config)
            for job in metrics.jobs(config):
                key = key_of(config, job.metric, job.parameters)
                if key not in done:
                    evaluation.cells.append(_measure(scorer, method, config, job, progress))
                    evaluation.write(out)
                    done.add(key)
                elif method == "dense" and job.metric == "perplexity" and not _all_compared(plan, job, done):
                    _measure(scorer, method, config, job, progress)
    finally:
        scorer.close()
    return evaluation


def _resume(plan: EvaluationPlan, text_name: str, out: Path) -> Evaluation:
    model = Path(plan.model).name if Path(plan.model).exists() else plan.model
    evaluation = Evaluation.resume(out, model=model, text=text_name, seed=plan.seed)
    # A file of an earlier version lacks the settings that came later, which had no effect then.
    for cell in evaluation.cells:
        cell.settings = FilterConfig.parse(cell.settings).model_dump(mode="json")
    return evaluation


def _step_tokens(config: FilterConfig) -> int:
    """Small enough that a step sees what decoding would, up to a chunk."""
    return min(64, config.chunk_size)


@dataclass(frozen=True)
class _Job:
    """One cell to measure."""

    metric: str  #: as in `Cell`.
    parameters: dict[str, Any]  #: as in `Cell`.
    units: int  #: what progress counts; 0 if unknown.
    measure: Callable[[Advance], tuple[dict[str, float], list[float]]]  #: returns the cell's values and samples.


def _all_compared(plan: EvaluationPlan, dense: _Job, done: set[str]) -> bool:
    """Whether nothing is left that the dense windows are to be compared with: they are not in the file."""
    return all(
        key_of(config, dense.metric, {**dense.parameters, "step_tokens": _step_tokens(config)}) in done
        for _, config in plan.points()
    )


def _measure(scorer: "ScoringEngine", method: str, config: FilterConfig, job: _Job, progress: Progress) -> Cell:
    described = ", ".join(f"{key} {value}" for key, value in job.parameters.items() if key != "step_tokens")
    before = scorer.status().counters.as_dict()
    advance = progress(f"{method} {config.pruning_ratio:g}: {job.metric} ({described})", job.units)
    values, samples = job.measure(advance)
    after = scorer.status().counters.as_dict()
    pruned, skipped, seen = (after[key] - before[key] for key in ("tokens_pruned", "attentions_skipped", "tokens_seen"))
    dense = {reason: count - before["rows_dense"].get(reason, 0) for reason, count in after["rows_dense"].items()}
    return Cell(
        method=method,
        settings=config.model_dump(mode="json"),
        metric=job.metric,
        parameters=job.parameters,
        values=values,
        samples=samples,
        tokens_seen=seen,
        tokens_pruned=pruned,
        attentions_skipped=skipped,
        rows_dense={reason: count for reason, count in dense.items() if count},
        filter_active=pruned > 0 or skipped > 0,
    )


class _Metrics:
    """What is measured of each point of the grid; what several points share is made once."""

    def __init__(self, plan: EvaluationPlan, scorer: "ScoringEngine", prose: str, prepared: dict[str, Any]) -> None:
        self.plan, self.scorer, self.prepared = plan, scorer, prepared
        self.tokens = list(scorer.tokenizer(prose, add_special_tokens=False)["input_ids"])
        self.dense: dict[int, list[torch.Tensor]] = {}

    def jobs(self, config: FilterConfig) -> Iterator[_Job]:
        """The cells of one point of the grid."""
        of = {"perplexity": self._perplexity, "tasks": self._tasks, "recall": self._recall}
        for metric in self.plan.metrics:
            yield from of[metric](_step_tokens(config))

    def _perplexity(self, step: int) -> Iterator[_Job]:
        for length in self.plan.lengths:
            windows = perplexity.windows_of(self.tokens, length, self.plan.windows)
            if not windows:
                raise EvaluationError(f"length={length} is longer than the text ({len(self.tokens)} tokens).")
            parameters = {"sequence_length": length, "windows": len(windows), "step_tokens": step}
            dense = self.dense.setdefault(length, [])
            measure = partial(perplexity.measure, self.scorer, windows, step, dense)
            yield _Job("perplexity", parameters, len(windows), measure)

    def _tasks(self, step: int) -> Iterator[_Job]:
        for name in self.plan.task_names:
            measure = partial(tasks.run_task, self.scorer, name, self.prepared[name], self.plan.limit, step)
            yield _Job(name, {"rows": self.plan.limit or "all", "step_tokens": step}, 0, measure)

    def _recall(self, step: int) -> Iterator[_Job]:
        plan = self.plan
        for length, depth, kind in itertools.product(plan.recall_lengths, plan.depths, plan.kinds):
            trials = recall.make_trials(kind, self.scorer.tokenizer, self.tokens, length, depth, plan.trials, plan.seed)
            asked = {"kind": kind, "length": length, "depth": depth, "trials": len(trials), "step_tokens": step}
            yield _Job("recall", asked, len(trials), partial(recall.measure, self.scorer, trials, step))
