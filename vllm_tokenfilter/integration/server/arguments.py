"""A file and flags, however they are spelled, as one set of words for vLLM's server, with our backend and settings.

vLLM's own parser says which option a word means, so that abbreviations, underscores, dotted flags and JSON are read as
`vllm serve` reads them; their values stay as they were typed, for vLLM to check.

Source: vllm/utils/argparse_utils.py (`FlexibleArgumentParser`).
"""

import argparse
import contextlib
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import huggingface_hub
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig, merged
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.integration import registration, versions
from vllm_tokenfilter.local.models import MODEL_NAME, default_model_path
from vllm_tokenfilter.local.settings_file import read_additional_config, read_config_file

#: Seconds that answers in flight have to finish once the server is asked to end; vLLM's own default cuts them off.
SHUTDOWN_TIMEOUT_S = 60

#: What the embedded model is served with where neither the flags nor the file say otherwise.
EMBEDDED_DEFAULTS = {
    "host": "127.0.0.1",
    "served-model-name": MODEL_NAME,
    "max-model-len": "8192",
    "dtype": "bfloat16",
    "kv-cache-memory-bytes": str(2 << 30),
}

#: And how it is filtered then: configs/smollm2-135m-tuned.yaml, what `vllm-tokenfilter tune` found (docs/tuning.md).
_RETRIEVAL_LAYERS = (6, 7, 8, 17, 18, 19, 20, 21, 23, 24)
EMBEDDED_FILTER: dict[str, Any] = {
    "pruning_ratio": 0.5,
    "chunk_size": 128,
    "recent_window": 128,
    "schedule": {"kind": "per_layer", "ratios": [0.0 if layer in _RETRIEVAL_LAYERS else 0.75 for layer in range(30)]},
}

#: Flags of ours that vLLM's server does not know, by option; it never gets them.
OUR_FLAGS = {"pruning_ratio": float}

# Options of which any one says how the model is compiled, or how large its KV cache is.
_COMPILATION = {"enforce_eager", "compilation_config", "optimization_level"}
_COMPILATION |= {"cudagraph_capture_sizes", "max_cudagraph_capture_size"}
_CACHE_SIZE = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}


class Option(NamedTuple):
    """An option as it was given: vLLM's name for it, the flag to write it with ("" for the model), its values."""

    name: str
    flag: str
    values: list[Any]


def server_arguments(flags: Iterable[str], pruning_ratio: float | None) -> list[str]:
    """The words that follow `vllm serve`.

    Flags win over the file that `--config` names, and `--pruning-ratio` over both, key by key. Where none of them says
    how to filter, the embedded model takes `EMBEDDED_FILTER` and others the defaults of `FilterConfig`. Answers in
    flight get `SHUTDOWN_TIMEOUT_S` to finish.

    Raises:
        ConfigError: the file, a flag or a setting of ours cannot be used.
        ModelError: no model is named and the embedded one cannot be made.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and CONFIG_KEY not in allowed.split(","):
        remedy = f"add {CONFIG_KEY} to it, without spaces around commas, or unset it."
        raise ConfigError(f"VLLM_PLUGINS={allowed} keeps this plugin out of vLLM; {remedy}")
    options = read(flags)
    last = {option.name: option.values[0] for option in options if option.values}
    backend = last.get("attention_backend", "auto")
    if backend.lower() not in ("auto", "none", "") and not registration.is_ours(backend):
        remedy = "leave it out, or on a GPU name it as inner_backend in the settings."
        raise ConfigError(f"attention-backend={backend} does not filter; {remedy}")
    extra: dict[str, Any] = {}
    for option in options:
        if option.name == "additional_config":
            extra = merged(extra, read_additional_config(option.values[0]))
    ratio = last.get("pruning_ratio") if pruning_ratio is None else pruning_ratio
    if ratio is not None:
        extra = merged(extra, {CONFIG_KEY: {"pruning_ratio": ratio}})
    embedded = not {"model", "model_tag"} & last.keys()
    extra.setdefault(CONFIG_KEY, EMBEDDED_FILTER if embedded else {})
    FilterConfig.within(extra)
    ours = ["--attention-backend", registration.BACKEND_NAME, "--additional-config", json.dumps(extra)]
    if "shutdown_timeout" not in last:
        ours += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)]
    if not embedded:
        return [*words_of(options), *ours]
    if "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # the variable was read when vLLM was imported
    return [str(default_model_path()), *words_of(options), *ours, *embedded_defaults(options, EMBEDDED_DEFAULTS)]


def words_of(options: list[Option]) -> list[str]:
    """The options as words, the model first and each as it was given last, without what is ours to say.

    That is what stock vLLM gets for comparison: no attention backend and no `additional_config`.
    """
    last = {option.name: option for option in options}
    left_out = {"config", "additional_config", "attention_backend", *OUR_FLAGS}
    words: list[str] = []
    if "model_tag" in last:
        words += last["model_tag"].values
        left_out |= {"model_tag", "model"}
    for option in options:
        # Each `--middleware` adds one.
        if option.name not in left_out and (option is last[option.name] or option.name == "middleware"):
            dashed = len(option.values) == 1 and option.values[0].startswith("-")
            words += [f"{option.flag}={option.values[0]}"] if dashed else [option.flag, *option.values]
    return words


def embedded_defaults(options: list[Option], defaults: Mapping[str, str]) -> list[str]:
    """Those of the defaults that no option replaces, and eager mode unless compilation was chosen."""
    names = {option.name for option in options}
    names |= _CACHE_SIZE if names & _CACHE_SIZE else set()
    words = [] if names & _COMPILATION else ["--enforce-eager"]
    for option, value in defaults.items():
        if option.replace("-", "_") not in names:
            words += [f"--{option}", value]
    return words


def read(flags: Iterable[str]) -> list[Option]:
    """What flags and the file they name say, in the order in which vLLM reads them: the last of a name counts.

    Raises:
        ConfigError: the file cannot be read, or something in it or among the flags is no option of vLLM's server.
    """
    flags = list(flags)
    options = _options(flags, "flags")
    if {"model", "model_tag"} <= {option.name for option in options}:
        raise ConfigError("model is given twice, as --model and as the first word; name it once.")
    files = [option.values[0] for option in options if option.name == "config"]
    if len(files) == 1:
        # The model stays the first word: an option of the file that takes several values would take it as one.
        lead = 0 if flags[0].startswith("-") else 1
        words = [*flags[:lead], *_file_words(read_config_file(files[0])), *flags[lead:]]
        options = _options(words, f"config={files[0]} and flags")
        files = [option.values[0] for option in options if option.name == "config"]
    if len(files) > 1:
        raise ConfigError(f"config is given twice ({', '.join(files)}); pass one file as a flag.")
    return options


def _file_words(settings: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    reader = _reader()
    flags = reader._option_string_actions
    for name, value in settings.items():
        flag = f"--{name}"
        if "." in name or isinstance(value, dict):
            words.append(f"{flag}={json.dumps(value)}")
        elif value is True:
            words.append(flag)
        elif value is False:
            # What has no negative is left out, as by vLLM; what is unknown or negative itself is refused by name.
            if f"--no-{name}" in flags or flag not in flags or name.startswith("no-"):
                words.append(f"--no-{name}")
        elif not isinstance(value, list):
            words.append(f"{flag}={value}")
        elif value:
            action = flags.get(flag) or next((found[0] for found in reader._get_option_tuples(flag)), None)
            if action is not None and action.nargs != "+" and (len(value) > 1 or action.nargs == 0):
                raise ConfigError(f"{name}={value} must be one value, not a list.")  # vLLM takes it for the model
            words += [flag, *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
    return words


class _Parser(FlexibleArgumentParser):
    """vLLM's, but for what it says of words that it refuses: one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {' '.join(message.split())}; give options as vLLM's server takes them.")

    def _pull_args_from_config(self, args: list[str]) -> list[str]:
        return args  # `read` takes the file


class _Collect(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        values = [] if values is None else values if isinstance(values, list) else [values]
        if self.option_strings:
            long = next(flag for flag in self.option_strings if flag.startswith("--"))
            namespace.options.append(Option(self.dest, str(option_string) if self.nargs == 0 else long, values))
        elif values and values[0].startswith("-"):
            parser.error(f"unrecognized arguments: {values[0]}")  # argparse takes unknown flags with spaces for words
        elif values:
            namespace.options.append(Option(self.dest, "", values))


@functools.cache
def server_parser() -> FlexibleArgumentParser:
    """The parser of `vllm serve`, which checks names of backends as it reads them."""
    registration.register_names()
    return versions.make_arg_parser(_Parser(prog="vllm-tokenfilter serve"))


@functools.cache
def _reader() -> _Parser:
    """The same options, their values left as they are."""
    reader = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    # An action may be known by more flags than it lists: vLLM hides old spellings from its help.
    for action in server_parser()._actions:
        if not action.option_strings:
            reader.add_argument(action.dest, nargs=action.nargs, action=_Collect)
        elif action.dest != "help":
            flags = [flag for flag, found in server_parser()._option_string_actions.items() if found is action]
            reader.add_argument(*flags, dest=action.dest, nargs=action.nargs, action=_Collect)
    for name, kind in OUR_FLAGS.items():
        reader.add_argument(f"--{name.replace('_', '-')}", type=kind, action=_Collect)
    return reader


def _options(words: list[str], where: str) -> list[Option]:
    """The options that words mean; a backend named in `attention_config` counts as `attention_backend`."""
    reader = _reader()
    reader.prog = where
    words = list(words)
    for at in range(len(words) - 1, 0, -1):
        # vLLM would take a negative number with a dot for a flag with a dot in its name.
        if re.fullmatch(r"-\d*\.\d+", words[at]) and re.fullmatch(r"--?[a-zA-Z][^=]*", words[at - 1]):
            words[at - 1 : at + 1] = [f"{words[at - 1]}={words[at]}"]
    found = argparse.Namespace(options=[])
    try:
        reader.parse_args(words, found)
    except (IndexError, RecursionError):
        raise ConfigError(
            f"{where}: a flag with a dot in its name has no value; write the value after the name."
        ) from None
    options: list[Option] = []
    for option in found.options:
        if option.name == "attention_config":
            with contextlib.suppress(ValueError, RecursionError, AttributeError):  # vLLM says what is wrong with it
                config = json.loads(option.values[0])
                if backend := config.pop("backend", None):
                    options.append(Option("attention_backend", "--attention-backend", [str(backend)]))
                option = option._replace(values=[json.dumps(config)])
        options.append(option)
    return options
