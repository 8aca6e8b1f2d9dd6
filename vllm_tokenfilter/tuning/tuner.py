"""Scores a model with some layers pruned, without a server; no user data, no training.

A question's text is read once with every token visible. Then, for each setting, only its last tokens are computed
again, with what the setting would have removed hidden from them: one pass over the text serves all settings.

Works on any decoder of `transformers` whose attention modules take `attention_mask` and cache keys and values by layer
(Llama, Mistral, Qwen, Phi, ...).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.filtering import kept, redundancy
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import Layout, sealed_chunks
from vllm_tokenfilter.local.progress import Progress
from vllm_tokenfilter.tuning.texts import TAIL, TuningText


@dataclass(frozen=True)
class Score:
    """How one setting did."""

    name: str  #: "dense", "layer 7", "tuned", "uniform".
    ratios: list[float]  #: of every layer.
    chunk_size: int  #: tokens; the recent window is as long, but for "uniform" (64 and 64).
    answer_logprob: float  #: mean per token of the answers, nats.
    token_accuracy: float  #: share of the answers' tokens ranked first.
    prose_nll: float  #: mean per token at the end of running text, nats.


class Tuner:
    """A model whose layers can be pruned one by one, without a server."""

    def __init__(self, model: Any) -> None:
        """Watch the attention modules of a causal language model of `transformers`, in evaluation mode.

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
                f"model={model.config.name_or_path or type(model).__name__} has attention layers that tune cannot "
                "tell apart; write a per_layer schedule by hand."
            )
        self._attentions = [found[index] for index in range(self.num_layers)]
        self._hidden: list[Tensor | None] = [None] * self.num_layers

    def measure(
        self, texts: list[TuningText], settings: dict[str, FilterConfig], stage: str, progress: Progress
    ) -> list[Score]:
        """How each of the settings does on the texts, in their order; the texts of a kind have one length."""
        advance = progress(stage, len(texts) * len(settings))
        answers: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
        prose: dict[str, list[float]] = {name: [] for name in settings}
        for text in texts:
            with torch.inference_mode():
                prefix = self._read(text.tokens[:-TAIL])
                for name, config in settings.items():
                    self._hide(prefix, config)
                    hits, logprob = self._score(text, prefix)
                    if text.kind == "prose":
                        prose[name].append(-logprob)
                    else:
                        answers[name].append((hits, logprob))
                    advance()
        return [
            Score(
                name=name,
                ratios=[layout.effective_ratio if layout else 0.0 for layout in self._layouts(config)],
                chunk_size=config.chunk_size,
                answer_logprob=_mean([logprob for _, logprob in answers[name]]),
                token_accuracy=_mean([hits for hits, _ in answers[name]]),
                prose_nll=_mean(prose[name]),
            )
            for name, config in settings.items()
        ]

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
        for index, layout in enumerate(self._layouts(config)):
            keys, values = prefix[index]
            self._hidden[index] = None if layout is None else visible(keys[0], values[0], layout, config)

    def _layouts(self, config: FilterConfig) -> list[Layout | None]:
        return [row.layout for row in LayerPlan.of(config, self.num_layers).rows]

    def _score(self, text: TuningText, prefix: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Share of the scored tokens ranked first, and their mean log-probability."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(prefix):
            cache.update(keys, values, index)
        ids = torch.tensor([text.tokens[-TAIL:]], device=self.model.device)
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
                rows = torch.arange(TAIL, device=seen.device)
                new = rows[:, None] >= rows[None, :]
                mask = torch.cat([new.new_ones(TAIL, len(seen)), new], 1)[None, None]
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
    """Which of a request's tokens one layer still holds, bool [T], from keys (after RoPE) and values [H, T, D].

    The settings' selector counts as "anchor".
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


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def load_model(path: str, device: str | None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer, from a folder or by its Hugging Face id.

    `device` is one of PyTorch's; None: a GPU if there is one.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
        return model.to(where).eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            f"model={path} cannot be loaded on {where} ({str(error).splitlines()[0]}); pass another --model or "
            "--device."
        ) from None
