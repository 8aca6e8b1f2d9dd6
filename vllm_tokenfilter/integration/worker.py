"""What Token Filtering adds to vLLM's worker: what `collective_rpc("token_filtering_status")` answers.

Source: vllm/v1/worker/worker_base.py (`init_worker`, worker extension classes).
"""

from typing import Any

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import status


class WorkerStatus:
    """Added to vLLM's worker class, so that one call reads every worker's counters."""

    def token_filtering_status(self) -> dict[str, Any]:
        """Settings in force and totals since start, of this worker.

        Returns:
            Keys backend, layers_filtered (indices), layers_dense (reason -> indices), layers_skipping (indices),
            layers_unskipped (reason -> indices), layer_table (see `layer_table`), the settings, effective_ratio, and
            the totals of `StepCounters`: tokens and rows of a KV-cache group that holds filtered layers, since each
            such group sees the same ones; what was sealed and pruned as a mean over the filtered layers; seals, skipped
            attentions and cache entries summed over the groups. `groups` has the tokens and the ratio of each.
        """
        return status.merge([builder.status() for builder in self._token_filtering_builders()])

    def token_filtering_use(self, settings: dict[str, Any]) -> None:
        """Filter by these settings from now on; only while no request is running (see `engine_core.py`)."""
        config = FilterConfig.parse(settings)
        for builder in self._token_filtering_builders():
            builder.use(config)

    def _token_filtering_builders(self) -> list[Any]:
        # Not before the worker has its device: these bring vLLM's backends along.
        from vllm_tokenfilter.integration.cpu.builder import TokenFilteringMetadataBuilder
        from vllm_tokenfilter.integration.gpu.backend import FilteringBuilder

        ours = (TokenFilteringMetadataBuilder, FilteringBuilder)
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        builders = [builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders]
        return [builder for builder in builders if isinstance(builder, ours)]
