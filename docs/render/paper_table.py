"""The paper's table on our model: dense, the paper's mode, the balanced settings and KV filtering, by ratio.

Joins the result files `paper_table_short` (128 tokens and the seven tasks) and `paper_table_long` (2048 tokens), whose
methods are settings files named MODE-PERCENT.
"""

from typing import Any

from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.tables import Rows

SHORT, LONG = "paper_table_short", "paper_table_long"
_MODES = {
    "dense": "dense: nothing pruned",
    "paper": "the paper's mode: attention skipped, output zero, later layers",
    "balanced": "balanced: KV filtering, retrieval layers dense",
    "filtering": "KV filtering, every layer pruned alike",
}
_TASKS = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
_PUBLISHED = ["*published, on another model: LLaMA-2-13B (arXiv 2512.07090)*", "0.5", "*29.22*", "", "*65.9*"]


def paper_table(results: dict[str, Result]) -> Rows:
    """Rows of the table; none where nothing was measured. Accuracies are lm-eval's `acc`, in percent."""
    cells = [cell for name in (SHORT, LONG) if name in results for cell in results[name]["cells"]]
    if not cells:
        return []
    rows: Rows = [["setting", "ratio", "perplexity, 128 tokens", "2048 tokens", "mean of tasks", *_TASKS.values()]]
    methods = dict.fromkeys(cell["method"] for cell in cells)
    for mode, title in _MODES.items():
        for method in sorted(name for name in methods if name.partition("-")[0] == mode):
            own = [cell for cell in cells if cell["method"] == method]
            percent = method.partition("-")[2]
            rows.append([title, f"{int(percent) / 100:g}" if percent else "0", *_figures(own)])
    return [*rows, _PUBLISHED + [""] * len(_TASKS)]


def _figures(cells: list[dict[str, Any]]) -> list[str]:
    perplexity = {
        cell["parameters"]["sequence_length"]: cell["values"]["perplexity"]
        for cell in cells
        if cell["metric"] == "perplexity"
    }
    tasks = {cell["metric"]: cell["values"] for cell in cells if cell["metric"] in _TASKS}
    figures = [f"{perplexity[length]:.2f}" if length in perplexity else "" for length in (128, 2048)]
    accuracies = [tasks[name]["accuracy"] for name in _TASKS if name in tasks]
    figures.append(f"{100 * sum(accuracies) / len(accuracies):.1f}" if len(accuracies) == len(_TASKS) else "")
    for name in _TASKS:
        value = tasks.get(name)
        figures.append(f"{100 * value['accuracy']:.1f} ({100 * value['standard_error']:.1f})" if value else "")
    return figures
