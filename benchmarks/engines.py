"""Engines side by side, each in a process of its own that idles while another is measured."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track

from vllm_tokenfilter.local.models import default_model_path

#: What a measurement takes: the `LLM`, and the task as it was sent.
Measure = Callable[..., Any]


def ours(pruning_ratio: float, **settings: Any) -> dict[str, Any]:
    """Engine arguments that select Token Filtering."""
    return {
        "attention_backend": "TOKEN_FILTERING",
        "additional_config": {"token_filtering": {"pruning_ratio": pruning_ratio, **settings}},
    }


class EngineProcess:
    """One engine; stock vLLM unless the arguments select ours."""

    def __init__(self, arguments: dict[str, Any], measure: Measure, model: str | None = None) -> None:
        """Start it and wait until it is ready.

        Args:
            arguments: of `vllm.LLM`.
            measure: a module's function, called in the engine's process for each task.
            model: folder of the model; the embedded one if left out.
        """
        model = model or str(default_model_path())
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, model, arguments, measure))
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


def interleave(
    engines: Mapping[str, dict[str, Any]],
    cases: Mapping[str, tuple[str, int]],
    measure: Measure,
    repeats: int,
    console: Console,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """Measure every case once in each repeat; what `measure` returned, by case, one dict a repeat.

    Args:
        engines: arguments of `vllm.LLM` by name; all live side by side and idle while another is measured.
        cases: engine and prompt tokens by name.
        measure: called with the `LLM`, the prompt tokens and a seed.
        repeats: after one that warms up, with prompts of at most 600 tokens.
        console: where progress is shown.
        model: folder of the model; the embedded one if left out.
    """
    processes: dict[str, EngineProcess] = {}
    for name, arguments in engines.items():
        with console.status(f"Starting {name} ..."):
            processes[name] = EngineProcess(arguments, measure, model)
    samples = []
    for repeat in track(range(-1, repeats), description="Repeats (the first warms up)"):
        sample: dict[str, Any] = {}
        ordered = list(cases.items())
        # Every other repeat runs backwards, so that no case always follows the same one.
        for case, (engine, length) in ordered if repeat % 2 else reversed(ordered):
            length = length if repeat >= 0 else min(length, 600)
            sample[case] = processes[engine].run(length, 1000 * (repeat + 1) + len(sample))
        if repeat >= 0:
            samples.append(sample)
    for process in processes.values():
        process.close()
    return samples


def _serve(pipe: Any, model: str, arguments: dict[str, Any], measure: Measure) -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    if "additional_config" not in arguments:
        os.environ["VLLM_PLUGINS"] = "none"
    from vllm import LLM

    llm = LLM(model, dtype="bfloat16", seed=0, **{"enforce_eager": True, **arguments})
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        pipe.send(measure(llm, *task))
