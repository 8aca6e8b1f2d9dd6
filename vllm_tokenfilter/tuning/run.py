"""Tunes one model: reads it, measures every layer, and writes what was found."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation.texts import load_text
from vllm_tokenfilter.local.models import resolve_model
from vllm_tokenfilter.local.paths import unwritable, write_text
from vllm_tokenfilter.local.progress import Progress
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.tuning.result import Tuning
from vllm_tokenfilter.tuning.search import pruned_layers, search
from vllm_tokenfilter.tuning.texts import make_texts
from vllm_tokenfilter.tuning.tuner import Score, Tuner, load_model


@dataclass(frozen=True)
class TuningRequest:
    """What is tuned, and how."""

    model: str | None  #: path or Hugging Face id; None for the embedded one.
    ratio: float  #: mean pruning ratio over all layers, at least.
    length: int  #: tokens of each text.
    trials: int  #: questions per kind and depth.
    seed: int  #: of the texts.
    text: str | None  #: see `load_text`.
    data_dir: Path | None  #: see `load_text`.
    device: str | None  #: of PyTorch; None: a GPU if there is one.
    out: Path  #: the YAML file.
    json: Path | None  #: the result file; None for none.
    reuse: Path | None  #: a result file whose layers are taken over; None to measure them.

    def check(self) -> None:
        """Refuse what is wrong before a model is read.

        Raises:
            EvaluationError: a number is out of range, or a file cannot be written.
        """
        reasons = unwritable(out=self.out, json=self.json)
        if not 0 < self.ratio < 1:
            reasons.append(f"ratio={self.ratio:g} must be above 0 and below 1.")
        if self.length < 600:
            reasons.append(f"length={self.length} leaves nothing to prune before the recent window; use at least 600.")
        if reasons:
            raise EvaluationError(reasons)


def run(request: TuningRequest, progress: Progress) -> Tuning:
    """Measure every layer and write the files.

    Raises:
        TokenFilterError: the model, the text or the ratio cannot be used, or a file cannot be written.
    """
    request.check()
    started = time.monotonic()
    source, prose = load_text(request.text, request.data_dir)
    path, name = resolve_model(request.model)
    progress(f"Loading {path} ...", 0)
    model, tokenizer = load_model(path, request.device)
    longest = int(model.config.get_text_config().max_position_embeddings)
    if request.length > longest:
        raise EvaluationError(f"length={request.length} is beyond the model's {longest} tokens; use a shorter one.")
    tuner = Tuner(model)
    pruned_layers(request.ratio, tuner.num_layers)
    tokens = list(tokenizer(prose, add_special_tokens=False)["input_ids"])
    texts = make_texts(tokenizer, tokens, request.length, request.trials, request.seed)
    asked = {"length": request.length, "trials": request.trials, "seed": request.seed}
    known = [] if request.reuse is None else _layers_of(request.reuse, tuner, {"model": name, "text": source, **asked})
    scores, found = search(tuner, texts, request.ratio, progress, known)
    tuning = Tuning(
        **provenance(),
        model=name,
        text=source,
        parameters={"ratio": request.ratio, **asked},
        seconds=round(time.monotonic() - started, 1),
        settings=found.model_dump(mode="json"),
        scores=scores,
    )
    write_text(request.out, tuning.settings_file(), "out")
    if request.json is not None:
        tuning.write(request.json)
    return tuning


def _layers_of(path: Path, tuner: Tuner, origin: dict[str, Any]) -> list[Score]:
    """Dense and every layer alone as an earlier run found them."""
    before = Tuning.read(path, "reuse")
    theirs = {"model": before.model, "text": before.text, **before.parameters}
    for key, value in origin.items():
        if theirs.get(key) != value:
            raise EvaluationError(f"reuse={path} was measured with {key}={theirs.get(key)}, not {value}; leave it out.")
    known = [score for score in before.scores if score.name not in ("tuned", "uniform")]
    if len(known) != tuner.num_layers + 1:
        raise EvaluationError(f"reuse={path} must hold each of the model's {tuner.num_layers} layers; leave it out.")
    return known
