"""Which versions of vLLM are served, and everything that depends on the one installed; no other module asks for it.

At most two versions at a time. Each difference says what differs, since when, and when to delete it.

Source: vllm/version.py.
"""

from typing import Any

import vllm
from vllm.config import VllmConfig

SUPPORTED = ((0, 32), (0, 33))
INSTALLED: str = vllm.__version__
_SINCE_33 = vllm.__version_tuple__[:2] >= (0, 33)


def unsupported() -> str | None:
    """The installed version if it is not one we are made for."""
    return None if vllm.__version_tuple__[:2] in SUPPORTED else INSTALLED


def supported_names() -> str:
    """The versions we are made for, in words."""
    return " or ".join(".".join(map(str, version)) for version in SUPPORTED)


def groups_its_own_cache(vllm_config: VllmConfig) -> bool:
    """Whether the model decides itself which layers share a block table.

    Models can since 0.33; before, vLLM does not know the question. With 0.32, delete the first half.
    """
    return _SINCE_33 and vllm_config.model_config.supports_kv_cache_grouping


def make_arg_parser(parser: Any) -> Any:
    """The parser with every flag of vLLM's server; since 0.33 made elsewhere. With 0.32, import it where it is used."""
    if _SINCE_33:
        from vllm.entrypoints.common import cli_args
    else:
        from vllm.entrypoints.launchers import cli_args
    return cli_args.make_arg_parser(parser)


def cli_env_setup() -> None:
    """What vLLM's commands do first; since 0.33 elsewhere. With 0.32, import it where it is used."""
    if _SINCE_33:
        from vllm.entrypoints.common.startup import cli_env_setup
    else:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    cli_env_setup()
