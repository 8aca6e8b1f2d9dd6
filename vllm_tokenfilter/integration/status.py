"""What was done since start, as one value: made in each worker, merged here, read by the server and its metrics.

Statuses are merged three ways. *Parts of a model* (the KV-cache groups of a worker, the stages of a pipeline) see the
same tokens in different layers; *ranks* (of tensor parallelism) the same tokens in the same layers; *engines* (of data
parallelism) different tokens in the same layers.

Imports no vLLM. Between processes a status travels as plain types: `model_dump(mode="json")` and `model_validate`.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, computed_field

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import Merge, StepCounters, merged_as
from vllm_tokenfilter.layer_plan import LayerPlan

_TOKENS, _MEANS, _CALLS, _PER_LAYER = map(merged_as, Merge)


class GroupStatus(BaseModel, frozen=True):
    """What was done in the layers of one KV-cache group that a worker, or an engine, holds."""

    plan: LayerPlan  #: of these layers; empty where a pipeline stage, or our backend, has none of the group's.
    counters: StepCounters  #: what was done in them.
    blocks_held: int = 0  #: KV-cache blocks that unfinished requests hold; only the scheduler knows.
    blocks_dense: int = 0  #: blocks that they would hold if nothing were filtered.


class Status(BaseModel, frozen=True):
    """Settings in force, what they make of every layer, and totals since start; of a worker, an engine, or a server."""

    backend: str  #: TOKEN_FILTERING.
    settings: FilterConfig  #: as configured.
    groups: list[GroupStatus]  #: one for each KV-cache group of the engine, in vLLM's order.
    inner_backends: list[str] = []  #: on a GPU, vLLM's backends in use.
    cudagraph_mode: str | None = None  #: on a GPU, vLLM's mode.
    engines: int = 1  #: data-parallel engines.
    switching: bool = False  #: whether another ratio waits for requests to end.
    prefix_caching: str = ""  #: in words; empty as long as the scheduler is not asked.
    #: The lowest and the highest ratio that can follow at run time; None if none can.
    reachable: tuple[float, float] | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def layers(self) -> LayerPlan:
        """What the settings make of the layers held."""
        return LayerPlan.joined(group.plan for group in self.groups)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def counters(self) -> StepCounters:
        """Totals over all groups."""
        return merge_parts(self.groups).counters

    @computed_field  # type: ignore[prop-decorator]
    @property
    def layer_table(self) -> list[dict[str, Any]]:
        """See `LayerPlan.table`."""
        return self.layers.table(self.settings.chunk_size)

    @property
    def settings_in_force(self) -> dict[str, Any]:
        """The settings as plain types, with the inner backends that were chosen."""
        chosen = {"inner_backend": ", ".join(self.inner_backends)} if self.inner_backends else {}
        return {**self.settings.model_dump(mode="json"), **chosen}


def merge_parts(parts: Iterable[GroupStatus]) -> GroupStatus:
    """Parts of a model as one; tokens and rows are counted where tokens are removed, if anywhere."""
    parts = [part for part in parts if part.plan.rows]
    active = [part for part in parts if part.plan.filtered] or parts
    if not active:
        return GroupStatus(plan=LayerPlan(), counters=StepCounters())
    total = _added(active[0].counters, (*_CALLS, *_PER_LAYER), [part.counters for part in parts])
    weights = [max(1, len(part.plan.filtered)) for part in active]
    for name in _MEANS:
        weighted = (getattr(part.counters, name) * weight for part, weight in zip(active, weights, strict=True))
        setattr(total, name, round(sum(weighted) / sum(weights)))
    return GroupStatus(plan=LayerPlan.joined(part.plan for part in parts), counters=total)


def merge_workers(workers: Sequence[Status]) -> Status:
    """One engine's status; workers of one pipeline stage hold the same layers, those of another stage other layers."""
    stages: dict[tuple[int, ...], list[Status]] = {}
    for worker in workers:
        stages.setdefault(tuple(worker.layers.indices), []).append(worker)
    # Only the work of each rank is its own.
    ranks = [_merge_groups(stage, _CALLS) for stage in stages.values()]
    groups = [merge_parts(parts) for parts in zip(*ranks, strict=True)]
    inner = sorted({name for worker in workers for name in worker.inner_backends})
    return workers[0].model_copy(update={"groups": groups, "inner_backends": inner})


def merge_engines(engines: Sequence[Status]) -> Status:
    """A server's status."""
    groups = _merge_groups(engines, (*_TOKENS, *_MEANS, *_CALLS, *_PER_LAYER))
    switching = any(engine.switching for engine in engines)
    return engines[0].model_copy(update={"groups": groups, "engines": len(engines), "switching": switching})


def _merge_groups(statuses: Sequence[Status], names: Iterable[str]) -> list[GroupStatus]:
    """The groups of statuses that hold the same layers: these counts and the blocks are added up."""
    return [
        GroupStatus(
            plan=same[0].plan,
            counters=_added(same[0].counters, names, [group.counters for group in same]),
            blocks_held=sum(group.blocks_held for group in same),
            blocks_dense=sum(group.blocks_dense for group in same),
        )
        for same in zip(*(status.groups for status in statuses), strict=True)
    ]


def _added(first: StepCounters, names: Iterable[str], counters: Sequence[StepCounters]) -> StepCounters:
    """The first with the sums of these counts over all."""
    total = first.copy()
    for name in names:
        setattr(total, name, functools.reduce(operator.add, (getattr(own, name) for own in counters)))
    return total
