"""What tune found: the result file, and the settings as a YAML file for vLLM's `--config`."""

from typing import Any, Literal

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.local.result_file import ResultFile
from vllm_tokenfilter.tuning.search import KEPT_PER_CHUNK
from vllm_tokenfilter.tuning.tuner import Score


class Tuning(ResultFile):
    """A result file."""

    kind: Literal["tuning"] = "tuning"
    text: str  #: what prose was read.
    parameters: dict[str, Any]  #: ratio, length, trials and seed, as in `TuningRequest`.
    seconds: float  #: what it took.
    settings: dict[str, Any]  #: every setting of the filter, as found.
    scores: list[Score]  #: "dense", each layer alone, "tuned" and "uniform".

    def settings_file(self) -> str:
        """The settings as YAML, with how they were found."""
        found, asked = FilterConfig.parse(self.settings), self.parameters
        scores = {score.name: score for score in self.scores}
        whole = [index for index, ratio in enumerate(found.schedule.ratios) if ratio == 0]

        def line(name: str) -> str:
            accuracy, nll = scores[name].token_accuracy, scores[name].prose_nll - scores["dense"].prose_nll
            return f"#   {name:8} {100 * accuracy:5.1f} % of the answers' tokens, log-perplexity {nll:+.4f}"

        return "\n".join(
            [
                f"# {self.model}: the retrieval layers keep every token, the others {KEPT_PER_CHUNK} of every "
                f"{found.chunk_size} before the newest {found.recent_window}.",
                "# Found by:",
                f"#   {self.command}",
                f"# At the end of {asked['length']} tokens, {asked['trials']} questions per kind and depth "
                "(docs/tuning.md):",
                *map(line, ("dense", "tuned", "uniform")),
                f"# Retrieval layers, kept dense: {', '.join(map(str, whole))}.",
                "attention-backend: TOKEN_FILTERING",
                "additional-config:",
                "  token_filtering:",
                f"    pruning_ratio: {found.pruning_ratio:g}",
                f"    chunk_size: {found.chunk_size}",
                f"    recent_window: {found.recent_window}",
                "    schedule:",
                "      kind: per_layer",
                f"      ratios: [{', '.join(f'{ratio:g}' for ratio in found.schedule.ratios)}]",
                "",
            ]
        )
