"""A model's shape and weight from its configuration: a config.json, a folder, or a Hugging Face id."""

import json
from pathlib import Path
from typing import Any

from vllm_tokenfilter.errors import PlanError
from vllm_tokenfilter.layer_plan import LayerFacts
from vllm_tokenfilter.planning.capacity import Shape

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def read_shape(model: str, dtype: str, weight_bytes: int | None) -> Shape:
    """The model's shape.

    Args:
        model: a config.json, a folder that holds one, or a Hugging Face id.
        dtype: of cache and weights: "auto", or a key of the table above. As in vLLM, auto takes the model's own, and
            two bytes for a float32 model.
        weight_bytes: of the weights, where known; None to take them from the folder's safetensors, or else from the
            number of parameters.

    Raises:
        PlanError: the model cannot be read, or keeps its KV cache in a way that is not planned for.
    """
    config = _load(model)
    text = config.get_text_config()
    if reasons := _unplannable(config, text):
        raise PlanError([f"model-config={model} {reason}." for reason in reasons])
    if dtype == "auto":
        own = str(getattr(text, "dtype", None) or getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
        dtype = "bfloat16" if own == "float32" else own
    if dtype not in _BYTES:
        raise PlanError(f"dtype={dtype} must be auto or one of {', '.join(_BYTES)}.")
    heads, head_size = kv_heads(text)
    return Shape(
        layers=_layers(text),
        num_kv_heads=heads,
        head_size=head_size,
        element_bytes=_BYTES[dtype],
        weight_bytes=_weight_bytes(model, config, _BYTES[dtype]) if weight_bytes is None else weight_bytes,
    )


def kv_heads(text: Any) -> tuple[int, int]:
    """KV heads of a layer, and the elements of each, from a text model's configuration."""
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return getattr(text, "num_key_value_heads", None) or heads, head_size


def _load(model: str) -> Any:
    from transformers import AutoConfig

    path = Path(model)
    try:
        if path.is_file():
            settings = json.loads(path.read_text())
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"model-config={model} cannot be read ({str(error).splitlines()[0]}); pass a config.json, a folder "
            "that holds one, or a Hugging Face id."
        ) from None


def _unplannable(config: Any, text: Any) -> list[str]:
    """Why the model's KV cache is not one number of heads and dimensions in every attention layer."""
    reasons = []
    if getattr(text, "kv_lora_rank", None):
        reasons.append("uses multi-head latent attention, which Token Filtering does not serve")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("is an encoder-decoder, which Token Filtering does not serve")
    if not getattr(text, "num_hidden_layers", None) or not getattr(text, "num_attention_heads", None):
        reasons.append("has no num_hidden_layers or num_attention_heads")
    if isinstance(getattr(text, "num_key_value_heads", None), list) or getattr(text, "global_head_dim", None):
        reasons.append("has layers of different numbers of heads or dimensions, which plan does not model")
    if unknown := set(getattr(text, "layer_types", None) or ()) - set(_KINDS):
        reasons.append(f"has layers of type {', '.join(sorted(unknown))}, which plan does not model")
    return reasons


_KINDS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}


def _layers(text: Any) -> tuple[LayerFacts, ...]:
    sliding = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    windows = {"sliding": sliding, "chunked": getattr(text, "attention_chunk_size", None)}
    alibi = _uses_alibi(text)
    types = getattr(text, "layer_types", None)
    if not types:
        types = ["sliding_attention" if sliding else "full_attention"] * text.num_hidden_layers
    layers = []
    for name in types[: text.num_hidden_layers]:
        kind = _KINDS[name]
        window = int(windows.get(kind) or 0)
        layers.append(LayerFacts(kind if window else "full", window, alibi=alibi))  # type: ignore[arg-type]
    return tuple(layers)


def _uses_alibi(text: Any) -> bool:
    """Whether attention is biased by distance: always in BLOOM, by a setting in Falcon and MPT."""
    settings = getattr(text, "attn_config", None)
    of_mpt = settings.get("alibi") if isinstance(settings, dict) else getattr(settings, "alibi", False)
    return text.model_type == "bloom" or bool(getattr(text, "alibi", False) or of_mpt)


def _weight_bytes(model: str, config: Any, element_bytes: int) -> int:
    """Bytes of the weights: those of the safetensors beside the configuration, or of the model's parameters."""
    path = Path(model)
    files = list((path.parent if path.is_file() else path).glob("*.safetensors")) if path.exists() else []
    if files:
        return sum(file.stat().st_size for file in files)
    if getattr(config, "quantization_config", None):
        raise PlanError(f"model-config={model} is quantised, so its size is not known; pass --weights in GiB.")
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).parameters()
            count: int = sum(parameter.numel() for parameter in parameters)
            return count * element_bytes
    except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise PlanError(
            f"model-config={model}: its parameters cannot be counted ({str(error).splitlines()[0]}); pass "
            "--weights in GiB."
        ) from None
