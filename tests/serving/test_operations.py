"""A running server: metrics that add up, its status, and another ratio without a restart."""

import asyncio
import itertools
import json
import time

import httpx
import psutil
import pytest

from tests.serving.running import (
    PLAIN,
    PRUNED,
    SEALED,
    SEEN,
    TINY_FLAGS,
    complete,
    metrics_of,
    prompts_of,
    running,
    same_text,
    serve,
    settled,
    totals_of,
)
from vllm_tokenfilter.integration import versions
from vllm_tokenfilter.integration.server.metrics import METRICS

KEY = {"Authorization": "Bearer sesame"}
MODEL = "tiny"

MALFORMED = [
    b"",
    b" ",
    b"{",
    b"}",
    b"null",
    b"true",
    b"0.25",
    b'"0.25"',
    b"[]",
    b"[0.25]",
    b"{}",
    b"\xff\xfe",
    b"pruning_ratio=0.25",
    b'{"pruning_ratio"}',
    b'{"pruning_ratio":}',
    b'{"pruning_ratio": 0.25',
    b"{'pruning_ratio': 0.25}",
    b'{"ratio": 0.25}',
    b'{"Pruning_ratio": 0.25}',
    b'{"pruning_ratio ": 0.25}',
    b'{"pruning-ratio": 0.25}',
    b'{"pruning_ratio": null}',
    b'{"pruning_ratio": true}',
    b'{"pruning_ratio": false}',
    b'{"pruning_ratio": "0.25"}',
    b'{"pruning_ratio": ""}',
    b'{"pruning_ratio": []}',
    b'{"pruning_ratio": [0.25]}',
    b'{"pruning_ratio": {}}',
    b'{"pruning_ratio": {"value": 0.25}}',
    b'{"pruning_ratio": NaN}',
    b'{"pruning_ratio": Infinity}',
    b'{"pruning_ratio": -Infinity}',
    b'{"pruning_ratio": 1e999}',
    b'{"pruning_ratio": -0.25}',
    b'{"pruning_ratio": -1}',
    b'{"pruning_ratio": 1}',
    b'{"pruning_ratio": 1.0}',
    b'{"pruning_ratio": 1.5}',
    b'{"pruning_ratio": 50}',
    b'{"pruning_ratio": 1e-9}',
    b'{"pruning_ratio": 0.001}',
    b'{"pruning_ratio": 0.96}',
    b'{"pruning_ratio": 0.97}',
    b'{"pruning_ratio": 0.999}',
    b'{"pruning_ratio": 0.25, "chunk_size": 32}',
    b'{"pruning_ratio": 0.25, "recent_window": 64}',
    b'{"pruning_ratio": 0.25, "dense_layers": [0]}',
    b'{"pruning_ratio": 0.25, "selector": "random"}',
    b'{"token_filtering": {"pruning_ratio": 0.25}}',
]


def counters_in(text):
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("tokenfilter_")]
    return {name: float(value) for name, _, value in lines if "_total" in name}


def check_load(url, count, at_once=16, kept=32):
    """Counters grow with a load of `count` requests, and end at what the answers' own token counts say.

    `kept`: tokens that stay of a chunk.
    """
    before, scrapes = metrics_of(url), []

    async def scrape(client, one):
        while True:
            scrapes.append((await client.get("/metrics")).text)
            await asyncio.sleep(1)

    answers, _ = complete(url, prompts_of(count, [40, 90, 140, 200, 300]), 24, at_once, scrape, until_answered=True)
    # What a request's last step made due is sealed with the next step.
    flush, _ = complete(url, prompts_of(2, [10], seed=99), 2)
    totals = totals_of(answers + flush, kept=kept)
    after = settled(url, SEEN, before[SEEN] + totals["seen"])
    assert after[SEEN] - before[SEEN] == totals["seen"]
    assert after[SEALED] - before[SEALED] == totals["sealed"] > 0
    assert after[PRUNED] - before[PRUNED] == totals["pruned"] > 0
    samples = [counters_in(text) for text in scrapes]
    assert len(samples) > 1 or count < 100
    for earlier, later in itertools.pairwise(samples):
        for name, value in earlier.items():
            assert later[name] >= value, name
    return answers


@pytest.fixture(scope="module")
def flags(tiny_model):
    return ["--model", tiny_model, "--served-model-name", MODEL, "--enable-prompt-tokens-details", *TINY_FLAGS]


def test_counters_add_up_under_load_and_end_with_the_server(flags):
    with running(PLAIN, *flags) as (url, process, _):
        check_load(url, 200)
        metrics = metrics_of(url)
        names = {name.partition("{")[0] for name in metrics}
        for metric in METRICS:
            # A metric by reason has a sample once the reason occurs.
            assert metric.name in names or metric.labels == ("reason",), f"{metric.name} is missing"
        assert metrics['tokenfilter_rows_dense_total{reason="shorter_than_window_and_chunk"}'] > 0
        assert metrics['tokenfilter_pruning_ratio{layers="0-3"}'] == 0.5
        assert metrics['tokenfilter_kv_blocks_held{layers="0-3"}'] == 0
        # Routes are only added for those who ask for them.
        assert httpx.get(f"{url}/token_filtering").status_code == 404
        # vLLM's server does not outlive its engine.
        engine = next(child for child in psutil.Process(process.pid).children() if "EngineCore" in child.name())
        engine.kill()
        # A supervisor that restarts on failure hears that it failed.
        assert process.wait(60) == 1


@pytest.fixture(scope="module")
def url(flags):
    with serve(*flags, "--no-enable-prefix-caching", "--api-key", "sesame", "--pruning-ratio", "0.5") as (url, _, _):
        yield url


@pytest.fixture(scope="module")
def later_server(flags):
    """A server that starts with the other ratio, and what its metrics are then."""
    settings = json.dumps({"token_filtering": {"pruning_ratio": 0.75}})
    with running(PLAIN, *flags, "--no-enable-prefix-caching", "--additional-config", settings) as (url, _, _):
        yield url, metrics_of(url)


@pytest.fixture(scope="module")
def fresh(later_server):
    """Its answers."""
    return complete(later_server[0], PROMPTS, LONG)[0]


def test_the_next_server_counts_from_nothing(later_server):
    url, at_start = later_server
    # To Prometheus that is a reset.
    assert at_start[SEEN] == 0
    check_load(url, 10, kept=16)


# Short enough that no step can cut a prompt where it matters: every chunk is sealed while decoding.
PROMPTS = prompts_of(8, [30, 60, 90, 120])
#: Tokens of answers that take seconds.
LONG = 400


def status_of(url):
    return httpx.get(f"{url}/token_filtering", headers=KEY, timeout=30).json()


def post(url, **arguments):
    return httpx.post(f"{url}/token_filtering", headers=KEY, timeout=120, **arguments)


def test_the_status_has_settings_layers_counters_refusals_and_versions(url):
    status = status_of(url)
    assert status["settings"]["pruning_ratio"] == 0.5
    assert [layer["layer"] for layer in status["layers"]] == [0, 1, 2, 3]
    assert all(layer["filtered"] and layer["effective_ratio"] == 0.5 for layer in status["layers"])
    assert status["counters"]["tokens_seen"] >= 0 and status["engines"] == 1
    assert {"setting", "reason", "remedy"} == set(status["refusals"][0])
    assert status["versions"]["vllm"] == versions.INSTALLED


def test_without_the_servers_key_nothing_is_shown_or_changed(url):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
        assert httpx.get(f"{url}/token_filtering", headers=headers).status_code == 401
        answer = httpx.post(f"{url}/token_filtering", headers=headers, json={"pruning_ratio": 0.25})
        assert answer.status_code == 401
    assert status_of(url)["settings"]["pruning_ratio"] == 0.5


def test_fifty_malformed_bodies_change_nothing(url):
    before, metrics = status_of(url), metrics_of(url)
    assert len(set(MALFORMED)) == 50
    for body in MALFORMED:
        answer = post(url, content=body)
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["message"].endswith("."), body
    assert status_of(url) == before
    time.sleep(1.5)  # metrics are a second old at most
    assert metrics_of(url) == metrics


@pytest.mark.parametrize("wanted", [0, 0.5, 1, True])
def test_a_request_that_wants_its_own_ratio_is_told_why_not(url, wanted):
    xargs = {"vllm_xargs": {"token_filtering": wanted}, "model": MODEL, "max_tokens": 1}
    for path, body in (
        ("completions", {"prompt": "Hello"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ):
        answer = httpx.post(f"{url}/v1/{path}", headers=KEY, json={**xargs, **body})
        assert answer.status_code == 400, answer.text
        assert "share one layout" in answer.text


def test_another_ratio_under_load_fails_nobody_and_is_as_good_as_a_fresh_server(url, fresh):
    at_half, _ = complete(url, PROMPTS, LONG, headers=KEY)

    async def meanwhile(client, one):
        await asyncio.sleep(0.7)
        switch = asyncio.create_task(client.post("/token_filtering", json={"pruning_ratio": 0.75}))
        await asyncio.sleep(0.2)
        busy = await client.post("/token_filtering", json={"pruning_ratio": 0.25})
        switching = (await client.get("/token_filtering")).json()["switching"]
        later = await asyncio.gather(*(one(prompt) for prompt in PROMPTS))
        return busy, switching, later, await switch

    answers, (busy, switching, later, switched) = complete(url, PROMPTS, LONG, 32, meanwhile, headers=KEY)
    assert busy.status_code == 409 and switching
    assert switched.status_code == 200, switched.text
    assert switched.json()["previous"] == 0.5 and switched.json()["effective_ratio"] == 0.75
    # Those who came before keep their ratio, those who came after have the new one.
    assert all(same_text(answer, expected) for answer, expected in zip(answers, at_half, strict=True))
    assert all(same_text(answer, expected) for answer, expected in zip(later, fresh, strict=True))
    assert not all(same_text(answer, expected) for answer, expected in zip(later, at_half, strict=True))
    assert status_of(url)["settings"]["pruning_ratio"] == 0.75
    metrics = settled(url, 'tokenfilter_pruning_ratio{layers="0-3"}', 0.75)
    assert metrics['tokenfilter_pruning_ratio{layers="0-3"}'] == 0.75
    info = {name: value for name, value in metrics.items() if name.startswith("tokenfilter_config_info")}
    assert [value for name, value in info.items() if 'pruning_ratio="0.75"' in name] == [1]
    assert [value for name, value in info.items() if 'pruning_ratio="0.5"' in name] == [0]


@pytest.mark.slow
def test_a_ratio_that_the_longest_request_would_not_fit_with_is_refused(model_path):
    # 2048 tokens at three quarters need 35 blocks of 32, and 40 are there; dense they would need 64.
    block = 32 * 30 * 3 * 64 * 2 * 2
    flags = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(41 * block), "--pruning-ratio", "0.75"]
    with serve(*flags) as (url, _, _):
        refused = httpx.post(f"{url}/token_filtering", json={"pruning_ratio": 0.25}, timeout=60)
        assert refused.status_code == 400 and "use at least 0." in refused.text, refused.text
        least = float(refused.text.partition("use at least ")[2].partition(",")[0])
        assert httpx.post(f"{url}/token_filtering", json={"pruning_ratio": least}, timeout=60).status_code == 200
        answers, _ = complete(url, prompts_of(1, [1900]), 100)
        assert answers[0]["usage"]["completion_tokens"] == 100
        started = time.monotonic()
        assert httpx.post(f"{url}/token_filtering", json={"pruning_ratio": 0.75}).json()["previous"] == least
        assert time.monotonic() - started < 5
