"""The plots, as SVG text: quality against ratio, speed against context, the two joined, and settings tried."""

import io
from typing import Any

from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.reports.figures import (
    Curve,
    Result,
    Trial,
    frontier,
    joined,
    lengths,
    quality_curves,
    speed_curves,
)

_INK = "#57606a"
# Distinguishable without colour too: ours is drawn thick, every baseline has a marker of its own.
_MARKERS = "osv^D<>Pp*"


def plots(results: list[Result]) -> dict[str, str]:
    """Title -> SVG of every plot the results have points for.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    found: dict[str, str] = {}
    longest = next(iter(lengths(results)), 0)
    if longest and (curves := quality_curves(results, longest, 64)):
        found[f"Perplexity against pruning ratio ({longest} tokens, window 64)"] = lines(
            curves, "pruning ratio", "perplexity relative to dense"
        )
    if curves := speed_curves(results):
        found["Decoding speed against context"] = lines(curves, "context in tokens", "times stock vLLM", base=1.0)
    if longest and (points := joined(results, longest, 64)):
        found["Speed against quality"] = _points(points)
    return found


def _axes() -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise EvaluationError(f"Plots need matplotlib ({error}); pip install 'vllm-tokenfilter[eval]'.") from None
    matplotlib.use("Agg")
    # The same file for the same numbers: no date, no random ids; text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "vllm-tokenfilter", "svg.fonttype": "none", "font.size": 10})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.grid(alpha=0.25)
    return figure, axes


def lines(curves: list[Curve], x: str, y: str, base: float | None = None) -> str:
    """A line plot as SVG text; `base` draws a dotted line at that height."""
    figure, axes = _axes()
    if base is not None:
        axes.axhline(base, color=_INK, linewidth=1, linestyle=":")
    for number, curve in enumerate(curves):
        ours = curve.label == "variance_aware" or curve.label.startswith("r=")
        axes.plot(
            *zip(*curve.points, strict=True),
            label=curve.label,
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=2.4 if ours else 1.2,
        )
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.legend(fontsize=8, labelcolor=_INK, framealpha=0)
    return _svg(figure)


def _points(points: list[tuple[str, float, float]]) -> str:
    figure, axes = _axes()
    axes.plot(
        [relative for _, relative, _ in points], [factor for _, _, factor in points], marker="o", linestyle="none"
    )
    for label, relative, factor in points:
        axes.annotate(label, (relative, factor), xytext=(6, 4), textcoords="offset points", color=_INK)
    axes.set_xlabel("perplexity relative to dense", color=_INK)
    axes.set_ylabel("times stock vLLM", color=_INK)
    axes.margins(0.2)
    return _svg(figure)


def settings_tried(trials: list[Trial]) -> str:
    """Recall against loss of text, a point per setting, those that no other beats joined, as SVG text."""
    figure, axes = _axes()
    groups = dict.fromkeys(trial.group for trial in trials)
    for number, group in enumerate(groups):
        own = [trial for trial in trials if trial.group == group]
        axes.plot(
            [trial.nll for trial in own],
            [100 * trial.recall for trial in own],
            marker=_MARKERS[number],
            linestyle="none",
            label=group,
        )
    best = frontier(trials)
    axes.plot(
        [trial.nll for trial in best],
        [100 * trial.recall for trial in best],
        color=_INK,
        linewidth=1,
        linestyle=":",
        label="no other is better in both",
    )
    # Those that spare the right layers lie on one another; the table names them.
    apart = sorted((trial for trial in trials if not trial.name.startswith("tuned")), key=lambda trial: trial.nll)
    for number, trial in enumerate(apart):
        place, offset = (trial.nll, 100 * trial.recall), (5, -9 if number % 2 else 3)
        axes.annotate(trial.name, place, xytext=offset, textcoords="offset points", color=_INK, fontsize=7)
    axes.set_xlabel("log-perplexity above dense, nats per token", color=_INK)
    axes.set_ylabel("tokens of answers right, percent", color=_INK)
    axes.margins(0.2, 0.08)
    axes.legend(fontsize=8, labelcolor=_INK, framealpha=0)
    return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
