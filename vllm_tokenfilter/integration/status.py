"""What a worker answers to `collective_rpc("token_filtering_status")`, and the blocks it logs at start and shutdown.

Source: vllm/v1/worker/worker_base.py (`init_worker`, worker extension classes).
"""

from typing import Any

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.registration import BACKEND_NAME


class WorkerStatus:
    """Added to vLLM's worker class, so that one call reads every worker's counters."""

    def token_filtering_status(self) -> dict[str, Any]:
        """Settings in force and totals since start, of this worker.

        Returns:
            Keys backend, layers_filtered (indices), layers_dense (reason -> indices), the settings, effective_ratio,
            and the totals of `StepCounters`, summed over KV-cache groups that hold filtered layers.
        """
        from vllm_tokenfilter.integration.backend import TokenFilteringMetadataBuilder

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        builders = [builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders]
        return merge([builder.status() for builder in builders if isinstance(builder, TokenFilteringMetadataBuilder)])


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
    """Several groups' statuses as one: layers joined, totals of the groups that filter added."""
    if not statuses:
        return {}
    active = [status for status in statuses if status["layers_filtered"]] or statuses[:1]
    merged = dict(active[0])
    merged["layers_filtered"] = sorted(index for status in statuses for index in status["layers_filtered"])
    dense: dict[str, list[int]] = {}
    for status in statuses:
        for reason, indices in status["layers_dense"].items():
            dense[reason] = sorted(dense.get(reason, []) + indices)
    merged["layers_dense"] = dense
    for status in active[1:]:
        for key, value in status.items():
            if key in _TOTALS:
                merged[key] += value
        merged["rows_dense"] = {
            reason: merged["rows_dense"].get(reason, 0) + status["rows_dense"].get(reason, 0)
            for reason in {**merged["rows_dense"], **status["rows_dense"]}
        }
    return merged


_TOTALS = ("tokens_seen", "tokens_sealed", "tokens_pruned", "rows_filtered", "seals", "seal_seconds")


def start_block(config: FilterConfig, filtered: list[int], dense: dict[str, list[int]], inner: str) -> str:
    """The lines logged once per KV-cache group at start."""
    lines = [
        f"Token Filtering is on: backend {BACKEND_NAME} over {inner}"
        if filtered and config.layout.removed_per_chunk
        else f"Token Filtering leaves this group dense: backend {BACKEND_NAME} over {inner}",
        f"  layers filtered: {_ranges(filtered)}",
        *(f"  layers dense: {_ranges(indices)} ({reason})" for reason, indices in dense.items()),
        f"  pruning ratio {config.pruning_ratio:g}: each sealed chunk of {config.chunk_size} tokens keeps "
        f"{config.layout.kept_per_chunk} (effective {config.layout.effective_ratio:.4g})",
        f"  always whole: the newest {config.recent_window} tokens; the first {config.sink_tokens} always stay; "
        f"requests shorter than {config.layout.first_seal} tokens are dense",
        f"  redundancy: {config.fusion}, anchor decay {config.anchor_decay:g} over {config.anchor_terms} tokens",
        "  not filtered: blocks stay allocated (reads shrink, memory does not); prefix caching is off"
        if config.layout.removed_per_chunk
        else "  not filtered: pruning_ratio is 0",
    ]
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
