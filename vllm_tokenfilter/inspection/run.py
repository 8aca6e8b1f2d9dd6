"""Inspects one text: reads it, feeds it to an engine dense and filtered, and writes the page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.inspection.compare import inspect_text
from vllm_tokenfilter.inspection.page import figures, write_page
from vllm_tokenfilter.inspection.text import read_text
from vllm_tokenfilter.local.models import resolve_model
from vllm_tokenfilter.local.paths import unwritable
from vllm_tokenfilter.local.progress import Progress
from vllm_tokenfilter.local.provenance import provenance


@dataclass(frozen=True)
class InspectionRequest:
    """What is looked at."""

    text: Path  #: UTF-8 file.
    chat: bool  #: put the text into the model's chat template.
    model: str | None  #: path or Hugging Face id; None for the embedded one.
    limit: int  #: tokens of the text that are read.
    step_tokens: int  #: tokens of each step.
    html: Path  #: the page.
    config: FilterConfig  #: our settings.

    def check(self) -> None:
        """Refuse what is wrong before an engine starts.

        Raises:
            EvaluationError: there is nothing to see, or a file is missing or cannot be written.
        """
        reasons = unwritable(html=self.html)
        if self.config.pruning_ratio == 0:
            reasons.append("pruning_ratio=0 removes nothing, so there is nothing to see; use one above 0.")
        if not self.text.is_file():
            reasons.append(f"text={self.text} must be a UTF-8 file that exists.")
        if self.limit < 2:
            reasons.append(f"limit={self.limit} must be at least 2 tokens.")
        if self.step_tokens < 1:
            reasons.append(f"step={self.step_tokens} must be at least 1 token.")
        if reasons:
            raise EvaluationError(reasons)


def run(request: InspectionRequest, progress: Progress) -> dict[str, float]:
    """Read the text dense and filtered and write the page; its figures, see `figures`.

    Raises:
        TokenFilterError: the text, the model or the settings cannot be used, or the page cannot be written.
    """
    request.check()
    path, name = resolve_model(request.model)
    from transformers import AutoConfig, AutoTokenizer

    try:
        longest = int(AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings)
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"model={path} cannot be read ({str(error).splitlines()[0]}); pass another.") from None
    text = read_text(request.text, request.chat, tokenizer, min(request.limit, longest - 1))
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

    progress(f"Starting vLLM for {len(text.ids)} tokens ...", 0)
    engine = ScoringEngine(path, len(text.ids) + 1, max_num_seqs=1, max_step_tokens=request.step_tokens)
    try:
        progress("Reading the text dense and filtered ...", 0)
        seen = inspect_text(engine, text, request.config, request.step_tokens)
    finally:
        engine.close()
    origin = {**provenance(), "model": name, "source": request.text.name}
    write_page(seen, request.config, origin, request.html)
    return figures(seen)
