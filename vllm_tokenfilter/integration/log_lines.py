"""What a worker logs: the block at its start, and the line at its end."""

from vllm.config import VllmConfig

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.layers import layers_by_index, longest_step, num_layers
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.layer_plan import LayerPlan, ranges
from vllm_tokenfilter.layout import peak_slots


def start_block(plan: LayerPlan, config: FilterConfig, vllm_config: VllmConfig) -> str:
    """The lines logged once per worker at start."""
    layout, table, layers = config.layout, plan.table(config.chunk_size), num_layers(vllm_config)
    inner = ", ".join(sorted({layer.impl.inner_name for layer in layers_by_index(vllm_config).values()}))
    state = "is on" if plan.filtered or plan.skipping else "filters no layer"
    lines = [
        f"Token Filtering {state}: backend {BACKEND_NAME} over {inner}",
        f"  layers filtered: {ranges(plan.filtered)}",
        *(f"  layers dense: {ranges(indices)} ({reason})" for reason, indices in plan.dense.items()),
        f"  pruning ratio {config.pruning_ratio:g}: each sealed chunk of {config.chunk_size} tokens keeps "
        f"{layout.kept_per_chunk} (effective {layout.effective_ratio:.4g})"
        if config.schedule.kind == "uniform"
        else f"  pruning ratio {config.pruning_ratio:g} as a mean over {layers} layers, schedule "
        f"{config.schedule.kind}; a sealed chunk of {config.chunk_size} tokens keeps",
    ]
    if config.schedule.kind != "uniform" or len({row["skip_ratio"] for row in table}) > 1:
        lines += [
            f"    layers {row['layers']}: {row['kept_per_chunk']} tokens"
            + (f", attention of {row['skip_ratio']:.4g} of the tokens skipped" if plan.skipping else "")
            for row in table
        ]
    lines += [
        f"  never removed: the newest {config.recent_window} tokens and the first {config.sink_tokens}; requests "
        f"shorter than {layout.first_seal} tokens stay dense",
        f"  redundancy: {config.fusion}, anchor decay {config.anchor_decay:g} over {config.anchor_terms} tokens"
        if config.selector == "anchor"
        else f"  redundancy: the baseline {config.selector}",
    ]
    options = config.attention_skipping
    if options.ratio > 0:
        near = f", sinks and the last {options.skip_window} tokens" if options.substitute == "window" else ""
        lines += [
            f"  attention skipping: {options.ratio:g} as a mean over {layers} layers, in layers "
            f"{ranges(plan.skipping)}; substitute {options.substitute}{near}; the first {options.warmup_tokens} tokens "
            "never skip",
            *(f"  layers that cannot skip: {ranges(indices)} ({reason})" for reason, indices in plan.unskipped.items()),
        ]
    if plan.filtered:
        length = vllm_config.model_config.max_model_len
        step = longest_step(vllm_config)
        slots = {peak_slots(length, step, own) for own in plan.layouts}
        needed = str(min(slots)) if len(slots) == 1 else f"{min(slots)} to {max(slots)}"
        lines.append(
            f"  memory: a request of {length} tokens needs at most {needed} slots in a filtered layer, with prefill "
            f"steps of at most {step} tokens"
        )
        shared = vllm_config.cache_config.enable_prefix_caching
        lines.append(f"  prefix caching: {'on, sealed chunks are shared' if shared else 'off'}")
    return "\n".join(lines)


def totals_line(totals: StepCounters) -> str:
    """The line logged at shutdown."""
    dense = ", ".join(f"{count} {reason}" for reason, count in totals.rows_dense.items()) or "none"
    return (
        f"Token Filtering totals: {totals.tokens_seen} tokens seen, {round(totals.tokens_sealed)} sealed, "
        f"{round(totals.tokens_pruned)} pruned per filtered layer; {totals.rows_filtered} rows filtered, "
        f"rows dense: {dense}; {totals.seals} seals in {totals.seal_seconds:.3f} s"
        + (
            f"; {totals.attentions_skipped} of {totals.attentions_decided} attentions skipped"
            if totals.attentions_decided
            else ""
        )
    )
