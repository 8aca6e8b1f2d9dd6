"""Servers of any command line, and load on them, for the tests of operation."""

import asyncio
import contextlib
import re
import sys
import time

import httpx

from vllm_tokenfilter.bench.servers import SERVE as VLLM
from vllm_tokenfilter.bench.servers import started

SEEN, SEALED, PRUNED = (f"tokenfilter_tokens_{word}_total" for word in ("seen", "sealed", "pruned"))
SERVE = [sys.executable, "-m", "vllm_tokenfilter.cli.app", "serve"]
PLAIN = [*VLLM, "--attention-backend", "TOKEN_FILTERING"]
TINY_FLAGS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "2048",
    "--kv-cache-memory-bytes",
    "100000000",
]


@contextlib.contextmanager
def running(command, *flags, env=None):
    """A healthy server at 127.0.0.1: its address, its process and its log."""
    with started("under test", flags, env or {}, command) as server:
        yield server.url, server.process, server.log


def serve(*flags, env=None):
    return running(SERVE, *flags, env=env)


def metrics_of(url):
    """Every sample of ours: name with labels -> value."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    lines = re.findall(r"^(tokenfilter_\S*?(?:\{.*?\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def prompts_of(count, lengths, seed=0):
    """Token ids that no two prompts share."""
    return [
        [(seed * 7919 + i * 9973 + j * 31) % 40000 + 100 for j in range(lengths[i % len(lengths)])]
        for i in range(count)
    ]


def complete(url, prompts, max_tokens, at_once=16, meanwhile=None, until_answered=False, headers=None):
    """Answers (JSON) to all prompts, greedy, and the result of `meanwhile(client, one)`, which runs beside them.

    `until_answered` ends it with the last answer.
    """

    async def everything():
        gate = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=url, timeout=300, headers=headers) as client:
            name = (await client.get("/v1/models")).json()["data"][0]["id"]

            async def one(prompt):
                async with gate:
                    body = {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
                    body |= {"ignore_eos": True, "logprobs": 1, "return_token_ids": True}
                    answer = await client.post("/v1/completions", json=body)
                    assert answer.status_code == 200, answer.text
                    return answer.json()

            beside = asyncio.create_task(meanwhile(client, one)) if meanwhile else None
            answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
            if beside is None:
                return answers, None
            if until_answered:
                beside.cancel()
                return answers, None
            return answers, await beside

    return asyncio.run(everything())


def totals_of(answers, chunk=64, window=64, kept=32):
    """Tokens that answers say were computed, and of them sealed and pruned: from their usage and the layout alone."""
    seen = sealed = 0
    for answer in answers:
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        computed = usage["prompt_tokens"] + usage["completion_tokens"] - 1  # nobody computes the last token
        seen += computed - cached
        sealed += chunk * max(0, (computed - window) // chunk)
    return {"seen": seen, "sealed": sealed, "pruned": sealed // chunk * (chunk - kept)}


def settled(url, key, value, within=30):
    """The metrics once `key` has reached `value`."""
    deadline = time.monotonic() + within
    while (metrics := metrics_of(url))[key] != value and time.monotonic() < deadline:
        time.sleep(0.2)
    return metrics


def steady(url, within=60):
    """The metrics once a second and a half has changed none of ours: the engine is looked at once a second."""
    deadline, before, metrics = time.monotonic() + within, None, metrics_of(url)
    while before != metrics and time.monotonic() < deadline:
        time.sleep(1.5)
        before, metrics = metrics, metrics_of(url)
    return metrics


def same_text(answer, expected, tolerance=2e-3):
    """Whether two greedy answers agree up to a place where the likeliest tokens were equals."""
    mine, theirs = answer["choices"][0], expected["choices"][0]
    for own, other, p, q in zip(
        mine["token_ids"],
        theirs["token_ids"],
        mine["logprobs"]["token_logprobs"],
        theirs["logprobs"]["token_logprobs"],
        strict=True,
    ):
        if abs(p - q) > tolerance:
            return False
        if own != other:
            return True
    return True
