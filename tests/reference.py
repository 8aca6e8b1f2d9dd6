"""The filter as a mask over a plain forward of a Hugging Face Llama: the oracle of the engine tests.

Shares no code with the package. Every layer keeps all keys and values; filtering only decides which of them a later
step may see. Written from the formulas in docs/algorithm.md and docs/layout.md.

A step with `computed` tokens before it lets each new token see every visible old token and the step's own tokens up
to itself; afterwards the chunks that the step made due lose their most redundant tokens. How a prompt was cut into
steps is therefore part of the input. So is what was taken over from the prefix cache: whole chunks, as the run that
computed them left them; the tokens behind them start a history of their own.
"""

from dataclasses import dataclass, field

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv


@dataclass
class Settings:
    """The settings in the formulas' letters."""

    ratio: float = 0.5
    C: int = 64
    W: int = 64
    sinks: int = 4
    g: float = 0.9
    M: int = 64
    dense_layers: tuple[int, ...] = ()
    # layer -> tokens a chunk keeps, where layers differ; a layer that is not in it is dense
    kept_of: dict[int, int] | None = None
    # layer -> the layer whose keys and values it reads, instead of any of its own
    reads: dict[int, int] = field(default_factory=dict)
    # attention skipping: the share of each layer, what stands for a skipped attention, and how
    skip: tuple[float, ...] = ()
    substitute: str = "none"
    skip_window: int = 64
    warmup: int = 64

    def K(self, layer):
        if layer in self.reads:
            return self.C
        if self.kept_of is not None:
            return self.kept_of.get(layer, self.C)
        return self.C if layer in self.dense_layers else self.C - round(self.ratio * self.C)

    @property
    def history(self):
        return min(self.W, 256)

    def sealed(self, n):
        return max(0, (n - self.W) // self.C)


@dataclass
class Result:
    """What the reference found.

    Attributes:
        logprobs: float32 [num_tokens, vocab], log-probability of the next token after each position.
        kept: (layer, chunk) -> offsets inside the chunk that stay.
        keys: per layer, float32 [1, H, num_tokens, D]; values likewise.
        near_ties: choices taken over from the backend because the cut lay between equals within `tie`.
        choices: choices compared.
        skipped: per layer, bool [num_tokens]: whose attention is skipped.
    """

    logprobs: torch.Tensor
    keys: list = field(default_factory=list)
    values: list = field(default_factory=list)
    kept: dict = field(default_factory=dict)
    near_ties: int = 0
    choices: int = 0
    skipped: list = field(default_factory=list)


def redundancy(keys, values, start, end, settings, origin=0):
    """Score positions start..end-1 from raw keys and values [H, T, D], in float64; nothing before origin counts."""
    first = max(origin, start - settings.M)
    distance = torch.arange(start, end)[:, None] - torch.arange(first, end)[None, :]
    counts = (distance >= 1) & (distance <= settings.M)
    weights = torch.where(counts, (1 - settings.g) * settings.g ** (distance - 1).clamp(min=0).double(), 0.0)
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 0, weights / total, 0.0)
    similar = []
    for x in (keys.double(), values.double()):
        similar.append(torch.cosine_similarity(x[:, start:end], weights @ x[:, first:end], dim=-1, eps=1e-300))
    k, v = similar
    var_k, var_v = k.var(0, correction=0), v.var(0, correction=0)
    a = torch.where(var_k + var_v == 0, 0.5, var_v / (var_k + var_v))
    return a * k.mean(0) + (1 - a) * v.mean(0)


def decide(scores, settings, layer, known=(), theirs=None, tie=1e-4):
    """Which tokens a layer skips, from the scores of all its tokens: a loop over the formulas of docs/skipping.md.

    Exact in fractions, so that only the scores are float.

    Args:
        scores: of positions 0 .. , float64.
        settings: the settings.
        layer: its index.
        known: decisions of the first positions, made before.
        theirs: the backend's decisions, taken over where a near tie explains the difference.
        tie: scores this close count as equal.

    Returns:
        bool [num_tokens], and how many of the decisions that were not known were taken over.
    """
    from fractions import Fraction

    ratio = Fraction(round(settings.skip[layer] * 10000), 10000)
    skipped, ties = list(known), 0
    debt = ratio * max(0, len(skipped) - settings.warmup) - sum(skipped)
    for t in range(len(skipped), len(scores)):
        recent = scores[max(0, t - settings.history) : t]
        if t < settings.warmup:
            skipped.append(False)
            continue
        level = ratio + debt / 8

        def above(below):
            return len(recent) > 0 and level > 0 and below >= len(recent) * (1 - level)  # noqa: B023

        skip = above(int((recent < scores[t]).sum()))
        if theirs is not None and bool(theirs[t]) != skip:
            surely, perhaps = int((recent < scores[t] - tie).sum()), int((recent < scores[t] + tie).sum())
            assert above(surely) != above(perhaps), f"layer {layer}, position {t}: skip is {skip} without a tie"
            skip, ties = bool(theirs[t]), ties + 1
        skipped.append(skip)
        debt += ratio - skip
    return torch.tensor(skipped), ties


def _substitute(settings, q, k, v, positions, scaling, outputs, skipped, group, before):
    """What stands for skipped attentions: changes `outputs` [T, heads * D] of a step in place.

    Args:
        settings: the settings.
        q: [heads, T, D] of the step.
        k: [H, num_tokens, D] of all tokens; v likewise.
        positions: positions stored before the step, in slot order.
        scaling: of the scores.
        outputs: the attention's.
        skipped: bool, of every token so far, the step's last.
        group: query heads per KV head.
        before: outputs of earlier tokens as they stood for attention, for the running mean: list of (skipped, output).
    """
    count = outputs.shape[0]
    first = k.shape[1] - count
    for t in range(count):
        position = first + t
        if settings.substitute == "running_output":
            if skipped[position]:
                mean, weight = before
                outputs[t] = mean / weight if weight > 0 else 0.0
            else:
                before[0] = settings.g * before[0] + (1 - settings.g) * outputs[t].double()
                before[1] = settings.g * before[1] + (1 - settings.g)
        elif skipped[position] and settings.substitute == "none":
            outputs[t] = 0
        elif skipped[position]:
            assert settings.substitute == "window", settings.substitute
            slots = torch.cat([positions, torch.arange(first, position + 1)])
            near = torch.unique(torch.cat([slots[: settings.sinks], slots[-settings.skip_window :]]))
            key, value = k[:, near].repeat_interleave(group, 0), v[:, near].repeat_interleave(group, 0)
            weights = (torch.einsum("hd,hnd->hn", q[:, t], key) * scaling).softmax(-1)
            outputs[t] = torch.einsum("hn,hnd->hd", weights, value).flatten()


def _choose(scores, chunk, settings, layer):
    order = sorted(
        range(settings.C),
        key=lambda i: (0, i) if chunk * settings.C + i < settings.sinks else (1, float(scores[i]), i),
    )
    return sorted(order[: settings.K(layer)])


def _reconcile(own, theirs, scores, tie, where):
    """The backend's choice, if the tokens it swapped are as redundant as those it swapped them for; else fail."""
    scores_of = lambda offsets: [float(scores[i]) for i in offsets]  # noqa: E731
    stayed, left = scores_of(set(theirs) - set(own)), scores_of(set(own) - set(theirs))
    assert len(theirs) == len(own), f"{where}: kept {len(theirs)} tokens, not {len(own)}"
    assert max(stayed) - min(left) <= tie, f"{where}: kept {theirs}, reference {own}: {stayed} for {left}"
    return theirs


def _join(steps, settings, start):
    """Steps between which nothing is sealed see the same tokens as one step would: fewer, larger forwards."""
    joined, computed, last = [], start, 0
    for step in steps:
        if joined and settings.sealed(computed) == settings.sealed(computed - last):
            joined[-1] += step
        else:
            joined.append(step)
        last = step
        computed += step
    return joined


@torch.no_grad()
def run(model, tokens, steps, settings, backend_choice=None, tie=1e-4, taken_over=None, backend_skips=None):
    """Feed `tokens` in `steps` and filter as the settings say.

    Args:
        model: LlamaForCausalLM in float32.
        tokens: prompt and continuation, ids.
        steps: tokens of each step; together all of `tokens` that were not taken over.
        settings: the filter's settings.
        backend_choice: (layer, chunk) -> offsets the backend kept.
        tie: redundancies this close count as equal.
        taken_over: per layer, (first position, end, Result) for each piece of the prefix that another run computed;
            whole chunks, the same tokens in every layer.
        backend_skips: layer -> bool [num_tokens], whose attention the backend skipped.
    """
    assert not (settings.skip and taken_over), "the reference of skipping starts every request anew"
    start = len(tokens) - sum(steps)
    assert start == (taken_over[0][-1][1] if taken_over else 0) and start % settings.C == 0
    inner = model.model
    config = model.config
    layers = inner.layers
    group = config.num_attention_heads // config.num_key_value_heads
    ids = torch.tensor([tokens])
    hidden_all = inner.embed_tokens(ids)
    cos, sin = inner.rotary_emb(hidden_all, torch.arange(len(tokens))[None])
    keys = [torch.zeros(0) for _ in layers]
    values = [torch.zeros(0) for _ in layers]
    visible = torch.ones(len(layers), len(tokens), dtype=torch.bool)
    result, computed = Result(torch.empty(0)), start
    logprobs = [torch.full((start, config.vocab_size), torch.nan)]
    skip_scores = [torch.zeros(0, dtype=torch.float64) for _ in layers]
    means = [[torch.zeros(config.num_attention_heads * layers[0].self_attn.head_dim).double(), 0.0] for _ in layers]
    result.skipped = [torch.zeros(0, dtype=torch.bool) for _ in layers]
    if start:
        for index, pieces in enumerate(taken_over):
            keys[index] = torch.cat([other.keys[index][:, :, a:b] for a, b, other in pieces], 2)
            values[index] = torch.cat([other.values[index][:, :, a:b] for a, b, other in pieces], 2)
            if settings.K(index) == settings.C:
                continue
            for a, b, other in pieces:
                for chunk in range(a // settings.C, b // settings.C):
                    result.kept[index, chunk] = other.kept[index, chunk]
                    visible[index, chunk * settings.C : (chunk + 1) * settings.C] = False
                    visible[index, [chunk * settings.C + i for i in other.kept[index, chunk]]] = True
    for step in _join(steps, settings, start):
        end = computed + step
        hidden = hidden_all[:, computed:end]
        for index, layer in enumerate(layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            shape = (1, step, -1, attention.head_dim)
            q = attention.q_proj(normed).view(shape).transpose(1, 2)
            k = attention.k_proj(normed).view(shape).transpose(1, 2)
            v = attention.v_proj(normed).view(shape).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, cos[:, computed:end], sin[:, computed:end])
            owner = settings.reads.get(index, index)
            if owner != index:
                keys[index], values[index] = keys[owner], values[owner]
            else:
                keys[index] = torch.cat([keys[index], k], 2) if computed else k
                values[index] = torch.cat([values[index], v], 2) if computed else v
            mask = torch.arange(end)[None, :] <= torch.arange(computed, end)[:, None]
            mask = mask & visible[owner, :end]
            scores = q @ repeat_kv(keys[index], group).transpose(2, 3) * attention.scaling
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            out = (weights @ repeat_kv(values[index], group)).transpose(1, 2).reshape(1, step, -1)
            if settings.skip and settings.skip[index] > 0:
                new = redundancy(keys[index][0], values[index][0], computed, end, settings, 0)
                skip_scores[index] = torch.cat([skip_scores[index], new])
                theirs = None if backend_skips is None else backend_skips[index]
                known = result.skipped[index].tolist()
                result.skipped[index], ties = decide(skip_scores[index], settings, index, known, theirs, tie)
                result.near_ties += ties
                result.choices += step
                stored = torch.arange(computed)[visible[index, :computed]]
                _substitute(
                    settings,
                    q[0],
                    keys[index][0],
                    values[index][0],
                    stored,
                    attention.scaling,
                    out[0],
                    result.skipped[index],
                    group,
                    means[index],
                )
            hidden = hidden + attention.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logprobs.append(model.lm_head(inner.norm(hidden))[0].log_softmax(-1))
        own = start // settings.C
        for chunk in range(max(own, settings.sealed(computed)), settings.sealed(end)):
            first = chunk * settings.C
            for index in range(len(layers)):
                if settings.K(index) == settings.C:
                    continue
                scores = redundancy(keys[index][0], values[index][0], first, first + settings.C, settings, start)
                kept = _choose(scores, chunk, settings, index)
                result.choices += 1
                # The backend seals at the start of the next step: what the last step made due it may never have chosen.
                theirs = (backend_choice or {}).get((index, chunk), kept)
                if theirs != kept:
                    kept = _reconcile(kept, theirs, scores, tie, f"layer {index}, chunk {chunk}")
                    result.near_ties += 1
                result.kept[index, chunk] = kept
                visible[index, first : first + settings.C] = False
                visible[index, [first + i for i in kept]] = True
        computed = end
    result.logprobs, result.keys, result.values = torch.cat(logprobs), keys, values
    return result
