"""`vllm-tokenfilter tune`: find which layers of a model may be pruned, and write the settings that do it."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_tokenfilter.cli.evaluate import progress_bar
from vllm_tokenfilter.cli.output import print_tables
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation.texts import load_text
from vllm_tokenfilter.local.models import default_model_path
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.reports.tables import tuning_tables
from vllm_tokenfilter.tuning.tuner import KEPT, Score, Tuner, make_texts, pruned_layers, tune


@dataclass(frozen=True)
class Request:
    """What is tuned, and how.

    Attributes:
        model: path or Hugging Face id; None for the embedded one.
        ratio: mean pruning ratio over all layers, at least.
        length: tokens of each text.
        trials: questions per kind and depth.
        seed: of the texts.
        text: see `load_text`.
        data_dir: see `load_text`.
        device: of PyTorch; None: a GPU if there is one.
        out: the YAML file.
        json: the result file; None for none.
        reuse: a result file whose layers are taken over; None to measure them.
    """

    model: str | None
    ratio: float
    length: int
    trials: int
    seed: int
    text: str | None
    data_dir: Path | None
    device: str | None
    out: Path
    json: Path | None
    reuse: Path | None


def run(request: Request) -> None:
    """Measure every layer, print what was found, write the files.

    Raises:
        TokenFilterError: the model, the text or the ratio cannot be used, or a file cannot be written.
    """
    _check(request)
    started = time.monotonic()
    source, prose = load_text(request.text, request.data_dir)
    if request.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = request.model or str(default_model_path())
    console = Console(stderr=True)

    with console.status(f"Loading {path} ..."):
        model, tokenizer = load_model(path, request.device)
    longest = int(model.config.get_text_config().max_position_embeddings)
    if request.length > longest:
        raise EvaluationError([f"length={request.length} is beyond the model's {longest} tokens; use a shorter one."])
    tuner = Tuner(model)
    pruned_layers(request.ratio, tuner.num_layers)
    tokens = list(tokenizer(prose, add_special_tokens=False)["input_ids"])
    texts = make_texts(tokenizer, tokens, request.length, request.trials, request.seed)
    name = Path(path).name if request.model is None else path
    asked = {"length": request.length, "trials": request.trials, "seed": request.seed}
    origin = {"model": name, "text": source, **asked}
    known = [] if request.reuse is None else _layers_of(request.reuse, origin, tuner.num_layers)
    with progress_bar(console) as progress:
        scores, found = tune(tuner, texts, request.ratio, progress, known)
    result = {
        "kind": "tuning",
        **provenance(),
        "model": name,
        "text": source,
        "parameters": {"ratio": request.ratio, **asked},
        "seconds": round(time.monotonic() - started, 1),
        "settings": found.model_dump(mode="json"),
        "scores": [asdict(score) for score in scores],
    }
    print_tables(tuning_tables(result))
    _write(request.out, _yaml(found, name, request, result))
    console.print(f"Written: {request.out}")
    if request.json is not None:
        _write(request.json, json.dumps(result, indent=1) + "\n")
        console.print(f"Written: {request.json}")


def _check(request: Request) -> None:
    reasons = []
    if not 0 < request.ratio < 1:
        reasons.append(f"ratio={request.ratio:g} is no ratio to prune by; use one above 0 and below 1.")
    if request.length < 600:
        reasons.append(f"length={request.length} leaves nothing to prune behind the recent window; use at least 600.")
    for option, file in (("out", request.out), ("json", request.json)):
        if file is not None and not file.parent.is_dir():
            reasons.append(f"{option}={file} cannot be written: {file.parent} is no folder; choose another place.")
    if reasons:
        raise EvaluationError(reasons)


def load_model(path: str, device: str | None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        path: folder or Hugging Face id.
        device: of PyTorch; None: a GPU if there is one.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
        return model.to(where).eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            [
                f"model={path} cannot be loaded on {where} ({str(error).splitlines()[0]}); pass another --model or "
                "--device."
            ]
        ) from None


def _layers_of(path: Path, origin: dict[str, Any], num_layers: int) -> list[Score]:
    """Dense and every layer alone as an earlier run found them."""
    try:
        before = json.loads(path.read_text())
        theirs = {"model": before["model"], "text": before["text"], **before["parameters"]}
        by_name = {score["name"]: Score(**score) for score in before["scores"]}
        known = [by_name[name] for name in ("dense", *(f"layer {layer}" for layer in range(num_layers)))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError([f"reuse={path} is no result file of tune for this model ({error!r})."]) from None
    for key, value in origin.items():
        if theirs[key] != value:
            raise EvaluationError([f"reuse={path} was measured with {key}={theirs[key]}, not {value}; leave it out."])
    return known


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise EvaluationError([f"{path} cannot be written ({error}); choose another place."]) from None


def _yaml(found: FilterConfig, model: str, request: Request, result: dict[str, Any]) -> str:
    by_name = {score["name"]: score for score in result["scores"]}
    whole = [index for index, ratio in enumerate(found.schedule.ratios) if ratio == 0]

    def line(name: str) -> str:
        score = by_name[name]
        accuracy, nll = score["token_accuracy"], score["prose_nll"] - by_name["dense"]["prose_nll"]
        return f"#   {name:8} {100 * accuracy:5.1f} % of the answers' tokens, log-perplexity {nll:+.4f}"

    return "\n".join(
        [
            f"# {model}: the layers that recall keep every token, the others {KEPT} of every {found.chunk_size}",
            f"# behind the newest {found.recent_window}.",
            "# Found by:",
            f"#   {result['command']}",
            f"# At the end of {request.length} tokens, {request.trials} questions a kind and depth (docs/tuning.md):",
            *(line(name) for name in ("dense", "tuned", "uniform")),
            f"# Layers kept whole: {', '.join(map(str, whole))}.",
            "attention-backend: TOKEN_FILTERING",
            "additional-config:",
            "  token_filtering:",
            f"    pruning_ratio: {found.pruning_ratio:g}",
            f"    chunk_size: {found.chunk_size}",
            f"    recent_window: {found.recent_window}",
            "    schedule:",
            "      kind: per_layer",
            f"      ratios: [{', '.join(f'{ratio:g}' for ratio in found.schedule.ratios)}]",
            "",
        ]
    )
