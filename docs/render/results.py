"""docs/results.md, rendered from benchmarks/results/*.json and nothing else."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.render.gpu import gpu_section
from docs.render.hits import hits_section
from docs.render.markdown import markdown
from docs.render.paper_table import LONG, SHORT, paper_table
from docs.render.spread import COLUMNS, figures, inverse
from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.tables import Rows, benchmark_tables, evaluation_tables, tuning_tables

_BOOTSTRAP_DRAWS = 2000

_INTRODUCTION = """# Results

What pruning gains and what it costs, on the embedded model. Speed is given as *times stock vLLM's speed*: above 1 is
faster. *Stock* is vLLM without this plugin; *dense* is the same engine with nothing pruned. Perplexity and KL
divergence are better when low; accuracy, agreement and log-probability when high.

Every figure is rendered by `make docs` from a file in [benchmarks/results/](../benchmarks/results/), which names
commit, command, machine and versions. A ratio is always taken inside one run, between measurements that took turns.
Settings that lost are shown too.
"""

_TUNING = """
Differences from dense, in nats per token, at the end of texts that were read with every token visible: for the
log-probability of answers higher is better, for the log-perplexity of running text lower. How they are measured:
[tuning.md](tuning.md).
"""

_PAPER = """
Zero-shot accuracy in percent, its standard error in brackets. For 128 tokens and for the tasks, whose texts are short,
chunk, recent window and warm-up are 16 tokens; for 2048 tokens they are those of the settings file. The published row
is of a model a hundred times larger: it shows what the paper reports, and cannot be compared with the other rows.
"""

_INTERVALS = """
This method (`variance_aware`) against each baseline on the same windows: the baseline's perplexity over ours, with the
95 % interval of a paired bootstrap over windows. Above 1 ours is better; an interval that contains 1 decides nothing.
"""


def load_results(folder: Path) -> dict[str, Result]:
    """Result files by name, without the ending, in alphabetical order."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def results_page(results: dict[str, Result]) -> str:
    """The page: speed of the attention, memory, tuning, serving, then quality."""
    parts = [_INTRODUCTION]
    parts += _runs(results, "attention_speed", "Decoding against a filtered cache", _attention)
    parts += _runs(results, "skipping_speed", "Decoding with attention skipped", _skipping)
    for name, title, section in (
        ("capacity", "What fits the same KV cache", _capacity),
        ("prefix_hits", "What a hit in the prefix cache changes", hits_section),
        ("gpu_attention", "Decode attention and sealing on a GPU", gpu_section),
    ):
        if result := results.get(name):
            parts += [f"## {title}\n", section(result), _origin(name, result.get("provenance", result))]
    parts += _tunings(results)
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
            parts.append(_heading(name, result))
            if intervals := paired_intervals(result):
                parts += [_INTERVALS, markdown(intervals) + "\n"]
            parts += _titled(evaluation_tables(result))
            parts.append(_origin(name, result))
    return "\n".join(parts).rstrip() + "\n"


def _heading(name: str, result: Result) -> str:
    return f"## {name.replace('_', ' ').capitalize()}, {result['text']}\n"


def _titled(tables: list[tuple[str, Rows]]) -> list[str]:
    """The tables, each under its title where there are several."""
    shown = [f"**{title}**\n\n" if len(tables) > 1 else "" for title, _ in tables]
    return [title + markdown(rows) + "\n" for title, (_, rows) in zip(shown, tables, strict=True)]


def _tunings(results: dict[str, Result]) -> list[str]:
    """The layers each tuning found, then the trials behind them; of repeats with another seed only the layers."""
    tunings = {name: result for name, result in results.items() if result.get("kind") == "tuning"}
    repeats = {name: result for name, result in tunings.items() if name.startswith("tuning_seed_")}
    parts = []
    if tunings:
        parts += ["## The layers that `tune` keeps dense\n", markdown(_layers_found(tunings)) + "\n"]
        parts += [_origin(name, result) for name, result in repeats.items()]
    for name, result in results.items():
        if result.get("kind") in ("tuning", "selection") and name not in repeats:
            parts += [_heading(name, result), _TUNING, *_titled(tuning_tables(result)), _origin(name, result)]
    return parts


def _layers_found(tunings: dict[str, Result]) -> Rows:
    rows: Rows = [["file", "text", "seed", "mean ratio", "cores", "minutes", "dense layers"]]
    for name, result in tunings.items():
        settings = result["settings"]
        dense = [str(index) for index, ratio in enumerate(settings["schedule"]["ratios"]) if not ratio]
        rows.append(
            [
                f"[{name}.json](../benchmarks/results/{name}.json)",
                result["text"],
                str(result["parameters"]["seed"]),
                f"{settings['pruning_ratio']:.3f}",
                str(result["machine"]["cores"]),
                "-" if "--reuse" in result["command"] else f"{result['seconds'] / 60:.1f}",
                ", ".join(dense),
            ]
        )
    return rows


def paired_intervals(result: Result) -> Rows:
    """Baseline over variance_aware in perplexity, with paired bootstrap intervals; no rows where none can be paired."""
    cells = [cell for cell in result["cells"] if cell["metric"] == "perplexity" and cell["filter_active"]]
    rows: Rows = [["baseline", "ratio", "chunk", "window", "tokens", "windows", "baseline / ours", "95 % interval"]]
    for ours in cells:
        if ours["method"] != "variance_aware" or len(ours["samples"]) < 8:
            continue
        for baseline in cells:
            if baseline["method"] != "variance_aware" and _comparable(ours, baseline):
                low, high = _bootstrap([b - a for a, b in zip(ours["samples"], baseline["samples"], strict=True)])
                settings, parameters = ours["settings"], ours["parameters"]
                rows.append(
                    [
                        baseline["method"],
                        f"{settings['pruning_ratio']:g}",
                        str(settings["chunk_size"]),
                        str(settings["recent_window"]),
                        str(parameters["sequence_length"]),
                        str(parameters["windows"]),
                        f"{baseline['values']['perplexity'] / ours['values']['perplexity']:.4f}",
                        f"{low:.4f} to {high:.4f}",
                    ]
                )
    return rows if len(rows) > 1 else []


def _comparable(ours: dict[str, Any], baseline: dict[str, Any]) -> bool:
    same = ("pruning_ratio", "chunk_size", "recent_window", "sink_tokens", "dense_layers", "first_layer")
    return ours["parameters"] == baseline["parameters"] and all(
        ours["settings"][key] == baseline["settings"][key] for key in same
    )


def _bootstrap(differences: list[float]) -> tuple[float, float]:
    """95 % interval of exp(mean difference), windows drawn with replacement, seeded."""
    draw = random.Random(0)
    count = len(differences)
    means = sorted(sum(draw.choices(differences, k=count)) / count for _ in range(_BOOTSTRAP_DRAWS))
    return math.exp(means[int(0.025 * _BOOTSTRAP_DRAWS)]), math.exp(means[int(0.975 * _BOOTSTRAP_DRAWS) - 1])


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


#: What the ratios of an attention_speed file compare. All but the speed-ups are ours over stock's in time.
_TIMED = {
    "speedup of r=0.5 over stock": "decoding, r=0.5",
    "speedup of r=0.75 over stock": "decoding, r=0.75",
    "r=0.5 against stock at stored tokens": "decoding, r=0.5; stock on texts as short as what r=0.5 stores",
    "r=0.75 against stock at stored tokens": "decoding, r=0.75; stock on texts as short as what r=0.75 stores",
    "r=0.5 against stock, short": "decoding short texts, r=0.5",
    "first token of r=0.5 against stock, mean": "time to first token, r=0.5, mean of the requests",
    "first token of r=0.5 against stock, last": "time to first token, r=0.5, last of the requests",
    "first token of r=0.75 against stock, mean": "time to first token, r=0.75, mean of the requests",
}


def _attention(result: Result) -> str:
    parameters = result["parameters"]
    rows: Rows = [["times stock's speed", *COLUMNS]]
    for name, ratio in result["summary"]["ratios"].items():
        speed = ratio if name.startswith("speedup") else inverse(ratio)
        rows.append([_TIMED[name], *figures(speed)])
    growth = ", ".join(
        f"{name} {share:.2%}" for name, share in result["summary"]["resident_growth_share_of_kv_cache"].items()
    )
    return (
        f"{parameters['requests']} requests of {parameters['long_tokens']} tokens (short: "
        f"{parameters['short_tokens']}), {parameters['repeats']} interleaved repeats.\n\n"
        f"{markdown(rows)}\n\n"
        f"Resident memory of the worker above stock's, as a share of the KV cache: {growth}.\n"
    )


def _skipping(result: Result) -> str:
    parameters = result["parameters"]
    parts = [
        f"{parameters['requests']} requests of {parameters['tokens']} tokens, {parameters['repeats']} interleaved "
        f"repeats, {'eager' if parameters['eager'] else 'compiled'}. *Stock at half the tokens* is the most that one "
        "mechanism at 0.5 could gain if deciding and sealing cost nothing; *at a quarter*, the most that both together "
        "could."
    ]
    for model, found in result["models"].items():
        summary = found["summary"]
        rows: Rows = [[f"times stock's speed: {model}", *COLUMNS, "sealing, share of decoding"]]
        for name, values in {**summary["speedups"], **summary["bounds"]}.items():
            share = summary["seal_share"].get(name)
            rows.append([name, *figures(values), "" if share is None else f"{share:.2%}"])
        parts.append(markdown(rows))
    return "\n\n".join(parts) + "\n"


_MEASURED = {
    "output_tokens_per_s": ("output tokens a second", "high"),
    "preemptions": ("preemptions", "low"),
    "prefix_cache_hit_rate": ("prefix-cache hit rate", "high"),
    "later_first_token_s": ("seconds to the first token, later turns or users", "low"),
}


def _capacity(result: Result) -> str:
    summary, reported, parameters = result["summary"], result["reported"], result["parameters"]
    length = parameters["reported"]["max_model_len"]
    rows: Rows = [["setting", f"requests of {length} tokens, as vLLM reports at start", "times stock"]]
    for name, start in reported.items():
        rows.append([name, f"{start['max_concurrency']:.2f}", f"{summary['ratios'][name]:.3f}"])
    load, system, chats = (parameters[name] for name in ("load", "system prompt", "chats"))
    measured: Rows = [["measured", "better when", "stock", "r=0.5", "r=0.5 / stock", "least", "greatest"]]
    for task in ("load", "system prompt", "chats"):
        for key, row in summary[task].items():
            title, better = _MEASURED[key]
            shown = [f"{row[column]:.4g}" for column in ("stock", "ours", "ratio", "least", "greatest")]
            measured.append([f"{task}: {title}", better, *shown])
    text = (
        f"**load**: {load['requests']} requests of {load['prompt_tokens']} tokens, {load['output_tokens']} more each, "
        f"in {load['kv_cache_memory_bytes'] / 1e6:.0f} MB of KV cache, which stock vLLM fills. **system prompt**: "
        f"{system['users']} users share {system['shared_tokens']} tokens. **chats**: {chats['chats']} chats of "
        f"{chats['turns']} turns. Medians of {parameters['repeats']} interleaved repeats; stock has prefix caching too."
    )
    return f"{markdown(rows)}\n\n{text}\n\n{markdown(measured)}\n"


def _origin(name: str, result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    listed = ", ".join(f"{key} {value}" for key, value in versions.items())
    return (
        f"<sub>[{name}.json](../benchmarks/results/{name}.json): `{result['command']}`, commit {result['commit']}, "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {listed}.</sub>\n"
    )
