"""What a server answers to unusual requests: those that want a filter of their own."""

import httpx
import pytest

from tests.serving.running import TINY_FLAGS, serve
from vllm_tokenfilter.bench.servers import Server

OWN = {"vllm_xargs": {"token_filtering": 0}}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
COMPLETION = {"prompt": "Hello", "max_tokens": 4}
GENERATE = {"token_ids": [1, 2, 3]}
STREAM, BEAMS = {"stream": True}, {"use_beam_search": True, "n": 2}


@pytest.fixture(scope="module")
def server(tiny_model):
    flags = ["--model", tiny_model, "--served-model-name", "tiny", "--pruning-ratio", "0.5", *TINY_FLAGS]
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
