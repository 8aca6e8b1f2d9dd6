"""The metrics of a server: one table, and what turns a status into them.

docs/metrics.md is generated from `METRICS`. The figures come from
`token_filtering_status` of every engine, merged by `integration/status.py`: tokens are counted once, however many ranks
and layers hold them; seals and their time are summed over all workers.

Source: https://prometheus.io/docs/practices/naming/.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from vllm_tokenfilter import __version__
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.status import GroupStatus, Status
from vllm_tokenfilter.layer_plan import ranges

#: Pairs of label values, in the order of the metric's labels, and a value.
Samples = Iterable[tuple[tuple[str, ...], float]]
#: Counted by the exporter itself: no status says it.
LOOKS_FAILED = "tokenfilter_looks_failed_total"


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str  #: as it is exposed, prefix and suffix included.
    unit: str  #: what is counted.
    help: str  #: one sentence.
    read: Callable[[Status], Samples]  #: the samples in a merged status.
    labels: tuple[str, ...] = ()  #: names of the labels.

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        """Counters only grow; gauges are as of the last look."""
        return "counter" if self.name.endswith("_total") else "gauge"


def _total(name: str, unit: str, help: str) -> Metric:
    """What a status counts under the same name."""
    counter = name.removeprefix("tokenfilter_").removesuffix("_total")
    return Metric(name, unit, help, lambda status: [((), getattr(status.counters, counter))])


def _layers_by_reason(name: str, help: str) -> Metric:
    """How many layers the plan names, by reason, in its field of the same name."""
    field = name.removeprefix("tokenfilter_layers_")

    def read(status: Status) -> Samples:
        return [((reason,), len(layers)) for reason, layers in getattr(status.layers, field).items()]

    return Metric(name, "layers", help, read, ("reason",))


def _per_layer_set(name: str, unit: str, help: str, value: Callable[[GroupStatus], float]) -> Metric:
    def read(status: Status) -> Samples:
        return [((ranges(group.plan.indices),), value(group)) for group in status.groups if group.plan.rows]

    return Metric(name, unit, help, read, ("layers",))


def _realised_ratio(group: GroupStatus) -> float:
    return group.counters.tokens_pruned / group.counters.tokens_seen if group.counters.tokens_seen else 0.0


METRICS: tuple[Metric, ...] = (
    _total(
        "tokenfilter_tokens_seen_total",
        "tokens",
        "Tokens computed: output, and prompts except what the prefix cache held; recomputed tokens count again.",
    ),
    _total("tokenfilter_tokens_sealed_total", "tokens", "Tokens of chunks that were ranked and sealed."),
    _total(
        "tokenfilter_tokens_pruned_total", "tokens", "Sealed tokens that left the KV cache of every filtered layer."
    ),
    _total("tokenfilter_rows_filtered_total", "rows", "Rows (one request in one step) that read a filtered cache."),
    Metric(
        "tokenfilter_rows_dense_total",
        "rows",
        "Rows that read every token, by reason.",
        lambda status: [((reason,), count) for reason, count in status.counters.rows_dense.items()],
        ("reason",),
    ),
    _total("tokenfilter_seals_total", "calls", "Calls of the sealing kernel, over all workers and KV-cache groups."),
    _total(
        "tokenfilter_seal_seconds_total",
        "seconds",
        "Time in the sealing kernel, summed over all workers and KV-cache groups; on a GPU, device time.",
    ),
    _total(
        "tokenfilter_attentions_decided_total",
        "attentions",
        "Attentions (a token in a layer that skips, after the warm-up) that could have been skipped.",
    ),
    _total("tokenfilter_attentions_skipped_total", "attentions", "Attentions that were skipped."),
    _per_layer_set(
        "tokenfilter_kv_blocks_held",
        "blocks",
        "KV-cache blocks that unfinished requests hold, per layer set; a shared block counts for each of them.",
        lambda group: group.blocks_held,
    ),
    _per_layer_set(
        "tokenfilter_kv_blocks_saved",
        "blocks",
        "Further KV-cache blocks that unfinished requests would hold if nothing were filtered, per layer set.",
        lambda group: group.blocks_dense - group.blocks_held,
    ),
    _per_layer_set(
        "tokenfilter_realised_ratio",
        "ratio",
        "Tokens pruned over tokens seen since start, per layer set; the recent window keeps it below the setting.",
        _realised_ratio,
    ),
    _per_layer_set(
        "tokenfilter_pruning_ratio",
        "ratio",
        "Share of a sealed chunk that is removed now, after rounding to whole tokens; 0 where layers are dense.",
        lambda group: group.plan.effective_ratio,
    ),
    Metric(
        "tokenfilter_layers_filtered",
        "layers",
        "Layers that are filtered.",
        lambda status: [((), len(status.layers.filtered))],
    ),
    _layers_by_reason("tokenfilter_layers_dense", "Layers that keep every token, by reason."),
    _layers_by_reason("tokenfilter_layers_unskipped", "Layers that should skip attention and cannot, by reason."),
    Metric(
        "tokenfilter_engines",
        "engines",
        "Engines (data-parallel ranks) whose figures are summed here.",
        lambda status: [((), status.engines)],
    ),
    Metric(
        LOOKS_FAILED,
        "looks",
        "Failed polls of the engines, at most one a second; meanwhile the other metrics keep their last values.",
        lambda status: [],
    ),
    Metric(
        "tokenfilter_config_info",
        "info",
        "1 for the settings in force, 0 for settings that a change at run time replaced.",
        lambda status: [((__version__, *map(str, status.settings_in_force.values())), 1)],
        ("version", *FilterConfig.model_fields),
    ),
)


@functools.cache
def _registered(registry: CollectorRegistry) -> dict[str, Any]:
    """The table's metrics in a registry, by name; it takes each name once."""
    made: dict[str, Any] = {}
    for metric in METRICS:
        if metric.kind == "counter":
            made[metric.name] = Counter(metric.name, metric.help, metric.labels, registry=registry)
        else:
            made[metric.name] = Gauge(
                metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode="mostrecent"
            )
    return made


class Exporter:
    """Keeps the table's metrics in a Prometheus registry up to date.

    With several API servers vLLM lets each write to files that any of them adds up when scraped; only one of them may
    then export. Several servers of one process share its registry: their counters add up, and a gauge is as of the
    last look at any of them.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._made = _registered(registry)
        self._last: dict[tuple[str, tuple[str, ...]], float] = {}

    def count_failure(self) -> None:
        """Count a look at the engines that brought no status."""
        self._made[LOOKS_FAILED].inc()

    def update(self, status: Status) -> None:
        """Take over a merged status; a counter that fell was restarted, and goes on from where it was."""
        for metric in METRICS:
            made = self._made[metric.name]
            samples = dict(metric.read(status))
            if metric.kind == "gauge":
                # Labels cannot be taken back from the files of several API servers: what is gone is 0.
                gone = [labels for name, labels in self._last if name == metric.name and labels not in samples]
                samples.update(dict.fromkeys(gone, 0.0))
            for labels, value in samples.items():
                sample = made.labels(*labels) if metric.labels else made
                before = self._last.get((metric.name, labels), 0.0)
                self._last[metric.name, labels] = value
                if metric.kind == "counter":
                    sample.inc(value - before if value >= before else value)
                else:
                    sample.set(value)
