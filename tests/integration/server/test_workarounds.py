"""What we put around vLLM's server: requests that want a filter of their own, and the status it ends with."""

import asyncio
import signal
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.serve.engine.serving import BaseServing

from vllm_tokenfilter.integration import registration, workarounds


@pytest.fixture
def check_model(monkeypatch):
    """The answer of a server's first look at a request, None if it is served; by backend."""

    async def stock(self, request):
        return None

    monkeypatch.setattr(BaseServing, "_check_model", stock)
    workarounds.refuse_opting_out()

    ours = registration.register_names()

    def check(request, backend=ours, **server):
        serving = BaseServing.__new__(BaseServing)
        config = SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
        vars(serving).update(server or {"engine_client": SimpleNamespace(vllm_config=config)})
        return asyncio.run(serving._check_model(SimpleNamespace(**request)))

    return check


OWN = {"token_filtering": 0}


@pytest.mark.parametrize("request_", [{"vllm_xargs": OWN}, {"sampling_params": SimpleNamespace(extra_args=OWN)}])
def test_a_filter_of_its_own_is_refused_before_anything_else(check_model, request_):
    answer = check_model(request_)
    assert answer.error.code == 400 and answer.error.param == "vllm_xargs.token_filtering"
    assert check_model(request_, backend=None) is None
    assert check_model(request_, models=None) is None, "a server without engines filters nothing"


@pytest.mark.parametrize("key", ["token-filtering", "Token_Filtering"])
@pytest.mark.parametrize("value", [None, 0, "off", [0]])
def test_every_spelling_and_value_asks_for_a_filter(check_model, key, value):
    assert check_model({"vllm_xargs": {key: value}}).error.param == f"vllm_xargs.{key}"


@pytest.mark.parametrize("request_", [{}, {"vllm_xargs": None}, {"vllm_xargs": {"other": 0}}, {"vllm_xargs": "x"}])
def test_other_requests_go_straight_through(check_model, request_):
    assert check_model(request_) is None


@pytest.mark.parametrize("asked", [True, False])
def test_a_server_that_ends_by_itself_fails(monkeypatch, asked):
    stopped = []

    async def ending():
        stopped.append("http")

    async def stock(engine_client):
        if asked:
            engine_client.shutdown(timeout=3)
        return ending()

    class Client:
        def shutdown(self, timeout):
            stopped.append(timeout)

    async def serve():
        await (await entry.build_and_serve(Client()))

    monkeypatch.setattr(entry, "build_and_serve", stock)
    workarounds.fail_with_the_engine()
    if asked:
        asyncio.run(serve())
        assert stopped == [3, "http"]
    else:
        with pytest.raises(SystemExit, match="1"):
            asyncio.run(serve())
        assert stopped == ["http"]


def test_a_worker_outlives_an_interrupt_and_no_other_process_does():
    def stock(number, frame):
        """Of whatever else is interrupted."""

    before = signal.signal(signal.SIGINT, stock)
    try:
        workarounds.outlive_interrupts()
        assert signal.getsignal(signal.SIGINT) is stock
        stock.__qualname__ = "WorkerProc.worker_main.<locals>.signal_handler"
        workarounds.outlive_interrupts()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
