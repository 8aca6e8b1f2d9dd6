"""What we add to vLLM's worker class, so that one call reaches every worker's metadata builders.

Source: vllm/v1/worker/worker_base.py (`init_worker`, worker extension classes).
"""

from typing import Any

from vllm.config import VllmConfig

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.integration.layers import plan_layers
from vllm_tokenfilter.integration.lifecycle import CountingBuilder
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.integration.status import GroupStatus, Status, merge_parts


class WorkerStatus:
    """Added to vLLM's worker class; see `EngineArgs.worker_extension_cls`."""

    vllm_config: VllmConfig
    model_runner: Any

    def token_filtering_status(self) -> dict[str, Any]:
        """Settings in force and totals since start, of this worker: a `Status` as plain types."""
        return status_of(builders_of(self.model_runner), self.vllm_config).model_dump(mode="json")

    def token_filtering_use(self, settings: dict[str, Any]) -> None:
        """Filter by these settings from now on; only while no request is running (see `engine_core.py`)."""
        config = FilterConfig.parse(settings)
        plan = plan_layers(self.vllm_config, config)
        for group in builders_of(self.model_runner):
            for builder in group:
                builder.use(config, plan)


def builders_of(model_runner: Any) -> list[list[Any]]:
    """Our metadata builders (`CountingBuilder`), by KV-cache group of the engine."""
    return [
        [builder for group in groups for builder in group.metadata_builders if isinstance(builder, CountingBuilder)]
        for groups in model_runner.attn_groups
    ]


def status_of(groups: list[list[CountingBuilder]], vllm_config: VllmConfig) -> Status:
    """The status of a worker with these builders."""
    builders = [builder for group in groups for builder in group]
    for settle in (settle for builder in builders for settle in builder.settles):
        settle()
    inner = sorted({builder.inner_name for builder in builders if builder.inner_name})
    mode = vllm_config.compilation_config.cudagraph_mode
    return Status(
        backend=BACKEND_NAME,
        settings=builders[0].config if builders else refusals.settings_of(vllm_config),
        groups=[
            merge_parts(GroupStatus(plan=builder.plan, counters=builder.counters) for builder in group)
            for group in groups
        ],
        inner_backends=inner,
        cudagraph_mode=mode.name if inner and mode is not None else None,
    )
