"""An engine core of vLLM over stand-ins for its scheduler, executor and queues; pauses are its own."""

import queue
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

from vllm_tokenfilter.config import CONFIG_KEY
from vllm_tokenfilter.integration.engine_core import extend_engine_core


@dataclass(frozen=True)
class Spec:
    """Of a KV-cache group: `layout` None where it keeps every token."""

    layout: Any
    block_size: int = 32
    page_size_bytes: int = 1
    max_step_tokens: int = 512

    def max_memory_usage_bytes(self, vllm_config):
        """One request of the longest length."""
        return vllm_config.model_config.max_model_len // self.block_size


class Manager:
    """Of the blocks of a KV-cache group."""

    def __init__(self, layout):
        self.use(Spec(layout))
        self.block_size = 32

    def use(self, spec):
        """Give blocks by this spec's layout."""
        self.kv_cache_spec = spec


class Queue(list):
    """Requests that wait."""

    def remove_requests(self, requests):
        """Take these out."""
        self[:] = [request for request in self if request not in requests]


class Scheduler:
    """Requests by name, which run or wait until they are told to finish."""

    def __init__(self, layouts, num_blocks):
        self.pause_state = PauseState.UNPAUSED
        self.running, self.waiting = set(), Queue()
        self.kv_holding_waiting = SimpleNamespace(add_request=lambda request: self.running.add(request.request_id))
        managers = [Manager(layout) for layout in layouts]
        groups = [SimpleNamespace(kv_cache_spec=manager.kv_cache_spec) for manager in managers]
        coordinator = SimpleNamespace(
            single_type_managers=managers, kv_cache_config=SimpleNamespace(kv_cache_groups=groups)
        )
        pool = SimpleNamespace(num_gpu_blocks=num_blocks)
        self.kv_cache_manager = SimpleNamespace(coordinator=coordinator, block_pool=pool)

    @property
    def requests(self):
        """All that are unfinished, by name."""
        return {**dict.fromkeys(self.running), **{request.request_id: request for request in self.waiting}}

    def set_pause_state(self, state):
        """As vLLM's."""
        self.pause_state = state

    def has_requests(self):
        """Whether there is anything to step for."""
        queued = self.waiting if self.pause_state == PauseState.UNPAUSED else []
        return self.pause_state != PauseState.PAUSED_ALL and bool(self.running or queued)

    def get_num_unfinished_requests(self):
        """As vLLM's, unpaused."""
        return len(self.requests)

    def finish_requests(self, names, status):
        """Abort all."""
        self.running.clear()
        self.waiting.clear()
        return []

    def reset_prefix_cache(self, *args, **kwargs):
        """Only without requests that hold blocks."""
        return not self.running


def engine_core(settings, layouts, num_layers=4, num_blocks=1000):
    """An engine that started with these settings, and groups of these layouts."""
    extend_engine_core()
    core = EngineCoreProc.__new__(EngineCoreProc)
    core.vllm_config = SimpleNamespace(
        additional_config={CONFIG_KEY: settings},
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: num_layers, max_model_len=2048),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        shutdown_timeout=60,
    )
    core.scheduler = Scheduler(layouts, num_blocks)
    core.told_workers = []
    core.collective_rpc = lambda method, args=(): core.told_workers.append(args)
    core.model_executor = SimpleNamespace(collective_rpc=lambda method: None)
    core.input_queue, core.output_queue, core.batch_queue = queue.Queue(), queue.Queue(), None
    core.engines_running, core._idle_state_callbacks = False, []
    core.shutdown_state = EngineShutdownState.RUNNING
    return core


def step(core, finish=()):
    """Finish requests, and do what vLLM's loop does when nothing is left to do."""
    core.scheduler.running -= set(finish)
    if not core.has_work() and core.is_running():
        core._notify_idle_state_callbacks()
