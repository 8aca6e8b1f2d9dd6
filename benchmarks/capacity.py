"""What fits: requests in the same KV cache, a load that stock vLLM cannot hold, and prefixes that are shared.

Stock vLLM and Token Filtering in one run. `make bench-capacity` writes benchmarks/results/capacity.json.
"""

import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from engines import EngineProcess, ours
from rich.console import Console
from rich.table import Table

from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result
from vllm_tokenfilter.local.settings_file import read_config_file

OUT = Path(__file__).parent / "results" / "capacity.json"
CONFIGS = Path(__file__).parents[1] / "configs"
REPORTED = {"max_model_len": 8192, "kv_cache_memory_bytes": 1 << 30}
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "r=0.5": ours(0.5),
    "r=0.75": ours(0.75),
    "first third dense, r=0.5": ours(0.5, first_layer=10),
    "layers 15-19 dense, r=0.6": ours(0.6, dense_layers=[15, 16, 17, 18, 19]),
    **{
        name: {
            "attention_backend": "TOKEN_FILTERING",
            "additional_config": read_config_file(CONFIGS / file)["additional-config"],
        }
        for name, file in (
            ("tuned, mean r=0.5", "smollm2-135m-tuned.yaml"),
            ("tuned, mean r=0.758", "smollm2-135m-tuned-75.yaml"),
        )
    },
}
#: 34,000 tokens of stock vLLM: 22 prompts of 1500 tokens, and 17 once they have grown by 500.
LOAD = {"max_model_len": 8192, "max_num_seqs": 32, "kv_cache_memory_bytes": 790_000_000, "disable_log_stats": False}
REQUESTS, PROMPT, OUTPUT = 32, 1500, 500
PREFIXES = {"max_model_len": 8192, "kv_cache_memory_bytes": 1 << 30, "disable_log_stats": False}
USERS, SYSTEM_TOKENS, QUESTION_TOKENS = 16, 2000, 60
CHATS, TURNS, OPENING_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 3, 6, 500, 150, 150


def measure(llm: Any, task: str, seed: int) -> dict[str, float]:
    """One of "reported", "load", "system prompt" and "chats"; times in seconds."""
    if task == "reported":
        cache = llm.llm_engine.vllm_config.cache_config
        return {"max_concurrency": cache.kv_cache_max_concurrency, "tokens": cache.kv_cache_size_tokens}
    draw = random.Random(seed)
    before = _counters(llm)
    if task == "load":
        result = _load(llm, draw)
    elif task == "system prompt":
        result = _system_prompt(llm, draw)
    else:
        result = _chats(llm, draw)
    after = _counters(llm)
    queries, hits, preemptions = (after[name] - before[name] for name in _COUNTERS)
    return {**result, "prefix_cache_hit_rate": hits / queries, "preemptions": preemptions}


_COUNTERS = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions")


def _counters(llm: Any) -> dict[str, float]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {name: values[name] for name in _COUNTERS}


def _words(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(100, 40000) for _ in range(count)]


def _load(llm: Any, draw: random.Random) -> dict[str, float]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    for i in range(REQUESTS):
        llm.llm_engine.add_request(f"load{i}", {"prompt_token_ids": _words(draw, PROMPT)}, sampling)
    started = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "output_tokens_per_s": REQUESTS * OUTPUT / seconds}


def _answer(llm: Any, prompt: list[int], max_tokens: int) -> tuple[list[int], float]:
    """The output's ids, and the time to the first of them."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    started, first = time.perf_counter(), 0.0
    llm.llm_engine.add_request(str(started), {"prompt_token_ids": prompt}, sampling)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            first = first or time.perf_counter() - started
            ids = list(output.outputs[0].token_ids)
    return ids, first


def _system_prompt(llm: Any, draw: random.Random) -> dict[str, float]:
    system = _words(draw, SYSTEM_TOKENS)
    times = [_answer(llm, system + _words(draw, QUESTION_TOKENS), 8)[1] for _ in range(USERS)]
    return {"later_first_token_s": statistics.median(times[1:])}


def _chats(llm: Any, draw: random.Random) -> dict[str, float]:
    times = []
    histories = [_words(draw, OPENING_TOKENS) for _ in range(CHATS)]
    for turn in range(TURNS):
        for history in histories:
            history += _words(draw, TURN_TOKENS)
            answer, first = _answer(llm, history, ANSWER_TOKENS)
            history += answer
            if turn:
                times.append(first)
    return {"later_first_token_s": statistics.median(times)}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats of what is timed.")] = 3,
    out: Annotated[Path, typer.Option(help="Result file.")] = OUT,
) -> None:
    """Measure, print a table, write the JSON."""
    console = Console()
    reported = {}
    for name, arguments in SETTINGS.items():
        with console.status(f"Asking what vLLM reports: {name} ..."):
            engine = EngineProcess({**REPORTED, **arguments}, measure)
            reported[name] = engine.run("reported", 0)
            engine.close()
    samples: dict[str, list[dict[str, dict[str, float]]]] = {}
    for tasks, common in ((("load",), LOAD), (("system prompt", "chats"), PREFIXES)):
        engines = {name: EngineProcess({**common, **SETTINGS[name]}, measure) for name in ("stock", "r=0.5")}
        for repeat in range(repeats):
            for task in tasks:
                with console.status(f"{task}, repeat {repeat + 1} of {repeats} ..."):
                    order = list(engines) if repeat % 2 else list(reversed(engines))
                    sample = {name: engines[name].run(task, 1000 + repeat) for name in order}
                samples.setdefault(task, []).append(sample)
        for process in engines.values():
            process.close()
    summary = {
        "ratios": {
            name: figures["max_concurrency"] / reported["stock"]["max_concurrency"]
            for name, figures in reported.items()
        },
        "load": _pairs(samples["load"], ("output_tokens_per_s", "preemptions")),
        "system prompt": _pairs(samples["system prompt"], ("prefix_cache_hit_rate", "later_first_token_s")),
        "chats": _pairs(samples["chats"], ("prefix_cache_hit_rate", "later_first_token_s")),
    }
    result = {
        "benchmark": "capacity",
        **provenance(),
        "model": "SmolLM2-135M-Instruct",
        "parameters": {
            "reported": REPORTED,
            "load": {**LOAD, "requests": REQUESTS, "prompt_tokens": PROMPT, "output_tokens": OUTPUT},
            "system prompt": {"users": USERS, "shared_tokens": SYSTEM_TOKENS, "own_tokens": QUESTION_TOKENS},
            "chats": {
                "chats": CHATS,
                "turns": TURNS,
                "opening_tokens": OPENING_TOKENS,
                "turn_tokens": TURN_TOKENS,
                "answer_tokens": ANSWER_TOKENS,
            },
            "repeats": repeats,
        },
        "reported": reported,
        "summary": summary,
        "samples": samples,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_result(out, result)
    table = Table("same KV cache", "requests of 8192 tokens", "to stock")
    for name, figures in reported.items():
        table.add_row(name, f"{figures['max_concurrency']:.2f}", f"{summary['ratios'][name]:.3f}")
    console.print(table)
    for task in samples:
        table = Table(task, "stock", "r=0.5", "ratio", "least", "greatest")
        for key, row in summary[task].items():
            table.add_row(key, *(f"{row[column]:.4g}" for column in ("stock", "ours", "ratio", "least", "greatest")))
        console.print(table)
    console.print(f"Written: {out}")


def _pairs(samples: list[dict[str, dict[str, float]]], keys: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Medians, and ours over stock inside a repeat; a ratio to nothing is nan."""
    rows = {}
    for key in keys:
        ratios = [s["r=0.5"][key] / s["stock"][key] if s["stock"][key] else float("nan") for s in samples]
        rows[key] = {
            "stock": statistics.median(s["stock"][key] for s in samples),
            "ours": statistics.median(s["r=0.5"][key] for s in samples),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
        }
    return rows


if __name__ == "__main__":
    typer.run(main)
