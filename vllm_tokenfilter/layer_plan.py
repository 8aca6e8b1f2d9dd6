"""The layer plan: what the settings make of every layer of a model, worked out once and handed to whoever asks.

Where a layer's tokens lie, which share of its attentions it skips, and why it does neither depends on the settings and
on a few facts about the model. A server reads the facts off vLLM's layers (`integration/layers.py`), the command
`plan` off a config.json (`planning/model_shape.py`); both make the plan here. Imports neither torch nor vLLM.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, computed_field

from vllm_tokenfilter.config import SKIP_UNITS, FilterConfig
from vllm_tokenfilter.layout import Layout


class DenseReason(StrEnum):
    """Why a layer or a row is not filtered, or a layer does not skip; the same words in logs, status and docs."""

    CONFIGURED = "configured_dense"
    SLIDING_WINDOW = "sliding_window_layer"
    CHUNKED_LOCAL = "chunked_local_layer"
    OTHER_CACHE = "unsupported_cache_layer"
    ALIBI = "alibi_layer"
    RATIO_ZERO = "pruning_ratio_zero"
    SHORT = "shorter_than_window_and_chunk"
    SHARED_CACHE = "reads_another_layers_cache"
    LEARNED_SINKS = "learned_attention_sinks"


_UNFIT = {"sliding": DenseReason.SLIDING_WINDOW, "chunked": DenseReason.CHUNKED_LOCAL, "other": DenseReason.OTHER_CACHE}


@dataclass(frozen=True)
class LayerFacts:
    """What the plan must know of a layer, whatever the settings.

    Attributes:
        kind: full attention; only the newest `window` tokens (sliding), or those of one chunk of `window` (chunked);
            or a cache that is none of these (other).
        window: tokens; 0 where it does not matter.
        alibi: whether scores depend on the distance in slots, which filtering changes.
        learned_sinks: whether the model has learned logits for tokens that are not there.
        reads: index of the layer whose cache it reads; None if it has its own.
    """

    kind: Literal["full", "sliding", "chunked", "other"] = "full"
    window: int = 0
    alibi: bool = False
    learned_sinks: bool = False
    reads: int | None = None

    @property
    def unfit(self) -> DenseReason | None:
        """Why the layer's cache is none we can work on; None if it is."""
        return _UNFIT.get(self.kind, DenseReason.ALIBI if self.alibi else None)


class LayerRow(BaseModel, frozen=True):
    """One layer's part of the plan.

    Attributes:
        index: of the layer in the model, from 0.
        layout: where its tokens lie; None if it keeps every token.
        pruning_ratio: what the settings ask of it, before rounding to whole tokens; 0 if it keeps every token.
        skip_units: share of the tokens whose attention it skips, in units of 1 / SKIP_UNITS.
        dense: why it keeps every token; None if it does not.
        unskipped: why it skips no attention although it should; None otherwise.
        reads: index of the layer whose cache it reads; None if it has its own.
    """

    index: int
    layout: Layout | None
    pruning_ratio: float
    skip_units: int
    dense: DenseReason | None
    unskipped: DenseReason | None
    reads: int | None

    @property
    def filtered(self) -> bool:
        """Whether the layer has a cache of its own from which tokens are removed."""
        return self.layout is not None and self.reads is None


class LayerPlan(BaseModel, frozen=True):
    """The rows of the layers that a process, or a part of it, holds, in order of their index; immutable."""

    rows: tuple[LayerRow, ...] = ()

    @classmethod
    def of(cls, config: FilterConfig, num_layers: int, facts: Mapping[int, LayerFacts] | None = None) -> "LayerPlan":
        """Make the plan.

        Args:
            config: the settings.
            num_layers: of the whole model, over all pipeline stages, >= 1.
            facts: of the layers to plan for, by index; None for all layers of a model with full attention throughout.

        Raises:
            ConfigError: a schedule does not fit so many layers; all reasons at once.
        """
        rows, settings = [], config.layer_settings(num_layers)
        facts = dict.fromkeys(range(num_layers), LayerFacts()) if facts is None else facts
        # A layer that reads another's cache finds it as that layer left it, who must leave it as all of them can read.
        owner = {index: index if own.reads is None else own.reads for index, own in facts.items()}
        unfit = {owner[index]: own.unfit for index, own in facts.items() if own.unfit}
        for index, own in sorted(facts.items()):
            ratio, layout, _ = settings[owner[index]]
            dense = own.unfit or unfit.get(owner[index])
            if dense is None and layout is None:
                dense = DenseReason.CONFIGURED if config.pruning_ratio else DenseReason.RATIO_ZERO
            units = round(settings[index][2] * SKIP_UNITS)
            unskipped = _unskipped(own, config) if units else None
            rows.append(
                LayerRow(
                    index=index,
                    layout=None if dense else layout,
                    pruning_ratio=0.0 if dense else ratio,
                    skip_units=0 if unskipped else units,
                    dense=dense,
                    unskipped=unskipped,
                    reads=own.reads,
                )
            )
        return cls(rows=tuple(rows))

    @classmethod
    def joined(cls, plans: Iterable["LayerPlan"]) -> "LayerPlan":
        """The plan of all layers that some of the plans have."""
        rows = {row.index: row for plan in plans for row in plan.rows}
        return cls(rows=tuple(row for _, row in sorted(rows.items())))

    def only(self, indices: Iterable[int]) -> "LayerPlan":
        """The plan of these layers alone."""
        wanted = set(indices)
        return LayerPlan(rows=tuple(row for row in self.rows if row.index in wanted))

    @property
    def indices(self) -> list[int]:
        """The layers."""
        return [row.index for row in self.rows]

    @property
    def layouts(self) -> set[Layout]:
        """The layouts of the filtered layers."""
        return {row.layout for row in self.rows if row.layout is not None}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def filtered(self) -> list[int]:
        """Layers with a cache of their own from which tokens are removed."""
        return [row.index for row in self.rows if row.filtered]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def dense(self) -> dict[str, list[int]]:
        """Layers that keep every token, by reason."""
        return _by_reason((row.dense, row.index) for row in self.rows)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def skipping(self) -> list[int]:
        """Layers that skip attention."""
        return [row.index for row in self.rows if row.skip_units]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def unskipped(self) -> dict[str, list[int]]:
        """Layers that should skip attention and cannot, by reason."""
        return _by_reason((row.unskipped, row.index) for row in self.rows)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def effective_ratio(self) -> float:
        """Share of a sealed chunk that is removed, as a mean over the filtered layers; 0 if there is none."""
        ratios = [row.layout.effective_ratio for row in self.rows if row.filtered and row.layout is not None]
        return sum(ratios) / len(ratios) if ratios else 0.0

    def table(self, chunk_size: int) -> list[dict[str, Any]]:
        """Runs of layers that are alike: layers (such as "0-9"), kept_per_chunk (tokens), kv_ratio and skip_ratio."""

        def kind(row: LayerRow) -> tuple[int, int]:
            return row.layout.kept_per_chunk if row.layout else chunk_size, row.skip_units

        return [
            {
                "layers": ranges(row.index for row in alike),
                "kept_per_chunk": kept,
                "kv_ratio": 1 - kept / chunk_size,
                "skip_ratio": units / SKIP_UNITS,
            }
            for (kept, units), alike in itertools.groupby(self.rows, kind)
        ]


def _unskipped(facts: LayerFacts, config: FilterConfig) -> DenseReason | None:
    if facts.reads is not None:
        return DenseReason.SHARED_CACHE
    if facts.learned_sinks and config.attention_skipping.substitute == "window":
        return DenseReason.LEARNED_SINKS
    return facts.unfit


def _by_reason(pairs: Iterable[tuple[DenseReason | None, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for reason, index in pairs:
        if reason is not None:
            found.setdefault(str(reason), []).append(index)
    return found


def ranges(indices: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"; "none" if there are none."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
