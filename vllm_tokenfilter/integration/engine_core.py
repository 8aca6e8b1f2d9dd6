"""What Token Filtering adds to vLLM's engine core: its status, and another pruning ratio while it runs.

A switch of ratios (`switching.py`) pauses the engine by vLLM's own means, so vLLM's pauses and its end take turns with
it: a pause that is asked for meanwhile begins when the switch is done, and an engine that is asked to end gives it up.

Source: vllm/v1/engine/core.py (utility methods, `pause_scheduler`, `_handle_shutdown`).
"""

import functools
from typing import Any

from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.request import RequestStatus

from vllm_tokenfilter.integration.switching import Control

_CONTROL = "_token_filtering_control"
_MARK = "_token_filtering_minds_switches"


def extend_engine_core() -> None:
    """Add the utility methods to vLLM's engine core; see `workarounds.extend_engine_core`."""
    EngineCore.token_filtering_status = _status
    EngineCore.token_filtering_prepare = _prepare
    EngineCore.token_filtering_cancel = _cancel
    EngineCore.token_filtering_switch = _switch
    if not hasattr(EngineCoreProc._handle_shutdown, _MARK):
        _mind_switches()


def _control(core: EngineCore) -> Control:
    control: Control | None = getattr(core, _CONTROL, None)
    if control is None:
        control = Control(core)
        setattr(core, _CONTROL, control)
    return control


def _status(self: EngineCore) -> dict[str, Any]:
    return _control(self).status().model_dump(mode="json")


def _prepare(self: EngineCore, pruning_ratio: float) -> dict[str, Any]:
    return _control(self).prepare(pruning_ratio)


def _cancel(self: EngineCore) -> None:
    _control(self).cancel()


def _switch(self: EngineCore) -> Any:
    return _control(self).switch()


def _mind_switches() -> None:
    """Let the engine's own pauses and its end take turns with a switch, which pauses it too.

    Symptom: a pause that is asked for during a switch ends with it; a resume lets new requests into the drain; requests
    that wait for a switch are lost when the engine is asked to end.
    Cause: vLLM knows one pause at a time, and does not say who asked for it.
    Inert: an engine that does not switch does what it did.
    Delete when: vLLM counts who pauses its scheduler.
    """
    pause, resume = EngineCoreProc.pause_scheduler, EngineCoreProc.resume_scheduler
    paused, end = EngineCoreProc.is_scheduler_paused, EngineCoreProc._handle_shutdown

    @functools.wraps(pause)
    def pause_scheduler(self: EngineCoreProc, mode: Any = "abort", clear_cache: bool = True) -> Any:
        if (control := _switching(self)) is None:
            return pause(self, mode, clear_cache)
        if mode == "abort":
            self._send_abort_outputs(self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED))
        return control.afterwards(lambda: pause(self, mode, clear_cache))

    @functools.wraps(resume)
    def resume_scheduler(self: EngineCoreProc) -> Any:
        control = _switching(self)
        return resume(self) if control is None else control.afterwards(lambda: resume(self))

    @functools.wraps(paused)
    def is_scheduler_paused(self: EngineCoreProc) -> bool:
        return paused(self) and _switching(self) is None

    @functools.wraps(end)
    def _handle_shutdown(self: EngineCoreProc) -> bool:
        if self.shutdown_state == EngineShutdownState.REQUESTED and (control := _switching(self)) is not None:
            control.give_up("the server is ending; the ratio stays as it is.")
        return end(self)

    setattr(_handle_shutdown, _MARK, True)
    for method in (pause_scheduler, resume_scheduler, is_scheduler_paused, _handle_shutdown):
        setattr(EngineCoreProc, method.__name__, method)


def _switching(core: EngineCore) -> Control | None:
    control: Control | None = getattr(core, _CONTROL, None)
    return control if control is not None and control.switching else None
