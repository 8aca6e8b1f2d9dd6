"""What an evaluation is asked and what it answers; the result file is one `Evaluation` as JSON."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from vllm_tokenfilter.config import FilterConfig, Fusion, Selector
from vllm_tokenfilter.local.result_file import ResultFile

#: Method -> the settings that make the filter choose as it does; docs/algorithm.md cites the sources.
METHODS: dict[str, dict[str, str]] = {
    **{fusion: {"selector": "anchor", "fusion": fusion} for fusion in get_args(Fusion)},
    **{selector: {"selector": selector} for selector in get_args(Selector) if selector != "anchor"},
}


class Cell(BaseModel):
    """One measurement: a method's settings under one metric."""

    model_config = ConfigDict(extra="forbid")

    method: str  #: a key of METHODS, "dense", or the name of a settings file.
    settings: dict[str, Any]  #: every setting of the filter, as in docs/configuration.md.
    metric: str  #: perplexity, recall, or a task's name.
    parameters: dict[str, Any]  #: what was measured: sequence length, rows, depth, ...
    #: The figures by name. perplexity; kl (mean KL divergence of the next-token distribution from dense to filtered,
    #: nats); top1_agreement (share of positions where both name the same likeliest token); accuracy and its standard
    #: error; token_accuracy; answer_logprob (mean per token, nats).
    values: dict[str, float]
    samples: list[float]  #: per window, row or trial, in order, what `values` is the mean of: for paired comparisons.
    tokens_seen: int  #: positions computed.
    tokens_pruned: int  #: positions that left the cache, as a mean over the filtered layers.
    attentions_skipped: int = 0  #: attentions of a token in a layer that were skipped.
    rows_dense: dict[str, int]  #: steps of requests that read every token, by reason.
    #: Whether anything was removed or skipped; if not, at a ratio above 0, this is "filter inactive" and no quality
    #: result.
    filter_active: bool

    @property
    def key(self) -> str:
        """See `key_of`."""
        return key_of(FilterConfig.parse(self.settings), self.metric, self.parameters)


class Evaluation(ResultFile):
    """A result file."""

    kind: Literal["evaluation"] = "evaluation"
    text: str  #: what prose was read.
    seed: int  #: of every generator.
    cells: list[Cell] = []  #: the measurements.


def key_of(config: FilterConfig, metric: str, parameters: dict[str, Any]) -> str:
    """What makes two cells the same measurement."""
    return repr((config, metric, sorted(parameters.items())))


def settings_of(method: str, ratio: float, window: int, chunk: int, extra: dict[str, Any]) -> FilterConfig:
    """The filter's settings for one point of the grid; ratio 0 is dense whatever the method.

    Raises:
        ConfigError: they cannot hold.
    """
    chosen: dict[str, Any] = {
        "pruning_ratio": ratio,
        "recent_window": window,
        "chunk_size": chunk,
        "anchor_terms": min(64, chunk),
        "sink_tokens": min(4, max(0, chunk - round(ratio * chunk))),
    }
    return FilterConfig.parse({**chosen, **METHODS[method], **extra})
