"""How a server ends: asked to, with answers in flight; and when its engine dies."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.serving.running import TINY_FLAGS, serve


def engine_of(process):
    return next(child for child in psutil.Process(process.pid).children() if "EngineCore" in child.name())


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_answer_in_flight_is_finished_before_the_server_ends(tiny_model, stop):
    body = {"model": tiny_model, "prompt": "Once", "max_tokens": 150, "ignore_eos": True, "stream": True}
    with serve("--model", tiny_model, *TINY_FLAGS) as (url, process, _):
        pieces = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line.removeprefix("data: "))["choices"][0])
                if len(pieces) == 10 and line:
                    # Ctrl-C in a terminal interrupts all of them; SIGTERM is for the server alone.
                    others = psutil.Process(process.pid).children(recursive=True) if stop == signal.SIGINT else []
                    for asked in (*others, process):
                        asked.send_signal(stop)
        assert len(pieces) == 150 and pieces[-1]["finish_reason"] == "length"
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_server_fails_with_its_engine_whoever_waits_for_it(tiny_model):
    body = {"model": tiny_model, "prompt": "Once", "max_tokens": 1500, "ignore_eos": True}
    with serve("--model", tiny_model, *TINY_FLAGS) as (url, process, log), ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=120)
        time.sleep(1)
        change = pool.submit(httpx.post, f"{url}/token_filtering", json={"pruning_ratio": 0.25}, timeout=120)
        time.sleep(1)
        assert not answer.done() and not change.done()
        engine_of(process).kill()
        assert (answer.result().status_code, change.result().status_code) == (500, 500)
        assert process.wait(30) == 1, log.read()
