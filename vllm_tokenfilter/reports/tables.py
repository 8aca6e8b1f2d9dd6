"""Tables of result files as rows of text, the first row the head: for pages, documents and terminals alike."""

from typing import Any

Rows = list[list[str]]

_NAMES = {
    "perplexity": ("perplexity", "{:.3f}"),
    "kl": ("KL from dense", "{:.4f}"),
    "top1_agreement": ("top-1 agreement", "{:.1%}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "standard_error": ("standard error", "{:.1%}"),
    "accuracy_normalised": ("normalised", "{:.1%}"),
    "standard_error_normalised": ("its error", "{:.1%}"),
    "token_accuracy": ("token accuracy", "{:.1%}"),
    "whole_answers": ("whole answers", "{:.1%}"),
    "answer_logprob": ("log-probability", "{:.3f}"),
}


def evaluation_tables(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    """A table per metric: title and rows, in the order measured."""
    cells = result["cells"]
    found = []
    for metric in dict.fromkeys(cell["metric"] for cell in cells):
        own = [cell for cell in cells if cell["metric"] == metric]
        names = [name for name in _NAMES if any(name in cell["values"] for cell in own)]
        measured = [key for key in own[0]["parameters"] if key != "step_tokens"]
        head = ["method", "ratio", "chunk", "window", "dense layers", "pruned in filtered layers"]
        rows = [[*head, *(key.replace("_", " ") for key in measured), *(_NAMES[name][0] for name in names)]]
        rows += [
            settings_row(cell)
            + [_pruned(cell)]
            + [str(cell["parameters"][key]) for key in measured]
            + _values(cell, names)
            for cell in own
        ]
        found.append((f"{metric}: {result['model']}", rows))
    return found


def settings_row(cell: dict[str, Any]) -> list[str]:
    """Method, ratio, chunk, window and dense layers of a cell."""
    settings = cell["settings"]
    if cell["method"] == "dense":
        return ["dense", "0", "-", "-", "-"]
    dense = " ".join(map(str, [*range(settings["first_layer"]), *settings["dense_layers"]]))
    schedule = settings.get("schedule", {}).get("kind", "uniform")
    skipping = settings.get("attention_skipping", {}).get("ratio", 0)
    return [
        cell["method"],
        f"{settings['pruning_ratio']:g}" + (f", skipping {skipping:g}" if skipping else ""),
        str(settings["chunk_size"]),
        str(settings["recent_window"]),
        dense or ("none" if schedule == "uniform" else f"as in {schedule}"),
    ]


def _pruned(cell: dict[str, Any]) -> str:
    """The share of tokens that left the cache, a mean over the filtered layers: layers left dense do not count."""
    return f"{cell['tokens_pruned'] / cell['tokens_seen']:.1%}" if cell["tokens_seen"] else "-"


def _values(cell: dict[str, Any], names: list[str]) -> list[str]:
    if cell["method"] != "dense" and not cell["filter_active"]:
        return ["filter inactive", *[""] * (len(names) - 1)]
    return [_NAMES[name][1].format(cell["values"][name]) if name in cell["values"] else "" for name in names]


def tuning_tables(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    """What was tried as a whole, and every layer alone, the most damaging first, where that was measured."""
    scores = {score["name"]: score for score in result["scores"]}
    dense = scores["dense"]

    def row(score: dict[str, Any]) -> list[str]:
        ratios = score["ratios"]
        return [
            score["name"],
            f"{sum(ratios) / len(ratios):.3f}",
            f"{score['token_accuracy']:.1%}",
            f"{score['answer_logprob'] - dense['answer_logprob']:+.3f}",
            f"{score['prose_nll'] - dense['prose_nll']:+.4f}",
        ]

    head = ["setting", "mean ratio", "answer tokens right", "answer log-probability", "prose log-perplexity"]
    layers = [score for name, score in scores.items() if name.startswith("layer ")]
    layers.sort(key=lambda score: score["answer_logprob"] - 10 * max(0.0, score["prose_nll"] - dense["prose_nll"]))
    whole = [row(score) for name, score in scores.items() if not name.startswith("layer ")]
    tables = [(f"Settings: {result['model']}", [head, *whole])]
    return tables + ([(f"One layer pruned at a time: {result['model']}", [head, *map(row, layers)])] if layers else [])


def benchmark_tables(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    """One table: a row per server and workload; in brackets the speed against stock's, above 1 faster."""
    head = ["server", "requests", "context", "first token", "between tokens", "99th percentile", "output tokens/s"]
    rows = [[*head, "peak memory", "KV cache tokens", "preemptions"]]
    for row in result["summary"]:
        capacity = result["capacity"].get(row["server"], {}).get("kv_cache_tokens")
        rows.append(
            [
                row["server"],
                str(row["concurrency"]),
                str(row["context"]),
                f"{row['first_token_s']['median'] * 1e3:.0f} ms" + _speed(row, "first_token_s"),
                f"{row['between_median_s']['median'] * 1e3:.1f} ms" + _speed(row, "between_median_s"),
                f"{row['between_p99_s']['median'] * 1e3:.1f} ms",
                f"{row['output_tokens_per_s']['median']:.1f}" + _speed(row, "output_tokens_per_s"),
                f"{row['peak_resident_bytes']['median'] / 2**30:.2f} GiB",
                f"{capacity:,.0f}" if capacity else "-",
                f"{row['preemptions']['median']:.0f}",
            ]
        )
    return [(f"Serving {result['model']}; in brackets times stock's speed in the same repeat (median)", rows)]


def capacity_table(report: dict[str, Any]) -> tuple[str, Rows]:
    """What `planning.deployment.predict` found: title and a row per setting."""
    title = (
        f"Requests of {report['context']} tokens, blocks of {report['block_size']}, prefill steps of at most "
        f"{report['prefill_step']}, {report['tensor_parallel']} GPU(s)"
    )
    head = ["", "requests at once", "times stock", "KV cache, tokens", "KV bytes per token", "KV read per step"]
    rows = [
        [
            entry["name"],
            f"{entry['max_concurrency']:.2f}",
            f"{entry['times_stock']:.2f}",
            f"{entry['cache_tokens']:,}",
            f"{entry['bytes_per_token']:,.0f}",
            f"{entry['read_bytes'] / 2**30:.3f} GiB",
        ]
        for entry in report["settings"]
    ]
    return title, [head, *rows]


def _speed(row: dict[str, Any], name: str) -> str:
    """Times stock's speed, in brackets: a time is turned over, so that above 1 is faster everywhere."""
    ratio = row.get(f"{name}_to_stock")
    if not ratio:
        return ""
    return f" ({ratio['median'] if name.endswith('_per_s') else 1 / ratio['median']:.2f} x)"
