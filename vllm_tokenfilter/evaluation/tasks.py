"""Multiple-choice tasks through lm-eval, scored with the visibility decoding has.

The task definitions, prompts and metrics are lm-eval's. Where `--data-dir` holds a task's rows, they take the place of
the hub's. lm-eval's own vLLM model scores a whole text in one prefill step, in which nothing is filtered yet, and asks
for a distribution called vllm at import: so the model here is our own.

Source: lm_eval/api/model.py (`TemplateLM`), lm_eval/api/task.py (`custom_dataset`).
"""

import bz2
import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation.tails import score_tails

if TYPE_CHECKING:
    from vllm_tokenfilter.integration.offline.scoring import ScoringEngine

#: The seven tasks of arXiv 2512.07090.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

_QUESTION = {"doc_to_text": "{{query.strip()}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "gold"}
_CONTINUED = {"doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
_CONTEXTS = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}

#: Task -> its file in --data-dir, and the same prompt lm-eval makes from the hub's columns.
LOCAL_TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "boolq": ("boolq.jsonl", _QUESTION),
    "piqa": ("piqa.jsonl", _QUESTION),
    "hellaswag": ("hellaswag_val.txt.bz2", _CONTINUED),
    "winogrande": ("winogrande.jsonl", _CONTEXTS),
    "arc_easy": ("arc_easy.jsonl", _QUESTION),
    "arc_challenge": ("arc_challenge.jsonl", _QUESTION),
    "openbookqa": ("openbook_qa.jsonl", _CONTINUED),
    "mmlu": ("mmlu.jsonl", _QUESTION),
}


def require_lm_eval() -> None:
    """Raise EvaluationError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"Tasks need lm-eval ({error}); pip install 'vllm-tokenfilter[eval]'.") from None


def prepare_task(name: str, data_dir: Path | None) -> Any:
    """What lm-eval takes for a task: its name, or its definition over the rows in `data_dir`.

    Raises:
        EvaluationError: the task is unknown or its rows cannot be had.
    """
    require_lm_eval()
    from datasets import Dataset

    local = data_dir / LOCAL_TASKS[name][0] if data_dir is not None and name in LOCAL_TASKS else None
    if local is not None and local.exists():
        rows = Dataset.from_list(_rows(local))
        return {
            "task": name,
            "custom_dataset": lambda **kwargs: {"test": rows},
            "test_split": "test",
            "output_type": "multiple_choice",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
            **LOCAL_TASKS[name][1],
        }
    if name not in _task_names():
        known = ", ".join(PAPER_TASKS)
        raise EvaluationError(f"task={name} must be a task of lm-eval: {known}, mmlu, or any other it has.")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        wanted = f"{LOCAL_TASKS[name][0]} in --data-dir" if name in LOCAL_TASKS else "a connection to the hub"
        raise EvaluationError(f"task={name} has no data: it needs {wanted}, or HF_HUB_OFFLINE unset to download it.")
    return name


@functools.cache
def _task_names() -> frozenset[str]:
    """Every task lm-eval knows; reading their definitions takes seconds."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".bz2":
            # Six lines a task: context, label, four endings.
            lines = bz2.decompress(path.read_bytes()).decode().splitlines()
            return [
                {"query": lines[i], "gold": int(lines[i + 1]), "choices": lines[i + 2 : i + 6]}
                for i in range(0, len(lines) - 5, 6)
            ]
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"data-dir: {path.name} cannot be read ({error}); see docs/evaluation.md.") from None


def run_task(
    scorer: "ScoringEngine", name: str, task: Any, limit: int | None, step_tokens: int, advance: Callable[[], None]
) -> tuple[dict[str, float], list[float]]:
    """Values (accuracy, normalised accuracy where the task has it, standard errors) and each row's 0 or 1.

    `task` is what `prepare_task` made of the name. Its first `limit` rows (None: all) are scored in steps of
    `step_tokens`; `advance` is called once a continuation is.

    Raises:
        EvaluationError: lm-eval cannot run it.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = _scoring_lm(scorer, step_tokens, advance)
    try:
        found = simple_evaluate(
            model=model, tasks=[task], num_fewshot=0, limit=limit, bootstrap_iters=1000, log_samples=True
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise EvaluationError(f"task={name} has no data ({error}); pass --data-dir.") from None
    results = found["results"][name]
    values = {"accuracy": float(results["acc,none"]), "standard_error": float(results["acc_stderr,none"])}
    if "acc_norm,none" in results:
        values["accuracy_normalised"] = float(results["acc_norm,none"])
        values["standard_error_normalised"] = float(results["acc_norm_stderr,none"])
    rows = sorted(next(iter(found["samples"].values())), key=lambda row: int(row["doc_id"]))
    return values, [float(row["acc"]) for row in rows]


def _scoring_lm(scorer: "ScoringEngine", step_tokens: int, advance: Callable[[], None]) -> Any:
    from lm_eval.api.model import TemplateLM

    class ScoringLM(TemplateLM):  # type: ignore[misc]
        """lm-eval's model contract over the scoring engine."""

        tokenizer = scorer.tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(scorer.tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(scorer.tokenizer(string, **special)["input_ids"])

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            # A text longer than the model keeps its end, as in lm-eval's own models.
            texts = [(context + answer)[-(scorer.max_model_len - 1) :] for _, context, answer in requests]
            lengths = [len(answer) for _, _, answer in requests]
            tails = score_tails(scorer, texts, lengths, step_tokens, advance)
            return [(sum(tail.logprobs), all(tail.hits)) for tail in tails]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise EvaluationError("This task scores running text; use --metric perplexity instead.")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise EvaluationError("This task generates text; eval scores multiple-choice tasks.")

    return ScoringLM()
