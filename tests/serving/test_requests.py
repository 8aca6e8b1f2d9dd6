"""One server with a schedule over layers: requests that want their own filter, another ratio, pauses meanwhile."""

import asyncio
import json
import time

import httpx
import pytest

from tests.serving.running import PRUNED, SEALED, TINY_FLAGS, complete, prompts_of, serve, settled, steady
from vllm_tokenfilter.bench.servers import Server

OWN = {"vllm_xargs": {"token_filtering": 0}}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
COMPLETION = {"prompt": "Hello", "max_tokens": 4}
GENERATE = {"token_ids": [1, 2, 3]}
STREAM, BEAMS = {"stream": True}, {"use_beam_search": True, "n": 2}


#: Of 128 tokens the layers keep 128, 64, 32 and 32: whole blocks, in two groups that are filtered and one that is not.
TUNED = {
    "pruning_ratio": 0.5,
    "chunk_size": 128,
    "recent_window": 128,
    "schedule": {"kind": "per_layer", "ratios": [0.0, 0.5, 0.75, 0.75]},
}


@pytest.fixture(scope="module")
def server(tiny_model):
    flags = [
        "--model",
        tiny_model,
        "--served-model-name",
        "tiny",
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
    ]
    flags += [*TINY_FLAGS, "--additional-config", json.dumps({"token_filtering": TUNED})]
    with serve(*flags, env={"VLLM_SERVER_DEV_MODE": "1"}) as (url, process, log):
        yield Server("tiny", url, process, log)


def post(server, path, body):
    return httpx.post(f"{server.url}{path}", json={"model": "tiny", **body}, timeout=120)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions", COMPLETION | STREAM),
        ("/v1/completions", COMPLETION | BEAMS),
        ("/v1/completions", COMPLETION | STREAM | {"n": 2}),
        ("/v1/completions", COMPLETION | STREAM | {"prompt": ["Hello", "Bye"]}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | STREAM),
        ("/v1/chat/completions", CHAT | BEAMS),
        ("/v1/chat/completions/batch", {"messages": [CHAT["messages"]], "max_tokens": 4}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 4} | STREAM),
        ("/v1/messages", CHAT),
        ("/v1/messages", CHAT | STREAM),
        ("/inference/v1/generate", GENERATE),
        ("/inference/v1/generate", GENERATE | STREAM),
    ],
)
def test_a_filter_of_its_own_is_refused_before_an_answer_begins(server, path, body):
    if "generate" in path:
        asking = {"sampling_params": {"max_tokens": 4, "extra_args": OWN["vllm_xargs"]}}
        plain = {"sampling_params": {"max_tokens": 4, "extra_args": {"other": 1}}}
    else:
        asking, plain = OWN, {"vllm_xargs": {"other": 1}}
    refused = post(server, path, body | asking)
    assert refused.status_code == 400, refused.text
    assert "share one layout of the KV cache" in refused.json()["error"]["message"]
    answered = post(server, path, body | plain)
    assert answered.status_code == 200 and "error" not in answered.text, answered.text


def test_tokenizing_needs_no_filter(server):
    assert post(server, "/tokenize", COMPLETION | OWN).status_code == 200


def test_a_running_servers_kv_cache_is_as_large_as_vllm_says(server):
    said = server.capacity()
    assert set(said) == {"kv_cache_tokens", "max_concurrency"}
    asked = Server("by its address", server.url).capacity()
    assert asked["kv_cache_tokens"] == said["kv_cache_tokens"]
    assert asked["max_concurrency"] == pytest.approx(said["max_concurrency"], abs=0.01)


def switch(server, ratio):
    return httpx.post(f"{server.url}/token_filtering", json={"pruning_ratio": ratio}, timeout=120)


def status_of(server):
    return httpx.get(f"{server.url}/token_filtering", timeout=30).json()


def cached_tokens(server, prompt):
    ((answer,), _) = complete(server.url, [prompt], 4)
    return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0


def test_the_ratio_in_force_is_answered_at_once_and_keeps_the_prefix_cache(server):
    (prompt,) = prompts_of(1, [600], seed=3)
    assert cached_tokens(server, prompt) == 0
    assert (found := cached_tokens(server, prompt)) > 0

    async def meanwhile(client, one):
        started = time.monotonic()
        return await client.post("/token_filtering", json={"pruning_ratio": 0.5}), time.monotonic() - started

    _, (answer, waited) = complete(server.url, prompts_of(4, [60]), 400, meanwhile=meanwhile)
    assert answer.status_code == 200 and answer.json()["effective_ratio"] == 0.5 and waited < 1, answer.text
    assert cached_tokens(server, prompt) == found


def test_a_schedule_is_scaled_under_load_whole_layers_stay_whole_and_nobody_fails(server):
    assert status_of(server)["reachable"] == {"lowest": 0.0, "highest": 0.75 * 124 / 128}
    refused = switch(server, 0.9)
    assert refused.status_code == 400 and "use 0 to 0.726562" in refused.text

    async def meanwhile(client, one):
        await asyncio.sleep(0.3)
        changing = asyncio.create_task(client.post("/token_filtering", json={"pruning_ratio": 0.25}))
        await asyncio.sleep(0.1)
        later = await asyncio.gather(*(one(prompt) for prompt in prompts_of(4, [300], seed=5)))
        return await changing, later

    answers, (changed, later) = complete(server.url, prompts_of(8, [60, 300]), 200, 32, meanwhile)
    assert changed.status_code == 200, changed.text
    told = changed.json()
    assert (told["pruning_ratio"], told["effective_ratio"], told["previous"]) == (0.25, 0.25, 0.5)
    assert {answer["usage"]["completion_tokens"] for answer in [*answers, *later]} == {200}
    status = status_of(server)
    assert [layer["effective_ratio"] for layer in status["layers"]] == [0.0, 0.25, 0.375, 0.375]
    assert all(layers["blocks_held"] == 0 for layers in status["layer_sets"])
    # The workers remove what is said now: 32, 48 and 48 of each chunk, a third of what they seal as a mean.
    complete(server.url, prompts_of(2, [10], seed=99), 2)  # what the last steps made due is sealed with these
    before = steady(server.url)
    complete(server.url, prompts_of(4, [600], seed=7), 4)
    complete(server.url, prompts_of(2, [10], seed=98), 2)
    after = settled(server.url, SEALED, before[SEALED] + 4 * 3 * 128)
    grown = {name: after[name] - before[name] for name in (SEALED, PRUNED)}
    assert grown == {SEALED: 4 * 3 * 128, PRUNED: 4 * 128}
    assert switch(server, 0.5).json()["previous"] == 0.25
    assert [layer["effective_ratio"] for layer in status_of(server)["layers"]] == [0.0, 0.5, 0.75, 0.75]


async def paused(client):
    return (await client.get("/is_paused")).json()["is_paused"]


@pytest.mark.parametrize("pause", ["mode=wait", "mode=keep&clear_cache=false", "mode=abort"])
def test_a_pause_that_is_asked_for_during_a_change_holds(server, pause):
    async def meanwhile(client, one):
        changing = asyncio.create_task(client.post("/token_filtering", json={"pruning_ratio": 0.25}))
        await asyncio.sleep(0.2)
        assert not await paused(client), "nobody has paused it yet"
        answer = await client.post(f"/pause?{pause}")
        changed = await changing
        assert await paused(client)
        later = asyncio.create_task(one(prompts_of(1, [20], seed=9)[0]))
        await asyncio.sleep(0.5)
        waiting = not later.done()
        busy = await client.post("/token_filtering", json={"pruning_ratio": 0.5})
        assert await paused(client)
        await client.post("/resume")
        return answer, changed, waiting, busy, await later

    answers, (answer, changed, waiting, busy, later) = complete(server.url, prompts_of(4, [60]), 400, 16, meanwhile)
    assert (answer.status_code, changed.status_code, busy.status_code) == (200, 200, 409), (answer.text, busy.text)
    assert waiting and later["usage"]["completion_tokens"] == 400
    assert "abort" in pause or {answer["usage"]["completion_tokens"] for answer in answers} == {400}
    assert switch(server, 0.5).json()["previous"] == 0.25


def test_a_change_that_is_asked_for_during_a_pause_is_told_to_wait(server):
    async def meanwhile(client, one):
        await asyncio.sleep(0.3)
        answer = await client.post("/pause?mode=keep&clear_cache=false")
        busy = await client.post("/token_filtering", json={"pruning_ratio": 0.25})
        still = await paused(client)
        await client.post("/resume")
        return answer, busy, still

    answers, (answer, busy, still) = complete(server.url, prompts_of(4, [60]), 300, 16, meanwhile)
    assert (answer.status_code, busy.status_code, still) == (200, 409, True), busy.text
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {300}


def test_a_seeded_request_of_several_steps_draws_the_same_tokens_alone_and_beside_others(server):
    prompt = prompts_of(1, [1300], seed=21)[0]

    def asked(salt):
        body = {"prompt": prompt, "seed": 7, "temperature": 1, "max_tokens": 20, "cache_salt": salt}
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", **body}, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    alone = asked("first")

    async def meanwhile(client, one):
        return await asyncio.to_thread(asked, "second")

    _, beside = complete(server.url, prompts_of(3, [40, 700, 300], seed=22), 60, meanwhile=meanwhile)
    assert beside == alone
