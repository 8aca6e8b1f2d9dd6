"""Where vLLM has no hook: each patch with its symptom, its cause, why it is safe twice, and when to delete it.

Source: vllm/engine/arg_utils.py (`EngineArgs.create_engine_config`), vllm/v1/engine/core.py (`EngineCore`),
vllm/v1/engine/input_processor.py (`InputProcessor._validate_params`), vllm/plugins/__init__.py,
vllm/entrypoints/serve/engine/serving.py (`BaseServing._check_model`), vllm/entrypoints/launchers/api_server/entry.py,
vllm/v1/executor/multiproc_executor.py (`WorkerProc.worker_main`).
"""

import functools
import importlib.metadata
import os
import signal
import sys
from typing import Any

from vllm.config import SchedulerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig, understood
from vllm_tokenfilter.errors import ConfigError, UnsupportedError
from vllm_tokenfilter.integration import refusals, registration, versions
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import Layout

logger = init_logger("vllm.tokenfilter")

WORKER_EXTENSION = "vllm_tokenfilter.integration.worker.WorkerStatus"
#: The smallest blocks vLLM's CPU kernels take (its default is 128), and its default on GPUs.
CPU_BLOCK_SIZE = 32
GPU_BLOCK_SIZE = 16
#: Measured: benchmarks/capacity.py and benchmarks/attention_speed.py.
PREFILL_STEP_TOKENS = 512
#: Prompt tokens of a step on GPUs, of all requests: an eighth of its time then reads the weights (docs/memory.md).
GPU_STEP_TOKENS = 2048
#: The endpoint plugin that exports metrics, by its entry point's name.
METRICS_PLUGIN = "token_filtering_metrics"
_MARK = "_token_filtering_checks"


def check_engine_configs() -> None:
    """Look at engine arguments before and after vLLM turns them into its configuration.

    Symptom: defaults that do not fit filtered blocks (block size, prefill steps, prefix caching where chunks fill no
    whole blocks), and a refused setting shows up as a traceback in a worker after the model is loaded.
    Cause: vLLM lets no plugin see the configuration in the process that makes it; the copies in the workers come
    too late to change the scheduler's. What was asked for and what is default is only visible in the arguments.
    Twice is safe: the wrapper is marked. Inert: arguments that do not select us go straight through.
    Delete when: vLLM gives plugins a hook on `VllmConfig`.
    """
    original = EngineArgs.create_engine_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if not _select(self):
            return original(self, *args, **kwargs)
        _prepare(self, kwargs.get("usage_context", args[0] if args else None))
        extend_engine_core()
        refuse_opting_out()
        fail_with_the_engine()
        name_metrics_plugin()
        # vLLM keeps a layer's backend for the process, under a key without our settings.
        _cached_get_attn_backend.cache_clear()
        vllm_config = original(self, *args, **kwargs)
        config = refusals.require_supported(vllm_config)
        if config.pruning_ratio > 0:
            _cut_on_a_grid(vllm_config, config)
        return vllm_config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def extend_engine_core() -> None:
    """Give vLLM's engine core our utility methods, in each process that runs one.

    Symptom: nobody can ask the scheduler how many blocks filtered layers hold, or give it another ratio.
    Cause: vLLM lets plugins add methods to workers (`worker_extension_cls`), but not to the engine core.
    Twice is safe: set to the same functions, wrappers marked. Inert: without a switch, calls go straight through.
    Delete when: vLLM takes an extension of its engine core.
    """
    # A spawned engine core has the module before it loads plugins; importing it anywhere else would cost a second.
    if "vllm.v1.engine.core" in sys.modules or "vllm.v1.engine.core_client" in sys.modules:
        from vllm_tokenfilter.integration import engine_core

        engine_core.extend_engine_core()


def refuse_opting_out() -> None:
    """Answer a request that wants a ratio of its own with a refusal.

    Symptom: `vllm_xargs: {"token_filtering": 0}` would be ignored in silence.
    Cause: vLLM lets plugins look at a request's parameters only as logits processors, which then take part in
    every step. Parameters of a beam search have no room for it, and a stream has begun before the engine's are checked,
    so a server looks at the request itself.
    Twice is safe: the wrappers are marked. Inert: a request without the key goes straight through.
    Delete when: vLLM gives plugins a hook on a request's parameters.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor._validate_params
    if not hasattr(original, _MARK):

        @functools.wraps(original)
        def _validate_params(self: InputProcessor, params: Any, *args: Any, **kwargs: Any) -> Any:
            if refusal := _own_filter(getattr(params, "extra_args", None), self.vllm_config):
                raise refusal
            return original(self, params, *args, **kwargs)

        setattr(_validate_params, _MARK, True)
        InputProcessor._validate_params = _validate_params  # type: ignore[method-assign]
    # Only where there is a server: importing it would cost others a second.
    if (serving := sys.modules.get("vllm.entrypoints.serve.engine.serving")) is not None:
        _refuse_opting_out_of_a_server(serving.BaseServing)


def _refuse_opting_out_of_a_server(serving: Any) -> None:
    original = serving._check_model
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    async def _check_model(self: Any, request: Any) -> Any:
        if (error := await original(self, request)) is not None or not hasattr(self, "engine_client"):
            return error
        sampling = getattr(request, "sampling_params", None)
        for extra in (getattr(request, "vllm_xargs", None), getattr(sampling, "extra_args", None)):
            if refusal := _own_filter(extra, self.engine_client.vllm_config):
                return self.create_error_response(refusal)
        return None

    setattr(_check_model, _MARK, True)
    serving._check_model = _check_model


def _own_filter(extra: Any, vllm_config: VllmConfig) -> VLLMValidationError | None:
    """What to answer to a request's further arguments if they ask for a filter of its own."""
    if not (isinstance(extra, dict) and registration.is_ours(vllm_config.attention_config.backend)):
        return None
    key = next((key for key in extra if str(key).replace("-", "_").lower() == CONFIG_KEY), None)
    if key is None:
        return None
    return VLLMValidationError(
        f"vllm_xargs.{key}={extra[key]!r} asks for a filter of this request's own, and all "
        "requests of a server share one layout of the KV cache; leave it out, use a server with another "
        "pruning_ratio, or change the ratio of this one with POST /token_filtering.",
        parameter=f"vllm_xargs.{key}",
    )


def fail_with_the_engine() -> None:
    """End a server whose engine died with status 1.

    Symptom: it ends with status 0, so whoever restarts it on failure does not.
    Cause: vLLM lets the server of such an engine end as one that was asked to.
    Twice is safe: the wrapper is marked. Inert: a server that is asked to end shuts its engine down first, and keeps
    the status it had.
    Delete when: vLLM's server ends with another status by itself.
    """
    entry = sys.modules.get("vllm.entrypoints.launchers.api_server.entry")
    if entry is None or hasattr(entry.build_and_serve, _MARK):
        return
    original = entry.build_and_serve

    @functools.wraps(original)
    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
        asked, shut_down = False, engine_client.shutdown

        def shutdown(*args: Any, **kwargs: Any) -> None:
            nonlocal asked
            asked = True
            shut_down(*args, **kwargs)

        engine_client.shutdown = shutdown
        ending = await original(engine_client, *args, **kwargs)
        del engine_client.shutdown
        by_itself = not asked

        async def end() -> None:
            await ending
            if by_itself:
                raise SystemExit(1)

        return end()

    setattr(build_and_serve, _MARK, True)
    entry.build_and_serve = build_and_serve  # type: ignore[attr-defined]


def outlive_interrupts() -> None:
    """Let a worker process end with its engine alone, not by an interrupt.

    Symptom: Ctrl-C in a terminal cuts answers in flight off, whatever `--shutdown-timeout` says.
    Cause: it interrupts all processes of a server. vLLM's engine then finishes what it has, but its workers end.
    Twice is safe: ignored is ignored. Inert: only where vLLM's worker process would end; its executor ends it by other
    means (SIGTERM, a pipe that closes).
    Delete when: vLLM's workers wait for their engine.
    """
    handler = signal.getsignal(signal.SIGINT)
    if getattr(handler, "__qualname__", "").startswith("WorkerProc."):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def name_metrics_plugin() -> None:
    """Have our endpoint plugin for metrics loaded wherever the backend is selected.

    Symptom: a plain `vllm serve` has none of our metrics.
    Cause: vLLM loads an endpoint plugin only if VLLM_PLUGINS names it, because it may add routes; this one adds
    none. No other plugin that a server loads by itself can ask the engines anything.
    Twice is safe: a name is added once. Inert: all plugins that would have been loaded are named too, and if naming one
    would load routes of another package, nothing is done and the log says so.
    Delete when: vLLM offers plugins without routes a way to the engines.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None:
        names = named.split(",")
    else:
        found = importlib.metadata.entry_points()
        endpoints = {entry.name for entry in found.select(group="vllm.endpoint_plugins")}
        groups = sorted(group for group in found.groups if group.startswith("vllm.") and "endpoint" not in group)
        names = list(dict.fromkeys(entry.name for group in groups for entry in found.select(group=group)))
        if clash := sorted(endpoints & set(names)):
            logger.warning(
                "Token Filtering: there are no metrics, because naming %s in VLLM_PLUGINS for them would also load "
                "routes of that name; set VLLM_PLUGINS to the plugins you want and %s.",
                ", ".join(clash),
                METRICS_PLUGIN,
            )
            return
    if METRICS_PLUGIN not in names:
        os.environ["VLLM_PLUGINS"] = ",".join([*names, METRICS_PLUGIN])


def _select(args: EngineArgs) -> bool:
    """Whether these arguments mean Token Filtering; settings without a named backend select it."""
    if str(args.attention_backend).lower() == "auto":
        args.attention_backend = None
    named = args.attention_backend or getattr(args.attention_config, "backend", None)
    if isinstance(args.additional_config, dict):
        args.additional_config = understood(args.additional_config)
    settings = args.additional_config.get(CONFIG_KEY) if isinstance(args.additional_config, dict) else None
    if named is None and settings is not None:
        args.attention_backend = registration.register_names()
        return True
    if named is not None and settings is not None and not registration.is_ours(named):
        raise ConfigError(
            f"attention_backend={getattr(named, 'name', named)} leaves the settings under "
            f"additional_config.{CONFIG_KEY} without effect; use attention_backend={registration.BACKEND_NAME} "
            "or remove the settings."
        )
    if not registration.is_ours(named):
        # `backend_per_kind` alone would lead to our backend past every check; it is refused with the others.
        return any(map(registration.is_ours, args.attention_config.backend_per_kind.values()))
    # CUSTOM becomes our own name, which brings its registration into every process.
    member = registration.register_names()
    if args.attention_backend:
        args.attention_backend = member
    else:
        args.attention_config.backend = member
    return True


def _prepare(args: EngineArgs, usage: UsageContext | None) -> None:
    config = FilterConfig.within(args.additional_config)
    if (version := versions.unsupported()) is not None:
        raise UnsupportedError([refusals.VERSION.sentence(version)])
    if config.pruning_ratio > 0:
        _choose_blocks(args, config)
        _limit_steps(args, usage)
    if not args.worker_extension_cls:
        args.worker_extension_cls = WORKER_EXTENSION
    elif args.worker_extension_cls != WORKER_EXTENSION:
        logger.warning(
            "Token Filtering: worker_extension_cls=%s is set, so there is no collective_rpc('token_filtering_status'), "
            "no metric and no /token_filtering; counters are still logged at shutdown.",
            args.worker_extension_cls,
        )


def _choose_blocks(args: EngineArgs, config: FilterConfig) -> None:
    """A block size that a chunk's kept tokens fill, and prefix caching only where they do."""
    if args.block_size is None and current_platform.is_cpu():
        args.block_size = CPU_BLOCK_SIZE
    block_size = args.block_size or GPU_BLOCK_SIZE
    if args.enable_prefix_caching is not None:
        return
    if config.inner_backend == "FLASHINFER":
        why = "it cannot be used over FLASHINFER"
    elif config.schedule.kind in ("tail", "linear"):
        why = (
            f"with schedule.kind={config.schedule.kind} a layer's kept tokens depend on the model; "
            f"--enable-prefix-caching switches it on where they fill blocks of {block_size} tokens"
        )
    elif not refusals.can_share_prefixes(config, _layouts(config), block_size):
        why = (
            f"the tokens a chunk keeps fill no whole blocks of {block_size} tokens with {refusals.kept_of(config)}; "
            f"{_nearest_fit(config, block_size)}"
        )
    else:
        return
    args.enable_prefix_caching = False
    logger.info("Token Filtering: prefix caching, on by default, is switched off: %s.", why)


def _layouts(config: FilterConfig) -> set[Layout]:
    """The layouts of the filtered layers; of schedules that need no model to know them."""
    if config.schedule.kind == "uniform":
        return {config.layout}
    try:
        return LayerPlan.of(config, len(config.schedule.ratios)).layouts
    except ConfigError:
        return set()  # refused once the model is known


def _nearest_fit(config: FilterConfig, block_size: int) -> str:
    """What to change for prefix caching, in words."""
    if config.selector == "recency":
        return "every other selector allows it"
    if config.schedule.kind != "uniform":
        return "ratios that keep whole blocks in every layer allow it"
    error = abs(config.layout.effective_ratio - config.pruning_ratio)
    for chunk_size in range(block_size, 4096 + 1, block_size):
        other = config.model_copy(update={"chunk_size": chunk_size})
        fits = chunk_size >= config.anchor_terms and refusals.can_share_prefixes(other, [other.layout], block_size)
        if fits and abs(other.layout.effective_ratio - config.pruning_ratio) <= error:
            return f"chunk_size={chunk_size} with recent_window={max(chunk_size, config.recent_window)} allows it"
    return "another pruning_ratio, such as 0.5, allows it"


def _limit_steps(args: EngineArgs, usage: UsageContext | None) -> None:
    """Short steps, unless the user set them: a step writes its tokens raw before they can be filtered.

    There is room for one part of a prompt, and for all others to decode beside it: this keeps prompts in the order they
    came. Several side by side would all wait for their first token as long as the last. On a GPU so short a step leaves
    the device waiting for its weights, so there parts of several prompts share one; each part is as short.
    """
    chosen = args.max_num_batched_tokens is not None or args.long_prefill_token_threshold
    budgets, most = args.get_batch_defaults(args.pipeline_parallel_size * args.tensor_parallel_size)
    requests = most.get(usage, SchedulerConfig.DEFAULT_MAX_NUM_SEQS) * (1 + (args.performance_mode == "throughput"))
    if not chosen and args.enable_chunked_prefill is not False:
        prompts = PREFILL_STEP_TOKENS if current_platform.is_cpu() else GPU_STEP_TOKENS
        args.max_num_batched_tokens = prompts + (args.max_num_seqs or requests)
        logger.info(
            "Token Filtering: max_num_batched_tokens=%d (vLLM's default is %d): a step takes %d tokens of prompts, at "
            "most %d of each, beside a token of every request that decodes.",
            args.max_num_batched_tokens,
            budgets.get(usage, SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS),
            prompts,
            PREFILL_STEP_TOKENS,
        )
    elif args.max_num_seqs is None and requests > (budget := args.max_num_batched_tokens or requests):
        logger.warning(
            "Token Filtering: vLLM lowers max_num_seqs from %d to max_num_batched_tokens=%d, and while so many "
            "requests decode no prompt goes on; raise the latter.",
            requests,
            budget,
        )


def _cut_on_a_grid(vllm_config: VllmConfig, config: FilterConfig) -> None:
    """Have prompts cut by `scheduler.py`, on the grid that the user set or ours, where it fits into a step.

    It fits if all other requests can decode in the same step; a prompt would wait for them otherwise.
    """
    scheduler, chunk = vllm_config.scheduler_config, config.chunk_size
    if scheduler.enable_chunked_prefill:
        grid = scheduler.long_prefill_token_threshold or PREFILL_STEP_TOKENS
        budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        room = budget - scheduler.max_num_seqs + 1
        if grid > room:
            grid, wanted = max(room // chunk * chunk, min(chunk, budget)), grid
            logger.warning(
                "Token Filtering: steps of a prompt have %d tokens, not the %d of long_prefill_token_threshold: "
                "max_num_batched_tokens=%d must leave room for max_num_seqs=%d; raise the former or lower the latter.",
                *(grid, wanted, budget, scheduler.max_num_seqs),
            )
        # vLLM takes none above `max_model_len`.
        scheduler.long_prefill_token_threshold = min(grid, vllm_config.model_config.max_model_len)
    name = "AsyncGridScheduler" if scheduler.async_scheduling else "GridScheduler"
    scheduler.scheduler_cls = refusals.SCHEDULERS + name
