"""What Token Filtering adds to vLLM's engine core: its status, and another pruning ratio while the server runs.

The ratio decides how many blocks a request holds, in the scheduler and in every worker at once, and the layout of a
request cannot change half-way. So a switch drains: requests that are there when it begins, waiting or preempted ones
included, finish under the old ratio; later ones are queued by vLLM's own pause; then scheduler and workers switch
between two steps, the prefix cache is emptied, and the queue goes on. Nobody's request fails.

A switch is two calls. `token_filtering_prepare` refuses what cannot hold and reserves the engine, so that of two
switches at the same time one is told to wait; with data parallelism it is asked of every engine before any switches.
`token_filtering_switch` drains and switches; it is repeated until it says that it is done.

Source: vllm/v1/engine/core.py (utility methods, `pause_scheduler`, idle-state callbacks),
vllm/v1/core/sched/scheduler.py (`kv_holding_waiting`, which is all that is admitted under PAUSED_NEW).
"""

import dataclasses
from concurrent.futures import Future
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.integration.kv_cache_manager import FilteredAttentionManager
from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
from vllm_tokenfilter.integration.status import Status, merge_workers
from vllm_tokenfilter.layout import Layout, peak_slots, shares_prefixes

logger = init_logger("vllm.tokenfilter")

_CONTROL = "_token_filtering_control"


def extend_engine_core() -> None:
    """Add the utility methods to vLLM's engine core; see `workarounds.extend_engine_core`."""
    EngineCore.token_filtering_status = _status
    EngineCore.token_filtering_prepare = _prepare
    EngineCore.token_filtering_cancel = _cancel
    EngineCore.token_filtering_switch = _switch


def _control(core: EngineCore) -> "Control":
    control: Control | None = getattr(core, _CONTROL, None)
    if control is None:
        control = Control(core)
        setattr(core, _CONTROL, control)
    return control


def _status(self: EngineCore) -> dict[str, Any]:
    return _control(self).status().model_dump(mode="json")


def _prepare(self: EngineCore, pruning_ratio: float) -> dict[str, str]:
    return _control(self).prepare(pruning_ratio)


def _cancel(self: EngineCore) -> None:
    _control(self).cancel()


def _switch(self: EngineCore) -> Any:
    return _control(self).switch()


class Control:
    """One engine's settings in force, and the switch to others.

    Attributes:
        config: the settings in force.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.config = refusals.settings_of(core.vllm_config)
        self._next: FilterConfig | None = None
        self._draining: set[str] | None = None

    def status(self) -> Status:
        """The merged status of this engine's workers, with what only the scheduler knows."""
        answers = self._core.collective_rpc("token_filtering_status")
        merged = merge_workers([Status.model_validate(answer) for answer in answers])
        groups = []
        for manager, group in zip(self._managers(), merged.groups, strict=True):
            if isinstance(manager, FilteredAttentionManager):
                held, dense = manager.block_usage()
            else:
                held = dense = sum(map(len, manager.req_to_blocks.values()))
            groups.append(group.model_copy(update={"blocks_held": held, "blocks_dense": dense}))
        known = {"switching": self._next is not None, "prefix_caching": self._prefix_caching(self.config)}
        return merged.model_copy(update={"groups": groups, **known})

    def prepare(self, pruning_ratio: float) -> dict[str, str]:
        """Reserve this engine for a switch: {}, or why not, under "refused" (for good) or "busy" (for now)."""
        try:
            config = FilterConfig.parse({**self.config.model_dump(mode="json"), "pruning_ratio": pruning_ratio})
        except ConfigError as error:
            return {"refused": " ".join(error.reasons)}
        if reason := self._refusal(config):
            return {"refused": reason}
        if self._next is not None:
            return {"busy": "pruning_ratio is being changed already; wait for that to end."}
        if self._core.scheduler.pause_state != PauseState.UNPAUSED:
            return {"busy": "the server is paused; resume it first."}
        self._next = config
        return {}

    def cancel(self) -> None:
        """Give up a reservation, before the switch began."""
        if self._draining is None:
            self._next = None

    def switch(self) -> Any:
        """Drain and switch; a dict, or a future of one, whose "done" says whether to call again.

        It is not done when requests were preempted meanwhile: they go on now, under the old ratio, which the engine
        does as soon as it hears from the caller.
        """
        assert self._next is not None, "prepare first"
        scheduler = self._core.scheduler
        if self._draining is None:
            self._draining = set(scheduler.requests)
            scheduler.set_pause_state(PauseState.PAUSED_NEW)
            self._admit_older()
        if not self._core.has_work():
            return self._finish()
        future: Future[dict[str, Any]] = Future()

        def when_idle(core: Any) -> None:
            try:
                future.set_result({"done": False} if self._admit_older() else self._finish())
            except Exception as error:
                future.set_exception(error)

        self._core._idle_state_callbacks.append(when_idle)
        return future

    def _admit_older(self) -> bool:
        """Let the requests that were there first go on in spite of the pause; whether there are any."""
        scheduler = self._core.scheduler
        older = [request for request in scheduler.waiting if request.request_id in (self._draining or ())]
        scheduler.waiting.remove_requests(older)
        for request in older:
            scheduler.kv_holding_waiting.add_request(request)
        return bool(older)

    def _finish(self) -> dict[str, Any]:
        core, config, before = self._core, self._next, self.config
        assert config is not None
        try:
            self._use(config)
        finally:
            self._next = self._draining = None
            core.scheduler.set_pause_state(PauseState.UNPAUSED)
            # The queue goes on without anybody having to call.
            core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
        logger.info(
            "Token Filtering: pruning ratio %g -> %g (effective %.4g).",
            before.pruning_ratio,
            config.pruning_ratio,
            config.layout.effective_ratio,
        )
        return {
            "done": True,
            "pruning_ratio": config.pruning_ratio,
            "effective_ratio": config.layout.effective_ratio,
            "previous": before.pruning_ratio,
            "prefix_caching": self._prefix_caching(config),
        }

    def _use(self, config: FilterConfig) -> None:
        scheduler = self._core.scheduler
        if not scheduler.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied, so the ratio stays as it is")
        coordinator = scheduler.kv_cache_manager.coordinator
        for manager, group in zip(self._managers(), coordinator.kv_cache_config.kv_cache_groups, strict=True):
            if isinstance(manager, FilteredAttentionManager):
                group.kv_cache_spec = dataclasses.replace(manager.kv_cache_spec, layout=config.layout)
                manager.use(group.kv_cache_spec)
        # The coordinator has the specs for its look-ups in the prefix cache.
        if hasattr(coordinator, "attention_groups"):
            coordinator.verify_and_split_kv_cache_groups()
        elif hasattr(coordinator, "kv_cache_spec"):
            coordinator.kv_cache_spec = coordinator.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._core.collective_rpc("token_filtering_use", args=(config.model_dump(mode="json"),))
        self.config = config

    def _refusal(self, config: FilterConfig) -> str:
        """Why these settings cannot follow the present ones, or ""."""
        core = self._core
        if isinstance(core, DPEngineCoreProc):
            return (
                "pruning_ratio cannot change at run time with data parallelism of a mixture-of-experts model, whose "
                "engines step together; restart the server."
            )
        if not current_platform.is_cpu():
            return (
                f"pruning_ratio={config.pruning_ratio:g} cannot change at run time on a GPU in this version; restart "
                "the server."
            )
        if config.schedule.kind != "uniform":
            return (
                f"pruning_ratio={config.pruning_ratio:g} cannot change at run time with schedule.kind="
                f"{config.schedule.kind}, which gives every KV-cache group a layout of its own; restart the server "
                "with that ratio, or with schedule.kind=uniform (--pruning-ratio alone for the embedded model)."
            )
        if not any(isinstance(manager, FilteredAttentionManager) for manager in self._managers()):
            return (
                f"pruning_ratio={config.pruning_ratio:g} needs filtered KV-cache groups, and this server started with "
                "none; restart it with a pruning_ratio above 0."
            )
        # Where chunks fill no whole blocks, the prefix cache merely has no hits, and the answer says so.
        reasons = [
            refusal.sentence(value)
            for refusal in refusals.REFUSALS
            if refusal.setting != "enable_prefix_caching"
            and (value := refusal.found(core.vllm_config, config)) is not None
        ]
        if reasons:
            return " ".join(reasons)
        available = core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
        if (needed := self._longest_request(config.layout)) > available:
            return (
                f"pruning_ratio={config.pruning_ratio:g} needs {needed} KV-cache blocks for one request of the longest "
                f"allowed length, and there are {available}; use {self._lowest_ratio(config, available)}, or restart "
                "with more memory for the KV cache or a smaller max_model_len."
            )
        return ""

    def _longest_request(self, layout: Layout) -> int:
        """Blocks of one request of the longest allowed length, at its peak."""
        blocks, vllm_config = 0, self._core.vllm_config
        for manager in self._managers():
            spec: Any = manager.kv_cache_spec
            if isinstance(spec, FilteredAttentionSpec):
                slots = peak_slots(vllm_config.model_config.max_model_len, spec.max_step_tokens, layout)
                blocks += cdiv(slots, spec.block_size)
            else:
                blocks += cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
        return blocks

    def _lowest_ratio(self, config: FilterConfig, available: int) -> str:
        for removed in range(config.layout.removed_per_chunk + 1, config.chunk_size):
            layout = dataclasses.replace(config.layout, kept_per_chunk=config.chunk_size - removed)
            if self._longest_request(layout) <= available:
                return f"at least {removed / config.chunk_size:g}"
        return "another ratio"

    def _prefix_caching(self, config: FilterConfig) -> str:
        cache = self._core.vllm_config.cache_config
        if not cache.enable_prefix_caching:
            return "off"
        filtered = [manager for manager in self._managers() if isinstance(manager, FilteredAttentionManager)]
        if all(shares_prefixes(config.layout, manager.block_size) for manager in filtered):
            return "on"
        return "on, without hits: the tokens a chunk keeps fill no whole blocks"

    def _managers(self) -> Any:
        return self._core.scheduler.kv_cache_manager.coordinator.single_type_managers
