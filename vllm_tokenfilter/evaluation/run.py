"""Runs a grid of methods and settings over the metrics, one engine for all, and saves after every cell."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation import perplexity, recall, tasks
from vllm_tokenfilter.evaluation.schema import METHODS, Cell, Evaluation, settings_of
from vllm_tokenfilter.evaluation.tails import score_tails
from vllm_tokenfilter.local.progress import Progress

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

QUALITY_METRICS = ("perplexity", "tasks", "recall")


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure.

    Attributes:
        model: path or Hugging Face id.
        methods: keys of schema.METHODS.
        ratios: pruning ratios; dense is always measured first.
        recent_windows: tokens.
        chunk_sizes: tokens.
        extra: settings that every cell of the grid has besides.
        configs: name -> settings measured as they are, beside the grid.
        metrics: of QUALITY_METRICS.
        lengths: tokens of perplexity windows.
        windows: windows per length; 0 for all the text has.
        task_names: tasks, for the metric "tasks".
        limit: rows per task; None for all.
        recall_lengths: tokens of the text before the answer.
        depths: where the fact stands, 0 to 1.
        kinds: of recall.KINDS.
        trials: per kind, length and depth.
        seed: of the generators.
        data_dir: local rows and text.
    """

    model: str
    methods: list[str]
    ratios: list[float]
    recent_windows: list[int]
    chunk_sizes: list[int]
    metrics: list[str]
    extra: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, FilterConfig] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [2048])
    windows: int = 8
    task_names: list[str] = field(default_factory=lambda: list(tasks.PAPER_TASKS))
    limit: int | None = None
    recall_lengths: list[int] = field(default_factory=lambda: [700, 1500])
    depths: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    kinds: list[str] = field(default_factory=lambda: list(recall.KINDS))
    trials: int = 100
    seed: int = 0
    data_dir: Path | None = None

    def points(self) -> list[tuple[str, FilterConfig]]:
        """The grid: dense, every method at every ratio, chunk size and window, and the settings of files.

        Raises:
            EvaluationError: a name is unknown.
            ConfigError: settings cannot hold together.
        """
        for method in self.methods:
            if method not in METHODS:
                raise EvaluationError(f"method={method} is unknown; use one of {', '.join(METHODS)}.")
        points = [("dense", FilterConfig(pruning_ratio=0.0))]
        for ratio in self.ratios:
            for chunk in self.chunk_sizes:
                for window in self.recent_windows:
                    for method in self.methods:
                        if ratio > 0:
                            points.append((method, settings_of(method, ratio, window, chunk, self.extra)))
        return points + list(self.configs.items())

    def check(self) -> None:
        """Refuse everything wrong with the plan before an engine starts.

        Raises:
            EvaluationError: a name, number or file is wrong.
            ConfigError: settings cannot hold together.
        """
        reasons = [
            f"metric={name} is unknown; use one of {', '.join(QUALITY_METRICS)}."
            for name in self.metrics
            if name not in QUALITY_METRICS
        ]
        reasons += [f"length={length} is too short to score; use at least 2." for length in self.lengths if length < 2]
        reasons += [f"depth={depth} is outside 0 to 1." for depth in self.depths if not 0 <= depth <= 1]
        reasons += [
            f"kind={kind} is unknown; use one of {', '.join(recall.KINDS)}."
            for kind in self.kinds
            if kind not in recall.KINDS
        ]
        if self.data_dir is not None and not self.data_dir.is_dir():
            reasons.append(f"data-dir={self.data_dir} must be a folder that exists; see docs/evaluation.md.")
        if reasons:
            raise EvaluationError(reasons)
        self.points()


def run(plan: EvaluationPlan, text: tuple[str, str], out: Path, progress: Progress) -> Evaluation:
    """Measure what `out` does not hold yet; it is written after every cell, so an interrupted run resumes.

    Args:
        plan: checked.
        text: name and content of the prose.
        out: result file.
        progress: told of every cell and its units.

    Raises:
        EvaluationError: `out` cannot be read or written, or belongs to another model, text or seed.
    """
    evaluation = _resume(plan, text[0], out)
    prepared = {}
    if "tasks" in plan.metrics:
        prepared = {name: tasks.prepare_task(name, plan.data_dir) for name in plan.task_names}
    longest = max(
        [
            *(plan.lengths if "perplexity" in plan.metrics else []),
            *([length + 64 for length in plan.recall_lengths] if "recall" in plan.metrics else []),
            *([2047] if "tasks" in plan.metrics else []),
            64,
        ]
    )
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

    scorer = ScoringEngine(plan.model, max_model_len=longest + 1, max_num_seqs=8, max_step_tokens=64)
    try:
        runner = _Runner(plan, scorer, text[1], prepared, evaluation, out, progress)
        for method, config in plan.points():
            runner.measure(method, config)
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


class _Runner:
    """Measures one point of the grid after the other; what several cells share is made once."""

    def __init__(
        self,
        plan: EvaluationPlan,
        scorer: "ScoringEngine",
        prose: str,
        prepared: dict[str, Any],
        evaluation: Evaluation,
        out: Path,
        progress: Progress,
    ) -> None:
        self.plan, self.scorer, self.prepared = plan, scorer, prepared
        self.evaluation, self.out, self.progress = evaluation, out, progress
        self.done = {cell.key for cell in evaluation.cells}
        self.tokens = list(scorer.tokenizer(prose, add_special_tokens=False)["input_ids"])
        self.dense: dict[int, perplexity.DenseWindows] = {}

    def measure(self, method: str, config: FilterConfig) -> None:
        self.scorer.use(config)
        step = _step_tokens(config)
        for metric in self.plan.metrics:
            getattr(self, f"_{metric}")(method, config, step)

    def _perplexity(self, method: str, config: FilterConfig, step: int) -> None:
        for length in self.plan.lengths:
            windows = perplexity.windows_of(self.tokens, length, self.plan.windows)
            if not windows:
                raise EvaluationError(f"length={length} is longer than the text ({len(self.tokens)} tokens).")
            parameters = {"sequence_length": length, "windows": len(windows), "step_tokens": step}
            dense = self.dense.setdefault(length, perplexity.DenseWindows())
            # The dense pass is needed again whenever something is still to be compared with it.
            needed = method == "dense" and any(
                self._cell(name, other, "perplexity", {**parameters, "step_tokens": _step_tokens(other)}).key
                not in self.done
                for name, other in self.plan.points()
            )
            self._record(
                method,
                config,
                "perplexity",
                parameters,
                len(windows),
                lambda advance, windows=windows, dense=dense: perplexity.summarise(  # type: ignore[misc]
                    perplexity.score_windows(self.scorer, windows, step, dense, advance)
                ),
                again=needed,
            )

    def _tasks(self, method: str, config: FilterConfig, step: int) -> None:
        for name in self.plan.task_names:
            self._record(
                method,
                config,
                name,
                {"rows": self.plan.limit or "all", "step_tokens": step},
                0,
                lambda advance, name=name: tasks.run_task(  # type: ignore[misc]
                    self.scorer, name, self.prepared[name], self.plan.limit, step, advance
                ),
            )

    def _recall(self, method: str, config: FilterConfig, step: int) -> None:
        for length in self.plan.recall_lengths:
            for depth in self.plan.depths:
                for kind in self.plan.kinds:
                    trials = recall.make_trials(
                        kind, self.scorer.tokenizer, self.tokens, length, depth, self.plan.trials, self.plan.seed
                    )
                    self._record(
                        method,
                        config,
                        "recall",
                        {"kind": kind, "length": length, "depth": depth, "trials": len(trials), "step_tokens": step},
                        len(trials),
                        lambda advance, trials=trials: recall.summarise(  # type: ignore[misc]
                            score_tails(
                                self.scorer,
                                [trial.tokens for trial in trials],
                                [trial.num_answer for trial in trials],
                                step,
                                advance,
                            )
                        ),
                    )

    def _cell(self, method: str, config: FilterConfig, metric: str, parameters: dict[str, Any]) -> Cell:
        return Cell(
            method=method,
            settings=config.model_dump(mode="json"),
            metric=metric,
            parameters=parameters,
            values={},
            samples=[],
            tokens_seen=0,
            tokens_pruned=0,
            rows_dense={},
            filter_active=False,
        )

    def _record(
        self,
        method: str,
        config: FilterConfig,
        metric: str,
        parameters: dict[str, Any],
        units: int,
        measure: Callable[[Callable[[], None]], tuple[dict[str, float], list[float]]],
        again: bool = False,
    ) -> None:
        cell = self._cell(method, config, metric, parameters)
        known = cell.key in self.done
        if known and not again:
            return
        described = ", ".join(f"{key} {value}" for key, value in parameters.items() if key != "step_tokens")
        before = self.scorer.status()
        values, samples = measure(self.progress(f"{method} {config.pruning_ratio:g}: {metric} ({described})", units))
        after = self.scorer.status()
        if known:
            return
        pruned = after["tokens_pruned"] - before["tokens_pruned"]
        self.evaluation.cells.append(
            cell.model_copy(
                update={
                    "values": values,
                    "samples": samples,
                    "tokens_seen": after["tokens_seen"] - before["tokens_seen"],
                    "tokens_pruned": pruned,
                    "rows_dense": {
                        reason: count - before["rows_dense"].get(reason, 0)
                        for reason, count in after["rows_dense"].items()
                        if count > before["rows_dense"].get(reason, 0)
                    },
                    "filter_active": pruned > 0 or after["attentions_skipped"] > before["attentions_skipped"],
                    "attentions_skipped": after["attentions_skipped"] - before["attentions_skipped"],
                }
            )
        )
        self.done.add(cell.key)
        self.evaluation.write(self.out)
