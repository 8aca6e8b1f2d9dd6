"""What fits one deployment: requests and KV bytes per token, dense and filtered, before a machine is rented."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import PlanError
from vllm_tokenfilter.planning.capacity import Capacity, Shape, kv_capacity
from vllm_tokenfilter.planning.model_shape import read_shape

GIB = 1 << 30


@dataclass(frozen=True)
class Deployment:
    """What is planned for; memory in GiB of one GPU."""

    model: str  #: a config.json, a folder, or a Hugging Face id.
    gpu_memory: float | None  #: of one GPU.
    utilization: float  #: share of it that vLLM takes.
    weights: float | None  #: of the whole model; None to find out.
    overhead: float  #: what activations, CUDA graphs and libraries take.
    cache: float | None  #: the KV cache itself, in place of all of the above; None to work it out.
    context: int  #: the longest request, in tokens.
    block_size: int  #: tokens of a block.
    prefill_step: int  #: the most tokens of a request that one step computes.
    tensor_parallel: int  #: GPUs that share the model.
    dtype: str  #: of weights and cache.


def predict(deployment: Deployment, configs: dict[str, FilterConfig]) -> dict[str, Any]:
    """The plan as plain types; `settings` holds stock vLLM first, then one entry per name."""
    _check(deployment)
    known = deployment.weights
    if deployment.cache is not None and known is None:
        known = 0.0  # not asked for
    shape = read_shape(deployment.model, deployment.dtype, None if known is None else round(known * GIB))
    if shape.num_kv_heads % deployment.tensor_parallel and deployment.tensor_parallel % shape.num_kv_heads:
        raise PlanError(
            f"tensor-parallel-size={deployment.tensor_parallel} does not divide the {shape.num_kv_heads} KV heads "
            "of the model; use one that does."
        )
    memory = _memory(deployment, shape)
    settings: list[dict[str, Any]] = []
    for name, config in [("stock vLLM", None), *configs.items()]:
        capacity = kv_capacity(
            shape,
            config,
            cache_bytes=memory["cache_bytes"],
            context=deployment.context,
            block_size=deployment.block_size,
            max_step_tokens=deployment.prefill_step,
            tensor_parallel=deployment.tensor_parallel,
        )
        settings.append(_entry(name, config, capacity, settings[0] if settings else None))
    return {
        "model": deployment.model,
        **{key: getattr(deployment, key) for key in ("context", "block_size", "prefill_step", "tensor_parallel")},
        "memory": memory,
        "settings": settings,
    }


def _check(deployment: Deployment) -> None:
    reasons = [
        f"{name}={value:g} must be a number above 0."
        for name, value in (
            ("gpu-memory", deployment.gpu_memory),
            ("kv-cache", deployment.cache),
            ("context", deployment.context),
            ("block-size", deployment.block_size),
            ("prefill-step", deployment.prefill_step),
            ("tensor-parallel-size", deployment.tensor_parallel),
        )
        if value is not None and value <= 0
    ]
    if deployment.gpu_memory is None and deployment.cache is None:
        reasons.append("gpu-memory is missing; pass the GiB of one GPU, or those of the KV cache as --kv-cache.")
    if not 0 < deployment.utilization <= 1:
        reasons.append(f"gpu-memory-utilization={deployment.utilization:g} must be above 0 and at most 1.")
    if reasons:
        raise PlanError(reasons)


def _memory(deployment: Deployment, shape: Shape) -> dict[str, Any]:
    """Bytes of one rank and where they go."""
    if deployment.cache is not None:
        cache = int(deployment.cache * GIB)
        return {"cache_bytes": cache, "sentence": f"KV cache as given: {cache / GIB:.2f} GiB a rank."}
    assert deployment.gpu_memory is not None
    taken = deployment.gpu_memory * deployment.utilization * GIB
    weights = shape.weight_bytes / deployment.tensor_parallel
    cache = int(taken - weights - deployment.overhead * GIB)
    parts = (
        f"of {deployment.gpu_memory:g} GiB a GPU vLLM takes {deployment.utilization:.0%}, less {weights / GIB:.2f} GiB "
        f"of weights and {deployment.overhead:g} GiB overhead (activations, CUDA graphs, libraries; --overhead)"
    )
    if cache <= 0:
        raise PlanError(
            f"gpu-memory={deployment.gpu_memory:g} leaves nothing for the KV cache: {parts}; use a larger GPU or "
            "--tensor-parallel-size."
        )
    return {
        "cache_bytes": cache,
        "weight_bytes": round(weights),
        "overhead_bytes": round(deployment.overhead * GIB),
        "sentence": f"KV cache: {cache / GIB:.2f} GiB a rank: {parts}.",
    }


def _entry(name: str, config: FilterConfig | None, capacity: Capacity, stock: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": name,
        "pruning_ratio": 0.0 if config is None else config.pruning_ratio,
        **dataclasses.asdict(capacity),
        "times_stock": capacity.max_concurrency / stock["max_concurrency"] if stock else 1.0,
    }
