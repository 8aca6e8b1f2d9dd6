"""What a worker answers to `collective_rpc("token_filtering_status")`, and the blocks it logs at start and shutdown.

Source: vllm/v1/worker/worker_base.py (`init_worker`, worker extension classes).
"""

from typing import Any

from vllm.config import VllmConfig

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.layers import longest_step
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.layout import peak_slots


class WorkerStatus:
    """Added to vLLM's worker class, so that one call reads every worker's counters."""

    def token_filtering_status(self) -> dict[str, Any]:
        """Settings in force and totals since start, of this worker.

        Returns:
            Keys backend, layers_filtered (indices), layers_dense (reason -> indices), the settings, effective_ratio,
            and the totals of `StepCounters` of a KV-cache group that holds filtered layers: each such group counts the
            same tokens and rows. Seals and their time are summed over the groups.
        """
        from vllm_tokenfilter.integration.backend import TokenFilteringMetadataBuilder
        from vllm_tokenfilter.integration.gpu_backend import FilteringBuilder

        ours = (TokenFilteringMetadataBuilder, FilteringBuilder)
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        builders = [builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders]
        return merge([builder.status() for builder in builders if isinstance(builder, ours)])


def describe(
    config: FilterConfig, filtered: list[int], dense: dict[str, list[int]], totals: dict[str, Any]
) -> dict[str, Any]:
    """One group's status as plain types."""
    return {
        "backend": BACKEND_NAME,
        "layers_filtered": filtered,
        "layers_dense": dense,
        **config.model_dump(mode="json"),
        "effective_ratio": config.layout.effective_ratio,
        **totals,
    }


def merge(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """Several groups' statuses as one: layers joined, counts of one group that filters, seals of all."""
    if not statuses:
        return {}
    active = [status for status in statuses if status["layers_filtered"]] or statuses
    merged = dict(active[0])
    merged["layers_filtered"] = sorted(index for status in statuses for index in status["layers_filtered"])
    dense: dict[str, list[int]] = {}
    for status in statuses:
        for reason, indices in status["layers_dense"].items():
            dense[reason] = sorted(dense.get(reason, []) + indices)
    merged["layers_dense"] = dense
    for key in ("seals", "seal_seconds"):
        merged[key] = sum(status[key] for status in active)
    return merged


def start_block(
    config: FilterConfig, filtered: list[int], dense: dict[str, list[int]], inner: str, vllm_config: VllmConfig
) -> str:
    """The lines logged once per worker at start."""
    layout = config.layout
    lines = [
        f"Token Filtering is on: backend {BACKEND_NAME} over {inner}"
        if filtered
        else f"Token Filtering filters no layer: backend {BACKEND_NAME} over {inner}",
        f"  layers filtered: {_ranges(filtered)}",
        *(f"  layers dense: {_ranges(indices)} ({reason})" for reason, indices in dense.items()),
        f"  pruning ratio {config.pruning_ratio:g}: each sealed chunk of {config.chunk_size} tokens keeps "
        f"{layout.kept_per_chunk} (effective {layout.effective_ratio:.4g})",
        f"  always whole: the newest {config.recent_window} tokens; the first {config.sink_tokens} always stay; "
        f"requests shorter than {layout.first_seal} tokens are dense",
        f"  redundancy: {config.fusion}, anchor decay {config.anchor_decay:g} over {config.anchor_terms} tokens"
        if config.selector == "anchor"
        else f"  redundancy: the rival method {config.selector}",
    ]
    if filtered:
        length = vllm_config.model_config.max_model_len
        step = longest_step(vllm_config)
        lines.append(
            f"  memory: a request of {length} tokens needs at most {peak_slots(length, step, layout)} slots in a "
            f"filtered layer, with prefill steps of at most {step} tokens"
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
    )


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
