"""The results page's section on hits in the prefix cache, from a file of benchmarks/prefix_hits.py."""

import statistics

from docs.render.markdown import markdown
from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.tables import Rows

_TEXT = """How what follows a prompt differs after a hit from the same prompt computed from its start (cold): means over
{prompts} prompts of {lengths} tokens and the {follow} tokens read behind each, by the tests' reference in float32. The
divergence is Kullback and Leibler's, of cold from hit, in nats per token. *now* is what is served; the other rows show
where hits could end, and how many tokens of a prompt would then be computed again.
"""
_FIGURES = ("computed_tokens", "divergence_first", "divergence", "logprob_difference", "nll", "nll_cold")


def hits_section(result: Result) -> str:
    """A row per ratio and end of the hit."""
    samples, parameters = result["samples"], result["parameters"]
    rows: Rows = [
        [
            "ratio",
            "the hit ends",
            "prompt tokens computed",
            "divergence, first token",
            "divergence",
            "log-probability differs by",
            "log-perplexity",
            "cold",
        ]
    ]
    for ratio, hit in dict.fromkeys((row["pruning_ratio"], row["hit"]) for row in samples):
        own = [row for row in samples if (row["pruning_ratio"], row["hit"]) == (ratio, hit)]
        rows.append([f"{ratio:g}", hit, *(f"{statistics.mean(row[name] for row in own):.3g}" for name in _FIGURES)])
    lengths = sorted({row["prompt_tokens"] for row in samples})
    text = _TEXT.format(
        prompts=len(lengths),
        lengths=" to ".join(str(x) for x in (lengths[0], lengths[-1])),
        follow=parameters["follow"],
    )
    return f"{text}\n{markdown(rows)}\n"
