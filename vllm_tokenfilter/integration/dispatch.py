"""Which class a registered name stands for: `SELECTED_BACKEND` for ours, `CPU_BACKEND` for vLLM's CPU_ATTN.

A module of its own because vLLM resolves a backend by importing a path and taking an attribute of it, every time a
layer with a new configuration is built: the attribute is computed at that moment, from the configuration in force, so
that an engine that does not select us gets vLLM's own class, not a lookalike. `OVER_<name>` is what `SELECTED_BACKEND`
leads to on NVIDIA. Raises before any weights load what cannot be served.

Source: vllm/v1/attention/selector.py (`_cached_get_attn_backend`), vllm/v1/attention/backends/registry.py
(`get_class`), vllm/platforms/cuda.py (`get_attn_backend_cls`).
"""

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_tokenfilter.integration import refusals, registration

logger = init_logger("vllm.tokenfilter")

_OVER = "OVER_"


class AutoBackend(AttentionBackend):
    """`inner_backend: auto`: asks vLLM what it would choose for the layer, and stands for a wrapper of that.

    vLLM validates a selected backend with everything it knows of the layer, and then asks for its path. Where vLLM's
    choice is FLASHINFER and prefixes are shared, the next that serves the layer is taken.
    """

    _chosen: str

    @classmethod
    def validate_configuration(cls, **layer: Any) -> list[str]:  # type: ignore[override]
        """See `AttentionBackend.validate_configuration`."""
        from vllm_tokenfilter.integration.gpu.backend import INNER_BACKENDS, backend_over

        layer.pop("device_capability")
        wanted, vllm_config = AttentionSelectorConfig(**layer), get_current_vllm_config()
        name = resolve_obj_by_qualname(current_platform.get_attn_backend_cls(None, wanted)).get_name()
        config = refusals.settings_of(vllm_config).model_copy(update={"inner_backend": name})
        if refused := refusals.FLASHINFER_PREFIXES.found(vllm_config, config):
            others = [other for other in INNER_BACKENDS if other != name and _serves(other, wanted)]
            if not others:
                return [refusals.FLASHINFER_PREFIXES.sentence(refused)]
            logger.info_once("Token Filtering: inner_backend=auto is %s; over %s no prefix is shared.", others[0], name)
            name = others[0]
        if name not in INNER_BACKENDS:
            return [
                f"inner_backend=auto is {name} here, which cannot be filtered; set inner_backend to one of "
                f"{', '.join(INNER_BACKENDS)}"
            ]
        cls._chosen = backend_over(name).__qualname__
        return []

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """See `AttentionBackend.full_cls_name`: the wrapper chosen last."""
        return __name__, cls._chosen

    @staticmethod
    def get_name() -> str:
        """Unused: the wrapper stands in before a layer is built."""
        raise NotImplementedError

    get_impl_cls = get_builder_cls = get_name  # type: ignore[assignment]


def _serves(name: str, layer: AttentionSelectorConfig) -> bool:
    try:
        current_platform.get_attn_backend_cls(AttentionBackendEnum[name], layer)
    except ValueError:
        return False
    return True


def __getattr__(name: str) -> Any:
    if name == "CPU_BACKEND":
        return _cpu_backend()
    if name == "SELECTED_BACKEND":
        return _selected_backend()
    if name.startswith(_OVER):
        from vllm_tokenfilter.integration.gpu.backend import backend_over

        return backend_over(name.removeprefix(_OVER))
    raise AttributeError(name)


def _cpu_backend() -> type[AttentionBackend]:
    """What the CPU platform uses, whatever was selected."""
    if registration.is_ours(get_current_vllm_config().attention_config.backend):
        return _selected_backend()
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend


def _selected_backend() -> type[AttentionBackend]:
    """Ours, for the platform at hand."""
    config = refusals.require_supported(get_current_vllm_config())
    if current_platform.is_cpu():
        from vllm_tokenfilter.integration.cpu.backend import TokenFilteringBackend

        return TokenFilteringBackend
    if config.inner_backend == "auto":
        return AutoBackend
    from vllm_tokenfilter.integration.gpu.backend import backend_over

    return backend_over(config.inner_backend)
