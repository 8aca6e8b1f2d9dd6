"""Our settings in a YAML file, as vLLM's `--config` takes it: the file that is served is the file that is measured."""

import contextlib
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig, merged, understood
from vllm_tokenfilter.errors import ConfigError


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The options in a vLLM `--config` file, with dashes in their names.

    `additional-config` is a mapping, however it is written, with underscores in our keys.

    Raises:
        ConfigError: it cannot be read, or holds no options.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        settings = json.loads(json.dumps(settings, default=str))  # dates as vLLM gets them, keys as words
    except Exception as error:  # PyYAML lets through whatever the making of a value raises
        reason = " ".join(str(error).split())
        raise ConfigError(f"config={path} cannot be read ({reason}); pass a YAML file in UTF-8.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"config={path} holds no settings; write one `flag: value` per line.")
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name, *inner = key.split(".")
        name = name.replace("_", "-")
        if name == "additional-config":
            nested = functools.reduce(lambda inside, part: {part: inside}, reversed(inner), value)
            found[name] = merged(found.get(name, {}), read_additional_config(nested))
        else:
            found[".".join([name, *inner])] = value
    return found


def read_additional_config(value: object) -> dict[str, Any]:
    """The value of vLLM's `additional_config`, from YAML or in JSON; see `understood`.

    Raises:
        ConfigError: it is not a mapping, or a key of ours cannot be understood.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"additional-config={value} must be a mapping; write it in YAML or as a JSON object.")
    return understood(value or {})


def read_named_settings(paths: Iterable[Path]) -> dict[str, FilterConfig]:
    """Our settings in several files, by the files' names without ending.

    Raises:
        ConfigError: as `read_settings`, or two files have one name, under which results could not be told apart.
    """
    found: dict[str, FilterConfig] = {}
    for path in paths:
        if path.stem in found:
            raise ConfigError(f"config={path} has the same name as another file, {path.stem}; rename one of them.")
        found[path.stem] = read_settings(path)
    return found


def read_settings(path: str | Path | None, pruning_ratio: float | None = None) -> FilterConfig:
    """Our settings in a vLLM `--config` file, or the defaults without one; the ratio wins over them.

    Raises:
        ConfigError: it cannot be read, has no settings of ours, or they cannot hold.
    """
    extra = {CONFIG_KEY: {}} if path is None else read_config_file(path).get("additional-config", {})
    if CONFIG_KEY not in extra:
        raise ConfigError(f"config={path} has no {CONFIG_KEY} under additional-config; write its settings there.")
    if pruning_ratio is not None:
        extra = merged(extra, {CONFIG_KEY: {"pruning_ratio": pruning_ratio}})
    return FilterConfig.within(extra)
