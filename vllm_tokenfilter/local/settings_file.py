"""Our settings in a YAML file, as vLLM's `--config` takes it: the file that is served is the file that is measured."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.errors import ConfigError


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The flags in a vLLM `--config` file, with dashes in their names.

    Raises:
        ConfigError: it cannot be read, or holds no flags.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"config={path} cannot be read ({error}); pass a YAML file."]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"config={path} holds no settings; write one `flag: value` a line."])
    return {str(key).replace("_", "-"): value for key, value in settings.items()}


def read_named_settings(paths: Iterable[Path]) -> dict[str, FilterConfig]:
    """Our settings in several files, by the files' names without ending.

    Raises:
        ConfigError: as `read_settings`, or two files have one name, under which results could not be told apart.
    """
    found: dict[str, FilterConfig] = {}
    for path in paths:
        if path.stem in found:
            raise ConfigError([f"config={path} has the name of another file, {path.stem}; rename one of them."])
        found[path.stem] = read_settings(path)
    return found


def read_settings(path: str | Path) -> FilterConfig:
    """Our settings in a vLLM `--config` file.

    Raises:
        ConfigError: it cannot be read, has no settings of ours, or they cannot hold.
    """
    extra = read_config_file(path).get("additional-config")
    if not isinstance(extra, dict) or CONFIG_KEY not in extra:
        raise ConfigError([f"config={path} has no {CONFIG_KEY} under additional-config; write its settings there."])
    return FilterConfig.parse(extra[CONFIG_KEY])
