"""What is told of the filter: the status of groups, workers and engines, and the blocks logged at start and shutdown.

Statuses are merged three times: of one worker's KV-cache groups (`merge`), of one engine's workers (`merge_workers`),
and of data-parallel engines (`merge_engines`).
"""

from collections import Counter
from typing import Any

from vllm.config import VllmConfig

from vllm_tokenfilter.config import SKIP_UNITS, FilterConfig
from vllm_tokenfilter.integration.layers import longest_step, num_layers
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.layout import peak_slots

_TOKENS = ("tokens_seen", "tokens_sealed", "tokens_pruned")
_SUMMED_OVER_WORKERS = ("seals", "seal_seconds")
_SUMMED_OVER_GROUPS = ("attentions_decided", "attentions_skipped", "reads_dense", "reads_filtered", "reads_done")


def describe(
    config: FilterConfig,
    filtered: list[int],
    dense: dict[str, list[int]],
    skipping: list[int],
    unskipped: dict[str, list[int]],
    num_layers: int,
    totals: dict[str, Any],
) -> dict[str, Any]:
    """One group's status as plain types."""
    layouts = config.layouts(num_layers)
    own = [layout.effective_ratio for index in filtered if (layout := layouts[index]) is not None]
    return {
        "backend": BACKEND_NAME,
        "layers_filtered": filtered,
        "layers_dense": dense,
        "layers_skipping": skipping,
        "layers_unskipped": unskipped,
        "layer_table": layer_table(config, num_layers),
        **config.model_dump(mode="json"),
        "effective_ratio": effective_ratio(config, num_layers),
        "group_ratio": sum(own) / len(own) if own else 0.0,
        **totals,
    }


def layer_table(config: FilterConfig, num_layers: int) -> list[dict[str, Any]]:
    """What the settings make of every layer: runs of layers that are alike, from the first to the last.

    Returns:
        Rows with layers (such as "0-9"), kept_per_chunk (tokens), kv_ratio and skip_ratio.
    """
    layouts, units = config.layouts(num_layers), config.skip_units(num_layers)
    alike: dict[tuple[int, int], list[list[int]]] = {}
    previous = None
    for index in range(num_layers):
        layout = layouts[index]
        key = (config.chunk_size if layout is None else layout.kept_per_chunk, units[index])
        runs = alike.setdefault(key, [])
        if key != previous:
            runs.append([])
        runs[-1].append(index)
        previous = key
    rows = [(run, key) for key, runs in alike.items() for run in runs]
    return [
        {
            "layers": ranges(run),
            "kept_per_chunk": kept,
            "kv_ratio": 1 - kept / config.chunk_size,
            "skip_ratio": skipped / SKIP_UNITS,
        }
        for run, (kept, skipped) in sorted(rows)
    ]


def effective_ratio(config: FilterConfig, num_layers: int) -> float:
    """The share of a sealed chunk that is removed, as a mean over the layers that are filtered; 0 if none is."""
    ratios = [layout.effective_ratio for layout in config.layouts(num_layers) if layout is not None]
    return sum(ratios) / len(ratios) if ratios else 0.0


def merge(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """Several groups' statuses as one; see `worker.WorkerStatus`."""
    if not statuses:
        return {}
    active = [status for status in statuses if status["layers_filtered"]] or statuses
    merged = dict(active[0])
    for key in ("layers_filtered", "layers_skipping"):
        merged[key] = sorted(index for status in statuses for index in status[key])
    for key in ("layers_dense", "layers_unskipped"):
        reasons: dict[str, list[int]] = {}
        for status in statuses:
            for reason, indices in status[key].items():
                reasons[reason] = sorted(reasons.get(reason, []) + indices)
        merged[key] = reasons
    # On a GPU vLLM may choose another backend for some of the layers.
    if inner := sorted({status["inner_backend"] for status in statuses if "inner_backend" in status}):
        merged["inner_backend"] = ", ".join(inner)
    for key in _SUMMED_OVER_WORKERS:
        merged[key] = sum(status[key] for status in active)
    for key in _SUMMED_OVER_GROUPS:
        merged[key] = sum(status[key] for status in statuses)
    for key in ("tokens_sealed", "tokens_pruned"):
        weights = [max(1, len(status["layers_filtered"])) for status in active]
        total = sum(status[key] * weight for status, weight in zip(active, weights, strict=True))
        merged[key] = round(total / sum(weights))
    merged["groups"] = [
        {
            "layers": ranges(
                sorted([*status["layers_filtered"], *(i for layers in status["layers_dense"].values() for i in layers)])
            ),
            "effective_ratio": status["group_ratio"],
            **{key: status[key] for key in _TOKENS},
        }
        for status in statuses
    ]
    return merged


def merge_workers(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine's status: ranks that hold parts of the same tokens count them once, and seal each on its own."""
    statuses = [status for status in statuses if status]
    if not statuses:
        return {}
    merged = dict(next((status for status in statuses if status["layers_filtered"]), statuses[0]))
    for key in _SUMMED_OVER_WORKERS:
        merged[key] = sum(status[key] for status in statuses)
    merged["layers_filtered"] = sorted({index for status in statuses for index in status["layers_filtered"]})
    dense: dict[str, set[int]] = {}
    for status in statuses:
        for reason, indices in status["layers_dense"].items():
            dense.setdefault(reason, set()).update(indices)
    merged["layers_dense"] = {reason: sorted(indices) for reason, indices in dense.items()}
    # Ranks of one pipeline stage have the same groups; those of another have other layers.
    merged["groups"] = list({group["layers"]: group for status in statuses for group in status["groups"]}.values())
    return merged


def merge_engines(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """The status of a server: engines hold the same layers and different requests, so everything counted adds up."""
    if not statuses:
        return {}
    merged = {**statuses[0], "engines": len(statuses)}
    for key in (*_TOKENS, *_SUMMED_OVER_WORKERS, *_SUMMED_OVER_GROUPS, "rows_filtered"):
        merged[key] = sum(status[key] for status in statuses)
    merged["rows_dense"] = dict(sum((Counter(status["rows_dense"]) for status in statuses), Counter()))
    merged["groups"] = [dict(group) for group in statuses[0]["groups"]]
    for index, group in enumerate(merged["groups"]):
        for key in (*_TOKENS, "blocks_held", "blocks_dense"):
            group[key] = sum(status["groups"][index][key] for status in statuses)
    return merged


def start_block(
    config: FilterConfig,
    filtered: list[int],
    dense: dict[str, list[int]],
    skipping: list[int],
    unskipped: dict[str, list[int]],
    inner: str,
    vllm_config: VllmConfig,
) -> str:
    """The lines logged once per worker at start."""
    layout, layers = config.layout, num_layers(vllm_config)
    table = layer_table(config, layers)
    lines = [
        f"Token Filtering is on: backend {BACKEND_NAME} over {inner}"
        if filtered or skipping
        else f"Token Filtering filters no layer: backend {BACKEND_NAME} over {inner}",
        f"  layers filtered: {ranges(filtered)}",
        *(f"  layers dense: {ranges(indices)} ({reason})" for reason, indices in dense.items()),
        f"  pruning ratio {config.pruning_ratio:g}: each sealed chunk of {config.chunk_size} tokens keeps "
        f"{layout.kept_per_chunk} (effective {layout.effective_ratio:.4g})"
        if config.schedule.kind == "uniform"
        else f"  pruning ratio {config.pruning_ratio:g} as a mean over {layers} layers, schedule "
        f"{config.schedule.kind}; a sealed chunk of {config.chunk_size} tokens keeps",
    ]
    if config.schedule.kind != "uniform" or len({row["skip_ratio"] for row in table}) > 1:
        lines += [
            f"    layers {row['layers']}: {row['kept_per_chunk']} tokens"
            + (f", attention of {row['skip_ratio']:.4g} of the tokens skipped" if skipping else "")
            for row in table
        ]
    lines += [
        f"  always whole: the newest {config.recent_window} tokens; the first {config.sink_tokens} always stay; "
        f"requests shorter than {layout.first_seal} tokens are dense",
        f"  redundancy: {config.fusion}, anchor decay {config.anchor_decay:g} over {config.anchor_terms} tokens"
        if config.selector == "anchor"
        else f"  redundancy: the rival method {config.selector}",
    ]
    options = config.attention_skipping
    if options.ratio > 0:
        near = f", sinks and the last {options.skip_window} tokens" if options.substitute == "window" else ""
        lines += [
            f"  attention skipping: {options.ratio:g} as a mean over {layers} layers, in layers {ranges(skipping)}; "
            f"substitute {options.substitute}{near}; the first {options.warmup_tokens} tokens never skip",
            *(f"  layers that cannot skip: {ranges(indices)} ({reason})" for reason, indices in unskipped.items()),
        ]
    if filtered:
        length = vllm_config.model_config.max_model_len
        step = longest_step(vllm_config)
        slots = {peak_slots(length, step, own) for own in config.layouts(layers) if own is not None}
        needed = str(min(slots)) if len(slots) == 1 else f"{min(slots)} to {max(slots)}"
        lines.append(
            f"  memory: a request of {length} tokens needs at most {needed} slots in a filtered layer, with prefill "
            f"steps of at most {step} tokens"
        )
        shared = vllm_config.cache_config.enable_prefix_caching
        lines.append(f"  prefix caching: {'on, sealed chunks are shared' if shared else 'off'}")
    return "\n".join(lines)


def totals_line(totals: dict[str, Any]) -> str:
    """The line logged at shutdown."""
    dense = ", ".join(f"{count} {reason}" for reason, count in totals["rows_dense"].items()) or "none"
    return (
        f"Token Filtering totals: {totals['tokens_seen']} tokens seen, {totals['tokens_sealed']} sealed, "
        f"{totals['tokens_pruned']} pruned per filtered layer; {totals['rows_filtered']} rows filtered, "
        f"rows dense: {dense}; {totals['seals']} seals in {totals['seal_seconds']:.3f} s"
        + (
            f"; {totals['attentions_skipped']} of {totals['attentions_decided']} attentions skipped"
            if totals["attentions_decided"]
            else ""
        )
    )


def ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
