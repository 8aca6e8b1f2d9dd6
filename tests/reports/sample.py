"""Small result files with made-up figures."""

from vllm_tokenfilter.bench.run import Sample, summarise
from vllm_tokenfilter.config import FilterConfig

ORIGIN = {
    "commit": "abc123",
    "command": "app.py eval",
    "machine": {"processor": "AMD EPYC", "cores": 2, "memory_gib": 24.0},
    "versions": {"vllm-tokenfilter": "0.1.0"},
    "time": "2026-01-01T00:00:00+00:00",
    "model": "Tiny",
}


def cell(method, ratio, perplexity, samples, active=True, metric="perplexity"):
    return {
        "method": method,
        "settings": FilterConfig(pruning_ratio=ratio).model_dump(mode="json"),
        "metric": metric,
        "parameters": {"sequence_length": 2048, "windows": len(samples), "step_tokens": 64},
        "values": {"perplexity": perplexity, "kl": 0.05, "top1_agreement": 0.9},
        "samples": samples,
        "tokens_seen": 1000,
        "tokens_pruned": 400 if active else 0,
        "rows_dense": {},
        "filter_active": active and ratio > 0,
    }


WINDOWS = [2.0, 2.5, 3.0, 2.2, 2.7, 2.9, 2.4, 2.6]
EVALUATION = {
    "kind": "evaluation",
    **ORIGIN,
    "text": "prose",
    "seed": 0,
    "cells": [
        cell("dense", 0.0, 10.0, WINDOWS),
        cell("variance_aware", 0.5, 11.0, WINDOWS),
        cell("random", 0.5, 12.0, [x + 0.1 for x in WINDOWS]),
        cell("key", 0.5, 11.01, [x + (0.02 if i % 2 else -0.02) for i, x in enumerate(WINDOWS)]),
        cell("variance_aware", 0.75, 12.0, WINDOWS),
        cell("mean", 0.25, 10.0, WINDOWS, active=False),
    ],
}


def measured(server, context, repeat, between):
    return Sample(
        server=server,
        context=context,
        concurrency=8,
        repeat=repeat,
        first_token_s=[1.0, 2.0],
        between_median_s=between,
        between_p99_s=2 * between,
        output_tokens_per_s=1 / between,
        requests_per_s=0.1,
        peak_resident_bytes=2**31,
        preemptions=0,
    )


SAMPLES = [
    measured(server, context, repeat, between * (1 + 0.1 * repeat))
    for repeat in range(3)
    for context, scale in ((512, 1.0), (4000, 2.0))
    for server, between in (("stock", 0.06 * scale), ("r=0.5", 0.05))
]
BENCHMARK = {
    "kind": "benchmark",
    **ORIGIN,
    "parameters": {},
    "capacity": {"stock": {"kv_cache_tokens": 1000.0}},
    "samples": [sample.model_dump() for sample in SAMPLES],
    "summary": summarise(SAMPLES),
}
