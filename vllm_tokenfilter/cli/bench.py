"""`vllm-tokenfilter bench`: stock vLLM against Token Filtering over real servers, interleaved."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_tokenfilter.bench.run import BenchmarkPlan, run
from vllm_tokenfilter.cli.output import print_tables
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.reports.tables import benchmark_tables


def bench(plan: BenchmarkPlan, out: Path, html: Path | None) -> None:
    """Measure, print the table, write the files.

    Raises:
        TokenFilterError: the plan cannot be measured; samples taken before are saved.
    """
    plan.check()
    if html is not None and not html.parent.is_dir():
        raise EvaluationError([f"html={html} cannot be written: {html.parent} is no folder; choose another place."])
    console = Console(stderr=True)
    with console.status("Starting servers ...") as status, _progress(console, status.stop) as progress:
        benchmark = run(plan, out, progress)
    print_tables(benchmark_tables(benchmark.model_dump(mode="json")))
    console.print(f"Written: {out}")
    if html is not None:
        from vllm_tokenfilter.reports.page import write_page

        write_page([json.loads(out.read_text())], html)
        console.print(f"Written: {html}")


@contextmanager
def _progress(console: Console, started: Callable[[], None]) -> Iterator[Callable[[int], Callable[[str], None]]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:

        def start(total: int) -> Callable[[str], None]:
            started()
            task = bar.add_task("", total=total)
            first = True

            def step(description: str) -> None:
                nonlocal first
                bar.update(task, description=description, advance=0 if first else 1)
                first = False

            return step

        yield start
