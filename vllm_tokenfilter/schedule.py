"""How one mean ratio is spread over a model's layers: pure arithmetic on layer indices.

Source: docs/schedules.md. The paper (arXiv 2512.07090) prunes later layers only, which is the kind `tail` here.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_tokenfilter.errors import ConfigError

ScheduleKind = Literal["uniform", "tail", "linear", "per_layer"]

#: The part of the layers that `tail` prunes where nothing is said: with a third spared, half of everything stays
#: below what a single layer can bear.
DEFAULT_TAIL_SHARE = 2 / 3
#: The highest ratio `linear` gives a layer by itself.
STEEPEST = 0.9
# What per-layer ratios may miss the mean by, so that they can be written with three decimals.
_MEAN_TOLERANCE = 0.0015


# YAML writes a whole number without a point, and has lists, not tuples: both say what is meant.
AS_FLOAT = BeforeValidator(lambda value: float(value) if type(value) is int else value)
Number = Annotated[float, AS_FLOAT]
Item = TypeVar("Item")
ListOf = Annotated[tuple[Item, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


def setting(default: Any, unit: str, description: str, **bounds: Any) -> Any:
    """A field of our settings; messages, docs/configuration.md and the schema tell its unit and description."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **bounds)


class Schedule(BaseModel):
    """Which layers carry how much of a ratio; immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ScheduleKind = setting(
        "uniform",
        "name",
        "uniform gives every filtered layer the ratio itself; tail puts all of it on the last layers; linear lets "
        "it rise from the first layer to the last; per_layer takes the ratios of a list. But for uniform beside "
        "dense layers, the mean over all layers is the ratio.",
    )
    share: Annotated[float | None, AS_FLOAT] = setting(
        None,
        "ratio",
        "For tail: the share of the layers, counted from the last, that is pruned; 2/3 if not set.",
        gt=0.0,
        le=1.0,
    )
    ratios: ListOf[Number] = setting(
        (), "ratios", "For per_layer: the ratio of every layer, from the first to the last."
    )

    def contradictions(self) -> list[str]:
        """What cannot hold whatever the model, a sentence each."""
        reasons = []
        if self.share is not None and self.kind != "tail":
            reasons.append(f"schedule.share={self.share:g} has no effect on kind={self.kind}; remove it or use tail.")
        if self.ratios and self.kind != "per_layer":
            reasons.append(f"schedule.ratios has no effect on kind={self.kind}; remove it or use per_layer.")
        if self.kind == "per_layer" and not self.ratios:
            reasons.append("schedule.kind=per_layer needs schedule.ratios; list the ratio of every layer.")
        reasons += [
            f"schedule.ratios contains {ratio:g}; each must be 0 or more and below 1."
            for ratio in self.ratios
            if not 0 <= ratio < 1
        ]
        return reasons

    def layer_ratios(self, mean: float, num_layers: int) -> tuple[float, ...]:
        """The ratio of each of `num_layers` >= 1 layers, from the first to the last; their mean is `mean`, in [0, 1).

        Raises:
            ConfigError: the ratio cannot be spread over so many layers; says what to do.
        """
        if mean == 0:
            return (0.0,) * num_layers
        match self.kind:
            case "uniform":
                return (mean,) * num_layers
            case "tail":
                share = self.share or DEFAULT_TAIL_SHARE
                count = max(1, round(share * num_layers))
                ratio = mean * num_layers / count
                if ratio >= 1:
                    raise ConfigError(
                        f"schedule.share={share:.3g} puts a ratio of {ratio:.3g} on the last {count} of "
                        f"{num_layers} layers; use a share above {mean:g} or a lower ratio."
                    )
                return (0.0,) * (num_layers - count) + (ratio,) * count
            case "linear":
                last = max(min(2 * mean, STEEPEST), mean)
                first = 2 * mean - last
                step = (last - first) / max(1, num_layers - 1)
                return (mean,) if num_layers == 1 else tuple(first + step * index for index in range(num_layers))
            case "per_layer":
                if len(self.ratios) != num_layers:
                    raise ConfigError(
                        f"schedule.ratios has {len(self.ratios)} entries and the model {num_layers} layers; give "
                        "each layer one."
                    )
                own = sum(self.ratios) / num_layers
                if abs(own - mean) > _MEAN_TOLERANCE:
                    raise ConfigError(
                        f"schedule.ratios has the mean {own:.4g}, not the ratio {mean:g}; set the ratio to {own:.4g}."
                    )
                return self.ratios


def whole_tokens(ratios: tuple[float, ...], chunk_size: int, quantum: int = 1) -> tuple[int, ...]:
    """Tokens of a chunk that each layer removes: multiples of `quantum` that keep the ratios' mean.

    `ratios`, of every layer, are in [0, 1), and `chunk_size` is a multiple of `quantum` too. Where there is one ratio
    besides 0, all layers get the same number, so that they share their KV-cache group.
    """
    if len(set(ratios) - {0.0}) <= 1:
        return tuple(round(ratio * chunk_size / quantum) * quantum for ratio in ratios)
    exact = [ratio * chunk_size / quantum for ratio in ratios]
    counts = [int(value) for value in exact]
    missing = round(sum(exact)) - sum(counts)
    # The largest remainders are rounded up; of equals the later layer, which bears more.
    order = sorted(range(len(exact)), key=lambda index: (exact[index] - counts[index], index), reverse=True)
    for index in order[:missing]:
        counts[index] += 1
    return tuple(count * quantum for count in counts)
