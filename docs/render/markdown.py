"""Rows of a table as Markdown."""

from vllm_tokenfilter.reports.tables import Rows


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])
