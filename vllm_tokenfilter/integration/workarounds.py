"""Where vLLM 0.32 has no hook: each patch with its symptom, its cause, why twice is safe, and when to delete it.

Source: vllm/engine/arg_utils.py (`EngineArgs.create_engine_config`).
"""

import functools
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.errors import ConfigError, UnsupportedError
from vllm_tokenfilter.integration import refusals, registration

logger = init_logger("vllm.tokenfilter")

WORKER_EXTENSION = "vllm_tokenfilter.integration.status.WorkerStatus"
_MARK = "_token_filtering_checks"


def check_engine_configs() -> None:
    """Look at engine arguments before and after vLLM turns them into its configuration.

    Symptom: with prefix caching merely on by default the scheduler shares blocks a filtered layer is still packing, and
    a refused setting shows up as a traceback in a worker after the model is loaded.
    Cause: vLLM 0.32 lets no plugin see the configuration in the process that makes it; the copies in the workers come
    too late to change the scheduler's. Whether prefix caching was asked for is only visible in the arguments.
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
        refusals.require_supported(vllm_config)
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
    if config.pruning_ratio > 0 and args.enable_prefix_caching is None:
        args.enable_prefix_caching = False
        logger.info("Token Filtering: prefix caching, on by default, is switched off; filtered blocks are not shared.")
    if not args.worker_extension_cls:
        args.worker_extension_cls = WORKER_EXTENSION
    elif args.worker_extension_cls != WORKER_EXTENSION:
        logger.warning(
            "Token Filtering: worker_extension_cls=%s is set, so collective_rpc('token_filtering_status') is not "
            "available; counters are still logged at shutdown.",
            args.worker_extension_cls,
        )
