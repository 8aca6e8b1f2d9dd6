"""Measures a grid on every server in turn, saves after every sample, and sums up: medians, spread, ratio to stock."""

import contextlib
import json
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from vllm_tokenfilter.bench.servers import PeakMemory, Server, started
from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.local.progress import Progress
from vllm_tokenfilter.local.result_file import ResultFile

BASELINE = "stock"
#: The fields of a sample that say what was measured; the others are figures.
_LOAD = ("server", "context", "concurrency", "repeat")


class Sample(BaseModel):
    """One server, one workload, once."""

    model_config = ConfigDict(extra="forbid")

    server: str  #: its name.
    context: int  #: prompt tokens of each request.
    concurrency: int  #: requests sent together.
    repeat: int  #: from 0.
    first_token_s: list[float]  #: time to first token of each request.
    between_median_s: float  #: median time between tokens, over all tokens of all requests.
    between_p99_s: float  #: 99th percentile of the same.
    output_tokens_per_s: float  #: tokens of all answers over the time from the first request to the last token.
    requests_per_s: float  #: requests over the same time.
    peak_resident_bytes: int  #: of the server's process tree; 0 if it was not started here.
    preemptions: float  #: during the sample.


class Benchmark(ResultFile):
    """A result file."""

    kind: Literal["benchmark"] = "benchmark"
    parameters: dict[str, Any]  #: output tokens, server flags and the grid.
    capacity: dict[str, dict[str, float]] = {}  #: server -> what vLLM said at start: kv_cache_tokens, max_concurrency.
    samples: list[Sample] = []  #: every measurement, in the order it was made.
    #: A row per server and workload: medians with least and greatest over repeats, and the ratios to stock of the same
    #: repeat.
    summary: list[dict[str, Any]] = []


@dataclass(frozen=True)
class BenchmarkPlan:
    """What to measure."""

    model: str  #: path or Hugging Face id; unused with urls.
    contexts: list[int]  #: prompt tokens.
    concurrencies: list[int]  #: requests sent together.
    ratios: list[float]  #: pruning ratios, one server each, beside stock.
    repeats: int  #: interleaved repeats; one more warms up.
    output_tokens: int  #: tokens of each answer.
    settings: dict[str, Any] = field(default_factory=dict)  #: further settings of the filter.
    server_flags: list[str] = field(default_factory=list)  #: further flags of every server.
    #: Name -> url of servers that run already, measured instead of starting any.
    urls: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  #: sent with every request.
    seed: int = 0  #: of the prompts.

    def check(self) -> None:
        """Refuse what is wrong before a server starts.

        Raises:
            EvaluationError: a number is out of range.
            ConfigError: a ratio or setting cannot hold.
        """
        reasons = [f"context={value} must be at least 1 token." for value in self.contexts if value < 1]
        reasons += [f"concurrency={value} must be at least 1." for value in self.concurrencies if value < 1]
        if reasons:
            raise EvaluationError(reasons)
        for ratio in self.ratios:
            FilterConfig.parse({**self.settings, "pruning_ratio": ratio})


def run(plan: BenchmarkPlan, out: Path, progress: Progress) -> Benchmark:
    """Measure what `out` does not hold yet; it is written after every sample, so an interrupted run resumes.

    Raises:
        EvaluationError: a server does not start or answer, or `out` cannot be used.
    """
    described = ("output_tokens", "contexts", "concurrencies", "settings", "server_flags", "urls", "seed")
    parameters = {name: getattr(plan, name) for name in described}
    with contextlib.ExitStack() as stack:
        model = ", ".join(plan.urls) or Path(plan.model).name
        benchmark = Benchmark.resume(out, model=model, parameters=parameters)
        progress("Starting servers ...", 0)
        servers = _servers(plan, stack)
        names = {server.name: _require_fits(server, plan) for server in servers}
        benchmark.capacity |= {server.name: server.capacity() for server in servers}
        done = {(s.server, s.context, s.concurrency, s.repeat) for s in benchmark.samples}
        loads = [(context, concurrency) for context in plan.contexts for concurrency in plan.concurrencies]
        advance = progress("Measuring", (plan.repeats + 1) * len(loads) * len(servers))
        for repeat in range(-1, plan.repeats):
            for context, concurrency in loads:
                # Every other repeat runs backwards, so that no server always follows the same one.
                for server in servers if repeat % 2 else servers[::-1]:
                    advance(f"{server.name}, {concurrency} x {context} tokens")
                    if (server.name, context, concurrency, repeat) in done:
                        continue
                    sample = _measure(plan, server, names[server.name], context, concurrency, repeat)
                    if repeat >= 0:
                        benchmark.samples.append(sample)
                        benchmark.summary = summarise(benchmark.samples)
                        benchmark.write(out)
    return benchmark


def _measure(plan: BenchmarkPlan, server: Server, name: str, context: int, concurrency: int, repeat: int) -> Sample:
    """Send one load to one server; a repeat below 0 warms up and need not be as long."""
    from vllm_tokenfilter.integration.offline.http_client import complete_together

    draw = random.Random(f"{plan.seed} {context} {concurrency} {repeat}")
    length = context if repeat >= 0 else min(context, 256)
    prompts = [[draw.randrange(100, 10000) for _ in range(length)] for _ in range(concurrency)]
    before = server.metrics()
    with PeakMemory(server) as memory:
        timings = complete_together(server.url, name, prompts, plan.output_tokens, plan.headers)
    after = server.metrics()
    between = sorted(value for timing in timings for value in timing.between)
    total = max(timing.first_token + sum(timing.between) for timing in timings)
    return Sample(
        server=server.name,
        context=context,
        concurrency=concurrency,
        repeat=repeat,
        first_token_s=[timing.first_token for timing in timings],
        between_median_s=statistics.median(between) if between else 0.0,
        between_p99_s=between[min(len(between) - 1, int(0.99 * len(between)))] if between else 0.0,
        output_tokens_per_s=sum(timing.output_tokens for timing in timings) / total,
        requests_per_s=len(timings) / total,
        peak_resident_bytes=memory.peak,
        preemptions=after.get("preemptions", 0) - before.get("preemptions", 0),
    )


def _servers(plan: BenchmarkPlan, stack: contextlib.ExitStack) -> list[Server]:
    if plan.urls:
        return [
            Server(name, url.rstrip("/").removesuffix("/v1"), headers=plan.headers) for name, url in plan.urls.items()
        ]
    longest = max(plan.contexts) + plan.output_tokens + 1
    flags = ["--model", plan.model, "--served-model-name", Path(plan.model).name, "--max-model-len", str(longest)]
    flags += ["--max-num-seqs", str(max(plan.concurrencies)), *plan.server_flags]
    from vllm_tokenfilter.integration.server.arguments import read, server_arguments, words_of

    servers = [stack.enter_context(started(BASELINE, words_of(read(flags)), {"VLLM_PLUGINS": ""}))]
    settings = ["--additional-config", json.dumps({CONFIG_KEY: plan.settings})]
    for ratio in plan.ratios:
        ours = server_arguments([*flags, *settings], ratio)
        servers.append(stack.enter_context(started(f"r={ratio:g}", ours, {})))
    return servers


def _require_fits(server: Server, plan: BenchmarkPlan) -> str:
    name, longest = server.model()
    if max(plan.contexts) + plan.output_tokens > longest:
        raise EvaluationError(
            f"context={max(plan.contexts)} with {plan.output_tokens} output tokens is longer than the {longest} "
            f"tokens {server.url} serves; use a shorter --context."
        )
    return name


def _figure(sample: Sample, name: str) -> float:
    value = getattr(sample, name)
    return statistics.mean(value) if isinstance(value, list) else float(value)


def summarise(samples: list[Sample]) -> list[dict[str, Any]]:
    """A row per server and workload; see `Benchmark.summary`."""
    stock = {(s.context, s.concurrency, s.repeat): s for s in samples if s.server == BASELINE}
    rows = []
    for key in dict.fromkeys((s.server, s.context, s.concurrency) for s in samples):
        own = [s for s in samples if (s.server, s.context, s.concurrency) == key]
        row: dict[str, Any] = {"server": key[0], "context": key[1], "concurrency": key[2], "repeats": len(own)}
        for name in [figure for figure in Sample.model_fields if figure not in _LOAD]:
            row[name] = _spread([_figure(sample, name) for sample in own])
            pairs = [
                (_figure(s, name), _figure(stock[s.context, s.concurrency, s.repeat], name))
                for s in own
                if (s.context, s.concurrency, s.repeat) in stock
            ]
            if key[0] != BASELINE and pairs and all(base for _, base in pairs):
                row[f"{name}_to_stock"] = _spread([value / base for value, base in pairs])
        rows.append(row)
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
