"""What happens once in a worker on any device: at its start the layers are planned, at its end the totals are logged.

Source: vllm/model_executor/layers/attention/attention.py (`process_weights_after_loading`);
vllm/v1/executor/multiproc_executor.py (how worker processes end).
"""

from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration import refusals, seeded_requests, workarounds
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.layers import give_filtered_layers_their_spec, layers_by_index, plan_layers
from vllm_tokenfilter.integration.log_lines import start_block, totals_line
from vllm_tokenfilter.integration.status import GroupStatus, merge_parts
from vllm_tokenfilter.layer_plan import LayerPlan

logger = init_logger("vllm.tokenfilter")

_MODEL = "_token_filtering_model"


class PlannedModel:
    """The layers of one model in this process, and what its metadata builders count.

    Attributes:
        plan: what the settings at start make of the layers.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.shared: dict[type, Any] = {}  #: what its builders have in common, by class.
        self._running = 0
        self._ended: list[GroupStatus] = []

    def count(self, builder: "CountingBuilder") -> None:
        """Have a builder in the line of totals, which is logged when all builders or their process go."""
        self._running += 1
        # A worker process leaves through multiprocessing, which runs no atexit handlers but these. Nothing that is
        # passed here holds the builder.
        Finalize(builder, self._end, args=(builder.plan, builder.counters, builder.settles), exitpriority=10)

    def _end(self, plan: LayerPlan, counters: StepCounters, settles: Sequence[Callable[[], None]]) -> None:
        for settle in settles:
            settle()
        self._running -= 1
        self._ended.append(GroupStatus(plan=plan, counters=counters))
        if self._running == 0:
            totals, self._ended = merge_parts(self._ended).counters, []
            if totals.tokens_seen:
                logger.info("%s", totals_line(totals))


def planned_model(vllm_config: VllmConfig) -> PlannedModel:
    """The model whose layers a configuration holds; planned once, when the first of its layers asks."""
    first = next(iter(layers_by_index(vllm_config).values()))
    model: PlannedModel | None = getattr(first, _MODEL, None)
    if model is None:
        config = refusals.require_supported(vllm_config)
        model = PlannedModel(plan_layers(vllm_config, config))
        setattr(first, _MODEL, model)
        workarounds.outlive_interrupts()
        seeded_requests.take_draws_back()
        give_filtered_layers_their_spec(model.plan, vllm_config)
        logger.info("%s", start_block(model.plan, config, vllm_config))
    return model


class PlanningImpl:
    """Mixed in before an attention implementation of vLLM's: the first layer whose weights are ready plans them all.

    Attributes:
        inner_name: vLLM's name of the backend inside.
    """

    inner_name: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_filtering_config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """See `AttentionImpl`; every layer is built by then, and no KV-cache spec asked for."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        planned_model(self._token_filtering_config)


class CountingBuilder:
    """Mixed in before a metadata builder of vLLM's: what a worker asks of ours.

    Attributes:
        config: the settings in force.
        plan: what they make of the group's layers.
        counters: what was done in them.
        settles: each brings the counters up to date by what a device counted.
        inner_name: on a GPU, the backend inside.
        in_totals: whether what it counts is logged when the worker ends.
    """

    config: FilterConfig
    plan: LayerPlan
    counters: StepCounters
    settles: Sequence[Callable[[], None]] = ()
    inner_name: str | None = None
    in_totals = True
