"""Another pruning ratio while the server runs: one engine's settings in force, and the switch to others.

The ratio decides how many blocks a request holds, in the scheduler and in every worker at once, and the layout of a
request cannot change half-way. So a switch drains: requests that are there when it begins, waiting or preempted ones
included, finish under the old ratio; later ones are queued by vLLM's own pause; then scheduler and workers switch
between two steps, the prefix cache is emptied, and the queue goes on. Nobody's request fails.

A switch is two calls. `prepare` refuses what cannot hold and reserves the engine, so that of two switches at the same
time one is told to wait; with data parallelism it is asked of every engine before any switches. `switch` drains and
switches; it is repeated until it says that it is done.

Source: vllm/v1/engine/core.py (`pause_scheduler`, idle-state callbacks), vllm/v1/core/sched/scheduler.py
(`kv_holding_waiting`, which is all that is admitted under PAUSED_NEW).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.integration.kv_cache_manager import FilteredAttentionManager
from vllm_tokenfilter.integration.status import Status, merge_workers
from vllm_tokenfilter.layout import Layout, peak_slots, shares_prefixes
from vllm_tokenfilter.rescale import Scale

logger = init_logger("vllm.tokenfilter")


class Control:
    """One engine's settings in force, and the switch to others.

    Attributes:
        config: the settings in force.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.config = refusals.settings_of(core.vllm_config)
        self._scale = Scale.of(self.config, core.vllm_config.model_config.get_total_num_hidden_layers())
        self._at_start = [getattr(manager.kv_cache_spec, "layout", None) for manager in self._managers()]
        self._next: FilterConfig | None = None
        self._draining: set[str] | None = None
        self._waiting: Future[dict[str, Any]] | None = None
        self._afterwards: list[tuple[Callable[[], Any], Future[Any]]] = []

    @property
    def switching(self) -> bool:
        """Whether a switch is prepared or under way."""
        return self._next is not None

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
        known = {
            "switching": self.switching,
            "prefix_caching": self._prefix_caching(self.config),
            "reachable": self.reachable(),
        }
        return merged.model_copy(update={"groups": groups, **known})

    def prepare(self, pruning_ratio: float) -> dict[str, Any]:
        """Reserve this engine for a switch.

        Returns:
            {}, or why it is not reserved: "refused" (for good) or "busy" (for now) with a sentence, or "unchanged" with
            the answer, where nothing would change.
        """
        try:
            reason = self._fixed()
            config = self.config if reason else self._scale.settings_for(pruning_ratio)
        except ConfigError as error:
            return {"refused": " ".join(error.reasons)}
        if reason := reason or self._refusal(config):
            return {"refused": reason}
        if self.switching:
            return {"busy": "pruning_ratio is being changed already; wait for that to end."}
        if self._layouts(config) == self._layouts(self.config):
            return {"unchanged": self._answer(self.config)}
        if self._core.scheduler.pause_state != PauseState.UNPAUSED:
            return {"busy": "the server is paused; resume it first."}
        self._next = config
        return {}

    def cancel(self) -> None:
        """Give up a reservation, before the switch began."""
        if self._draining is None:
            self._end()

    def switch(self) -> Any:
        """Drain and switch; a dict, or a future of one, whose "done" says whether to call again.

        It is not done when requests were preempted meanwhile: they go on now, under the old ratio, which the engine
        does as soon as it hears from the caller. "busy" says why it was given up.
        """
        assert self.switching, "prepare first"
        scheduler = self._core.scheduler
        if self._draining is None:
            self._draining = set(scheduler.requests)
            scheduler.set_pause_state(PauseState.PAUSED_NEW)
            self._admit_older()
        if not self._core.has_work():
            return self._finish()
        future = self._waiting = Future[dict[str, Any]]()

        def when_idle(core: Any) -> None:
            if future.done():
                return  # given up
            try:
                future.set_result({"done": False} if self._admit_older() else self._finish())
            except Exception as error:
                future.set_exception(error)

        self._core._idle_state_callbacks.append(when_idle)
        return future

    def afterwards(self, action: Callable[[], Any]) -> Future[Any]:
        """Do something once no switch is under way; a future of what it returns."""
        self._afterwards.append((action, future := Future[Any]()))
        return future

    def give_up(self, reason: str) -> None:
        """End a switch without its effect; who waits for it hears the reason."""
        waiting = self._waiting
        self._end()
        if waiting is not None and not waiting.done():
            waiting.set_result({"done": True, "busy": reason})

    def reachable(self) -> tuple[float, float] | None:
        """The lowest and the highest ratio that can follow at run time; None if none can."""
        return None if self._fixed() else (self._lowest_ratio, self._scale.highest)

    def _admit_older(self) -> bool:
        """Let the requests that were there first go on in spite of the pause; whether there are any."""
        scheduler = self._core.scheduler
        older = [request for request in scheduler.waiting if request.request_id in (self._draining or ())]
        scheduler.waiting.remove_requests(older)
        for request in older:
            scheduler.kv_holding_waiting.add_request(request)
        return bool(older)

    def _finish(self) -> dict[str, Any]:
        config, before = self._next, self.config
        assert config is not None
        try:
            if not self._core.scheduler.reset_prefix_cache():
                return {"done": True, "busy": "requests that wait for input hold KV-cache blocks; try again later."}
            self._use(config)
        finally:
            self._end()
        answer = {**self._answer(config), "previous": before.pruning_ratio}
        logger.info(
            "Token Filtering: pruning ratio %g -> %g (effective %.4g).",
            before.pruning_ratio,
            config.pruning_ratio,
            answer["effective_ratio"],
        )
        return {"done": True, **answer}

    def _end(self) -> None:
        """Let the queue go on, and do what waited for the switch."""
        drained, self._next, self._draining, self._waiting = self._draining, None, None, None
        if drained is not None:
            self._core.scheduler.set_pause_state(PauseState.UNPAUSED)
            # The queue goes on without anybody having to call.
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
        actions, self._afterwards = self._afterwards, []
        for action, future in actions:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

    def _answer(self, config: FilterConfig) -> dict[str, Any]:
        """What a caller hears of the settings that are in force then."""
        uniform = config.schedule.kind == "uniform"
        return {
            "effective_ratio": config.layout.effective_ratio if uniform else config.pruning_ratio,
            "previous": self.config.pruning_ratio,
            "prefix_caching": self._prefix_caching(config),
        }

    def _use(self, config: FilterConfig) -> None:
        coordinator = self._core.scheduler.kv_cache_manager.coordinator
        groups = coordinator.kv_cache_config.kv_cache_groups
        for manager, group, layout in zip(self._managers(), groups, self._layouts(config), strict=True):
            if layout is not None:
                group.kv_cache_spec = dataclasses.replace(manager.kv_cache_spec, layout=layout)
                manager.use(group.kv_cache_spec)
        # The coordinator has the specs for its look-ups in the prefix cache.
        if hasattr(coordinator, "attention_groups"):
            coordinator.verify_and_split_kv_cache_groups()
        elif hasattr(coordinator, "kv_cache_spec"):
            coordinator.kv_cache_spec = coordinator.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._core.collective_rpc("token_filtering_use", args=(config.model_dump(mode="json"),))
        self.config = config

    def _layouts(self, config: FilterConfig) -> list[Layout | None]:
        """The layout of each KV-cache group under other settings; None where it keeps every token."""
        return [None if layout is None else self._scale.layout(layout, config) for layout in self._at_start]

    def _fixed(self) -> str:
        """Why no other ratio can follow, or ""."""
        if isinstance(self._core, DPEngineCoreProc):
            return (
                "pruning_ratio cannot change at run time with data parallelism of a mixture-of-experts model, whose "
                "engines step together; restart the server."
            )
        if not any(self._at_start):
            return (
                "another pruning_ratio needs filtered KV-cache groups, and this server started with none; restart it "
                "with a pruning_ratio above 0."
            )
        return ""

    def _refusal(self, config: FilterConfig) -> str:
        """Why these settings cannot follow the present ones, or ""."""
        core = self._core
        # Where chunks fill no whole blocks, the prefix cache merely has no hits, and the answer says so.
        reasons = [
            refusal.sentence(value)
            for refusal in refusals.REFUSALS
            if refusal.setting != "enable_prefix_caching" and (value := refusal.found(core.vllm_config, config))
        ]
        if reasons:
            return " ".join(reasons)
        if (needed := self._longest_request(config)) > self._available:
            return (
                f"pruning_ratio={config.pruning_ratio:g} needs {needed} KV-cache blocks for one request of the longest "
                f"allowed length, and there are {self._available}; use at least {self._lowest_ratio:g}, or restart "
                "with more memory for the KV cache or a smaller max_model_len."
            )
        return ""

    @property
    def _available(self) -> int:
        return int(self._core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    def _longest_request(self, config: FilterConfig) -> int:
        """Blocks of one request of the longest allowed length, at its peak."""
        blocks, vllm_config = 0, self._core.vllm_config
        for manager, layout in zip(self._managers(), self._layouts(config), strict=True):
            spec: Any = manager.kv_cache_spec
            if layout is not None:
                slots = peak_slots(vllm_config.model_config.max_model_len, spec.max_step_tokens, layout)
                blocks += cdiv(slots, spec.block_size)
            else:
                blocks += cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
        return blocks

    @functools.cached_property
    def _lowest_ratio(self) -> float:
        """The lowest ratio with which one request of the longest allowed length fits."""
        for removed in range(self._scale.most_removed):
            with contextlib.suppress(ConfigError):
                config = self._scale.settings_for(removed * self._scale.step)
                if self._longest_request(config) <= self._available:
                    return config.pruning_ratio
        return self._scale.highest

    def _prefix_caching(self, config: FilterConfig) -> str:
        cache = self._core.vllm_config.cache_config
        if not cache.enable_prefix_caching:
            return "off"
        filtered = zip(self._managers(), self._layouts(config), strict=True)
        if all(layout is None or shares_prefixes(layout, manager.block_size) for manager, layout in filtered):
            return "on"
        return "on, without hits: the tokens a chunk keeps fill no whole blocks"

    def _managers(self) -> Any:
        return self._core.scheduler.kv_cache_manager.coordinator.single_type_managers
