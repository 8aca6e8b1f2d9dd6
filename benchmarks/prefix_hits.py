"""What a hit in the prefix cache changes: the reference of the tests, cold and after hits that end in several places.

Needs no server: `tests/reference.py` models a hit, and the engine tests hold served hits to it. For each ratio and
prompt, the text behind the prompt is read token by token, and its log-probabilities are compared with those of the same
prompt computed from its start, cut on the grid:

    now                 the hit ends ahead of the window, as served
    grid line           it ends at the last multiple of the grid inside the prompt
    window before it    it ends a window before that, so that all that follows the line sees the chunks it sees cold
    two windows before

    python -m benchmarks.prefix_hits
"""

import argparse
import statistics
from pathlib import Path

import torch

from tests import reference
from vllm_tokenfilter.evaluation.texts import load_text
from vllm_tokenfilter.local.models import MODEL_NAME, default_model_path
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result

GRID = 512


def cut(start, end):
    """Steps of a prompt from `start` to `end` on the grid."""
    steps = []
    while start < end:
        steps.append(min(end, (start // GRID + 1) * GRID) - start)
        start += steps[-1]
    return steps


def hits(length, settings):
    """Name -> chunks taken over by a prompt of so many tokens."""
    line = (length - 1) // GRID * GRID
    return {
        "now": settings.sealed(length),
        "grid line": line // settings.C,
        "window before it": settings.sealed(line),
        "two windows before": settings.sealed(line - settings.W),
    }


def compare(model, ids, length, settings):
    """Per hit, how what follows the prompt differs from cold."""
    count, layers = len(ids) - length, range(len(model.model.layers))

    def read(steps, **hit):
        result = reference.run(model, ids, [*steps, *[1] * count], settings, **hit)
        logprobs = result.logprobs[length - 1 : length + count - 1]
        return result, logprobs, logprobs[torch.arange(count), torch.tensor(ids[length:])]

    cold, of_all, of_text = read(cut(0, length))
    rows = []
    for name, chunks in hits(length, settings).items():
        start = chunks * settings.C
        _, other, own = read(cut(start, length), taken_over=[[(0, start, cold)] for _ in layers] if start else None)
        divergence = (of_all.exp() * (of_all - other)).sum(1)
        rows.append(
            {
                "hit": name,
                "prompt_tokens": length,
                "computed_tokens": length - start,
                "divergence_first": divergence[0].item(),
                "divergence": divergence.mean().item(),
                "logprob_difference": (own - of_text).abs().mean().item(),
                "nll": -own.mean().item(),
                "nll_cold": -of_text.mean().item(),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--prompts", type=int, nargs="+", default=[760, 900, 1000, 1250], help="tokens of each")
    parser.add_argument("--follow", type=int, default=64, help="tokens read behind each prompt")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "prefix_hits.json")
    options, origin = parser.parse_args(), provenance()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = default_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(path)(load_text("builtin", None)[1])["input_ids"]
    samples = []
    for ratio in options.ratios:
        first = 0
        for length in options.prompts:
            ids = tokens[first : first + length + options.follow]
            assert len(ids) == length + options.follow, "there is less text"
            rows = compare(model, ids, length, reference.Settings(ratio=ratio))
            samples += [{"pruning_ratio": ratio, **row} for row in rows]
            first += length
        for name in hits(GRID + 1, reference.Settings()):
            own = [row for row in samples if (row["pruning_ratio"], row["hit"]) == (ratio, name)]
            figures = ("computed_tokens", "divergence_first", "divergence", "logprob_difference", "nll", "nll_cold")
            print(ratio, name, {f: round(statistics.mean(row[f] for row in own), 4) for f in figures}, flush=True)
    parameters = {"model": MODEL_NAME, "grid": GRID, "chunk_size": 64, "recent_window": 64, "follow": options.follow}
    write_result(options.json, {"provenance": origin, "parameters": parameters, "samples": samples})


if __name__ == "__main__":
    main()
