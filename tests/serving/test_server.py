"""The server as a user starts it, through the openai client."""

import subprocess

import httpx
import openai
import pytest

from tests.command import run_command
from tests.serving.running import SERVE, serve

MODEL = "SmolLM2-135M-Instruct"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def url(model_path):
    # In bfloat16 the words depend on the processor's kernels: with AMX, stock vLLM itself does not say Paris.
    with serve("--pruning-ratio", "0.5", "--dtype", "float32") as (url, _, _):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


def test_the_model_is_listed_and_the_server_is_healthy(url, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert httpx.get(f"{url}/health").status_code == 200


def test_chat_says_paris(client):
    answer = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20)
    assert "Paris" in answer.choices[0].message.content


def test_chat_streams_the_same_answer(client):
    whole = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20)
    stream = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    assert text == whole.choices[0].message.content


def test_completions_have_logprobs_and_stop_at_a_string(client, prose):
    prompt = prose[:4000]
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)  # now both take it over from the prefix cache
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=64, logprobs=2)
    choice = answer.choices[0]
    assert len(choice.logprobs.token_logprobs) == 64 and all(value <= 0 for value in choice.logprobs.token_logprobs)
    word = choice.text.split()[3]
    stopped = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=64, stop=[word])
    assert word not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"
    assert choice.text.startswith(stopped.choices[0].text)


def test_completions_stream(client, prose):
    arguments = {"model": MODEL, "prompt": prose[:3000], "temperature": 0, "max_tokens": 90}
    client.completions.create(**arguments)  # now both take the prompt over from the prefix cache
    whole = client.completions.create(**arguments).choices[0].text
    parts = [part.choices[0].text for part in client.completions.create(**arguments, stream=True) if part.choices]
    assert len(parts) > 1 and "".join(parts) == whole


def test_vllms_own_metrics_are_served(url, client):
    assert "vllm:" in httpx.get(f"{url}/metrics").text


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["0", "0.25", "0.75"])
def test_every_ratio_says_paris(model_path, ratio):
    with serve("--pruning-ratio", ratio, "--dtype", "float32") as (url, _, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=20)
        assert "Paris" in answer.choices[0].message.content


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--pruning-ratio", "1.5"], "pruning_ratio=1.5"),
        (["--additional-config", '{"token_filtering": {"chunk_sise": 64}}'], "did you mean chunk_size?"),
        (["--additional-config", "{"], "must be a mapping"),
        (["--config", "no-such-file.yaml"], "no-such-file.yaml cannot be read"),
    ],
)
def test_a_setting_that_cannot_hold_ends_in_one_sentence(model_path, flags, sentence):
    ends_in(sentence, run_command("serve", *flags))


def test_what_the_engine_refuses_ends_in_one_sentence_too(model_path):
    flags = ["--enable-prefix-caching", "--pruning-ratio", "0.75"]
    done = subprocess.run([*SERVE, *flags], capture_output=True, text=True, timeout=120, check=False)
    ends_in("(16 tokens kept) shares whole blocks", done)


def ends_in(sentence, done):
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert sentence in done.stderr.strip().splitlines()[-1]
