"""The page of `vllm-tokenfilter inspect`: one file, without a network, for keyboard and screen reader too."""

import base64
import html
import json
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.inspection.compare import PRUNED, RAW, Inspection
from vllm_tokenfilter.local.paths import write_text
from vllm_tokenfilter.local.provenance import described

_LOSSES = 25


def write_page(seen: Inspection, config: FilterConfig, origin: dict[str, Any], path: Path) -> None:
    """Write the page; `origin` is `provenance()` with the keys model and source (the text's name).

    Raises:
        EvaluationError: it cannot be written.
    """
    write_text(path, render_page(seen, config, origin), "html")


def render_page(seen: Inspection, config: FilterConfig, origin: dict[str, Any]) -> str:
    """The page as text; the same inspection gives the same bytes."""
    title = f"Token Filtering: {origin['source']}, {origin['model']}, ratio {config.pruning_ratio:g}"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_resource('page.css')}</style></head><body><main>",
            f"<h1>{html.escape(title)}</h1>",
            _summary(seen, config),
            _controls(seen),
            _text(seen),
            _maps(),
            "<h2>Tables</h2>",
            _layer_table(seen),
            _loss_table(seen),
            f"<p><small>{html.escape(_origin(origin, config))}</small></p>",
            "</main>",
            f'<script type="application/json" id="data">{_data(seen, config)}</script>',
            f"<script>{_resource('page.js')}</script></body></html>\n",
        ]
    )


def figures(seen: Inspection) -> dict[str, float]:
    """The page's figures: counts, shares, perplexities, nats."""
    num_filtered = seen.num_filtered_layers
    sealed = int((seen.states != RAW).any(0).sum())
    entries = num_filtered * len(seen.text.ids)
    return {
        "tokens": len(seen.text.ids),
        "sealed": sealed,
        "pruned_share": float((seen.states == PRUNED).sum()) / entries if entries else 0.0,
        "dense_perplexity": _perplexity(seen.dense_probability),
        "filtered_perplexity": _perplexity(seen.filtered_probability),
        "same_choice": float(seen.same_choice.mean()),
        "kl": float(seen.kl.mean()),
    }


def _perplexity(probability: "np.typing.NDArray[np.float64]") -> float:
    return math.exp(-float(np.log(np.maximum(probability, 1e-300)).mean()))


def _summary(seen: Inspection, config: FilterConfig) -> str:
    found, dense = figures(seen), "; ".join(f"{len(ids)} {reason}" for reason, ids in seen.dense_layers.items())
    shown = {
        "tokens": f"{found['tokens']:.0f}",
        "of them in sealed chunks": f"{found['sealed']:.0f}",
        "filtered layers": f"{seen.num_filtered_layers} of {len(seen.layers)}",
        "entries pruned there": f"{found['pruned_share']:.1%}",
        "perplexity, dense": f"{found['dense_perplexity']:.2f}",
        "perplexity, filtered": f"{found['filtered_perplexity']:.2f}",
        "same most likely next token": f"{found['same_choice']:.1%}",
        "divergence from dense": f"{found['kl']:.3f} nats",
    }
    items = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in shown.items())
    notes = []
    if seen.text.num_cut:
        notes.append(f"The last {seen.text.num_cut} tokens of the text were left out (--limit).")
    if dense:
        notes.append(f"Layers that keep every token: {html.escape(dense)}.")
    if not found["sealed"]:
        notes.append(
            f"Nothing was sealed: a chunk is due from {config.layout.first_seal} tokens on, so this text is read dense."
        )
    return f'<dl class="figures">{items}</dl>' + "".join(f"<p>{note}</p>" for note in notes)


def _controls(seen: Inspection) -> str:
    options = "".join(f'<option value="{row}">layer {layer}</option>' for row, layer in enumerate(seen.layers))
    return (
        '<div class="bar"><label>Show <select id="layer"><option value="all">all layers</option>'
        f'{options}</select></label><output id="told" aria-live="polite" for="layer"></output></div>'
    )


def _text(seen: Inspection) -> str:
    pruned = (seen.states == PRUNED).sum(0)
    whole = (seen.states == RAW).all(0)
    most = max(seen.num_filtered_layers, 1)
    spans = []
    for index, piece in enumerate(seen.text.pieces):
        shown = html.escape(piece) or "·"  # a token that ends inside a character
        style = f' style="--p:{pruned[index] / most:.3f}"' if pruned[index] else ""
        kind = ' class="r"' if whole[index] else ""
        spans.append(f'<span role="option" id="t{index}"{kind}{style}>{shown}</span>')
    return (
        '<h2 id="text-head">The text</h2><p class="note">The stronger the shade, the more layers dropped the token; '
        "underlined: at least half of them, doubly: three quarters. Grey: whole in every layer (the recent window and "
        "what is not sealed yet). Arrow keys move token by token, up and down by 16, page keys by a chunk.</p>"
        '<div id="text" tabindex="0" role="listbox" aria-labelledby="text-head" aria-activedescendant="t0">'
        + "".join(spans)
        + "</div>"
    )


def _maps() -> str:
    def figure(name: str, title: str, table: str, legend: str, note: str) -> str:
        return (
            f'<h2 id="{name}-head">{title}</h2><p class="note" id="{name}-note">{note}</p>'
            f'<div class="legend">{legend}</div><canvas id="{name}" tabindex="0" role="img" '
            f'aria-labelledby="{name}-head" aria-describedby="{name}-note" aria-details="{table}"></canvas>'
        )

    def sample(name: str, colour: str) -> str:
        return f'<span><i style="background:{colour}"></i>{name}</span>'

    return (
        figure(
            "map",
            "Layers and positions",
            "layers-table",
            sample("pruned", "rgb(var(--heat))") + sample("kept", "var(--paper)") + sample("whole", "var(--raw)"),
            "A row is a layer, a column a token. The keys of the text move the cursor here too, and so does a click; "
            "with Shift it chooses the layer as well.",
        )
        + figure(
            "lines",
            "Similarity to the running anchor",
            "layers-table",
            sample("key", "var(--key)") + sample("value (dashed)", "var(--value)"),
            "Cosine of a token's key and value to the decayed mean of those before it, mean over heads and the layers "
            "shown. A token that is similar in both is redundant.",
        )
        + figure(
            "cost",
            "Probability of the next token: filtered minus dense",
            "loss-table",
            sample("less likely, filtered (below)", "var(--cost)") + sample("more likely (above)", "var(--gain)"),
            "At each position, how the probability of the token that really follows changes.",
        )
    )


def _layer_table(seen: Inspection) -> str:
    dense = {index: reason for reason, indices in seen.dense_layers.items() for index in indices}
    rows = []
    for row, layer in enumerate(seen.layers):
        pruned = int((seen.states[row] == PRUNED).sum())
        shown = dense.get(layer, f"{pruned}")
        rows.append(
            [str(layer), shown, f"{seen.key_similarity[row].mean():.3f}", f"{seen.value_similarity[row].mean():.3f}"]
        )
    head = ["layer", "tokens pruned", "mean key similarity", "mean value similarity"]
    return _table("layers-table", "By layer", head, rows)


def _loss_table(seen: Inspection) -> str:
    change = seen.filtered_probability - seen.dense_probability
    rows = [
        [
            html.escape(json.dumps(seen.text.pieces[position + 1], ensure_ascii=False)),
            str(position + 1),
            f"{seen.dense_probability[position]:.1%}",
            f"{seen.filtered_probability[position]:.1%}",
            f"{seen.kl[position]:.3f}",
        ]
        for position in np.argsort(change, kind="stable")[:_LOSSES]
    ]
    head = ["token", "position", "dense", "filtered", "divergence, nats"]
    return _table("loss-table", f"The {len(rows)} tokens whose probability fell most", head, rows)


def _table(name: str, caption: str, head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table id="{name}">'
        f"<caption>{caption}</caption><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _data(seen: Inspection, config: FilterConfig) -> str:
    def packed(array: Any) -> str:
        return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()

    content = {
        "tokens": len(seen.text.ids),
        "layers": seen.layers,
        "filtered": seen.num_filtered_layers,
        "chunk": config.chunk_size,
        "states": packed(seen.states),
        "key": packed(np.rint(seen.key_similarity * 127).astype(np.int8)),
        "value": packed(np.rint(seen.value_similarity * 127).astype(np.int8)),
        "before": [round(float(value), 5) for value in seen.dense_probability],
        "after": [round(float(value), 5) for value in seen.filtered_probability],
    }
    return json.dumps(content)


def _origin(origin: dict[str, Any], config: FilterConfig) -> str:
    settings = [f"{name} {json.dumps(value)}" for name, value in _settings(config.model_dump(mode="json"))]
    return f"{', '.join(settings)}; {described(origin)}"


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Those that are set, those of a part under its name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            yield prefix + name, value


def _resource(name: str) -> str:
    return resources.files("vllm_tokenfilter.inspection").joinpath(name).read_text(encoding="utf-8")
