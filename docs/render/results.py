"""docs/results.md and the README's first figures, rendered from benchmarks/results/*.json and nothing else."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.render.gpu import gpu_section
from docs.render.paper_table import LONG, SHORT, paper_table
from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.tables import Rows, benchmark_tables, evaluation_tables, markdown, tuning_tables

_BOOTSTRAP_DRAWS = 2000
_TUNED_MODEL = "SmolLM2-135M-Instruct"
_PAIR = ("r=0.5", "tuned, mean r=0.5")
_METHODS = ("variance_aware", "smollm2-135m-tuned")
_ABSENT = "not measured"

_INTRODUCTION = """# Results

Every figure on this page is rendered from a file in [benchmarks/results/](../benchmarks/results/) by `make docs`;
each file names commit, command, machine and versions. Ratios are taken inside one run against stock vLLM. Losing
figures stay.
"""


def load_results(folder: Path) -> dict[str, Result]:
    """Result files by name, without the ending, in alphabetical order."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def results_page(results: dict[str, Result]) -> str:
    """The page: speed of the attention, memory, serving, then quality."""
    parts = [_INTRODUCTION]
    parts += _runs(results, "attention_speed", "Decoding against a filtered cache", _attention)
    parts += _runs(results, "skipping_speed", "Decoding with attention skipped", _skipping)
    if capacity := results.get("capacity"):
        parts += ["## What fits the same KV cache\n", _capacity(capacity), _origin("capacity", capacity)]
    if on_gpu := results.get("gpu_attention"):
        parts += ["## Decode attention and sealing on a GPU\n", gpu_section(on_gpu), _origin("gpu_attention", on_gpu)]
    tunings = {name: result for name, result in results.items() if result.get("kind") == "tuning"}
    if tunings:
        parts += ["## The layers that `tune` leaves whole\n", markdown(_layers_found(tunings)) + "\n"]
        parts += [_origin(name, result) for name, result in tunings.items() if _only_repeats(name)]
    for name, result in results.items():
        if result.get("kind") in ("tuning", "selection") and not _only_repeats(name):
            parts += [f"## {name.replace('_', ' ').capitalize()}, {result['text']}\n", _LAYERS]
            for _, rows in tuning_tables(result):
                parts.append(markdown(rows) + "\n")
            parts.append(_origin(name, result))
    for name, result in results.items():
        if result.get("kind") == "benchmark":
            for title, rows in benchmark_tables(result):
                parts += [f"## {title}\n", markdown(rows) + "\n"]
            parts.append(_origin(name, result))
    if table := paper_table(results):
        parts += ["## The paper's table on this model\n", _PAPER, markdown(table) + "\n"]
        parts += [_origin(name, results[name]) for name in (SHORT, LONG) if name in results]
    for name, result in results.items():
        if result.get("kind") == "evaluation" and name not in (SHORT, LONG):
            parts.append(f"## {name.replace('_', ' ').capitalize()}, {result['text']}\n")
            if intervals := paired_intervals(result):
                parts += [_INTERVALS, markdown(intervals) + "\n"]
            for _, rows in evaluation_tables(result):
                parts.append(markdown(rows) + "\n")
            parts.append(_origin(name, result))
    return "\n".join(parts).rstrip() + "\n"


def _only_repeats(name: str) -> bool:
    """Whether a tuning result repeats another with a seed of its own: the list it found says all."""
    return name.startswith("tuning_seed_")


def _layers_found(tunings: dict[str, Result]) -> Rows:
    rows: Rows = [["file", "text", "seed", "mean ratio", "cores", "minutes", "layers left whole"]]
    for name, result in tunings.items():
        settings, parameters = result["settings"], result["parameters"]
        whole = [str(index) for index, ratio in enumerate(settings["schedule"]["ratios"]) if not ratio]
        rows.append(
            [
                f"[{name}.json](../benchmarks/results/{name}.json)",
                result["text"],
                str(parameters["seed"]),
                f"{settings['pruning_ratio']:.3f}",
                str(result["machine"]["cores"]),
                "-" if "--reuse" in result["command"] else f"{result['seconds'] / 60:.1f}",
                ", ".join(whole),
            ]
        )
    return rows


_LAYERS = """
Log-probability of the answers and log-perplexity of running text are differences to dense, in nats per token, at the
end of texts that were read whole: [tuning.md](tuning.md).
"""

_PAPER = """
Zero-shot accuracy in percent, its standard error in brackets. For 128 tokens and the tasks, whose texts are short,
chunk, recent window and warm-up are 16 tokens; for 2048 tokens they are those of the settings. The published row is of
a model a hundred times larger and stands here only to name the paper's figures: nothing in it compares with ours.
"""

_INTERVALS = """
Ours against each rival on the same windows: perplexity of the rival over ours, with the 95 % interval of
a paired bootstrap over windows. Above 1 ours is better; an interval that holds 1 decides nothing.
"""


def paired_intervals(result: Result) -> Rows:
    """Rival over variance_aware in perplexity, with paired bootstrap intervals; no rows where nothing can be paired."""
    cells = [cell for cell in result["cells"] if cell["metric"] == "perplexity" and cell["filter_active"]]
    rows: Rows = [["rival", "ratio", "chunk", "window", "tokens", "windows", "rival / ours", "95 % interval"]]
    for ours in cells:
        if ours["method"] != "variance_aware" or len(ours["samples"]) < 8:
            continue
        for rival in cells:
            if rival["method"] != "variance_aware" and _comparable(ours, rival):
                low, high = _bootstrap([b - a for a, b in zip(ours["samples"], rival["samples"], strict=True)])
                settings, parameters = ours["settings"], ours["parameters"]
                rows.append(
                    [
                        rival["method"],
                        f"{settings['pruning_ratio']:g}",
                        str(settings["chunk_size"]),
                        str(settings["recent_window"]),
                        str(parameters["sequence_length"]),
                        str(parameters["windows"]),
                        f"{rival['values']['perplexity'] / ours['values']['perplexity']:.4f}",
                        f"{low:.4f} to {high:.4f}",
                    ]
                )
    return rows if len(rows) > 1 else []


def _comparable(ours: dict[str, Any], rival: dict[str, Any]) -> bool:
    same = ("pruning_ratio", "chunk_size", "recent_window", "sink_tokens", "dense_layers", "first_layer")
    return ours["parameters"] == rival["parameters"] and all(
        ours["settings"][key] == rival["settings"][key] for key in same
    )


def _bootstrap(differences: list[float]) -> tuple[float, float]:
    """95 % interval of exp(mean difference), windows drawn with replacement, seeded."""
    draw = random.Random(0)
    count = len(differences)
    means = sorted(sum(draw.choices(differences, k=count)) / count for _ in range(_BOOTSTRAP_DRAWS))
    return math.exp(means[int(0.025 * _BOOTSTRAP_DRAWS)]), math.exp(means[int(0.975 * _BOOTSTRAP_DRAWS) - 1])


def readme_block(results: dict[str, Result]) -> str:
    """The README's figures: the plot and, at ratio 0.5, what every layer alike and the tuned layers gain and cost."""
    parts = []
    if "perplexity_grid" in results:
        parts.append("![Perplexity against pruning ratio, ours and rival methods](docs/quality.svg)\n")
    rows = _gains(results) + _costs(results)
    if rows:
        title = "SmolLM2-135M-Instruct, half of the sealed tokens removed"
        head = [title, "every layer alike", "[tuned](docs/tuning.md), as `make serve` runs it", "from"]
        parts.append(markdown([head, *rows]) + "\n")
    parts.append("More, rival methods and losing figures included: [docs/results.md](docs/results.md).")
    return "\n".join(parts)


def _gains(results: dict[str, Result]) -> Rows:
    """Speed and capacity over stock, ratio 0.5: rows of title, every layer alike, tuned, file."""
    rows: Rows = []
    if speed := results.get("skipping_speed"):
        found = speed["models"][_TUNED_MODEL]["summary"]["speedups"]
        parameters = speed["parameters"]
        title = f"decoding, {parameters['requests']} requests x {parameters['tokens']} tokens, against stock vLLM"
        shown = [
            f"**{found[name]['median']:.2f} x** ({found[name]['least']:.2f} to {found[name]['greatest']:.2f})"
            if name in found
            else _ABSENT
            for name in _PAIR
        ]
        rows.append([title, *shown, _file("skipping_speed")])
    if capacity := results.get("capacity"):
        ratios = capacity["summary"]["ratios"]
        title = "requests of 8192 tokens in the same KV cache, against stock vLLM"
        shown = [f"**{ratios[name]:.3f} x**" if name in ratios else _ABSENT for name in _PAIR]
        rows.append([title, *shown, _file("capacity")])
    return rows


def _costs(results: dict[str, Result]) -> Rows:
    """Perplexity, agreement and recall at ratio 0.5, both settings from one file: rows as in `_gains`."""
    rows: Rows = []
    if quality := results.get("perplexity_tuned"):
        by_method = {
            cell["method"]: cell
            for cell in quality["cells"]
            if cell["method"] != "variance_aware" or cell["settings"]["pruning_ratio"] == 0.5
        }
        dense = by_method["dense"]
        tokens = dense["parameters"]["sequence_length"]
        cells = [by_method[name]["values"] if name in by_method else None for name in _METHODS]
        before = dense["values"]["perplexity"]
        changes = [f"**{cell['perplexity'] / before - 1:+.1%}**" if cell else _ABSENT for cell in cells]
        agreements = [f"**{cell['top1_agreement']:.1%}**" if cell else _ABSENT for cell in cells]
        file = _file("perplexity_tuned")
        rows.append([f"perplexity, {quality['text']}, {tokens} tokens, against dense", *changes, file])
        rows.append(["same likeliest next token as dense", *agreements, file])
    if recall := results.get("recall"):
        found = {
            cell["method"]: cell["values"]["token_accuracy"]
            for cell in recall["cells"]
            if cell["parameters"] == {**cell["parameters"], "kind": "passkey", "length": 1500, "depth": 0.5}
        }
        title = f"pass key in 1500 tokens, tokens right (dense: {found['dense']:.1%})"
        shown = [f"**{found[name]:.1%}**" if name in found else _ABSENT for name in _METHODS]
        rows.append([title, *shown, _file("recall")])
    return rows


def _file(name: str) -> str:
    return f"[{name}.json](benchmarks/results/{name}.json)"


def _runs(results: dict[str, Result], benchmark: str, title: str, tables: Callable[[Result], str]) -> list[str]:
    """A section with every run of a benchmark, each under its processor's name."""
    runs = {name: result for name, result in results.items() if result.get("benchmark") == benchmark}
    parts = [f"## {title}\n"] if runs else []
    for name, run in runs.items():
        heading = f"### {run['machine']['processor']}\n"
        if heading in parts:
            heading = heading.replace("\n", ", another run\n")
        parts += [heading, tables(run), _origin(name, run)]
    return parts


def _attention(result: Result) -> str:
    parameters = result["parameters"]
    rows: Rows = [["ratio", "median", "least", "greatest"]]
    for name, values in result["summary"]["ratios"].items():
        rows.append([name, *(f"{values[key]:.3f}" for key in ("median", "least", "greatest"))])
    growth = ", ".join(
        f"{name} {share:.2%}" for name, share in result["summary"]["resident_growth_share_of_kv_cache"].items()
    )
    return (
        f"{parameters['requests']} requests x {parameters['long_tokens']} tokens (short: "
        f"{parameters['short_tokens']}), {parameters['repeats']} interleaved repeats; a speed-up is stock's time "
        "between tokens over ours, the other ratios are ours over stock's.\n\n"
        + markdown(rows)
        + f"\n\nResident size of the worker above stock's, as a share of the KV cache: {growth}.\n"
    )


def _skipping(result: Result) -> str:
    parameters = result["parameters"]
    parts = [
        f"{parameters['requests']} requests x {parameters['tokens']} tokens, {parameters['repeats']} interleaved "
        f"repeats, {'eager' if parameters['eager'] else 'compiled'}; stock's time between tokens over ours. Stock at "
        "fewer tokens bounds what sparing as many could gain, if deciding and sealing cost nothing: half of them for "
        "one mechanism at 0.5, a quarter for both."
    ]
    for model, found in result["models"].items():
        summary = found["summary"]
        rows: Rows = [[model, "median", "least", "greatest", "sealing, share of decoding"]]
        for name, values in {**summary["speedups"], **summary["bounds"]}.items():
            figures = [f"{values[key]:.3f}" for key in ("median", "least", "greatest")]
            share = summary["seal_share"].get(name)
            rows.append([name, *figures, "" if share is None else f"{share:.2%}"])
        parts.append(markdown(rows))
    return "\n\n".join(parts) + "\n"


def _capacity(result: Result) -> str:
    summary, reported, parameters = result["summary"], result["reported"], result["parameters"]
    length = parameters["reported"]["max_model_len"]
    rows: Rows = [["setting", f"requests of {length} tokens, as vLLM reports at start", "to stock"]]
    for name, figures in reported.items():
        rows.append([name, f"{figures['max_concurrency']:.2f}", f"{summary['ratios'][name]:.3f}"])
    load, system, chats = (parameters[name] for name in ("load", "system prompt", "chats"))
    measured: Rows = [["r=0.5 against stock", "stock", "r=0.5", "ratio", "least", "greatest"]]
    for task in ("load", "system prompt", "chats"):
        for key, row in summary[task].items():
            figures = [f"{row[column]:.4g}" for column in ("stock", "ours", "ratio", "least", "greatest")]
            measured.append([f"{task}: {_MEASURED[key]}", *figures])
    text = (
        f"**load**: {load['requests']} requests of {load['prompt_tokens']} tokens, {load['output_tokens']} more each, "
        f"in {load['kv_cache_memory_bytes'] / 1e6:.0f} MB of KV cache, which stock vLLM fills. **system prompt**: "
        f"{system['users']} users share {system['shared_tokens']} tokens. **chats**: {chats['chats']} chats of "
        f"{chats['turns']} turns. Medians of {parameters['repeats']} interleaved repeats; stock has prefix caching too."
    )
    return f"{markdown(rows)}\n\n{text}\n\n{markdown(measured)}\n"


_MEASURED = {
    "output_tokens_per_s": "output tokens a second",
    "preemptions": "preemptions",
    "prefix_cache_hit_rate": "prefix-cache hit rate",
    "later_first_token_s": "time to first token of later turns or users, seconds",
}


def _origin(name: str, result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    listed = ", ".join(f"{key} {value}" for key, value in versions.items())
    return (
        f"<sub>[{name}.json](../benchmarks/results/{name}.json): `{result['command']}`, commit {result['commit']}, "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {listed}.</sub>\n"
    )
