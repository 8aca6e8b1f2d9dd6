"""Where the ratio is put: the layers that lose least are pruned heavily, the others keep every token.

Pruned heavily one at a time, most layers change nothing and a few lose the answer; docs/tuning.md has the procedure and
what it found.
"""

import math
from collections.abc import Sequence

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.local.progress import Progress
from vllm_tokenfilter.tuning.texts import TuningText
from vllm_tokenfilter.tuning.tuner import Score, Tuner

#: Tokens that pruned layers keep of a chunk: one block of 32, so that prefix caching stays on (docs/memory.md).
KEPT_PER_CHUNK = 32
#: Chunk sizes a plan may use, and the largest share of the layers that it prunes with each: a larger chunk prunes
#: harder and so leaves more layers whole, but its recent window, one chunk, is larger too.
CHUNKS = ((128, 0.7), (256, 0.95))
#: What a layer must lose, as a share of the worst layer's loss, to be told from chance.
_CLEAR = 0.1


def pruned_layers(ratio: float, num_layers: int) -> tuple[int, int]:
    """How many layers are pruned, and the chunk size, so that the mean over all layers is at least `ratio`.

    Raises:
        EvaluationError: even the largest chunk leaves too much.
    """
    for chunk, most in CHUNKS:
        heavy = 1 - KEPT_PER_CHUNK / chunk
        count = math.ceil(ratio * num_layers / heavy - 1e-9)
        if count <= most * num_layers:
            return max(1, count), chunk
    highest = int(most * num_layers) / num_layers * heavy
    raise EvaluationError(
        f"ratio={ratio:g} leaves too few layers dense; use at most {math.floor(highest * 100) / 100:g}."
    )


def pruning_config(layers: Sequence[int], num_layers: int, chunk: int, kept: int = KEPT_PER_CHUNK) -> FilterConfig:
    """Settings that prune these layers to `kept` tokens of a chunk and no other."""
    ratios = [1 - kept / chunk if index in layers else 0.0 for index in range(num_layers)]
    return FilterConfig.parse(
        {
            "pruning_ratio": round(sum(ratios) / num_layers, 4),
            "chunk_size": chunk,
            "recent_window": chunk,
            "schedule": {"kind": "per_layer", "ratios": ratios},
        }
    )


def probe_config(layer: int, num_layers: int) -> FilterConfig:
    """Settings that leave one layer so little that the answer is lost if it is a retrieval layer."""
    return pruning_config([layer], num_layers, chunk=256, kept=16)


def choose_layers(damage: Sequence[float], count: int) -> list[int]:
    """The `count` layers that lose least, ascending; of equals the later ones.

    Layers whose loss stands out rank by it. The others' losses are chance, another draw of questions orders them anew,
    so they rank by their neighbours' too: retrieval layers stand together, and one beside them is the safer to keep.
    """
    lost = [0.0, *(max(0.0, loss) for loss in damage), 0.0]
    clear = _CLEAR * max(lost)

    def rank(layer: int) -> tuple[bool, float, int]:
        before, own, after = lost[layer : layer + 3]
        stands_out = own > clear
        return stands_out, own if stands_out else own + (before + after) / 4, -layer

    return sorted(sorted(range(len(damage)), key=rank)[:count])


def damage_of(score: Score, dense: Score) -> float:
    """What a setting loses against dense, in nats per token: of the answers, and of running text counted tenfold.

    Running text loses a tenth of what an answer loses where both suffer, and is most of what a model writes.
    """
    return (dense.answer_logprob - score.answer_logprob) + 10 * max(0.0, score.prose_nll - dense.prose_nll)


def search(
    tuner: Tuner, texts: list[TuningText], ratio: float, progress: Progress, known: Sequence[Score] = ()
) -> tuple[list[Score], FilterConfig]:
    """Find which layers to prune, for a mean over all layers of at least `ratio`, and say what the result costs.

    `texts` are from `make_texts`. `known` is "dense" and each layer alone, from an earlier run on the same texts; they
    are measured if there are none.

    Returns:
        Every setting measured ("dense", each layer alone, "tuned", "uniform"), and the settings found.
    """
    count, chunk = pruned_layers(ratio, tuner.num_layers)
    dense, uniform = (FilterConfig.parse({"pruning_ratio": value}) for value in (0, ratio))
    probes = {f"layer {layer}": probe_config(layer, tuner.num_layers) for layer in range(tuner.num_layers)}
    if not known:
        known = tuner.measure(texts, {"dense": dense, **probes}, "Pruning one layer at a time", progress)
    damage = [damage_of(score, known[0]) for score in known[1:]]
    found = pruning_config(choose_layers(damage, count), tuner.num_layers, chunk)
    both = tuner.measure(texts, {"tuned": found, "uniform": uniform}, "Trying the result", progress)
    return [*known, *both], found
