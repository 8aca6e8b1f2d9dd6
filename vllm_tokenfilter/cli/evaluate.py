"""`vllm-tokenfilter eval`: quality against ratio, method and window, on the user's machine and model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_tokenfilter.cli.output import print_tables
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation.run import EvaluationPlan, run
from vllm_tokenfilter.evaluation.texts import load_text
from vllm_tokenfilter.reports.tables import evaluation_tables


def evaluate(plan: EvaluationPlan, text_source: str | None, out: Path, html: Path | None) -> None:
    """Measure, print the tables, write the files.

    Raises:
        TokenFilterError: the plan cannot be measured; cells finished before are saved.
    """
    plan.check()
    text = load_text(text_source, plan.data_dir)
    if html is not None and not html.parent.is_dir():
        raise EvaluationError([f"html={html} cannot be written: {html.parent} is no folder; choose another place."])
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        evaluation = run(plan, text, out, progress)
    print_tables(evaluation_tables(evaluation.model_dump(mode="json")))
    console.print(f"Written: {out}")
    if html is not None:
        from vllm_tokenfilter.reports.page import write_page

        write_page([json.loads(out.read_text())], html)
        console.print(f"Written: {html}")


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """A bar that shows one stage after the other; yields what is told of each, and returns what to call per unit."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        current: list[Any] = []

        def start(description: str, units: int) -> Callable[[], None]:
            if current:
                bar.update(current[-1], visible=False)
            current.append(bar.add_task(description, total=units or None))
            return lambda: bar.advance(current[-1])

        yield start
