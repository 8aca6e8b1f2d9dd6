"""Every setting of Token Filtering, in one frozen model; needs neither torch nor vLLM.

Read once at start from vLLM's `additional_config["token_filtering"]` (a mapping in YAML). The reference
page docs/configuration.md is generated from this model.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.layout import Layout
from vllm_tokenfilter.schedule import ListOf, Number, Schedule, setting, whole_tokens

#: The key of vLLM's `additional_config` that holds our settings, and our entry-point name.
CONFIG_KEY = "token_filtering"

Fusion = Literal["variance_aware", "mean", "key", "value"]
InnerBackend = Literal["auto", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"]
Selector = Literal["anchor", "random", "keydiff", "key_norm", "value_key_norm", "lagkv", "recency"]
Substitute = Literal["none", "window", "running_output"]

#: Ratios of skipping are met in this many steps: 0.0001.
SKIP_UNITS = 10_000


class AttentionSkipping(BaseModel):
    """The paper's own mechanism: a layer skips the attention of a redundant token; immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ratio: Number = setting(
        0.0,
        "ratio",
        "Share of the tokens whose attention a layer skips, as a mean over all layers (0 = off).",
        ge=0.0,
        lt=1.0,
    )
    substitute: Substitute = setting(
        "window",
        "name",
        "What replaces a skipped attention: none (zero, as in the paper), window (attention to the sinks and the "
        "newest skip_window tokens only), running_output (the decaying mean of the outputs that were not skipped).",
    )
    skip_window: int = setting(
        64,
        "tokens",
        "Newest stored tokens that the substitute window attends to, the token itself among them.",
        ge=1,
        le=4096,
    )
    warmup_tokens: int = setting(64, "tokens", "First tokens of a request that are never skipped.", ge=1, le=1_048_576)
    schedule: Schedule = setting(Schedule(), "settings", "How the ratio is spread over the layers.")


class FilterConfig(BaseModel):
    """Settings of Token Filtering; immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    pruning_ratio: Number = setting(
        0.5,
        "ratio",
        "Share of each sealed chunk that is removed from the KV cache (0 = dense, as in stock vLLM).",
        ge=0.0,
        lt=1.0,
    )
    chunk_size: int = setting(64, "tokens", "Tokens that are ranked and sealed together.", ge=2, le=4096)
    recent_window: int = setting(
        64, "tokens", "Newest tokens, which are never removed; at least chunk_size.", ge=2, le=1_048_576
    )
    sink_tokens: int = setting(
        4, "tokens", "First tokens of the sequence, which are never removed; at most what a chunk keeps.", ge=0, le=4096
    )
    anchor_decay: Number = setting(
        0.9, "factor per token", "Decay of the running anchor per token (0.9 in the paper).", gt=0.0, lt=1.0
    )
    anchor_terms: int = setting(
        64, "tokens", "Earlier tokens that one anchor averages; at most chunk_size.", ge=1, le=4096
    )
    fusion: Fusion = setting(
        "variance_aware",
        "name",
        "How key and value similarity become one redundancy, for filtering and skipping alike: variance_aware gives "
        "more weight to the one on which the heads agree, mean averages both, key and value use one alone.",
    )
    selector: Selector = setting(
        "anchor",
        "name",
        "How tokens are ranked: anchor is this plugin's method (key and value similarity to running anchors, see "
        "fusion); the others are baselines for comparison: random, keydiff, key_norm, value_key_norm, lagkv, and "
        "recency (StreamingLLM: sinks and newest tokens only).",
    )
    random_seed: int = setting(0, "seed", "Seed of the selector random; the others ignore it.", ge=0, lt=2**16)
    dense_layers: ListOf[int] = setting((), "layer indices", "Layers that keep every token, by index from 0.")
    first_layer: int = setting(0, "layer index", "First filtered layer; all layers before it keep every token.", ge=0)
    schedule: Schedule = setting(
        Schedule(), "settings", "How pruning_ratio is spread over the layers; see docs/schedules.md."
    )
    attention_skipping: AttentionSkipping = setting(
        AttentionSkipping(), "settings", "The paper's own mode, off by default; see docs/skipping.md."
    )

    inner_backend: InnerBackend = setting(
        "auto",
        "name",
        "On a GPU, the attention backend of vLLM that reads and writes the cache; auto: the one vLLM would choose.",
    )

    @property
    def layout(self) -> Layout:
        """The layout of a layer that has the ratio itself; `kept_per_chunk` is rounded to whole tokens once, here."""
        return self._layout_without(round(self.pruning_ratio * self.chunk_size))

    def layer_settings(self, num_layers: int) -> list[tuple[float, Layout | None, float]]:
        """What a `LayerPlan` starts from, for every layer: pruning ratio, layout (None: all tokens), ratio of skipping.

        Raises:
            ConfigError: a schedule does not fit so many layers, or leaves a layer too little.
        """
        skipping, resolved = self.attention_skipping, []
        reasons: list[str] = []
        for schedule, mean in ((self.schedule, self.pruning_ratio), (skipping.schedule, skipping.ratio)):
            try:
                resolved.append(schedule.layer_ratios(mean, num_layers))
            except ConfigError as error:
                reasons += error.reasons
        if reasons:
            raise ConfigError(reasons)
        ratios, skipped = resolved
        # Ratios that rise layer by layer would make a KV-cache group of each: eighths of a chunk are fine enough.
        fine = self.schedule.kind != "linear" or self.chunk_size % 8
        counts = whole_tokens(ratios, self.chunk_size, 1 if fine else self.chunk_size // 8)
        if self.chunk_size - max(counts) < max(1, self.sink_tokens):
            raise ConfigError(
                f"schedule.kind={self.schedule.kind} leaves a layer {self.chunk_size - max(counts)} tokens of a "
                f"chunk, which must hold {max(1, self.sink_tokens)}; use a lower pruning_ratio, fewer sink_tokens "
                "or a larger chunk_size."
            )
        dense = {*range(self.first_layer), *self.dense_layers}
        layouts = [self._layout_without(n) if n and index not in dense else None for index, n in enumerate(counts)]
        return list(zip(ratios, layouts, skipped, strict=True))

    @property
    def active(self) -> bool:
        """Whether anything is pruned or skipped at all."""
        return self.pruning_ratio > 0 or self.attention_skipping.ratio > 0

    def _layout_without(self, removed_per_chunk: int) -> Layout:
        return Layout(
            chunk_size=self.chunk_size,
            kept_per_chunk=self.chunk_size - removed_per_chunk,
            recent_window=self.recent_window,
            sink_tokens=self.sink_tokens,
            anchor_terms=self.anchor_terms,
        )

    def _contradictions(self) -> list[str]:
        layout, reasons = self.layout, []
        if self.recent_window < self.chunk_size:
            reasons.append(
                f"recent_window={self.recent_window} is below chunk_size={self.chunk_size}; "
                f"use recent_window of at least {self.chunk_size} or a smaller chunk_size."
            )
        if self.anchor_terms > self.chunk_size:
            reasons.append(
                f"anchor_terms={self.anchor_terms} is above chunk_size={self.chunk_size}; "
                f"use anchor_terms of at most {self.chunk_size}."
            )
        if layout.kept_per_chunk < 1:
            reasons.append(
                f"pruning_ratio={self.pruning_ratio:g} keeps no token of a chunk of {self.chunk_size}; "
                f"use at most {(self.chunk_size - 1) / self.chunk_size:g} or a larger chunk_size."
            )
        elif self.pruning_ratio > 0 and layout.removed_per_chunk == 0:
            reasons.append(
                f"pruning_ratio={self.pruning_ratio:g} removes no token of a chunk of {self.chunk_size}; "
                f"use 0 or at least {1 / self.chunk_size:g}."
            )
        elif self.sink_tokens > layout.kept_per_chunk:
            reasons.append(
                f"sink_tokens={self.sink_tokens} is above the {layout.kept_per_chunk} tokens a chunk keeps at "
                f"pruning_ratio={self.pruning_ratio:g}, chunk_size={self.chunk_size}; use fewer sink_tokens, a lower "
                "pruning_ratio or a larger chunk_size."
            )
        reasons.extend(
            f"dense_layers contains {index}; a layer's index must be 0 or more."
            for index in self.dense_layers
            if index < 0
        )
        if self.schedule.kind != "uniform" and (self.dense_layers or self.first_layer):
            reasons.append(
                f"schedule.kind={self.schedule.kind} decides which layers keep every token; remove dense_layers and "
                "first_layer, or list their ratio as 0 in a schedule of kind per_layer."
            )
        reasons += self.schedule.contradictions()
        reasons += [f"attention_skipping.{reason}" for reason in self.attention_skipping.schedule.contradictions()]
        return reasons

    @classmethod
    def within(cls, additional_config: object) -> "FilterConfig":
        """Read the settings in vLLM's `additional_config`; the defaults where it holds none.

        Raises:
            ConfigError: see `parse`, and settings of ours must not stand beside our key.
        """
        if isinstance(additional_config, str):
            raise ConfigError(f"additional_config={additional_config} must be a mapping; write it as a JSON object.")
        found = understood(additional_config) if isinstance(additional_config, Mapping) else {}
        if beside := [key for key in found if str(key).replace("-", "_") in cls.model_fields]:
            raise ConfigError(f"additional_config.{beside[0]} has no effect there; write it under {CONFIG_KEY}.")
        return cls.parse(found.get(CONFIG_KEY))

    @classmethod
    def parse(cls, settings: object) -> "FilterConfig":
        """Read the mapping under `additional_config.token_filtering` (None: the defaults), refusing all wrong at once.

        Raises:
            ConfigError: a key is unknown, wrongly typed or out of range, or settings contradict each other.
        """
        if settings is None:
            settings = {}
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"{CONFIG_KEY}={settings!r} must be a mapping; write settings such as pruning_ratio: 0.5 under it."
            )
        try:
            config = cls.model_validate({str(key): value for key, value in settings.items()})
        except ValidationError as error:
            raise ConfigError([_explain(detail) for detail in error.errors()]) from None
        if reasons := config._contradictions():
            raise ConfigError(reasons)
        return config


def understood(additional_config: Mapping[Any, Any]) -> dict[Any, Any]:
    """What vLLM's `additional_config` holds, with underscores in our key and in those under it, for dashes too.

    Raises:
        ConfigError: a key is nearly ours and would be ignored, or holds no settings.
    """
    found: dict[Any, Any] = {}
    for key, value in additional_config.items():
        name = str(key).replace("-", "_")
        if name == CONFIG_KEY:
            if not isinstance(value, Mapping | None):
                FilterConfig.parse(value)
            found[name] = merged(found.get(name, {}), _underscored(value or {}))
        elif difflib.get_close_matches(name.lower(), [CONFIG_KEY], cutoff=0.7):
            raise ConfigError(f"additional_config.{key} is not a key of this plugin; did you mean {CONFIG_KEY}?")
        else:
            found[key] = value
    return found


def merged(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Both, key by key; where both have a value, the second's."""
    found = dict(first)
    for key, value in then.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def _underscored(value: Any) -> Any:
    is_leaf = not isinstance(value, Mapping)
    return value if is_leaf else {str(key).replace("-", "_"): _underscored(item) for key, item in value.items()}


def _explain(detail: Mapping[str, Any]) -> str:
    """One sentence for one pydantic error: setting, value, remedy."""
    if not detail["loc"]:
        return f"{CONFIG_KEY}={detail['input']!r} is refused ({detail['msg']})."
    where = ".".join(map(str, detail["loc"]))
    model: Any = FilterConfig
    name, field = "", None
    for part in detail["loc"]:
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
        if part in model.model_fields:
            name, field = str(part), model.model_fields[part]
    if detail["type"] == "extra_forbidden":
        known = list(model.model_fields)
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}."
        return f"{where}={detail['input']!r} is not a setting; {remedy}"
    assert field is not None
    return f"{where}={detail['input']!r} is refused ({detail['msg']}); {name}: {field.description}"
