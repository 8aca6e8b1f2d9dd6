"""The plot of docs/tuning.md: settings of equal budget, by what they cost running text and answers."""

from dataclasses import dataclass

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
    apart = sorted((trial for trial in trials if not trial.name.startswith("tuned")), key=lambda trial: trial.nll)
    for number, trial in enumerate(apart):
        place, offset = (trial.nll, 100 * trial.recall), (5, -9 if number % 2 else 3)
        axes.annotate(trial.name, place, xytext=offset, textcoords="offset points", color=INK, fontsize=7)
    axes.set_xlabel("log-perplexity above dense, nats per token", color=INK)
    axes.set_ylabel("tokens of answers right, percent", color=INK)
    axes.margins(0.2, 0.08)
    axes.legend(fontsize=8, labelcolor=INK, framealpha=0)
    return svg(figure)
