"""How fast decoding reads a filtered cache: stock vLLM and Token Filtering, interleaved, engines side by side.

Every engine lives in a process of its own and idles while another is measured. One repeat measures every case once;
ratios are taken inside a repeat, and the medians over repeats are reported. `make bench` writes
benchmarks/results/attention_speed.json.
"""

import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from engines import interleave, ours
from rich.console import Console
from rich.table import Table

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.layout import stored_tokens
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result

OUT = Path(__file__).parent / "results" / "attention_speed.json"
REQUESTS, LONG, SHORT, NEW_TOKENS = 8, 4000, 128, 96
STORED = {ratio: stored_tokens(LONG, FilterConfig(pruning_ratio=ratio).layout) for ratio in (0.5, 0.75)}
KV_BYTES = 1 << 30

#: case -> (engine, prompt tokens)
CASES = {
    "stock long": ("stock", LONG),
    "r=0.5 long": ("r=0.5", LONG),
    "stock at stored, r=0.5": ("stock", STORED[0.5]),
    "r=0.75 long": ("r=0.75", LONG),
    "stock at stored, r=0.75": ("stock", STORED[0.75]),
    "stock short": ("stock", SHORT),
    "r=0.5 short": ("r=0.5", SHORT),
}
COMMON = {"max_model_len": 8192, "max_num_seqs": REQUESTS, "kv_cache_memory_bytes": KV_BYTES}
ENGINES: dict[str, dict[str, Any]] = {
    "stock": {"max_num_batched_tokens": 2048},  # what stock vLLM's server takes on CPU
    "r=0.5": ours(0.5),
    "r=0.75": ours(0.75),
}


def measure(llm: Any, prompt_tokens: int, seed: int) -> dict[str, Any]:
    """Run the requests together; times in seconds, resident size in bytes."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    draw = random.Random(seed)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    started = time.perf_counter()
    for i in range(REQUESTS):
        prompt = {"prompt_token_ids": [draw.randrange(100, 40000) for _ in range(prompt_tokens)]}
        engine.add_request(f"{seed}-{i}", prompt, sampling)
    first: dict[str, float] = {}
    between, sealing = [], []
    while engine.has_unfinished_requests():
        sealed, before = seal_seconds(engine), time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if len(first) == REQUESTS and len(outputs) == REQUESTS:
            between.append(now - before)
            sealing.append(seal_seconds(engine) - sealed)
        for output in outputs:
            first.setdefault(output.request_id, now - started)
    return {
        "time_between_tokens_s": statistics.median(between),
        "steps": len(between),
        "seal_share": sum(sealing) / sum(between),
        "first_token_mean_s": statistics.mean(first.values()),
        "first_token_last_s": max(first.values()),
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def seal_seconds(engine: Any) -> float:
    """Seconds this engine has sealed so far; 0 for stock vLLM."""
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    groups = itertools.chain.from_iterable(runner.attn_groups)
    builders = itertools.chain.from_iterable(group.metadata_builders for group in groups)
    return sum(builder.counters.seal_seconds for builder in builders if hasattr(builder, "counters"))


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, least and greatest over repeats, of the cases and of the ratios inside one repeat."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}

    def ratio(above: str, below: str, key: str = "time_between_tokens_s") -> dict[str, float]:
        return spread([sample[above][key] / sample[below][key] for sample in samples])

    resident = {
        name: statistics.median(
            max(sample[case]["resident_bytes"] for case, (engine, _) in CASES.items() if engine == name)
            for sample in samples
        )
        for name in ENGINES
    }
    return {
        "cases": {
            case: {key: spread([sample[case][key] for sample in samples]) for key in samples[0][case]} for case in CASES
        },
        "ratios": {
            "speedup of r=0.5 over stock": ratio("stock long", "r=0.5 long"),
            "speedup of r=0.75 over stock": ratio("stock long", "r=0.75 long"),
            "r=0.5 against stock at stored tokens": ratio("r=0.5 long", "stock at stored, r=0.5"),
            "r=0.75 against stock at stored tokens": ratio("r=0.75 long", "stock at stored, r=0.75"),
            "r=0.5 against stock, short": ratio("r=0.5 short", "stock short"),
            "first token of r=0.5 against stock, mean": ratio("r=0.5 long", "stock long", "first_token_mean_s"),
            "first token of r=0.5 against stock, last": ratio("r=0.5 long", "stock long", "first_token_last_s"),
            "first token of r=0.75 against stock, mean": ratio("r=0.75 long", "stock long", "first_token_mean_s"),
        },
        "resident_growth_share_of_kv_cache": {
            name: (resident[name] - resident["stock"]) / KV_BYTES for name in ENGINES if name != "stock"
        },
    }


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats.")] = 7,
    out: Annotated[Path, typer.Option(help="Result file.")] = OUT,
) -> None:
    """Measure, print a table, write the JSON."""
    console = Console()
    engines = {name: {**COMMON, **arguments} for name, arguments in ENGINES.items()}
    samples = interleave(engines, CASES, measure, repeats, console)
    result = {
        "benchmark": "attention_speed",
        **provenance(),
        "model": "SmolLM2-135M-Instruct",
        "parameters": {
            "requests": REQUESTS,
            "long_tokens": LONG,
            "short_tokens": SHORT,
            "stored_tokens": {str(ratio): stored for ratio, stored in STORED.items()},
            "new_tokens": NEW_TOKENS,
            "kv_cache_bytes": KV_BYTES,
            "repeats": repeats,
        },
        "summary": summarise(samples),
        "samples": samples,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_result(out, result)
    table = Table("ratio", "median", "least", "greatest")
    for name, values in result["summary"]["ratios"].items():
        table.add_row(name, *(f"{values[key]:.3f}" for key in ("median", "least", "greatest")))
    console.print(table)
    console.print({name: f"{v:.2%}" for name, v in result["summary"]["resident_growth_share_of_kv_cache"].items()})
    console.print(f"Written: {out}")


if __name__ == "__main__":
    typer.run(main)
