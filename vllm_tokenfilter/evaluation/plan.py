"""What an evaluation measures: a grid of methods and settings, and the metrics of each."""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation import recall, tasks
from vllm_tokenfilter.evaluation.schema import METHODS, settings_of

QUALITY_METRICS = ("perplexity", "tasks", "recall")


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure."""

    model: str  #: path or Hugging Face id.
    methods: list[str]  #: keys of schema.METHODS.
    ratios: list[float]  #: pruning ratios; dense is always measured first.
    recent_windows: list[int]  #: tokens.
    chunk_sizes: list[int]  #: tokens.
    metrics: list[str]  #: of QUALITY_METRICS.
    extra: dict[str, Any] = field(default_factory=dict)  #: settings that every cell of the grid has besides.
    #: Name -> settings measured as they are, beside the grid.
    configs: dict[str, FilterConfig] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [2048])  #: tokens of perplexity windows.
    windows: int = 8  #: windows per length; 0 for all the text has.
    task_names: list[str] = field(default_factory=lambda: list(tasks.PAPER_TASKS))  #: tasks, for the metric "tasks".
    limit: int | None = None  #: rows per task; None for all.
    recall_lengths: list[int] = field(default_factory=lambda: [700, 1500])  #: tokens of the text before the answer.
    depths: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])  #: where the fact stands, 0 to 1.
    kinds: list[str] = field(default_factory=lambda: list(recall.KINDS))  #: of recall.KINDS.
    trials: int = 100  #: per kind, length and depth.
    seed: int = 0  #: of the generators.
    data_dir: Path | None = None  #: local rows and text.

    def points(self) -> list[tuple[str, FilterConfig]]:
        """The grid: dense, every method at every ratio, chunk size and window, and the settings of files.

        Raises:
            EvaluationError: a name is unknown.
            ConfigError: settings cannot hold together.
        """
        if unknown := _unknown("method", self.methods, METHODS):
            raise EvaluationError(unknown)
        grid = itertools.product((r for r in self.ratios if r > 0), self.chunk_sizes, self.recent_windows, self.methods)
        points = [
            (method, settings_of(method, ratio, window, chunk, self.extra)) for ratio, chunk, window, method in grid
        ]
        return [("dense", FilterConfig(pruning_ratio=0.0)), *points, *self.configs.items()]

    def check(self) -> None:
        """Refuse everything wrong with the plan before an engine starts.

        Raises:
            EvaluationError: a name, number or file is wrong.
            ConfigError: settings cannot hold together.
        """
        reasons = _unknown("metric", self.metrics, QUALITY_METRICS)
        reasons += [f"length={length} is too short to score; use at least 2." for length in self.lengths if length < 2]
        reasons += [f"depth={depth} must be from 0 to 1." for depth in self.depths if not 0 <= depth <= 1]
        reasons += _unknown("kind", self.kinds, recall.KINDS)
        if self.data_dir is not None and not self.data_dir.is_dir():
            reasons.append(f"data-dir={self.data_dir} must be a folder that exists; see docs/evaluation.md.")
        if reasons:
            raise EvaluationError(reasons)
        self.points()


def _unknown(option: str, names: Iterable[str], known: Collection[str]) -> list[str]:
    return [f"{option}={name} is unknown; use one of {', '.join(known)}." for name in names if name not in known]
