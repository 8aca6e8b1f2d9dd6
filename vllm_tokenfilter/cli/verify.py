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
    for key, value in {**found, **_spared(found)}.items():
        if key != "layer_table":
            status.add_row(key, str(value))
    console.print(status)
    for check, passed in report["checks"].items():
        console.print(f"[{'green' if passed else 'red'}]{'ok  ' if passed else 'FAIL'}[/] {check}")


def _spared(status: dict[str, Any]) -> dict[str, str]:
    """Which part of decoding's cache reads was spared, and by what."""
    dense = status.get("reads_dense", 0)
    if not dense:
        return {}
    filtered, done = status["reads_filtered"], status["reads_done"]
    return {
        "cache reads of decoding spared by KV filtering": f"{1 - filtered / dense:.1%}",
        "cache reads of decoding spared by attention skipping": f"{(filtered - done) / dense:.1%}",
    }
