"""Engines side by side, each in a process of its own that idles while another is measured."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from vllm_tokenfilter.models import default_model_path

#: What a measurement takes: the `LLM`, and the task as it was sent.
Measure = Callable[..., Any]


def ours(pruning_ratio: float, **settings: Any) -> dict[str, Any]:
    """Engine arguments that select Token Filtering."""
    return {
        "attention_backend": "TOKEN_FILTERING",
        "additional_config": {"token_filtering": {"pruning_ratio": pruning_ratio, **settings}},
    }


class EngineProcess:
    """One engine on the embedded model; stock vLLM unless the arguments select ours."""

    def __init__(self, arguments: dict[str, Any], measure: Measure) -> None:
        """Start it and wait until it is ready.

        Args:
            arguments: of `vllm.LLM`.
            measure: a module's function, called in the engine's process for each task.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, str(default_model_path()), arguments, measure))
        self._process.start()
        self._pipe.recv()

    def run(self, *task: Any) -> Any:
        """Measure one task."""
        self._pipe.send(task)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(30)


def _serve(pipe: Any, model: str, arguments: dict[str, Any], measure: Measure) -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    if "additional_config" not in arguments:
        os.environ["VLLM_PLUGINS"] = "none"
    from vllm import LLM

    llm = LLM(model, dtype="bfloat16", seed=0, **{"enforce_eager": True, **arguments})
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        pipe.send(measure(llm, *task))
