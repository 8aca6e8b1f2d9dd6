"""What commands print for people."""

from rich import box
from rich.console import Console
from rich.table import Table

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
