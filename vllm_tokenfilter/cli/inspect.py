"""`vllm-tokenfilter inspect`: see on one text what is dropped, and what it costs the prediction."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.local.models import default_model_path
from vllm_tokenfilter.local.provenance import provenance


@dataclass(frozen=True)
class Request:
    """What is looked at.

    Attributes:
        text: UTF-8 file.
        chat: put the text into the model's chat template.
        model: path or Hugging Face id; None for the embedded one.
        limit: tokens of the text that are read.
        step_tokens: tokens of each step.
        html: the page.
        as_json: print the figures as JSON.
    """

    text: Path
    chat: bool
    model: str | None
    limit: int
    step_tokens: int
    html: Path
    as_json: bool


def inspect(request: Request, config: FilterConfig) -> None:
    """Read the text dense and filtered, write the page, print its figures.

    Raises:
        TokenFilterError: the text, the model or the settings cannot be used, or the page cannot be written.
    """
    _check(request, config)
    if request.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = request.model or str(default_model_path())
    console = Console(stderr=True)
    from transformers import AutoConfig, AutoTokenizer

    from vllm_tokenfilter.inspection.compare import inspect_text, read_text
    from vllm_tokenfilter.inspection.page import figures, write_page

    try:
        longest = int(AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings)
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise EvaluationError([f"model={path} cannot be read ({str(error).splitlines()[0]}); pass another."]) from None
    text = read_text(request.text, request.chat, tokenizer, min(request.limit, longest - 1))
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

    with console.status(f"Starting vLLM for {len(text.ids)} tokens ..."):
        engine = ScoringEngine(path, len(text.ids) + 1, max_num_seqs=1, max_step_tokens=request.step_tokens)
    try:
        with console.status("Reading the text dense and filtered ..."):
            seen = inspect_text(engine, text, config, request.step_tokens)
    finally:
        engine.close()
    origin = {**provenance(), "model": Path(path).name if request.model is None else path, "source": request.text.name}
    write_page(seen, config, origin, request.html)
    found = figures(seen)
    if request.as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name.replace('_', ' '):22} {value:.4g}")
    console.print(f"Written: {request.html}")


def _check(request: Request, config: FilterConfig) -> None:
    reasons = []
    if config.pruning_ratio == 0:
        reasons.append("pruning_ratio=0 drops nothing, so there is nothing to see; use one above 0.")
    if not request.html.parent.is_dir():
        reasons.append(f"html={request.html} cannot be written: {request.html.parent} is no folder.")
    if not request.text.is_file():
        reasons.append(f"text={request.text} is no file; pass a UTF-8 file.")
    if request.limit < 2:
        reasons.append(f"limit={request.limit} is no text; use at least 2.")
    if request.step_tokens < 1:
        reasons.append(f"step={request.step_tokens} is no step; use at least 1.")
    if reasons:
        raise EvaluationError(reasons)
