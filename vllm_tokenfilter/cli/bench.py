"""`vllm-tokenfilter bench`: stock vLLM against Token Filtering over real servers, interleaved."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_tokenfilter.bench.run import Benchmark, Plan, run
from vllm_tokenfilter.errors import EvaluationError


def bench(plan: Plan, out: Path, html: Path | None) -> None:
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
    Console().print(table(benchmark))
    console.print(f"Written: {out}")
    if html is not None:
        from vllm_tokenfilter.reports.page import write_page

        write_page([json.loads(out.read_text())], html)
        console.print(f"Written: {html}")


@contextmanager
def _progress(console: Console, started: Callable[[], None]) -> Iterator[Callable[[int], Callable[[str], None]]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=False) as bar:

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


def table(benchmark: Benchmark) -> Table:
    """A row per server and workload; ratios to stock in brackets, taken inside a repeat."""
    found = Table(
        "server",
        "requests x tokens",
        "first token",
        "between tokens (p99)",
        "output tokens/s",
        "peak memory",
        "KV tokens",
        "preempted",
        title="Medians over repeats; in brackets the ratio to stock",
    )
    for row in benchmark.summary:
        capacity = benchmark.capacity.get(row["server"], {}).get("kv_cache_tokens")
        found.add_row(
            row["server"],
            f"{row['concurrency']} x {row['context']}",
            f"{row['first_token_s']['median'] * 1e3:.0f} ms{_ratio(row, 'first_token_s')}",
            f"{row['between_median_s']['median'] * 1e3:.1f} ms{_ratio(row, 'between_median_s')} "
            f"({row['between_p99_s']['median'] * 1e3:.1f})",
            f"{row['output_tokens_per_s']['median']:.1f}{_ratio(row, 'output_tokens_per_s')}",
            f"{row['peak_resident_bytes']['median'] / 2**30:.2f} GiB" if row["peak_resident_bytes"]["median"] else "-",
            f"{capacity:,.0f}" if capacity else "-",
            f"{row['preemptions']['median']:.0f}",
        )
    return found


def _ratio(row: dict[str, Any], name: str) -> str:
    ratio = row.get(f"{name}_to_stock")
    return f" [{ratio['median']:.2f}]" if ratio else ""
