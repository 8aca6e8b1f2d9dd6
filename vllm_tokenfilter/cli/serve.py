"""`vllm-tokenfilter serve`: vLLM's own OpenAI server, in this process, with the backend selected.

Works where vLLM's command does not: with the CPU package `vllm` dies at start, its distribution having another name.
"""

import json
import os
from typing import Any

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.local.models import MODEL_NAME, default_model_path
from vllm_tokenfilter.local.settings_file import read_config_file

#: The endpoint plugin that serves /token_filtering, by its entry point's name.
HTTP_PLUGIN = "token_filtering_http"

#: What the embedded model is served with where neither the flags nor the file say otherwise.
EMBEDDED_DEFAULTS = {
    "host": "127.0.0.1",
    "served-model-name": MODEL_NAME,
    "max-model-len": "8192",
    "dtype": "bfloat16",
    "kv-cache-memory-bytes": str(2 << 30),
}

#: And how it is filtered then: configs/smollm2-135m-tuned.yaml, what `vllm-tokenfilter tune` found (docs/tuning.md).
_RECALLING_LAYERS = (6, 7, 8, 17, 18, 19, 20, 21, 23, 24)
EMBEDDED_FILTER: dict[str, Any] = {
    "pruning_ratio": 0.5,
    "chunk_size": 128,
    "recent_window": 128,
    "schedule": {
        "kind": "per_layer",
        "ratios": [0.0 if layer in _RECALLING_LAYERS else 0.75 for layer in range(30)],
    },
}


def run(flags: list[str], config_file: str | None, pruning_ratio: float | None) -> None:
    """Serve until interrupted.

    Args:
        flags: vLLM's own server flags, as given.
        config_file: a vLLM `--config` file.
        pruning_ratio: wins over the file's and the flags'.

    Raises:
        TokenFilterError: a setting cannot hold.
    """
    arguments = server_arguments(flags, config_file, pruning_ratio)

    # vLLM's own `serve` without its `vllm` command, which asks for a distribution that the CPU package is not.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_tokenfilter.integration import plugin, workarounds

    plugin.register()
    # This command is the consent that vLLM asks for before a plugin may add routes.
    workarounds.name_metrics_plugin()
    if "VLLM_PLUGINS" in os.environ:
        os.environ["VLLM_PLUGINS"] += f",{HTTP_PLUGIN}"
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm-tokenfilter")
    command.subparser_init(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["serve", *arguments])
    command.validate(parsed)
    command.cmd(parsed)


def server_arguments(flags: list[str], config_file: str | None, pruning_ratio: float | None) -> list[str]:
    """The words that follow `vllm serve`.

    Flags win over the file, and `--pruning-ratio` over both, key by key. Where none of them says how to filter, the
    embedded model takes `EMBEDDED_FILTER` and others the defaults of `FilterConfig`.

    Raises:
        ConfigError: the file or a setting of ours cannot be used.
        ModelError: no model is named and the embedded one cannot be made.
    """
    file_settings = {} if config_file is None else read_config_file(config_file)
    flags, extra = _take_additional_config(flags)
    merged = {**(file_settings.get("additional-config") or {}), **extra}
    ours = merged.get(CONFIG_KEY)
    if pruning_ratio is not None:
        if not isinstance(ours, dict | None):
            FilterConfig.parse(ours)
        ours = {**(ours or {}), "pruning_ratio": pruning_ratio}
    given = {flag.removeprefix("--").partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    given |= set(file_settings)
    if ours is None and not _names_model(flags, given):
        ours = EMBEDDED_FILTER
    FilterConfig.parse(ours)
    merged[CONFIG_KEY] = ours or {}
    _require_plugin_allowed()

    arguments = [*flags, "--additional-config", json.dumps(merged)]
    if config_file is not None:
        arguments += ["--config", config_file]
    if not given & {"attention-backend", "attention-config"} and "-ac" not in flags:
        arguments += ["--attention-backend", "TOKEN_FILTERING"]
    if not _names_model(flags, given):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        arguments.insert(0, str(default_model_path()))
        for flag, value in EMBEDDED_DEFAULTS.items():
            if flag not in given:
                arguments += [f"--{flag}", value]
        if not given & {"enforce-eager", "no-enforce-eager", "compilation-config"}:
            arguments += ["--enforce-eager"]
    return arguments


def _take_additional_config(flags: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The flags without `--additional-config`, and its value."""
    rest: list[str] = []
    value: str | None = None
    waiting = False
    for flag in flags:
        name, equals, inline = flag.partition("=")
        if waiting:
            value, waiting = flag, False
        elif name.replace("_", "-") == "--additional-config":
            value, waiting = (inline, False) if equals else (None, True)
        else:
            rest.append(flag)
    if value is None:
        return rest, {}
    try:
        extra = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError([f"additional-config={value} is no JSON ({error}); pass an object in quotes."]) from None
    if not isinstance(extra, dict):
        raise ConfigError([f"additional-config={value} is no JSON object; pass one in quotes."])
    return rest, extra


def _names_model(flags: list[str], given: set[str]) -> bool:
    # vLLM takes the model as its first word too.
    return "model" in given or bool(flags and not flags[0].startswith("-"))


def _require_plugin_allowed() -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and CONFIG_KEY not in allowed.split(","):
        raise ConfigError(
            [f"VLLM_PLUGINS={allowed} keeps this plugin out of vLLM; add {CONFIG_KEY} to it or unset it."]
        )
