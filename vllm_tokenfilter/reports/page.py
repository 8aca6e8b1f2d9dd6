"""One self-contained HTML page: plots and tables of any number of result files, readable without a network."""

import html
from pathlib import Path

from vllm_tokenfilter.local.paths import write_text
from vllm_tokenfilter.local.provenance import described
from vllm_tokenfilter.reports.figures import Result, benchmarks, evaluations
from vllm_tokenfilter.reports.plots import plots
from vllm_tokenfilter.reports.tables import Rows, benchmark_tables, evaluation_tables

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8888; text-align: right; } th { position: sticky; top: 0; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; font-weight: 600; padding: .25rem 0; }
small { color: #6e7781; }
"""


def write_page(results: list[Result], path: Path) -> None:
    """Write the page of result files of `bench` and `eval`, as read from JSON.

    Raises:
        EvaluationError: it cannot be written, or matplotlib is missing.
    """
    write_text(path, render_page(results), "html")


def render_page(results: list[Result]) -> str:
    """The page as text; the same results give the same bytes."""
    models = ", ".join(dict.fromkeys(html.escape(str(result["model"])) for result in results))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Token Filtering: {models}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Token Filtering: {models}</h1>",
    ]
    for title, svg in plots(results).items():
        label = html.escape(title, quote=True)
        picture = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        parts.append(f"<figure><figcaption><h2>{html.escape(title)}</h2></figcaption>{picture}</figure>")
    for result in benchmarks(results):
        parts += [_table(title, rows) for title, rows in benchmark_tables(result)]
    for result in evaluations(results):
        parts += [_table(title, rows) for title, rows in evaluation_tables(result)]
    parts.append("<h2>Where the figures come from</h2><ul>")
    for result in results:
        origin = f"{result['kind']} of {result['model']}: {described(result)}"
        parts.append(f"<li><small>{html.escape(origin)}</small></li>")
    parts.append("</ul></body></html>\n")
    return "\n".join(parts)


def _table(title: str, rows: Rows) -> str:
    head, *body = rows
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{html.escape(title)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
