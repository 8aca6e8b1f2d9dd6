"""Where vLLM 0.32 has no hook: each patch with its symptom, its cause, why twice is safe, and when to delete it.

Source: vllm/engine/arg_utils.py (`EngineArgs.create_engine_config`).
"""

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.errors import ConfigError, UnsupportedError
from vllm_tokenfilter.integration import refusals, registration

logger = init_logger("vllm.tokenfilter")

WORKER_EXTENSION = "vllm_tokenfilter.integration.status.WorkerStatus"
#: The smallest blocks vLLM's CPU kernels take (its default is 128), and its default on GPUs.
CPU_BLOCK_SIZE = 32
GPU_BLOCK_SIZE = 16
#: Measured: benchmarks/capacity.py and benchmarks/attention_speed.py.
PREFILL_STEP_TOKENS = 512
_MARK = "_token_filtering_checks"


def check_engine_configs() -> None:
    """Look at engine arguments before and after vLLM turns them into its configuration.

    Symptom: defaults that do not fit filtered blocks (block size, prefill steps, prefix caching where chunks fill no
    whole blocks), and a refused setting shows up as a traceback in a worker after the model is loaded.
    Cause: vLLM 0.32 lets no plugin see the configuration in the process that makes it; the copies in the workers come
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
        _prepare(self)
        vllm_config = original(self, *args, **kwargs)
        config = refusals.require_supported(vllm_config)
        if config.pruning_ratio > 0:
            _limit_steps_of_a_request(vllm_config)
        return vllm_config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def _select(args: EngineArgs) -> bool:
    """Whether these arguments mean Token Filtering; settings without a named backend select it."""
    named = args.attention_backend or getattr(args.attention_config, "backend", None)
    settings = args.additional_config.get(CONFIG_KEY) if isinstance(args.additional_config, dict) else None
    if named is None and settings is not None:
        args.attention_backend = registration.register_names()
        return True
    if named is not None and settings is not None and not registration.is_ours(named):
        raise ConfigError(
            [
                f"attention_backend={getattr(named, 'name', named)} leaves the settings under "
                f"additional_config.{CONFIG_KEY} without effect; use attention_backend={registration.BACKEND_NAME} "
                "or remove the settings."
            ]
        )
    if not registration.is_ours(named):
        return False
    # CUSTOM becomes our own name, which brings its registration into every process.
    member = registration.register_names()
    if args.attention_backend:
        args.attention_backend = member
    else:
        args.attention_config.backend = member
    return True


def _prepare(args: EngineArgs) -> None:
    settings = args.additional_config.get(CONFIG_KEY) if isinstance(args.additional_config, dict) else None
    config = FilterConfig.parse(settings)
    if (version := refusals.vllm_version()) is not None:
        raise UnsupportedError([refusals.REFUSALS[0].sentence(version)])
    if config.pruning_ratio > 0:
        _choose_blocks(args, config)
        _limit_steps(args)
    if not args.worker_extension_cls:
        args.worker_extension_cls = WORKER_EXTENSION
    elif args.worker_extension_cls != WORKER_EXTENSION:
        logger.warning(
            "Token Filtering: worker_extension_cls=%s is set, so collective_rpc('token_filtering_status') is not "
            "available; counters are still logged at shutdown.",
            args.worker_extension_cls,
        )


def _choose_blocks(args: EngineArgs, config: FilterConfig) -> None:
    """A block size that a chunk's kept tokens fill, and prefix caching only where they do."""
    if args.block_size is None and current_platform.is_cpu():
        args.block_size = CPU_BLOCK_SIZE
    block_size = args.block_size or GPU_BLOCK_SIZE
    if args.enable_prefix_caching is None and config.inner_backend == "FLASHINFER":
        args.enable_prefix_caching = False
        logger.info(
            "Token Filtering: prefix caching, on by default, is switched off: it cannot be had over FLASHINFER."
        )
    if args.enable_prefix_caching is None and not refusals.can_share_prefixes(config, block_size):
        args.enable_prefix_caching = False
        logger.info(
            "Token Filtering: prefix caching, on by default, is switched off: the tokens a chunk keeps fill no whole "
            "blocks of %d tokens with %s; %s.",
            block_size,
            refusals.kept_of(config),
            _nearest_fit(config, block_size),
        )


def _nearest_fit(config: FilterConfig, block_size: int) -> str:
    """What to change for prefix caching, in words."""
    if config.selector == "recency":
        return "every other selector would have it"
    error = abs(config.layout.effective_ratio - config.pruning_ratio)
    for chunk_size in range(block_size, 4096 + 1, block_size):
        other = config.model_copy(update={"chunk_size": chunk_size})
        fits = chunk_size >= config.anchor_terms and refusals.can_share_prefixes(other, block_size)
        if fits and abs(other.layout.effective_ratio - config.pruning_ratio) <= error:
            return f"chunk_size={chunk_size} with recent_window={max(chunk_size, config.recent_window)} would have it"
    return "another pruning_ratio, such as 0.5, would have it"


def _limit_steps(args: EngineArgs) -> None:
    """Short steps, unless the user set them: a step writes its tokens raw before they can be filtered.

    One budget for the whole step keeps prompts in the order they came: a limit per request alone would prefill several
    side by side, and all of them would wait for their first token as long as the last.
    """
    chosen = args.max_num_batched_tokens is not None or args.long_prefill_token_threshold
    if not chosen and args.enable_chunked_prefill is not False:
        args.max_num_batched_tokens = max(PREFILL_STEP_TOKENS, args.max_num_seqs or 0)


def _limit_steps_of_a_request(vllm_config: VllmConfig) -> None:
    """The same for one request, where a step as a whole may be longer; vLLM takes no limit above `max_model_len`."""
    scheduler = vllm_config.scheduler_config
    if scheduler.enable_chunked_prefill and not scheduler.long_prefill_token_threshold:
        longest = min(PREFILL_STEP_TOKENS, vllm_config.model_config.max_model_len)
        scheduler.long_prefill_token_threshold = longest
