"""What the metrics cost: how long an engine answers for its status, next to a decode step; JSON under results/.

One status a second is asked for (`endpoints.METRICS_INTERVAL_S`), whatever the number of API servers. The round trip to
an idle engine is all the time an engine can lose to it, and more: it contains the way there and back, when the engine
goes on stepping. The share of one second that it takes is the share of step time it costs at most.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from vllm_tokenfilter.models import MODEL_NAME, default_model_path
from vllm_tokenfilter.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--json", type=Path, default=RESULTS / "metrics_cost.json")
    options = parser.parse_args()
    # Imported late: --help needs no engine.
    from vllm import LLM, SamplingParams

    from vllm_tokenfilter.integration.endpoints import METRICS_INTERVAL_S

    llm = LLM(
        str(default_model_path()),
        dtype="bfloat16",
        max_model_len=options.tokens + 256,
        kv_cache_memory_bytes=1 << 29,
        enforce_eager=True,
        disable_log_stats=False,
        attention_backend="TOKEN_FILTERING",
    )
    client = llm.llm_engine.engine_core
    prompts = [
        {"prompt_token_ids": [(i * 9973 + j * 31) % 40000 + 100 for j in range(options.tokens)]}
        for i in range(options.requests)
    ]
    answers = llm.generate(prompts, SamplingParams(max_tokens=128, temperature=0, ignore_eos=True), use_tqdm=False)
    between = [
        (answer.metrics.last_token_ts - answer.metrics.first_token_ts) / (answer.metrics.num_generation_tokens - 1)
        for answer in answers
    ]
    samples = []
    for _ in range(options.calls):
        started = time.perf_counter()
        status = client.call_utility("token_filtering_status")
        samples.append(time.perf_counter() - started)
    step, call = statistics.median(between), statistics.median(samples)
    result = {
        "provenance": provenance(),
        "parameters": {
            "model": MODEL_NAME,
            "requests": options.requests,
            "prompt_tokens": options.tokens,
            "calls": options.calls,
            "interval_seconds": METRICS_INTERVAL_S,
        },
        "samples": {"status_seconds": samples, "step_seconds": between},
        "values": {
            "status_seconds": call,
            "status_seconds_greatest": max(samples),
            "step_seconds": step,
            "share_of_step_time": call / METRICS_INTERVAL_S,
        },
        "filter": {key: status[key] for key in ("tokens_seen", "tokens_pruned", "rows_filtered", "rows_dense")},
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["values"], indent=1))


if __name__ == "__main__":
    main()
