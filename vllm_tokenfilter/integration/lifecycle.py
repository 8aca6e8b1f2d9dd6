"""What happens once in a worker on any device: at its start the layers are sorted, at its end the totals are logged.

Source: vllm/model_executor/layers/attention/attention.py (`process_weights_after_loading`);
vllm/v1/executor/multiproc_executor.py (how worker processes end).
"""

from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from vllm_tokenfilter.integration import refusals, status
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.layers import give_filtered_layers_their_spec, sort_layers, sort_skipping

logger = init_logger("vllm.tokenfilter")

_SORTED = "_token_filtering_sorted"


class SortingImpl:
    """Mixed in before an attention implementation of vLLM's: the first layer whose weights are ready sorts them all.

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
        _sort_all_layers_once(self._token_filtering_config, self.inner_name)


def log_totals_at_end(builder: Any, counters: StepCounters, settle: Callable[[], None] | None = None) -> None:
    """Log a builder's totals when it or its process goes.

    Args:
        builder: the metadata builder; nothing here keeps it alive.
        counters: its counters.
        settle: brings them up to date first; must not hold the builder.
    """
    # A worker process leaves through multiprocessing, which runs no atexit handlers but these.
    Finalize(builder, _log_totals, args=(counters, settle), exitpriority=10)


def _log_totals(counters: StepCounters, settle: Callable[[], None] | None) -> None:
    if settle is not None:
        settle()
    if counters.tokens_seen:
        logger.info("%s", status.totals_line(counters.as_dict()))


def _sort_all_layers_once(vllm_config: VllmConfig, inner_name: str) -> None:
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    if any(getattr(layer, _SORTED, False) for layer in layers.values()):
        return
    config = refusals.require_supported(vllm_config)
    filtered, dense = sort_layers(vllm_config, config)
    skipping, unskipped = sort_skipping(vllm_config, config)
    give_filtered_layers_their_spec(filtered, vllm_config, config)
    for layer in layers.values():
        setattr(layer, _SORTED, True)
    block = status.start_block(config, list(filtered), dense, list(skipping), unskipped, inner_name, vllm_config)
    logger.info("%s", block)
