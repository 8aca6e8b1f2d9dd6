"""Another ratio in a running engine: drained, beside vLLM's own pauses, and given up when the engine ends."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import DPEngineCoreProc, EngineShutdownState

from tests.integration.stand_ins import engine_core, step
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import refusals

UNIFORM = {"pruning_ratio": 0.5}
#: Two layers keep every token; of a chunk of 64, one loses 32 and one 48.
UNEVEN = {"pruning_ratio": 0.3125, "schedule": {"kind": "per_layer", "ratios": [0.0, 0.0, 0.5, 0.75]}}


@pytest.fixture(autouse=True)
def _any_deployment(monkeypatch):
    monkeypatch.setattr(refusals, "REFUSALS", ())


def started(settings, **given):
    layouts = dict.fromkeys(layout for _, layout, _ in FilterConfig.parse(settings).layer_settings(4))
    return engine_core(settings, layouts, **given)


def draining(settings=UNIFORM, ratio=0.25):
    """An engine in which a request runs, another waits, and a switch has begun."""
    core = started(settings)
    core.scheduler.running.add("first")
    assert core.token_filtering_prepare(ratio) == {}
    switch = core.token_filtering_switch()
    core.scheduler.waiting.append(SimpleNamespace(request_id="later"))
    step(core)
    assert not switch.done() and core.scheduler.pause_state == PauseState.PAUSED_NEW
    return core, switch


def test_who_was_there_finishes_first_and_who_comes_later_waits():
    core = started(UNIFORM)
    core.scheduler.running.add("running")
    core.scheduler.waiting.append(SimpleNamespace(request_id="waiting"))
    assert core.token_filtering_prepare(0.75) == {}
    switch = core.token_filtering_switch()
    assert core.scheduler.running == {"running", "waiting"}, "vLLM's own pause would keep it waiting"
    core.scheduler.waiting.append(SimpleNamespace(request_id="later"))
    # The engine ran dry, but one that was preempted meanwhile waits again.
    core.scheduler.waiting.append(SimpleNamespace(request_id="running"))
    step(core, finish=["running", "waiting"])
    assert switch.result() == {"done": False}
    assert core.scheduler.running == {"running"}
    assert [request.request_id for request in core.scheduler.waiting] == ["later"]
    assert core.told_workers == [], "nothing changes before everyone has finished"


def test_the_prefix_cache_is_emptied_then_workers_follow_then_the_queue_goes_on():
    core, done = started(UNIFORM), []
    core.scheduler.reset_prefix_cache = lambda: done.append("prefix cache emptied") or True
    core.collective_rpc = lambda method, args: done.append((method, args[0]["pruning_ratio"]))
    core.input_queue.put_nowait = lambda what: done.append("woken")
    assert core.token_filtering_prepare(0.75) == {}
    answer = core.token_filtering_switch()
    assert answer["done"] and (answer["previous"], answer["effective_ratio"]) == (0.5, 0.75)
    assert done == ["prefix cache emptied", ("token_filtering_use", 0.75), "woken"]
    assert core.scheduler.pause_state == PauseState.UNPAUSED


def test_the_groups_of_a_schedule_are_scaled_and_whole_layers_stay_whole():
    core = started(UNEVEN)
    assert core.token_filtering_prepare(0.15625) == {}
    answer = core.token_filtering_switch()
    assert answer["done"] and answer["effective_ratio"] == 0.15625 and answer["previous"] == 0.3125
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    kept = [manager.kv_cache_spec.layout and manager.kv_cache_spec.layout.kept_per_chunk for manager in managers]
    assert kept == [None, 48, 40]
    ((settings,),) = core.told_workers
    assert FilterConfig.parse(settings).schedule.ratios == (0, 0, 0.25, 0.375)
    # And back, from where it is now.
    assert core.token_filtering_prepare(0.3125) == {}
    assert core.token_filtering_switch()["previous"] == 0.15625
    assert FilterConfig.parse(core.told_workers[-1][0]) == FilterConfig.parse(UNEVEN)
    assert "use 0 to 0.46875" in core.token_filtering_prepare(0.5)["refused"]


@pytest.mark.parametrize("settings", [UNIFORM, UNEVEN])
def test_the_ratio_in_force_changes_nothing_and_waits_for_nobody(settings):
    core = started(settings)
    core.scheduler.running.add("first")
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    ratio = settings["pruning_ratio"]
    assert core.token_filtering_prepare(ratio)["unchanged"]["effective_ratio"] == ratio
    assert core.token_filtering_prepare(ratio + 1e-4)["unchanged"]["effective_ratio"] == ratio
    assert core.token_filtering_prepare(0.25) == {"busy": "the server is paused; resume it first."}
    assert core.told_workers == [] and core.scheduler.pause_state == PauseState.PAUSED_NEW


@pytest.mark.parametrize("mode, state", [("wait", PauseState.PAUSED_NEW), ("keep", PauseState.PAUSED_ALL)])
def test_a_pause_during_a_switch_begins_after_it_and_holds(mode, state):
    core, switch = draining()
    pause = core.pause_scheduler(mode, clear_cache=False)
    step(core)
    assert not pause.done() and not switch.done() and not core.is_scheduler_paused()
    step(core, finish=["first"])
    assert switch.result()["done"] and pause.done()
    assert core.scheduler.pause_state == state and core.is_scheduler_paused()
    assert [request.request_id for request in core.scheduler.waiting] == ["later"]
    assert core.token_filtering_prepare(0.75) == {"busy": "the server is paused; resume it first."}
    core.resume_scheduler()
    assert core.scheduler.pause_state == PauseState.UNPAUSED


def test_a_pause_that_aborts_ends_the_drain():
    core, switch = draining()
    core._send_abort_outputs = lambda aborted: None
    pause = core.pause_scheduler("abort", clear_cache=False)
    step(core)
    assert switch.result()["done"] and pause.done() and core.is_scheduler_paused()


def test_a_resume_during_a_switch_lets_no_new_request_into_the_drain():
    core, switch = draining()
    pause, resume = core.pause_scheduler("wait", clear_cache=False), core.resume_scheduler()
    assert core.scheduler.pause_state == PauseState.PAUSED_NEW
    step(core, finish=["first"])
    assert switch.done() and pause.done() and resume.done()
    assert core.scheduler.pause_state == PauseState.UNPAUSED


def test_a_pause_between_the_two_calls_of_a_switch_holds_too():
    core = started(UNIFORM)
    assert core.token_filtering_prepare(0.25) == {}
    pause = core.pause_scheduler("keep", clear_cache=False)
    assert core.token_filtering_switch()["done"]
    assert pause.done() and core.scheduler.pause_state == PauseState.PAUSED_ALL
    assert core.token_filtering_prepare(0.75)["busy"]
    core.resume_scheduler()
    assert core.token_filtering_prepare(0.75) == {}
    core.token_filtering_cancel()
    assert not core.is_scheduler_paused() and core.token_filtering_prepare(0.75) == {}


def test_blocks_that_nobody_gives_back_end_a_switch_in_words():
    core = started(UNIFORM)
    core.token_filtering_prepare(0.25)
    core.scheduler.reset_prefix_cache = lambda: False
    assert "hold KV-cache blocks" in core.token_filtering_switch()["busy"]
    assert core.scheduler.pause_state == PauseState.UNPAUSED and core.token_filtering_prepare(0.25) == {}


def test_an_engine_that_ends_gives_the_switch_up_and_serves_those_who_wait():
    core, switch = draining()
    core.shutdown_state = EngineShutdownState.REQUESTED
    assert core._handle_shutdown()
    assert "the server is ending" in switch.result()["busy"]
    assert core.scheduler.pause_state == PauseState.UNPAUSED and core.has_work() and core.told_workers == []


def test_the_lowest_ratio_is_the_one_that_the_longest_request_fits_with():
    core = started(UNIFORM, num_blocks=50)
    assert "use at least 0." in core.token_filtering_prepare(0.25)["refused"]
    (lowest, highest) = core._token_filtering_control.reachable()
    assert highest == 60 / 64 and core.token_filtering_prepare(lowest) == {}
    core.token_filtering_cancel()
    assert "refused" in core.token_filtering_prepare(lowest - 1 / 64)


def test_a_server_without_filtered_groups_is_told_to_start_with_a_ratio():
    core = engine_core({"pruning_ratio": 0}, [None])
    assert "restart it with a pruning_ratio above 0" in core.token_filtering_prepare(0.25)["refused"]
    assert core._token_filtering_control.reachable() is None


def test_to_nought_and_back():
    core = started(UNIFORM)
    for ratio, previous in ((0, 0.5), (0.5, 0)):
        assert core.token_filtering_prepare(ratio) == {}
        assert core.token_filtering_switch()["previous"] == previous


def test_prefix_caching_that_was_off_at_the_start_stays_off():
    core = started({"pruning_ratio": 0.75})
    core.vllm_config.cache_config.enable_prefix_caching = False
    assert core.token_filtering_prepare(0.5) == {}
    assert core.token_filtering_switch()["prefix_caching"] == "off"


def test_engines_that_step_together_keep_their_ratio():
    core = started(UNIFORM)
    core.__class__ = DPEngineCoreProc
    assert "restart the server" in core.token_filtering_prepare(0.25)["refused"]


def test_a_ratio_out_of_range_is_refused():
    assert "pruning_ratio=1.5" in started(UNIFORM).token_filtering_prepare(1.5)["refused"]
