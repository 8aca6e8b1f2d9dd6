"""The plot of docs/tuning.md: settings of equal budget, by what they cost running text and answers."""

from dataclasses import dataclass
from typing import Any

from matplotlib.transforms import Bbox

from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.plots import INK, MARKERS, blank_axes, svg


@dataclass(frozen=True)
class SelectionTrial:
    """One setting of `benchmarks/selection_trials.py`.

    Attributes:
        name: as in the file.
        group: what it has in common with others: which layers it prunes.
        nll: log-perplexity of running text above dense, nats per token.
        recall: share of the answers' tokens ranked first.
    """

    name: str
    group: str
    nll: float
    recall: float


def selection_trials(result: Result) -> list[SelectionTrial]:
    """Every setting tried but dense, in the file's order."""
    dense, *others = result["scores"]

    def group(name: str) -> str:
        if name.startswith("tuned"):
            return "retrieval layers dense"
        return "other layers dense" if name.endswith("whole") else "all layers pruned"

    return [
        SelectionTrial(
            score["name"], group(score["name"]), score["prose_nll"] - dense["prose_nll"], score["token_accuracy"]
        )
        for score in others
    ]


def frontier(trials: list[SelectionTrial]) -> list[SelectionTrial]:
    """Those that no other beats in one respect without losing in the other, by falling loss of text."""
    best = [
        own
        for own in trials
        if not any(
            other.nll <= own.nll and other.recall >= own.recall and (other.nll, other.recall) != (own.nll, own.recall)
            for other in trials
        )
    ]
    return sorted(best, key=lambda trial: (trial.nll, trial.recall))


def settings_tried(trials: list[SelectionTrial]) -> str:
    """Recall against loss of text, a point per setting, those that no other beats joined, as SVG text."""
    figure, axes = blank_axes()
    groups = dict.fromkeys(trial.group for trial in trials)
    for number, group in enumerate(groups):
        own = [trial for trial in trials if trial.group == group]
        axes.plot(
            [trial.nll for trial in own],
            [100 * trial.recall for trial in own],
            marker=MARKERS[number],
            linestyle="none",
            label=group,
        )
    best = frontier(trials)
    axes.plot(
        [trial.nll for trial in best],
        [100 * trial.recall for trial in best],
        color=INK,
        linewidth=1,
        linestyle=":",
        label="no other setting is better in both",
    )
    # The settings with dense retrieval layers lie too close together to be labelled; the table names them.
    axes.set_xlabel("log-perplexity above dense, nats per token", color=INK)
    axes.set_ylabel("tokens of answers right, percent", color=INK)
    axes.margins(0.2, 0.08)
    axes.legend(fontsize=8, labelcolor=INK, framealpha=0)
    figure.draw_without_rendering()  # settles where everything lies
    places = {trial: (trial.nll, 100 * trial.recall) for trial in trials}
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in axes.transData.transform(list(places.values()))]
    for trial in sorted(trials, key=lambda trial: trial.nll):
        if not trial.name.startswith("tuned"):
            taken.append(_label(axes, trial.name, places[trial], taken))
    return svg(figure)


def _label(axes: Any, name: str, place: tuple[float, float], taken: list[Any]) -> Any:
    """Write a name beside its point where it covers nothing of what is taken, in pixels; returns what it takes."""
    for away in (3, 11, 19, 27):
        for ha, x in (("left", 5), ("right", -5)):
            for va, y in (("bottom", away - 2), ("top", 2 - away)):
                text = axes.annotate(
                    name, place, xytext=(x, y), textcoords="offset points", ha=ha, va=va, color=INK, fontsize=7
                )
                box = text.get_window_extent()
                if not any(box.overlaps(other) for other in taken) and axes.bbox.containsx(box.x0):
                    return box
                text.remove()
    raise ValueError(f"no room for the name {name}")
