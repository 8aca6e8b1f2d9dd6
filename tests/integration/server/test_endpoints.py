"""POST /token_filtering over an engine with stand-ins: whatever is sent is answered in words."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.v1.engine.exceptions import EngineDeadError

from tests.integration.stand_ins import engine_core, step
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import refusals, registration, workarounds
from vllm_tokenfilter.integration.server import endpoints
from vllm_tokenfilter.integration.server.endpoints import PATH, HttpEndpoint

STARTED = {"pruning_ratio": 0.5}


class Client:
    """vLLM's client of several engines, which calls them at once."""

    def __init__(self, engines):
        self.core_engines = engines

    async def _call_utility_async(self, method, *args, engine):
        result = getattr(engine, method)(*args)
        return result if isinstance(result, dict | None) else await asyncio.wrap_future(result)


def served(engines):
    """The application of a server over these engines."""
    app = FastAPI()
    init_exception_handler(app)
    HttpEndpoint().attach_router(app)
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=registration.register_names()),
        parallel_config=SimpleNamespace(worker_extension_cls=workarounds.WORKER_EXTENSION),
    )
    app.state.args = SimpleNamespace(api_key=None, log_error_stack=False)
    app.state.engine_client = SimpleNamespace(
        vllm_config=config, engine_core=Client(engines), errored=False, dead_error=EngineDeadError()
    )
    app.state.server = None  # asked to end by vLLM's handler, unless its engine runs
    return app


def send(app, method, body):
    async def sent():
        # What the server does not answer itself is an error here, not a response of status 500.
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, PATH, content=body)

    return asyncio.run(sent())


def post(app, body):
    return send(app, "POST", body)


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(refusals, "REFUSALS", ())
    return [engine_core(STARTED, [FilterConfig.parse(STARTED).layout]) for _ in range(2)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["pruning_ratio", "pruning-ratio", "schedule", "\ud800", ""]) | st.text(max_size=5)
BODIES = st.one_of(
    st.binary(max_size=40),
    VALUES.map(json.dumps).map(str.encode),
    st.dictionaries(KEYS, VALUES, max_size=3).map(json.dumps).map(str.encode),
    st.floats(-0.5, 1.5).map(lambda ratio: json.dumps({"pruning_ratio": ratio}).encode()),
    st.builds(lambda depth, mark: mark * depth, st.integers(1, 20_000), st.sampled_from([b"[", b'{"a":', b'[{"b":'])),
    st.integers(1, 6000).map(lambda digits: b'{"pruning_ratio": ' + b"9" * digits + b"}"),
)


def answered_in_words(app, body):
    answer = post(app, body)
    assert answer.status_code in (200, 400), (body, answer.text)
    if answer.status_code == 400:
        message = answer.json()["error"]["message"]
        assert message.endswith(".") and len(message) < 500, body
        assert "pruning_ratio" in message
    else:
        assert abs(answer.json()["effective_ratio"] - json.loads(body)["pruning_ratio"]) <= 0.5 / 64
        assert answer.json()["engines"] == 2


def fuzz(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@fuzz(200)
@given(body=BODIES)
@example(body=b"[" * 20_000)
@example(body=b'{"pruning_ratio": ' + b"[" * 20_000 + b"]" * 20_000 + b"}")
@example(body=b'{"pruning_ratio": ' + b"[" * 500 + b"]" * 500 + b"}")
@example(body=b'{"\\ud800": 1}')
@example(body=b'{"pruning_ratio": "\\udfff"}')
@example(body=json.dumps({"x" * 100_000: 1}).encode())
@example(body=b'{"pruning_ratio": -0.0}')
def test_whatever_is_sent_is_answered_in_words(engines, body):
    answered_in_words(served(engines), body)


@pytest.mark.slow
@fuzz(2000)
@given(body=BODIES)
def test_two_thousand_bodies_are_answered_in_words(engines, body):
    answered_in_words(served(engines), body)


def test_the_ratio_in_force_is_answered_at_once_and_waits_for_nobody(engines):
    app = served(engines)
    for engine in engines:
        engine.scheduler.running.add("a long answer")
    same = post(app, b'{"pruning_ratio": 0.5}')
    assert same.status_code == 200 and same.json()["previous"] == same.json()["effective_ratio"] == 0.5
    assert all(engine.told_workers == [] for engine in engines)


def test_all_engines_switch_or_none(engines):
    app = served(engines)
    engines[1].pause_scheduler("keep", clear_cache=False)
    busy = post(app, b'{"pruning_ratio": 0.25}')
    assert busy.status_code == 409 and "resume it first" in busy.text
    engines[1].resume_scheduler()
    assert post(app, b'{"pruning_ratio": 0.25}').json()["previous"] == 0.5
    assert post(app, b'{"pruning_ratio": 0.25}').json()["previous"] == 0.25
    assert [len(engine.told_workers) for engine in engines] == [1, 1]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_waits_for_an_engine_that_dies_is_told_so(engines, monkeypatch, method):
    app = served(engines)
    client = app.state.engine_client
    vars(client).update(is_running=True)  # so that vLLM's handler leaves the server alone
    monkeypatch.setattr(endpoints, "ALIVE_INTERVAL_S", 0.01)

    async def unanswered(*args, **kwargs):
        await asyncio.sleep(0.05)
        client.errored = True
        await asyncio.sleep(10)
        raise AssertionError("it waited for an engine that is dead")

    client.engine_core.call_utility_all_async = client.engine_core._call_utility_async = unanswered
    body = b'{"pruning_ratio": 0.25}'
    assert send(app, method, body).status_code == 500


def test_a_change_goes_on_when_its_caller_hangs_up(engines):
    app = served(engines)
    for engine in engines:
        engine.scheduler.running.add("an answer")

    async def hang_up():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            asking = asyncio.create_task(client.post(PATH, content=b'{"pruning_ratio": 0.25}'))
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.sleep(0.05)
            for engine in engines:
                step(engine, finish=["an answer"])
            await asyncio.sleep(0.05)

    asyncio.run(hang_up())
    assert [engine.told_workers[0][0]["pruning_ratio"] for engine in engines] == [0.25, 0.25]
