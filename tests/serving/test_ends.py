"""How a server ends: asked to, with answers in flight; and when its engine dies."""

import json
import signal

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
                    # systemd asks every process of the unit.
                    for asked in (engine_of(process), process):
                        asked.send_signal(stop)
        assert len(pieces) == 150 and pieces[-1]["finish_reason"] == "length"
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_server_fails_with_its_engine(tiny_model):
    with serve("--model", tiny_model, *TINY_FLAGS) as (_, process, log):
        engine_of(process).kill()
        assert process.wait(30) == 1, log.read()
