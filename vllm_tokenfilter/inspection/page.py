"""The page of `vllm-tokenfilter inspect`: one file, without a network, for keyboard and screen reader too."""

import base64
import html
import json
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from string import Template
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
    return Template(_resource("page.html")).substitute(
        title=html.escape(f"Token Filtering: {origin['source']}, {origin['model']}, ratio {config.pruning_ratio:g}"),
        style=_resource("page.css"),
        figures=_figures(seen),
        notes=_notes(seen, config),
        layers="".join(f'<option value="{row}">layer {layer}</option>' for row, layer in enumerate(seen.layers)),
        text=_text(seen),
        layer_table=_layer_table(seen),
        loss_table=_loss_table(seen),
        origin=html.escape(_origin(origin, config)),
        data=_data(seen, config),
        script=_resource("page.js"),
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


def _figures(seen: Inspection) -> str:
    found = figures(seen)
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
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())


def _notes(seen: Inspection, config: FilterConfig) -> str:
    notes, first = [], config.layout.first_seal
    if seen.text.num_cut:
        notes.append(f"The last {seen.text.num_cut} tokens of the text were left out (--limit).")
    if dense := "; ".join(f"{len(ids)} {reason}" for reason, ids in seen.dense_layers.items()):
        notes.append(f"Layers that keep every token: {html.escape(dense)}.")
    if (seen.states == RAW).all():
        notes.append(f"Nothing was sealed: a chunk is due from {first} tokens on, so this text is read dense.")
    return "".join(f"<p>{note}</p>" for note in notes)


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
    return "".join(spans)


def _layer_table(seen: Inspection) -> str:
    dense = {index: reason for reason, indices in seen.dense_layers.items() for index in indices}
    rows = []
    for layer, states, *similarity in zip(
        seen.layers, seen.states, seen.key_similarity, seen.value_similarity, strict=True
    ):
        pruned = dense.get(layer, str((states == PRUNED).sum()))
        rows.append([str(layer), pruned, *(f"{of.mean():.3f}" for of in similarity)])
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
