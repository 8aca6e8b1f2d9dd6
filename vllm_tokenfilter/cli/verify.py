"""What `vllm-tokenfilter verify` prints: one report that proves the installation."""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(report: dict[str, Any]) -> None:
    """Print versions, both texts, what every layer does, what was counted, and the checks."""
    console = Console()
    components = Table("component", "version", title="Versions")
    for name, version in report["versions"].items():
        components.add_row(name, version)
    console.print(components)
    texts = Table("", "stock", "Token Filtering", title=f"The same prompt, greedy ({report['model']})")
    for key in ("prompt_tokens", "seconds", "text", "error"):
        if key in report["dense"] or key in report["filtered"]:
            texts.add_row(key, str(report["dense"].get(key, "")), str(report["filtered"].get(key, "")))
    console.print(texts)
    found = report["filtered"].get("status", {})
    layers = Table("layers", "kept of a chunk", "KV ratio", "attention skipped", title="What every layer does")
    for row in found.get("layer_table", []):
        layers.add_row(row["layers"], str(row["kept_per_chunk"]), f"{row['kv_ratio']:.3g}", f"{row['skip_ratio']:.3g}")
    console.print(layers)
    status = Table("what the worker counted", "value", title="What was filtered")
    for key, value in (_counted(found) if found else {}).items():
        status.add_row(key, str(value))
    console.print(status)
    for check, passed in report["checks"].items():
        console.print(f"[{'green' if passed else 'red'}]{'ok  ' if passed else 'FAIL'}[/] {check}")


def _counted(answer: dict[str, Any]) -> dict[str, Any]:
    """A worker's status in rows, and which part of decoding's cache reads was spared by what."""
    from vllm_tokenfilter.integration.status import Status

    status = Status.model_validate(answer)
    layers, counters = status.layers.model_dump(exclude={"rows", "effective_ratio"}), status.counters
    rows = {
        "backend": status.backend,
        **{f"layers_{name}": indices for name, indices in layers.items()},
        **status.settings_in_force,
        "effective_ratio": status.layers.effective_ratio,
        **counters.as_dict(),
    }
    if status.cudagraph_mode is not None:
        rows["cudagraph_mode"] = status.cudagraph_mode
    if dense := counters.reads_dense:
        filtered, done = counters.reads_filtered, counters.reads_done
        rows["cache reads of decoding saved by KV filtering"] = f"{1 - filtered / dense:.1%}"
        rows["cache reads of decoding saved by attention skipping"] = f"{(filtered - done) / dense:.1%}"
    return rows
