"""What the reports show, taken from result files: series for plots."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a plot: a label and its points, ascending in x."""

    label: str
    points: list[tuple[float, float]]


def evaluations(results: list[Result]) -> list[Result]:
    """The evaluation files among them."""
    return [result for result in results if result.get("kind") == "evaluation"]


def benchmarks(results: list[Result]) -> list[Result]:
    """The benchmark files among them."""
    return [result for result in results if result.get("kind") == "benchmark"]


def perplexity_cells(results: list[Result], length: int) -> list[Result]:
    """Cells of the perplexity metric at one window length, with the filter active or dense."""
    return [
        cell
        for result in evaluations(results)
        for cell in result["cells"]
        if cell["metric"] == "perplexity"
        and cell["parameters"]["sequence_length"] == length
        and (cell["filter_active"] or cell["method"] == "dense")
    ]


def quality_curves(results: list[Result], length: int, window: int, chunk: int = 64) -> list[Curve]:
    """Perplexity relative to dense against ratio, a curve per method, all layers filtered."""
    cells = perplexity_cells(results, length)
    dense = [cell["values"]["perplexity"] for cell in cells if cell["method"] == "dense"]
    if not dense:
        return []
    curves: dict[str, list[tuple[float, float]]] = defaultdict(lambda: [(0.0, 1.0)])
    for cell in cells:
        settings = cell["settings"]
        same = settings["recent_window"] == window and settings["chunk_size"] == chunk
        if cell["method"] != "dense" and same and not settings["dense_layers"] and not settings["first_layer"]:
            curves[cell["method"]].append((settings["pruning_ratio"], cell["values"]["perplexity"] / dense[0]))
    return [Curve(method, sorted(points)) for method, points in curves.items()]


def speed_curves(results: list[Result]) -> list[Curve]:
    """How many times faster than stock decoding is against context, a curve per server at the highest concurrency."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for result in benchmarks(results):
        most = max((row["concurrency"] for row in result["summary"]), default=0)
        for row in result["summary"]:
            if row["concurrency"] == most and "between_median_s_to_stock" in row:
                label = f"{row['server']}, {most} requests"
                curves[label].append((row["context"], 1 / row["between_median_s_to_stock"]["median"]))
    return [Curve(label, sorted(points)) for label, points in curves.items()]


def joined(results: list[Result], length: int, window: int, chunk: int = 64) -> list[tuple[str, float, float]]:
    """(label, perplexity relative to dense, speed-up at the longest context) of every ratio measured for both."""
    speed = {curve.label.partition(",")[0]: curve.points[-1][1] for curve in speed_curves(results)}
    quality = {curve.label: dict(curve.points) for curve in quality_curves(results, length, window, chunk)}
    found = []
    for server, factor in speed.items():
        ratio = float(server.removeprefix("r=")) if server.startswith("r=") else None
        relative = quality.get("variance_aware", {}).get(ratio) if ratio is not None else None
        if relative is not None:
            found.append((server, relative, factor))
    return found


def lengths(results: list[Result]) -> list[int]:
    """Perplexity window lengths measured, longest first."""
    found = {
        cell["parameters"]["sequence_length"]
        for result in evaluations(results)
        for cell in result["cells"]
        if cell["metric"] == "perplexity"
    }
    return sorted(found, reverse=True)
