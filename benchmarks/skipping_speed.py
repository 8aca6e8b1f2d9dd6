"""How fast decoding is when attention is skipped, or layers are pruned unevenly: stock vLLM and ours, interleaved.

Measured as attention_speed.py does, but compiled, which is vLLM's default: what is not attention takes less then.
`make bench-skipping` writes benchmarks/results/skipping_speed.json.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from attention_speed import COMMON, ENGINES, KV_BYTES, LONG, NEW_TOKENS, REQUESTS, measure
from engines import EngineProcess, ours
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_tokenfilter.provenance import provenance
from vllm_tokenfilter.settings_file import read_config_file

OUT = Path(__file__).parent / "results" / "skipping_speed.json"
TUNED = Path(__file__).parents[1] / "configs" / "smollm2-135m-tuned.yaml"
CASES: dict[str, dict[str, Any]] = {
    "stock": ENGINES["stock"],
    "skipping 0.5, none": ours(0, attention_skipping={"ratio": 0.5, "substitute": "none"}),
    "tuned, mean r=0.5": {
        "attention_backend": "TOKEN_FILTERING",
        "additional_config": read_config_file(TUNED)["additional-config"],
    },
    "skipping 0.5, window, and r=0.5": ours(0.5, attention_skipping={"ratio": 0.5, "substitute": "window"}),
}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats.")] = 5,
    eager: Annotated[bool, typer.Option(help="Compile nothing, as attention_speed.py.")] = False,
    out: Annotated[Path, typer.Option(help="Result file.")] = OUT,
) -> None:
    """Measure, print a table, write the JSON."""
    console = Console()
    engines: dict[str, EngineProcess] = {}
    for name, arguments in CASES.items():
        with console.status(f"Starting {name} ..."):
            engines[name] = EngineProcess({**COMMON, "enforce_eager": eager, **arguments}, measure)
    samples = []
    for repeat in track(range(-1, repeats), description="Repeats (the first warms up)"):
        length, sample = LONG if repeat >= 0 else 600, {}
        # Every other repeat runs backwards, so that no case always follows the same one.
        for number, name in enumerate(CASES if repeat % 2 else reversed(CASES)):
            sample[name] = engines[name].run(length, 1000 * (repeat + 1) + number)
        if repeat >= 0:
            samples.append(sample)
    for process in engines.values():
        process.close()
    speedups = {}
    for name in list(CASES)[1:]:
        found = [s["stock"]["time_between_tokens_s"] / s[name]["time_between_tokens_s"] for s in samples]
        speedups[name] = {"median": statistics.median(found), "least": min(found), "greatest": max(found)}
    result = {
        "benchmark": "skipping_speed",
        **provenance(),
        "model": "SmolLM2-135M-Instruct",
        "parameters": {
            "requests": REQUESTS,
            "tokens": LONG,
            "new_tokens": NEW_TOKENS,
            "kv_cache_bytes": KV_BYTES,
            "repeats": repeats,
            "eager": eager,
        },
        "summary": {
            "speedups": speedups,
            "seal_share": {
                name: statistics.median(s[name]["seal_share"] for s in samples) for name in CASES if name != "stock"
            },
        },
        "samples": samples,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("speed-up over stock", "median", "least", "greatest")
    for name, values in speedups.items():
        table.add_row(name, *(f"{values[key]:.3f}" for key in ("median", "least", "greatest")))
    console.print(table)
    console.print(f"Written: {out}")


if __name__ == "__main__":
    typer.run(main)
