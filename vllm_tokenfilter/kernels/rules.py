"""How tokens are ranked and attention is skipped, and the codes by which the kernels of both devices know it.

Numbers only: what a device's kernels are handed is made from these in kernels/cpu and kernels/gpu.

Source: docs/algorithm.md (redundancy), docs/skipping.md (the decision).
"""

from dataclasses import dataclass
from typing import get_args

from vllm_tokenfilter.config import FilterConfig, Fusion, Substitute

VARIANCE_AWARE, MEAN, KEY, VALUE = range(len(get_args(Fusion)))
FUSION_CODES: dict[Fusion, int] = {"variance_aware": VARIANCE_AWARE, "mean": MEAN, "key": KEY, "value": VALUE}
_SELECTORS = ("anchor", "random", "keydiff", "key_norm", "value_key_norm", "lagkv", "recency")
SELECTOR_CODES = {name: code for code, name in enumerate(_SELECTORS)}
# Scores of a baseline stand in place of the similarity of keys, or of keys and values; how they become one number.
_BASELINE_FUSION = {"random": KEY, "keydiff": KEY, "key_norm": KEY, "value_key_norm": KEY, "lagkv": MEAN}

#: What the GPU kernels can rank by.
GPU_SELECTORS = ("anchor", "random", "keydiff", "key_norm", "value_key_norm")
#: A program of theirs holds one number per token of a chunk.
MAX_CHUNK_SIZE = 1024
#: A debt of this many tokens moves the level by the whole ratio range: small against 1000 tokens, large against noise.
PATIENCE = 8
#: Scores the threshold is a quantile of: what is always raw, and enough of it.
_MOST_HISTORY = 256


@dataclass(frozen=True)
class ScoreRule:
    """How tokens are ranked, to seal them; `SkipRule` has the fusion for attention skipping."""

    selector: str = "anchor"  #: a key of SELECTOR_CODES; see selectors.py.
    fusion: Fusion = "variance_aware"  #: a key of FUSION_CODES, for the selector "anchor".
    decay: float = 0.9  #: the anchor's decay per token.
    seed: int = 0  #: of the selector "random".

    @classmethod
    def of(cls, config: FilterConfig) -> "ScoreRule":
        """The rule that the settings name."""
        return cls(config.selector, config.fusion, config.anchor_decay, config.random_seed)

    @property
    def fusion_code(self) -> int:
        """How the heads' scores of keys and values become one number per token."""
        return _BASELINE_FUSION.get(self.selector, FUSION_CODES[self.fusion])


@dataclass(frozen=True)
class SkipRule:
    """How a layer decides and substitutes."""

    terms: int  #: predecessors an anchor averages.
    fusion: Fusion  #: a key of FUSION_CODES.
    decay: float  #: the anchor's decay per token, and that of the substitute "running_output".
    history: int  #: most recent scores the threshold is a quantile of.
    warmup: int  #: first positions that are never skipped.
    sinks: int  #: first slots the substitute "window" attends to.
    window: int  #: newest slots it attends to, the token's own among them.

    @classmethod
    def of(cls, config: FilterConfig) -> "SkipRule":
        """The rule for these settings."""
        skipping = config.attention_skipping
        return cls(
            terms=config.anchor_terms,
            fusion=config.fusion,
            decay=config.anchor_decay,
            history=min(config.recent_window, _MOST_HISTORY),
            warmup=skipping.warmup_tokens,
            sinks=config.sink_tokens,
            window=skipping.skip_window,
        )

    def skipped_reads(self, substitute: Substitute) -> int:
        """Cache entries that a skipped row of one token reads at most: vLLM's kernel one, the substitute its own."""
        return 1 + {"none": 0, "window": self.sinks + self.window, "running_output": 0}[substitute]
