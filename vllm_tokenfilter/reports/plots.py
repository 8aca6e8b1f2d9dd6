"""The plots, as SVG text: quality against ratio, speed against context, and the two joined."""

import io
from typing import Any

from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.reports.figures import Curve, Result, joined, lengths, quality_curves, speed_curves

INK = "#57606a"
# Distinguishable without colour too: ours is drawn thick, every baseline has a marker of its own.
MARKERS = "osv^D<>Pp*"


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


def blank_axes() -> tuple[Any, Any]:
    """A matplotlib figure and its axes, for light and dark pages.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
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
        spine.set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.25)
    return figure, axes


def lines(curves: list[Curve], x: str, y: str, base: float | None = None) -> str:
    """A line plot as SVG text; `base` draws a dotted line at that height."""
    figure, axes = blank_axes()
    if base is not None:
        axes.axhline(base, color=INK, linewidth=1, linestyle=":")
    for number, curve in enumerate(curves):
        ours = curve.label == "variance_aware" or curve.label.startswith("r=")
        axes.plot(
            *zip(*curve.points, strict=True),
            label=curve.label,
            marker=MARKERS[number % len(MARKERS)],
            linewidth=2.4 if ours else 1.2,
        )
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.legend(fontsize=8, labelcolor=INK, framealpha=0)
    return svg(figure)


def _points(points: list[tuple[str, float, float]]) -> str:
    figure, axes = blank_axes()
    axes.plot(
        [relative for _, relative, _ in points], [factor for _, _, factor in points], marker="o", linestyle="none"
    )
    for label, relative, factor in points:
        axes.annotate(label, (relative, factor), xytext=(6, 4), textcoords="offset points", color=INK)
    axes.set_xlabel("perplexity relative to dense", color=INK)
    axes.set_ylabel("times stock vLLM", color=INK)
    axes.margins(0.2)
    return svg(figure)


def svg(figure: Any) -> str:
    """A matplotlib figure as SVG text; the same figure gives the same bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
