"""The backend's names in vLLM's registry, and which class they stand for.

Runs at process start, before any configuration is read. Afterwards `--attention-backend TOKEN_FILTERING` and, if no
other plugin claims it, `CUSTOM` name our backend: on a GPU through `dispatch`, which wraps one of vLLM's. On CPU
vLLM ignores the selected name and asks for CPU_ATTN, so that name is routed through `dispatch` too, which hands out the
stock class unless ours was selected.

Source: vllm/v1/attention/backends/registry.py, vllm/platforms/cpu.py (`get_attn_backend_cls`).
"""

import functools
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

BACKEND_NAME = "TOKEN_FILTERING"
BACKEND_PATH = "vllm_tokenfilter.integration.dispatch.SELECTED_BACKEND"
_CPU_PATH = "vllm_tokenfilter.integration.dispatch.CPU_BACKEND"


def register_names() -> AttentionBackendEnum:
    """Register the names once per process; returns the member TOKEN_FILTERING."""
    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[BACKEND_NAME]
    register_backend(BACKEND_NAME, BACKEND_PATH)
    member = AttentionBackendEnum[BACKEND_NAME]
    # A spawned process unpickles its configuration before it loads plugins and would not know the name: the member
    # brings its own registration along.
    member.__reduce_ex__ = functools.partial(_reduce, member)  # type: ignore[method-assign]
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    if not AttentionBackendEnum.CPU_ATTN.is_overridden():
        register_backend(AttentionBackendEnum.CPU_ATTN, _CPU_PATH)
    return member


def is_ours(backend: Any) -> bool:
    """Whether a configured backend (member, name or None) is Token Filtering."""
    name = str(getattr(backend, "name", backend)).upper()
    if name == AttentionBackendEnum.CUSTOM.name:
        return AttentionBackendEnum.CUSTOM.is_overridden() and AttentionBackendEnum.CUSTOM.get_path() == BACKEND_PATH
    return name == BACKEND_NAME


def _reduce(member: AttentionBackendEnum, protocol: int) -> tuple[Any, ...]:
    return register_names, ()
