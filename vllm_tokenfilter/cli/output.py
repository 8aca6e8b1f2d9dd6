"""What commands print for people."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_tokenfilter.local import progress
from vllm_tokenfilter.reports.tables import Rows


def print_tables(tables: list[tuple[str, Rows]]) -> None:
    """Print titled tables, the first row of each as its head; a file or pipe gets them at full width."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for title, (head, *body) in tables:
        table = Table(*head, title=title, box=box.SIMPLE_HEAD)
        for row in body:
            table.add_row(*row)
        console.print(table)


@contextmanager
def progress_bar() -> Iterator[progress.Progress]:
    """A bar on stderr that shows one stage after the other."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown: list[TaskID] = []

        def start(stage: str, units: int) -> progress.Advance:
            if shown:
                bar.update(shown[-1], visible=False)
            shown.append(bar.add_task(stage, total=units or None))
            return lambda unit=None: bar.update(shown[-1], advance=1, description=unit)

        yield start


def say_written(*files: Path | None) -> None:
    """Say on stderr which files were written."""
    for file in files:
        if file is not None:
            Console(stderr=True).print(f"Written: {file}")


def write_page_of(result: Path, page: Path | None) -> None:
    """Write the page of a result file, where one is wanted."""
    if page is not None:
        from vllm_tokenfilter.reports.page import write_page

        write_page([json.loads(result.read_text())], page)
