"""What CPU_ATTN stands for: the stock class, unless the current configuration selects Token Filtering.

A module of its own because vLLM resolves a backend by importing a path and taking an attribute of it, every time a
layer with a new configuration is built: `SELECTED_BACKEND` is computed at that moment, so that an engine that does
not select us gets vLLM's own class, not a lookalike. Raises before any weights load what cannot be served.

Source: vllm/v1/attention/selector.py (`_cached_get_attn_backend`).
"""

from typing import Any

from vllm.config import get_current_vllm_config

from vllm_tokenfilter.integration import refusals, registration


def __getattr__(name: str) -> Any:
    if name != "SELECTED_BACKEND":
        raise AttributeError(name)
    vllm_config = get_current_vllm_config()
    if registration.is_ours(vllm_config.attention_config.backend):
        from vllm_tokenfilter.integration.cpu.backend import TokenFilteringBackend

        refusals.require_supported(vllm_config)
        return TokenFilteringBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
