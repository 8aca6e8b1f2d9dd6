"""Another pruning ratio while requests are there: who is waited for, and what happens between two steps."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.core.sched.interface import PauseState

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import engine_core, refusals


class Queue(list):
    """Stands for a queue of vLLM's scheduler."""

    def remove_requests(self, requests):
        for request in requests:
            self.remove(request)

    add_request = list.append


class Core:
    """Stands for the engine core; `done` lists what was done to it, in order."""

    def __init__(self, emptied=True):
        self.done, self.idle = [], False
        coordinator = SimpleNamespace(single_type_managers=(), kv_cache_config=SimpleNamespace(kv_cache_groups=()))
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=False))
        self.scheduler = SimpleNamespace(
            requests={},
            waiting=Queue(),
            kv_holding_waiting=Queue(),
            pause_state=PauseState.UNPAUSED,
            set_pause_state=self.pause,
            reset_prefix_cache=lambda: self.done.append("prefix cache emptied") or emptied,
            kv_cache_manager=SimpleNamespace(coordinator=coordinator),
        )
        self._idle_state_callbacks = []
        self.input_queue = SimpleNamespace(put_nowait=lambda what: self.done.append("woken"))

    def pause(self, state):
        self.scheduler.pause_state = state

    def has_work(self):
        return not self.idle

    def collective_rpc(self, method, args):
        self.done.append((method, args[0]["pruning_ratio"]))

    def add(self, name, waits):
        self.scheduler.requests[name] = request = SimpleNamespace(request_id=name)
        if waits:
            self.scheduler.waiting.append(request)


@pytest.fixture
def control(monkeypatch):
    monkeypatch.setattr(refusals, "settings_of", lambda vllm_config: FilterConfig())
    monkeypatch.setattr(engine_core.Control, "_refusal", lambda self, config: "")

    def of(core):
        made = engine_core.Control(core)
        assert made.prepare(0.75) == {}
        return made

    return of


def names(queue):
    return [request.request_id for request in queue]


def test_who_was_there_finishes_first_and_who_comes_later_waits(control):
    core = Core()
    core.add("running", waits=False)
    core.add("waiting", waits=True)
    switching = control(core).switch()
    assert core.scheduler.pause_state == PauseState.PAUSED_NEW
    assert names(core.scheduler.kv_holding_waiting) == ["waiting"], "vLLM's own pause admits these only"
    core.add("later", waits=True)
    # The engine ran dry, but one that was preempted meanwhile waits again.
    core.scheduler.waiting.append(core.scheduler.requests["running"])
    (when_idle,) = core._idle_state_callbacks
    when_idle(core)
    assert switching.result() == {"done": False}
    assert names(core.scheduler.kv_holding_waiting) == ["waiting", "running"]
    assert names(core.scheduler.waiting) == ["later"]
    assert core.done == [], "nothing changes before everyone has finished"


def test_between_two_steps_the_prefix_cache_is_emptied_then_workers_follow_then_the_queue_goes_on(control):
    core = Core()
    core.idle = True
    answer = control(core).switch()
    assert answer["done"] and (answer["previous"], answer["pruning_ratio"]) == (0.5, 0.75)
    assert core.done == ["prefix cache emptied", ("token_filtering_use", 0.75), "woken"]
    assert core.scheduler.pause_state == PauseState.UNPAUSED


def test_a_prefix_cache_that_cannot_be_emptied_leaves_the_ratio_as_it_is(control):
    core = Core(emptied=False)
    core.idle = True
    made = control(core)
    with pytest.raises(RuntimeError, match="the ratio stays as it is"):
        made.switch()
    assert made.config.pruning_ratio == 0.5 and core.scheduler.pause_state == PauseState.UNPAUSED
    assert core.done == ["prefix cache emptied", "woken"]
