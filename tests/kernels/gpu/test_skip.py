"""The GPU kernels of attention skipping in Triton's interpreter, against the reference and the CPU's kernels."""

from typing import get_args

import numpy as np
import pytest
import torch

from tests import reference
from vllm_tokenfilter.config import Fusion
from vllm_tokenfilter.kernels.cpu import skip
from vllm_tokenfilter.kernels.cpu.cache import FLOAT32, PagedCache
from vllm_tokenfilter.kernels.plan import plan_seals
from vllm_tokenfilter.kernels.rules import ScoreRule, SkipRule
from vllm_tokenfilter.layout import Layout, removed_tokens, sealed_chunks

pytest.importorskip("triton")

from tests.kernels.gpu.test_seal import make_layers, prose, read, write
from vllm_tokenfilter.kernels.gpu import skip as gpu
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.carry import CarriedOnDevice, bytes_of_means, follow_seals
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.gpu.lengths import NO_SEALS
from vllm_tokenfilter.kernels.gpu.rows import SkipBuffers, SkipRowsOnDevice, describe_rows
from vllm_tokenfilter.kernels.gpu.seal import seal_chunks
from vllm_tokenfilter.kernels.gpu.substitutes import put_substitute

pytestmark = pytest.mark.usefixtures("interpreted")

#: Rows and tokens the buffers are made for; steps below are padded beside them.
MAX_REQS, MAX_TOKENS = 5, 140
UNITS = 10000


class Group:
    """The layers of one layout, with steps as the metadata builder and the forward drive the kernels."""

    def __init__(self, layers, rule, substitute="none", layout=None, num_heads=None, tables=None):
        self.layers, self.rule, self.substitute, self.layout = layers, rule, substitute, layout
        cache = GpuCache.over(layers, list(range(len(layers))), layers[0].dtype)
        self.width = (num_heads or cache.num_kv_heads) * cache.head_size
        self.carried = CarriedOnDevice.over(cache, self.width if substitute == "running_output" else 0)
        self.buffers = SkipBuffers.make(MAX_REQS, MAX_TOKENS, cache.num_kv_heads, torch.device("cpu"))
        self.buffers.skipped.fill_(7)  # what earlier layers and steps left there must not matter
        self.tables, self.done, self.due = tables, [0] * len(tables), None
        self.seal_cache = GpuCache.over(layers, list(range(len(layers))), layers[0].dtype)
        self.sealed = {}

    def step(self, counts, ratio, layer=0, padded=1, outputs=None, queries=None, scale=1.0, softcap=0.0, decoding=None):
        """Decide and substitute for rows of so many new tokens, already written; returns the decisions per row."""
        done, counts = np.array(self.done), np.array(counts)
        removed = np.zeros_like(done) if self.layout is None else removed_tokens(done, self.layout)
        starts = np.concatenate([[0], np.cumsum(counts), np.full(padded, counts.sum())]).astype(np.int32)
        slots = np.full(counts.sum() + 2, -1, np.int64)
        size = self.carried.cache.block_size
        for row, count in enumerate(counts):
            own = done[row] - removed[row] + np.arange(count)
            slots[starts[row] : starts[row + 1]] = self.tables[row][own // size].astype(np.int64) * size + own % size
        lengths = np.concatenate([done + counts, np.zeros(padded)]).astype(np.int32)
        stored = np.concatenate([done + counts - removed, np.zeros(padded)]).astype(np.int32)
        table = np.concatenate([self.tables, np.zeros((padded, self.tables.shape[1]), np.int32)])
        step = SkipRowsOnDevice(
            torch.from_numpy(starts),
            torch.from_numpy(stored),
            torch.from_numpy(table),
            torch.from_numpy(slots),
            len(lengths),
            len(slots),
            bool((counts <= 1).all()) if decoding is None else decoding,
        )
        shared = torch.zeros(len(lengths), dtype=torch.int32)
        describe_rows(step.query_start_loc, torch.from_numpy(lengths), shared, self.buffers, self.layout)
        gpu.decide(self.carried, self.rule, step, self.buffers, layer, round(ratio * UNITS), self.substitute)
        for row, count in enumerate(counts):
            skipped = bool(self.buffers.skipped[starts[row]]) and count == 1
            assert self.buffers.read_lens[row] == (1 if skipped else stored[row])
        if outputs is not None:
            one = torch.ones(1)
            put_substitute(
                self.carried, self.rule, step, self.buffers, layer, self.substitute, queries, outputs, scale, softcap,
                one, one,
            )  # fmt: skip
        self.plan = None
        if self.layout is not None:
            plan = plan_seals(done, done + counts, size, self.layout)
            if plan is not None:
                self.due = DueSealsOnDevice.snapshot(plan, torch.from_numpy(self.tables), shared[: len(counts)])
        self.done = (done + counts).tolist()
        return [self.buffers.skipped[starts[row] : starts[row + 1]].clone().bool() for row in range(len(counts))]

    def seal(self):
        if self.due is not None:
            seal_chunks(self.seal_cache, self.due, self.layout, ScoreRule())
            follow_seals(self.carried, self.due, self.layout)
            self.due = None

    def slot(self, row):
        """The slot of the row's next token."""
        return self.done[row] - (0 if self.layout is None else removed_tokens(self.done[row], self.layout))


def group_of(dtype, heads, dims, size, heads_first, length, rows=2, num_layers=1, **changes):
    """A group over empty caches, and the rows' texts [rows][layers](keys, values)."""
    per_row = -(-length // size)
    layers = make_layers(dtype, num_layers, rows * per_row + 2, heads, size, dims, heads_first)
    tables = 1 + np.random.default_rng(0).permutation(rows * per_row).reshape(rows, -1).astype(np.int32)
    texts = [
        [prose(heads, length, dims, dtype, 10 * row + layer) for layer in range(num_layers)] for row in range(rows)
    ]
    return Group(layers, tables=tables, **changes), texts


def feed(group, texts, counts):
    """Write the rows' next tokens behind what is stored."""
    for row, count in enumerate(counts):
        for layer, (keys, values) in zip(group.layers, texts[row], strict=True):
            part = slice(group.done[row], group.done[row] + count)
            write(layer, group.tables[row], group.slot(row), keys[:, part], values[:, part])


def plan_of(length):
    """Steps of two rows up to the length: prefill in pieces, one beside a decoding row, then decoding alone."""
    steps = [(70, 30), (1, 33), (1, 1)]
    done = [sum(step[0] for step in steps), sum(step[1] for step in steps)]
    while min(done) < length:
        step = tuple(min(1, length - own) for own in done)
        steps.append(step)
        done = [own + count for own, count in zip(done, step, strict=True)]
    return steps


CASES = [
    # tokens, dtype, KV heads, head size, block size, order, ratio, fusion, history, terms
    (160, torch.float32, 2, 64, 16, True, 0.5, "variance_aware", 48, 32),
    (110, torch.bfloat16, 3, 80, 32, False, 0.25, "variance_aware", 64, 64),
    (110, torch.float16, 1, 64, 64, True, 0.8, "mean", 33, 7),
    (110, torch.float8_e4m3fn, 2, 32, 16, False, 0.5, "key", 64, 33),
    *[
        (90, torch.float32, 2, 32, 16, True, 0.5, fusion, 48, 32)
        for fusion in sorted({*get_args(Fusion)} - {"variance_aware", "mean", "key"})
    ],
    pytest.param((300, torch.float32, 2, 64, 16, True, 0.5, "variance_aware", 48, 32), marks=pytest.mark.slow),
    *[
        pytest.param((500, dtype, heads, 64, size, True, ratio, "variance_aware", 64, 64), marks=pytest.mark.slow)
        for dtype, heads, size in ((torch.bfloat16, 8, 16), (torch.float32, 1, 128))
        for ratio in (0.1, 0.5, 0.9)
    ],
]


@pytest.mark.parametrize("case", CASES, ids=lambda x: f"{x[0]} tokens of {x[1]}, {x[7]}".replace("torch.", ""))
def test_decisions_over_many_decoded_tokens_follow_the_formulas_and_the_cpu(case):
    length, dtype, heads, dims, size, heads_first, ratio, fusion, history, terms = case
    warmup = 20
    rule = SkipRule(terms, fusion, 0.9, history, warmup, 4, 16)
    group, texts = group_of(dtype, heads, dims, size, heads_first, length, rows=1, rule=rule)
    found = []
    for count in (70, 1, 15, *[1] * (length - 86)):
        feed(group, texts, [count])
        found += group.step([count], ratio)
    decisions = torch.cat(found)
    keys, values = (x.float() for x in texts[0][0])
    if fusion == "variance_aware":
        own = reference.Settings(W=history, M=terms, skip=(ratio,), warmup=warmup)
        scores = reference.redundancy(keys, values, 0, length, own)
        slots = np.arange(length)
        physical = group.tables[0][slots // size].astype(np.int64) * size + slots % size
        kept = group.carried.cache.saved_redundancy[0, torch.from_numpy(physical)]
        assert (kept - scores).abs().max() < 1e-5
        decided, ties = reference.decide(scores, own, 0, theirs=decisions, tie=1e-5)
        assert torch.equal(decided, decisions) and ties <= 0.01 * length
    on_cpu = cpu_decisions(keys, values, rule, ratio)
    assert (on_cpu != decisions).float().mean() <= 0.02, "near ties may differ, no more"
    assert not decisions[:warmup].any()
    assert abs(int(decisions.sum()) - ratio * (length - warmup)) < 9, "the debt stays below nine tokens"
    assert group.buffers.totals[:, :2].sum(0).tolist() == [length - warmup, int(decisions.sum())]


def cpu_decisions(keys, values, rule, ratio):
    """What skip.c decides for the same keys and values [heads, tokens, dims] in float32."""
    heads, length, dims = keys.shape
    storage = torch.stack([keys, values], 2)  # one block
    tokens, dim = np.arange(length, dtype=np.int64) * 2 * dims, np.arange(dims, dtype=np.int64)
    cache = PagedCache(
        elements=storage.view(torch.int32).flatten().numpy().view(np.uint32),
        encoding=FLOAT32,
        widen_table=np.zeros(1, np.float32),
        layer_starts=np.zeros(1, np.int64),
        block_stride=heads * length * 2 * dims,
        head_stride=length * 2 * dims,
        num_kv_heads=heads,
        num_blocks=1,
        key_tokens=tokens,
        key_dims=dim,
        value_tokens=tokens + dims,
        value_dims=dim,
    )
    numbers = ([0, length], [0], [0], [0])
    rows = skip.SkipRows(np.zeros((1, 1), np.int32), *(np.array(x, np.int64) for x in numbers))
    carried, anchors = np.zeros((1, length), np.int64), np.zeros((1, 1, cache.anchor_width), np.float32)
    state = skip.SkipState(cache, rule, rows, carried, anchors, 1)
    return torch.from_numpy(skip.decide_skips(state, 0, round(ratio * UNITS))).bool()


@pytest.mark.parametrize("ratio", [0.05, 0.95])
def test_the_share_is_met_within_two_points_though_every_token_is_more_redundant_than_the_last(ratio):
    rule = SkipRule(8, "variance_aware", 0.9, 32, 10, 4, 16)
    group, texts = group_of(torch.float32, 1, 16, 32, True, 610, rows=1, rule=rule)
    noise = torch.randn(2, 1, 610, 16, generator=torch.Generator().manual_seed(0))
    texts[0][0] = tuple(1 + noise * torch.linspace(4, 0, 610).exp()[:, None] / 50)
    found = []
    for count in (*[130] * 4, *[1] * 20, 70):
        feed(group, texts, [count])
        found += group.step([count], ratio, padded=0)
    assert abs(torch.cat(found)[10:].float().mean() - ratio) <= 0.02


@pytest.mark.parametrize("decoding", [True, False])
def test_how_a_text_is_cut_into_steps_or_launched_changes_no_decision(decoding):
    rule = SkipRule(16, "variance_aware", 0.9, 40, 10, 4, 16)

    def decide(steps):
        group, texts = group_of(torch.float32, 2, 32, 16, True, 80, rows=1, rule=rule)
        found = []
        for count in steps:
            feed(group, texts, [count])
            found += group.step([count], 0.5, decoding=decoding)
        return torch.cat(found)

    assert torch.equal(decide([80]), decide([30, 1, 1, 17, 1, 30]))


def test_decisions_go_on_over_seals_in_every_layer():
    layout = Layout(16, 8, 32, 4, 16)
    rule, length = SkipRule(16, "variance_aware", 0.9, 32, 20, 4, 16), 90
    group, texts = group_of(torch.bfloat16, 1, 32, 16, True, length, num_layers=2, rule=rule, layout=layout)
    own = reference.Settings(W=32, M=16, skip=(0.5, 0.3), warmup=20)
    found = {(row, layer): [] for row in range(2) for layer in range(2)}
    for counts in plan_of(length):
        group.seal()
        feed(group, texts, counts)
        done = group.done
        for layer in range(2):
            group.done = done
            for row, decisions in enumerate(group.step(counts, own.skip[layer], layer)):
                found[row, layer].append(decisions)
    for (row, layer), decisions in found.items():
        decisions = torch.cat(decisions)
        scores = reference.redundancy(*(x.float() for x in texts[row][layer]), 0, length, own)
        decided, ties = reference.decide(scores, own, layer, theirs=decisions, tie=1e-5)
        assert torch.equal(decided, decisions) and ties <= 3
    assert sealed_chunks(length, layout) == 3


def test_tokens_that_go_nowhere_are_left_alone_and_counted_nowhere():
    rule = SkipRule(8, "variance_aware", 0.9, 16, 1, 4, 16)
    group, texts = group_of(torch.float32, 2, 16, 16, True, 64, rows=1, rule=rule)
    feed(group, texts, [40])
    group.step([40], 0.5)
    kept, debts = group.carried.cache.saved_redundancy.clone(), group.carried.debts.clone()
    totals = group.buffers.totals.clone()
    dead = SkipRowsOnDevice(
        torch.tensor([0, 1, 30], dtype=torch.int32), torch.tensor([41, 70], dtype=torch.int32),
        torch.from_numpy(np.repeat(group.tables, 2, 0)), torch.full((30,), -1), 2, 30, False,
    )  # fmt: skip
    describe_rows(dead.query_start_loc, dead.stored_lens, None, group.buffers, None)
    gpu.decide(group.carried, rule, dead, group.buffers, 0, 5000, "none")
    assert group.buffers.read_lens[:2].tolist() == [41, 70]
    assert torch.equal(group.carried.cache.saved_redundancy, kept) and torch.equal(group.carried.debts, debts)
    assert torch.equal(group.buffers.totals, totals)
    group.buffers.skipped.fill_(1)
    outputs = torch.full((30, 32), 3.0)
    for substitute in ("none", "window", "running_output"):
        carried = CarriedOnDevice.over(group.carried.cache, 32)
        one = torch.ones(1)
        queries = torch.zeros(30, 2, 16)
        put_substitute(carried, rule, dead, group.buffers, 0, substitute, queries, outputs, 1.0, 0.0, one, one)
        assert (outputs == 3.0).all() and not carried.weights.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_substitute_none_is_zero_and_nothing_else_changes(dtype):
    rule = SkipRule(8, "variance_aware", 0.9, 16, 1, 4, 16)
    group, texts = group_of(torch.float32, 2, 16, 16, True, 64, rows=2, rule=rule)
    feed(group, texts, [24, 16])
    before = torch.randn(42, 32, dtype=dtype)
    outputs = before.clone()
    decisions = torch.cat(group.step([24, 16], 0.5, outputs=outputs))
    assert decisions.any() and not outputs[:40][decisions].any()
    assert torch.equal(outputs[:40][~decisions], before[:40][~decisions]) and torch.equal(outputs[40:], before[40:])


@pytest.mark.parametrize("window, softcap", [(16, 0.0), (1, 0.0), (400, 0.0), (20, 5.0)])
@pytest.mark.parametrize("heads, group_size, dims, size", [(2, 3, 32, 16), (1, 1, 80, 32)])
def test_the_window_is_plain_attention_to_sinks_and_newest(window, softcap, heads, group_size, dims, size):
    rule = SkipRule(8, "mean", 0.9, 16, 1, 4, window)
    group, texts = group_of(
        torch.float32, heads, dims, size, False, 60, rule=rule, substitute="window", num_heads=heads * group_size
    )
    for counts in ((26, 3), (1, 14)):
        feed(group, texts, counts)
        total = sum(counts) + 2
        queries = torch.randn(total, heads * group_size, dims)
        before = torch.randn(total, heads * group_size, dims)
        outputs, done = before.clone(), group.done
        decisions = group.step(counts, 0.6, outputs=outputs, queries=queries, scale=0.3, softcap=softcap)
        token = 0
        for row, own in enumerate(decisions):
            keys, values = read(group.layers[0], group.tables[row], done[row] + counts[row])
            for t, skipped in enumerate(own):
                slot = done[row] + t
                if not skipped:
                    assert torch.equal(outputs[token], before[token])
                else:
                    seen = sorted({*range(min(4, slot + 1)), *range(max(0, slot + 1 - window), slot + 1)})
                    for head in range(heads * group_size):
                        logits = queries[token, head] @ keys[head // group_size, seen].T * 0.3
                        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                        want = logits.softmax(-1) @ values[head // group_size, seen]
                        torch.testing.assert_close(outputs[token, head], want, atol=1e-5, rtol=1e-4)
                token += 1
        assert any(own.any() for own in decisions)


def test_the_windows_keys_and_values_of_an_fp8_cache_are_scaled():
    rule = SkipRule(8, "mean", 0.9, 16, 1, 4, 16)
    group, texts = group_of(torch.float8_e4m3fn, 1, 32, 16, True, 40, rows=1, rule=rule, substitute="window")
    feed(group, texts, [40])
    queries, plain, scaled = torch.randn(42, 1, 32), torch.zeros(42, 32), torch.zeros(42, 32)
    decisions = group.step([40], 0.6, outputs=plain, queries=queries)[0]
    step = SkipRowsOnDevice(
        torch.tensor([0, 40], dtype=torch.int32), torch.tensor([40], dtype=torch.int32),
        torch.from_numpy(group.tables), torch.arange(40), 1, 40, False,
    )  # fmt: skip
    two = torch.full((1,), 2.0)
    put_substitute(group.carried, rule, step, group.buffers, 0, "window", queries / 2, scaled, 1.0, 0.0, two, two)
    assert decisions.any()
    torch.testing.assert_close(scaled[:40][decisions], 2 * plain[:40][decisions])


@pytest.mark.parametrize("layout", [None, Layout(16, 8, 32, 4, 16)], ids=["dense", "filtered"])
def test_means_of_outputs_go_on_across_steps_blocks_and_seals(layout):
    rule, length = SkipRule(8, "mean", 0.9, 48, 20, 4, 16), 90
    group, texts = group_of(
        torch.float32, 1, 80, 16, True, length, rule=rule, substitute="running_output", layout=layout, num_heads=2
    )
    state = [[torch.zeros(160, dtype=torch.float64), 0.0] for _ in range(2)]
    replaced = 0
    for counts in plan_of(length):
        group.seal()
        feed(group, texts, counts)
        before = torch.randn(sum(counts) + 2, 160)
        outputs = before.clone()
        token = 0
        for row, own in enumerate(group.step(counts, 0.5, outputs=outputs)):
            for skipped in own:
                mean, weight = state[row]
                if skipped:
                    want = mean / weight if weight else mean
                    torch.testing.assert_close(outputs[token].double(), want, atol=1e-4, rtol=1e-4)
                    replaced += 1
                else:
                    assert torch.equal(outputs[token], before[token])
                    state[row] = [0.9 * mean + 0.1 * before[token].double(), 0.9 * weight + 0.1]
                token += 1
        assert torch.equal(outputs[token:], before[token:])
    assert replaced > 60


def test_the_bytes_of_means_are_what_is_allocated():
    cache = GpuCache.over(make_layers(torch.bfloat16, 2, 9, 2, 16, 64, True), [0, 1], torch.bfloat16)
    carried = CarriedOnDevice.over(cache, 4 * 64)
    assert bytes_of_means(cache, 4 * 64) == carried.means.nbytes + carried.weights.nbytes


@pytest.mark.parametrize("layout", [None, Layout(64, 32, 96, 4, 64)], ids=["dense", "filtered"])
def test_rows_are_described_as_the_layout_has_them(layout):
    computed = np.array([0, 128, 500, 70, 95, 0, 0])
    queries = np.array([40, 60, 1, 200, 1, 7, 0])  # the last but one is a dummy run's row, the last is padding
    shared = np.array([0, 2, 0, 1, 0, NO_SEALS, NO_SEALS])
    buffers = SkipBuffers.make(8, 1, 1, torch.device("cpu"))
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    describe_rows(
        torch.from_numpy(starts),
        torch.from_numpy((computed + queries).astype(np.int32)),
        None if layout is None else torch.from_numpy(shared.astype(np.int32)),
        buffers,
        layout,
    )
    own = np.where(shared == NO_SEALS, 0, shared)
    removed = 0 if layout is None else removed_tokens(computed, layout, own)
    raw = 0 * computed if layout is None else sealed_chunks(computed, layout, own) * layout.kept_per_chunk
    assert buffers.rows[:, :7].tolist() == [(computed - removed).tolist(), raw.tolist(), computed.tolist()]
    assert not buffers.rows[:, 7].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_else_a_step_decides_changes_no_bit(dtype):
    """Two requests in one step, and each alone."""
    rule = SkipRule(16, "variance_aware", 0.9, 40, 10, 4, 16)
    _, texts = group_of(dtype, 2, 32, 16, True, 80, rule=rule)

    def decide(rows):
        group, _ = group_of(dtype, 2, 32, 16, True, 80, rows=len(rows), rule=rule)
        found = [[] for _ in rows]
        for step in ((60, 1), (1, 33), (1, 1), (17, 44), (1, 1)):
            counts = [step[row] for row in rows]
            feed(group, [texts[row] for row in rows], counts)
            for own, decided in zip(found, group.step(counts, 0.5), strict=True):
                own += decided.tolist()
        slots = group.tables[:, :, None].astype(np.int64) * 16 + np.arange(16)
        scores = group.carried.cache.saved_redundancy[0][torch.from_numpy(slots)].flatten(1)[:, :80].tolist()
        return {row: (found[i], scores[i]) for i, row in enumerate(rows)}

    assert decide([1, 0]) == decide([0]) | decide([1])
