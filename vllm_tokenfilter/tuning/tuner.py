"""Which layers of a model recall, found once per model from questions made up here; no user data, no training.

Only a few layers fetch facts from far back: pruned heavily one at a time, most layers change nothing and a few lose the
answer. So the ratio is put where it costs nothing: the layers that lose least are pruned heavily, the others keep
every token. docs/tuning.md has the procedure and what it found.

A question's text is read once with every token visible. Then, for each setting, only its last tokens are computed
again, with what the setting would have removed hidden from them: one pass over the text serves all settings.

Works on any decoder of `transformers` whose attention modules take `attention_mask` and cache keys and values by layer
(Llama, Mistral, Qwen, Phi, ...).
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.evaluation import perplexity, recall
from vllm_tokenfilter.filtering import kept, redundancy
from vllm_tokenfilter.layout import Layout, sealed_chunks

#: Tokens that pruned layers keep of a chunk: one block of 32, so that prefix caching stays on (docs/memory.md).
KEPT = 32
#: Chunk sizes a plan may use, and the largest share of the layers that it prunes with each: a larger chunk prunes
#: harder and so leaves more layers whole, but its recent window, one chunk, is larger too.
CHUNKS = ((128, 0.7), (256, 0.95))
#: What a layer is tried with: so little is left that one that recalls loses the answer.
_PROBE = {"chunk_size": 256, "recent_window": 256}
_PROBE_KEPT = 16
_KINDS = ("passkey", "key_value")
_DEPTHS = (0.1, 0.5, 0.9)
#: Questions are made with another seed than those `eval` asks by default.
SEED = 1000
#: What a layer must lose, as a share of the worst layer's loss, to be told from chance.
_CLEAR = 0.1
#: Tokens at the end of a text that are computed again; questions and answers are shorter.
_TAIL = 40


@dataclass(frozen=True)
class Text:
    """A text whose end is scored.

    Attributes:
        kind: of recall.KINDS, or "prose".
        tokens: ids.
        num_scored: tokens at the end that are predicted.
    """

    kind: str
    tokens: list[int]
    num_scored: int


@dataclass
class Score:
    """How one setting did.

    Attributes:
        name: "dense", "layer 7", "tuned", "uniform".
        ratios: of every layer.
        chunk_size: tokens; the recent window is as long, but for "uniform" (64 and 64).
        answer_logprob: mean per token of the answers, nats.
        token_accuracy: share of the answers' tokens ranked first.
        prose_nll: mean per token at the end of running text, nats.
    """

    name: str
    ratios: list[float]
    chunk_size: int
    answer_logprob: float = 0.0
    token_accuracy: float = 0.0
    prose_nll: float = 0.0

    @classmethod
    def of(cls, name: str, config: FilterConfig, num_layers: int) -> "Score":
        """A setting that is still to be measured."""
        layouts = config.layouts(num_layers)
        return cls(name, [layout.effective_ratio if layout else 0.0 for layout in layouts], config.chunk_size)


def make_texts(tokenizer: Any, prose: list[int], length: int, trials: int, seed: int = SEED) -> list[Text]:
    """Questions of every kind and depth, and as much running text.

    Args:
        tokenizer: the model's.
        prose: token ids of running text, many times `length`.
        length: tokens of each text.
        trials: questions per kind and depth.
        seed: the same seed gives the same texts.
    """
    texts = []
    for kind in _KINDS:
        for depth in _DEPTHS:
            made = recall.make_trials(kind, tokenizer, prose, length, depth, trials, seed)
            texts += [Text(kind, trial.tokens, trial.num_answer) for trial in made]
    windows = perplexity.windows_of(prose, length, 0)
    if not windows:
        raise EvaluationError([f"length={length} is longer than the text ({len(prose)} tokens); use a shorter one."])
    windows = random.Random(seed).sample(windows, min(len(texts), len(windows)))
    return texts + [Text("prose", window, _TAIL - 1) for window in windows]


def pruned_layers(ratio: float, num_layers: int) -> tuple[int, int]:
    """How many layers are pruned, and the chunk size, so that the mean over all layers is at least `ratio`.

    Raises:
        EvaluationError: even the largest chunk leaves too much.
    """
    for chunk, most in CHUNKS:
        heavy = 1 - KEPT / chunk
        count = math.ceil(ratio * num_layers / heavy - 1e-9)
        if count <= most * num_layers:
            return max(1, count), chunk
    highest = int(most * num_layers) / num_layers * heavy
    raise EvaluationError(
        [f"ratio={ratio:g} leaves too few layers whole; use at most {math.floor(highest * 100) / 100:g}."]
    )


def heavy_config(layers: Sequence[int], chunk: int, num_layers: int) -> FilterConfig:
    """Settings that prune these layers to `KEPT` tokens of a chunk and no other."""
    heavy = 1 - KEPT / chunk
    ratios = [heavy if index in layers else 0.0 for index in range(num_layers)]
    return FilterConfig.parse(
        {
            "pruning_ratio": round(sum(ratios) / num_layers, 4),
            "chunk_size": chunk,
            "recent_window": chunk,
            "schedule": {"kind": "per_layer", "ratios": ratios},
        }
    )


def probe_config(layer: int, num_layers: int) -> FilterConfig:
    """Settings that leave one layer little and the others everything."""
    ratio = 1 - _PROBE_KEPT / _PROBE["chunk_size"]
    ratios = [ratio if index == layer else 0.0 for index in range(num_layers)]
    schedule = {"kind": "per_layer", "ratios": ratios}
    return FilterConfig.parse({**_PROBE, "pruning_ratio": round(ratio / num_layers, 4), "schedule": schedule})


def choose_layers(damage: Sequence[float], count: int) -> list[int]:
    """The `count` layers that lose least, ascending; of equals the later ones.

    Layers whose loss stands out rank by it. The others' losses are chance, another draw of questions orders them anew,
    so they rank by their neighbours' too: layers that recall stand together, and one beside them is the safer to keep.
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


class Tuner:
    """A model whose layers can be pruned one by one, without a server."""

    def __init__(self, model: Any) -> None:
        """Watch the model's attention modules.

        Args:
            model: a causal language model of `transformers`, in evaluation mode.

        Raises:
            EvaluationError: its layers cannot be told apart.
        """
        self.model = model
        found = {
            module.layer_idx: module
            for name, module in model.named_modules()
            if getattr(module, "layer_idx", None) is not None and name.endswith(("attn", "attention"))
        }
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        if sorted(found) != list(range(self.num_layers)):
            raise EvaluationError(
                [
                    f"model={model.config.name_or_path or type(model).__name__} has attention layers that tune cannot "
                    "tell apart; write a per_layer schedule by hand."
                ]
            )
        self._attentions = [found[index] for index in range(self.num_layers)]
        self._hidden: list[Tensor | None] = [None] * self.num_layers

    def measure(
        self, texts: list[Text], settings: list[tuple[Score, FilterConfig]], advance: Callable[[], None]
    ) -> None:
        """Score every setting on every text, into its `Score`.

        Args:
            texts: of one length within a kind.
            settings: what to score.
            advance: called after each text and setting.
        """
        sums: dict[str, dict[str, list[float]]] = {
            score.name: {"logprob": [], "hit": [], "nll": []} for score, _ in settings
        }
        for text in texts:
            with torch.inference_mode():
                prefix = self._read(text.tokens[:-_TAIL])
                for score, config in settings:
                    self._hide(prefix, config)
                    hits, logprob = self._score(text, prefix)
                    found = sums[score.name]
                    if text.kind == "prose":
                        found["nll"].append(-logprob)
                    else:
                        found["hit"].append(hits)
                        found["logprob"].append(logprob)
                    advance()
        for score, _ in settings:
            means = {key: sum(values) / max(1, len(values)) for key, values in sums[score.name].items()}
            score.answer_logprob, score.token_accuracy = means["logprob"], means["hit"]
            score.prose_nll = means["nll"]

    def _read(self, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [H, T, D] of every layer."""
        from transformers import DynamicCache

        cache = DynamicCache()
        ids = torch.tensor([tokens], device=self.model.device)
        for start in range(0, len(tokens), 1024):
            self.model.base_model(input_ids=ids[:, start : start + 1024], past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _hide(self, prefix: list[tuple[Tensor, Tensor]], config: FilterConfig) -> None:
        """Say which tokens of the prefix each layer still sees."""
        for index, layout in enumerate(config.layouts(self.num_layers)):
            keys, values = prefix[index]
            self._hidden[index] = None if layout is None else visible(keys[0], values[0], layout, config)

    def _score(self, text: Text, prefix: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Share of the scored tokens ranked first, and their mean log-probability."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(prefix):
            cache.update(keys, values, index)
        ids = torch.tensor([text.tokens[-_TAIL:]], device=self.model.device)
        with self._masks():
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        logprobs = logits[0, -text.num_scored - 1 : -1].float().log_softmax(-1)
        targets = ids[0, -text.num_scored :]
        hits = (logprobs.argmax(-1) == targets).float().mean()
        return float(hits), float(logprobs.gather(1, targets[:, None]).mean())

    @contextlib.contextmanager
    def _masks(self) -> Iterator[None]:
        """Let each attention module see only what is not hidden from it."""

        def narrow(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            seen = self._hidden[module.layer_idx]
            if seen is None:
                return None
            mask = kwargs.get("attention_mask")
            if mask is None:
                rows = torch.arange(_TAIL, device=seen.device)
                new = rows[:, None] >= rows[None, :]
                mask = torch.cat([new.new_ones(_TAIL, len(seen)), new], 1)[None, None]
            hidden = torch.nn.functional.pad(~seen, (0, mask.shape[-1] - len(seen)))
            lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, lowest)}

        hooks = [module.register_forward_pre_hook(narrow, with_kwargs=True) for module in self._attentions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def visible(keys: Tensor, values: Tensor, layout: Layout, config: FilterConfig) -> Tensor:
    """Which of a request's tokens one layer still holds, bool [T].

    Args:
        keys: [H, T, D], after RoPE.
        values: same shape.
        layout: the layer's.
        config: how tokens are ranked; its selector counts as "anchor".
    """
    seen = torch.ones(keys.shape[1], dtype=torch.bool, device=keys.device)
    size = layout.chunk_size
    for chunk in range(sealed_chunks(keys.shape[1], layout)):
        # A token is scored alike in a longer text once its predecessors are there.
        start = max(0, chunk * size - layout.anchor_terms)
        piece = slice(start, (chunk + 1) * size)
        scores = redundancy(
            keys[:, piece].cpu(),
            values[:, piece].cpu(),
            decay=config.anchor_decay,
            terms=config.anchor_terms,
            fusion=config.fusion,
        )[chunk * size - start :]
        stays = kept(scores, layout.kept_per_chunk, layout.sink_tokens if chunk == 0 else 0)
        seen[chunk * size : (chunk + 1) * size] = False
        seen[chunk * size + stays.to(seen.device)] = True
    return seen


def tune(
    tuner: Tuner,
    texts: list[Text],
    ratio: float,
    progress: Callable[[str, int], Callable[[], None]],
    known: Sequence[Score] = (),
) -> tuple[list[Score], FilterConfig]:
    """Find which layers to prune, and say what the result costs.

    Args:
        tuner: the model.
        texts: from `make_texts`.
        ratio: mean over all layers, at least.
        progress: told of a stage and its units; returns what to call after each.
        known: "dense" and each layer alone, from an earlier run on the same texts; measured if there are none.

    Returns:
        Every setting measured ("dense", each layer alone, "tuned", "uniform"), and the settings found.
    """
    count, chunk = pruned_layers(ratio, tuner.num_layers)
    singles = [probe_config(layer, tuner.num_layers) for layer in range(tuner.num_layers)]
    dense = FilterConfig.parse({"pruning_ratio": 0})
    settings = [(Score.of("dense", dense, tuner.num_layers), dense)]
    settings += [(Score.of(f"layer {layer}", own, tuner.num_layers), own) for layer, own in enumerate(singles)]
    if not known:
        tuner.measure(texts, settings, progress("Pruning one layer at a time", len(texts) * len(settings)))
        known = [score for score, _ in settings]
    damage = [damage_of(score, known[0]) for score in known[1:]]
    found = heavy_config(choose_layers(damage, count), chunk, tuner.num_layers)
    uniform = FilterConfig.parse({"pruning_ratio": ratio})
    both = [
        (Score.of("tuned", found, tuner.num_layers), found),
        (Score.of("uniform", uniform, tuner.num_layers), uniform),
    ]
    tuner.measure(texts, both, progress("Trying the result", len(texts) * len(both)))
    return [*known, *(score for score, _ in both)], found
