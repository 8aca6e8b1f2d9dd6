"""What the metrics cost: the counters of every step, against the same engine without them, and the look once a second.

Counters: one engine decodes, and of every two steps one, drawn by chance, does not count. A pair's difference is what
counting takes, whatever the length of the requests and the state of the machine; steps that seal are left out. What is
left in both is one addition a step and one a seal, which is timed by itself.

The look: one status a second is asked for (`endpoints.METRICS_INTERVAL_S`), whatever the number of API servers. The
round trip to an idle engine in its own process is all the time an engine can lose to it, and more: it contains the way
there and back, when the engine goes on stepping.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from engines import EngineProcess, ours

from vllm_tokenfilter.local.models import MODEL_NAME, default_model_path
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result

RESULTS = Path(__file__).parent / "results"
RATIO = 0.5


def count_or_not(llm, requests, tokens, new_tokens, seed):
    """Decode once; seconds of steps that count and of those that do not, in pairs."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    builders = [builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders]
    draw = random.Random(seed)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    for number in range(requests):
        prompt = {"prompt_token_ids": [draw.randrange(100, 40000) for _ in range(tokens)]}
        engine.add_request(f"{seed}-{number}", prompt, sampling)

    def step(counting):
        for builder in builders:
            if counting:
                vars(builder).pop("_count", None)
            else:
                builder._count = lambda *_: None
        seals = sum(builder.counters.seals for builder in builders)
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        sealed = sum(builder.counters.seals for builder in builders) > seals
        return seconds if len(outputs) == requests and not sealed else None

    pairs = []
    while engine.has_unfinished_requests():
        first = draw.random() < 0.5
        timed = {counting: step(counting) for counting in (first, not first) if engine.has_unfinished_requests()}
        if len(timed) == 2 and None not in timed.values():
            pairs.append([timed[True], timed[False]])
    step(True)
    return pairs[4:]  # the first ones follow prefill steps


def one_addition(builder_rows, calls=20000):
    """Seconds of the addition that is left in steps that do not count."""
    import numpy as np

    from vllm_tokenfilter.integration.counters import StepCounters

    counters, query_lens = StepCounters(), np.ones(builder_rows, np.int64)
    started = time.perf_counter()
    for _ in range(calls):
        counters.tokens_seen += int(query_lens.sum())
    return (time.perf_counter() - started) / calls


def interval(values, draws=2000):
    """Bounds of the median that hold 95 % of the medians of drawn samples."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    return [medians[draws // 40], medians[-draws // 40 - 1]]


def status_round_trips(calls, requests, tokens):
    """Seconds of each, and what the engine counted in a load before."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(default_model_path()),
        dtype="bfloat16",
        max_model_len=tokens + 256,
        kv_cache_memory_bytes=1 << 29,
        enforce_eager=True,
        attention_backend="TOKEN_FILTERING",
    )
    prompts = [
        {"prompt_token_ids": [(i * 9973 + j * 31) % 40000 + 100 for j in range(tokens)]} for i in range(requests)
    ]
    llm.generate(prompts, SamplingParams(max_tokens=128, temperature=0, ignore_eos=True), use_tqdm=False)
    samples = []
    for _ in range(calls):
        started = time.perf_counter()
        status = llm.llm_engine.engine_core.call_utility("token_filtering_status")
        samples.append(time.perf_counter() - started)
    return samples, {
        key: status["counters"][key] for key in ("tokens_seen", "tokens_pruned", "rows_filtered", "rows_dense")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--json", type=Path, default=RESULTS / "metrics_cost.json")
    options = parser.parse_args()
    # Imported late: --help needs no engine.
    from vllm_tokenfilter.integration.server.endpoints import METRICS_INTERVAL_S

    arguments = {"max_model_len": options.tokens + options.new_tokens, "kv_cache_memory_bytes": 1 << 29}
    engine = EngineProcess({**arguments, **ours(RATIO)}, count_or_not)
    engine.run(options.requests, 100, 64, 0)
    rounds = [
        engine.run(options.requests, options.tokens, options.new_tokens, number + 1) for number in range(options.rounds)
    ]
    engine.close()
    samples, counted = status_round_trips(options.calls, options.requests, options.tokens)

    def share(pairs):
        return statistics.median((on - off) / off for on, off in pairs)

    pairs = [pair for pairs in rounds for pair in pairs]
    off, look = statistics.median(pair[1] for pair in pairs), statistics.median(samples)
    left = one_addition(options.requests) / off
    values = {
        "pairs": len(pairs),
        "step_seconds_counting": statistics.median(pair[0] for pair in pairs),
        "step_seconds_without": off,
        "counting_share": share(pairs),
        "counting_share_interval_95": interval([(on - off) / off for on, off in pairs]),
        "counting_share_of_each_round": [share(one) for one in rounds],
        "addition_left_share": left,
        "status_seconds": look,
        "status_seconds_greatest": max(samples),
        "status_share": look / METRICS_INTERVAL_S,
    }
    values["share_of_step_time"] = values["counting_share"] + left + values["status_share"]
    values["share_of_step_time_at_most"] = values["counting_share_interval_95"][1] + left + values["status_share"]
    result = {
        "provenance": provenance(),
        "parameters": {
            "model": MODEL_NAME,
            "pruning_ratio": RATIO,
            "requests": options.requests,
            "prompt_tokens": options.tokens,
            "new_tokens": options.new_tokens,
            "calls": options.calls,
            "interval_seconds": METRICS_INTERVAL_S,
        },
        "values": values,
        "filter": counted,
        "samples": {
            "status_seconds": [round(sample, 6) for sample in samples],
            "step_seconds_counting_and_without": [[[round(x, 6) for x in pair] for pair in one] for one in rounds],
        },
    }
    write_result(options.json, result)
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
