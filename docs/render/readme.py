"""The README's first figures: what half of the tokens removed gains and costs, by every layer alike and tuned."""

from docs.render.markdown import markdown
from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.tables import Rows

_MODEL = "SmolLM2-135M-Instruct"
#: The two settings side by side, as the benchmarks name them and as the evaluations do.
_SERVED = ("r=0.5", "tuned, mean r=0.5")
_MEASURED = ("variance_aware", "smollm2-135m-tuned")
_HEAD = [
    f"{_MODEL}, half of the sealed tokens removed",
    "every layer pruned alike",
    "[tuned](docs/tuning.md): only layers that tolerate pruning are pruned (`make serve`)",
    "measured in",
]
_ABSENT = "not measured"


def readme_block(results: dict[str, Result]) -> str:
    """The plot, the table, and where to read on."""
    parts = []
    if "perplexity_grid" in results:
        parts.append("![Perplexity against pruning ratio: this method and the baselines](docs/quality.svg)\n")
    if rows := _gains(results) + _costs(results):
        parts.append(markdown([_HEAD, *rows]) + "\n")
    parts.append("All results, with the baselines and the settings that lost: [docs/results.md](docs/results.md).")
    return "\n".join(parts)


def _row(title: str, figures: dict[str, str], names: tuple[str, ...], file: str) -> list[str]:
    return [title, *(figures.get(name, _ABSENT) for name in names), f"[{file}.json](benchmarks/results/{file}.json)"]


def _gains(results: dict[str, Result]) -> Rows:
    """Speed and capacity, relative to stock vLLM's."""
    rows: Rows = []
    if speed := results.get("skipping_speed"):
        figures = {
            name: f"**{value['median']:.2f} x** ({value['least']:.2f} to {value['greatest']:.2f})"
            for name, value in speed["models"][_MODEL]["summary"]["speedups"].items()
        }
        work = f"{speed['parameters']['requests']} requests of {speed['parameters']['tokens']} tokens"
        title = f"gain: decoding speed relative to stock vLLM ({work}, {speed['machine']['cores']} CPU cores)"
        rows.append(_row(title, figures, _SERVED, "skipping_speed"))
    if capacity := results.get("capacity"):
        figures = {name: f"**{value:.3f} x**" for name, value in capacity["summary"]["ratios"].items()}
        title = "gain: how many 8192-token requests fit the same KV cache, relative to stock vLLM"
        rows.append(_row(title, figures, _SERVED, "capacity"))
    return rows


def _costs(results: dict[str, Result]) -> Rows:
    """Perplexity, agreement and recall against dense, both settings from one file."""
    rows: Rows = []
    if quality := results.get("perplexity_tuned"):
        values = {
            cell["method"]: cell["values"]
            for cell in quality["cells"]
            if cell["method"] != "variance_aware" or cell["settings"]["pruning_ratio"] == 0.5
        }
        dense = values["dense"]["perplexity"]
        tokens = quality["cells"][0]["parameters"]["sequence_length"]
        rises = {name: f"**{value['perplexity'] / dense - 1:+.1%}**" for name, value in values.items()}
        title = f"cost: rise in perplexity, {quality['text']}, {tokens} tokens"
        rows.append(_row(title, rises, _MEASURED, "perplexity_tuned"))
        agreements = {name: f"**{value['top1_agreement']:.1%}**" for name, value in values.items()}
        title = "cost: positions whose most likely next token is still the same (dense: 100%)"
        rows.append(_row(title, agreements, _MEASURED, "perplexity_tuned"))
    if recall := results.get("recall"):
        right = {
            cell["method"]: f"**{cell['values']['token_accuracy']:.1%}**"
            for cell in recall["cells"]
            if cell["parameters"] == {**cell["parameters"], "kind": "passkey", "length": 1500, "depth": 0.5}
        }
        dense = right["dense"].strip("*")
        title = f"cost: share of a hidden pass key's tokens recalled correctly (1500-token context; dense: {dense})"
        rows.append(_row(title, right, _MEASURED, "recall"))
    return rows
