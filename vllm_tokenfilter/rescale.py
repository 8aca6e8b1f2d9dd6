"""Other ratios for a server that runs: its KV-cache groups are fixed, so layers alike at its start stay alike.

Layers that keep every token go on to keep them. The others are scaled by one factor, up to what a layer can bear, so
that the mean over all layers is the one asked for, as near as whole tokens allow. Imports neither torch nor vLLM.

Source: docs/operations.md.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.layout import Layout
from vllm_tokenfilter.schedule import Schedule


@dataclass(frozen=True)
class Scale:
    """What a server's settings can be scaled to."""

    started: FilterConfig  #: the settings it started with.
    removed: tuple[int, ...]  #: tokens that each layer removes of a chunk at the start; 0 where it keeps all.

    @classmethod
    def of(cls, started: FilterConfig, num_layers: int) -> "Scale":
        """Of a model with so many layers.

        Raises:
            ConfigError: a schedule does not fit them.
        """
        return cls(started, _removed(started, num_layers))

    @property
    def most_removed(self) -> int:
        """Tokens of a chunk that a layer can lose."""
        return self.started.chunk_size - max(1, self.started.sink_tokens)

    @property
    def step(self) -> float:
        """The ratio that one more token of a chunk makes in every filtered layer."""
        if self.started.schedule.kind == "uniform":
            return 1 / self.started.chunk_size
        filtered = sum(count > 0 for count in self.removed)
        return filtered / (len(self.removed) * self.started.chunk_size)

    @property
    def highest(self) -> float:
        """The highest ratio that can be had."""
        return self.most_removed * self.step

    def settings_for(self, ratio: float) -> FilterConfig:
        """The settings nearest to a ratio; theirs is the one asked for if the schedule is uniform, else what they give.

        Raises:
            ConfigError: the ratio is out of reach; says what is not.
        """
        if self.started.schedule.kind == "uniform":
            return FilterConfig.parse({**self.started.model_dump(mode="json"), "pruning_ratio": ratio})
        if ratio > self.highest:
            keeping = self.removed.count(0)
            raise ConfigError(
                f"pruning_ratio={ratio:g} is out of reach: {keeping} of {len(self.removed)} layers keep every token, "
                f"and the others at least {self.started.chunk_size - self.most_removed} of {self.started.chunk_size}; "
                f"use 0 to {self.highest:g}, or restart the server with another schedule."
            )
        scaled = self._scaled(ratio)
        if all(count == scaled[count] for count in scaled):
            return self.started
        if ratio > 0 and not any(scaled.values()):
            raise ConfigError(
                f"pruning_ratio={ratio:g} removes no token of a chunk in any layer; use 0 or at least {self.step:g}."
            )
        size = self.started.chunk_size
        removed = [scaled[count] for count in self.removed]
        changes = {
            "pruning_ratio": sum(removed) / (size * len(removed)),
            "schedule": Schedule(kind="per_layer", ratios=tuple(count / size for count in removed)).model_dump(),
        }
        return FilterConfig.parse({**self.started.model_dump(mode="json"), **changes})

    def layout(self, at_start: Layout, settings: FilterConfig) -> Layout:
        """Where the tokens of layers lie under other settings, by where they lay at the start."""
        place = self.removed.index(at_start.removed_per_chunk)
        kept = at_start.chunk_size - _removed(settings, len(self.removed))[place]
        return dataclasses.replace(at_start, kept_per_chunk=kept)

    def _scaled(self, ratio: float) -> dict[int, int]:
        """Tokens removed at the start -> tokens to remove."""
        wanted = ratio * len(self.removed) * self.started.chunk_size
        free, full = Counter(self.removed), 0
        del free[0]
        capped: dict[int, int] = {0: 0}
        while free:
            factor = (wanted - full * self.most_removed) / sum(count * layers for count, layers in free.items())
            over = [count for count in free if count * factor > self.most_removed]
            if not over:
                return capped | {count: round(count * factor) for count in free}
            for count in over:
                full += free.pop(count)
                capped[count] = self.most_removed
        return capped


def _removed(settings: FilterConfig, num_layers: int) -> tuple[int, ...]:
    return tuple(layout.removed_per_chunk if layout else 0 for _, layout, _ in settings.layer_settings(num_layers))
