"""The GPU's step path with stand-ins: a step that implements our own protocol, an inner builder that records.

Here in Triton's interpreter; tests/gpu/test_steps.py runs the tests of steps on a GPU too, with another `device`.
"""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.kernels.reference import seal_reference
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.layout import Layout, removed_tokens, stored_tokens

pytest.importorskip("triton")

from tests.kernels.gpu.test_seal import make_layers, prose, read, settings, write
from vllm_tokenfilter.integration.gpu.steps import FilteredSteps, HostLengths, LayoutStep, StepsInCommon
from vllm_tokenfilter.kernels.gpu.cache import GpuCache

pytestmark = pytest.mark.usefixtures("interpreted")
LAYOUT, SIZE = Layout(64, 32, 64, 4, 64), 16


@dataclass
class Step:
    """See `steps.RunnerStep`."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor | None
    is_prefilling: torch.Tensor | None
    max_seq_len: int
    num_reqs: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor

    def replace(self, _num_computed_tokens_cache=None, **changes):
        return replace(self, **changes)


def step(computed, queries, tables, padded=0, prefilling=None, dummy=False, device="cpu"):
    """A step as vLLM's runners describe it, with its slots as vLLM computes them, for dense layers.

    As in model runner V2, whether rows are prefilling is told of real ones alone, and lengths of padded ones too.
    """
    computed, queries = np.array(computed), np.array(queries)
    seq_lens = np.concatenate([computed + queries, np.zeros(padded)]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(queries), np.full(padded, queries.sum())]).astype(np.int32)
    slots = np.full(queries.sum() + padded, -1, np.int64)
    if not dummy:
        for row, (done, count) in enumerate(zip(computed, queries, strict=True)):
            positions = done + np.arange(count)
            blocks = tables[row, np.minimum(positions // SIZE, tables.shape[1] - 1)].astype(np.int64)
            slots[starts[row] : starts[row + 1]] = blocks * SIZE + positions % SIZE
    return Step(
        torch.from_numpy(starts).to(device),
        torch.from_numpy(starts.copy()),
        torch.from_numpy(seq_lens).to(device),
        torch.from_numpy(seq_lens.copy()),
        torch.tensor([*(computed == 0 if prefilling is None else prefilling)]),
        int(seq_lens.max()),
        len(seq_lens),
        torch.from_numpy(np.concatenate([tables, np.zeros((padded, tables.shape[1]), np.int32)])).to(device),
        torch.from_numpy(slots).to(device),
    )


def make_steps(layers=None, mark_blocks=0, device="cpu", common=None, **changes):
    layers = layers or make_layers(torch.bfloat16, 2, 64, 2, SIZE, 64, True, device)
    config = settings(LAYOUT, **changes)
    return FilteredSteps(
        config,
        LAYOUT,
        SIZE,
        mark_blocks,
        8,
        40,
        torch.device(device),
        lambda: GpuCache.over(layers, [0, 1], layers[0].dtype),
        common=common,
    )


def test_lives_of_requests_leave_in_the_cache_what_the_reference_keeps(device):
    layers = make_layers(torch.bfloat16, 2, 64, 2, SIZE, 64, True, device)
    steps = make_steps(layers, device=device)
    tables = np.random.default_rng(3).permutation(64)[:48].reshape(2, 24).astype(np.int32)
    texts = [[prose(2, 340, 64, torch.bfloat16, 7 * row + layer) for layer in range(2)] for row in range(2)]
    lengths, plan = [0, 0], [(100, 30), (93, 1), (1, 64), *[(1, 1)] * 3, (130, 2), (1, 1), (1, 94)]
    buffers = set()
    for queries in plan:
        now = step(lengths, queries, tables, padded=1, device=device)
        adjusted = steps.adjust(now)
        buffers.add((adjusted.seq_lens.data_ptr(), now.slot_mapping.data_ptr() == 0))
        for row, count in enumerate(queries):
            stored = stored_tokens(lengths[row], LAYOUT)
            begin = int(now.query_start_loc[row])
            slots = now.slot_mapping[begin : begin + count]
            want = stored + np.arange(count)
            assert slots.tolist() == (tables[row][want // SIZE].astype(int) * SIZE + want % SIZE).tolist()
            assert adjusted.seq_lens[row] == adjusted.seq_lens_cpu_upper_bound[row] == stored + count
            for layer, (keys, values) in zip(layers, texts[row], strict=True):
                part = slice(lengths[row], lengths[row] + count)
                write(layer, tables[row], stored, keys[:, part], values[:, part])
            lengths[row] += count
        assert adjusted.max_seq_len == adjusted.seq_lens.max() and adjusted.seq_lens[2] == 0
    assert len(buffers) == 1, "CUDA graphs need the lengths where they were"
    steps.adjust(step(lengths, [1, 1], tables, device=device))
    for row in range(2):
        for index, (keys, values) in enumerate(texts[row]):
            last = (lengths[row] - 64) // 64
            keys, values = keys[:, : lengths[row]], values[:, : lengths[row]]
            want = seal_reference(keys, values, None, 0, last, steps.config, index)
            got = read(layers[index], tables[row], stored_tokens(lengths[row], LAYOUT))
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    sealed = sum((length - 64) // 64 for length in lengths)
    assert steps.counters.tokens_sealed == 64 * sealed
    assert steps.counters.tokens_pruned == 32 * sealed
    assert steps.counters.tokens_seen == sum(lengths) + 2


def of_another_group(now, tables, device="cpu"):
    """The same step as a runner describes it to a group with other blocks: every other tensor is the same object."""
    queries = np.diff(now.query_start_loc_cpu.numpy())[: len(tables)]
    computed = now.seq_lens_cpu_upper_bound.numpy()[: len(tables)] - queries
    own = step(computed, queries, tables, padded=now.num_reqs - len(tables), device=device)
    return replace(now, block_table_tensor=own.block_table_tensor, slot_mapping=own.slot_mapping)


def test_groups_of_one_layout_share_a_step_and_seal_in_their_own_blocks(device, monkeypatch):
    """Two groups beside each other and each by itself: the same caches, lengths, slots and counts; read once."""
    common, draw = StepsInCommon(), np.random.default_rng(3)
    tables = [draw.permutation(64)[:48].reshape(2, 24).astype(np.int32) for _ in range(2)]
    caches = [[make_layers(torch.bfloat16, 2, 64, 2, SIZE, 64, True, device) for _ in range(2)] for _ in range(2)]
    together, alone = (
        [make_steps(layers, device=device, common=shared) for layers in part]
        for part, shared in zip(caches, (common, None), strict=True)
    )
    texts = [[prose(2, 400, 64, torch.bfloat16, 7 * row + layer) for layer in range(2)] for row in range(2)]
    read, planned, lengths = [], [], [0, 0]
    of, plan = HostLengths.of, LayoutStep.of
    for queries in [(150, 200), *[(1, 1)] * 4, (30, 2), *[(1, 1)] * 2, (64, 80), *[(1, 1)] * 3]:
        now = step(lengths, queries, tables[0], padded=1, device=device)
        steps = [now, *(of_another_group(now, own, device) for own in tables[1:])]
        monkeypatch.setattr(HostLengths, "of", lambda step: read.append(step) or of(step))
        monkeypatch.setattr(LayoutStep, "of", lambda *given: planned.append(plan(*given)) or planned[-1])
        mine = [group.adjust(one) for group, one in zip(together, steps, strict=True)]
        monkeypatch.setattr(HostLengths, "of", of)
        monkeypatch.setattr(LayoutStep, "of", plan)
        copies = [replace(own, slot_mapping=own.slot_mapping.clone()) for own in steps]
        theirs = [group.adjust(one) for group, one in zip(alone, copies, strict=True)]
        assert all(one is planned[-1] for one in planned[-2:])
        for group, (ours, other) in enumerate(zip(mine, theirs, strict=True)):
            assert torch.equal(steps[group].slot_mapping, copies[group].slot_mapping)
            assert torch.equal(ours.seq_lens, other.seq_lens) and ours.max_seq_len == other.max_seq_len
            assert torch.equal(ours.seq_lens_cpu_upper_bound, other.seq_lens_cpu_upper_bound)
            for row, count in enumerate(queries):
                part, stored = slice(lengths[row], lengths[row] + count), stored_tokens(lengths[row], LAYOUT)
                for layers in (caches[0][group], caches[1][group]):
                    for layer, (keys, values) in zip(layers, texts[row], strict=True):
                        write(layer, tables[group][row], stored, keys[:, part], values[:, part])
        lengths = [before + count for before, count in zip(lengths, queries, strict=True)]
    assert len(read) == 12 and len({id(one) for one in planned}) <= 12, "read and planned once a step"
    for ours, other in zip(together, alone, strict=True):
        own, apart = (vars(group.counters.copy()) | {"seal_seconds": 0} for group in (ours, other))
        assert own == apart and own["seals"] >= 2
    for ours, other in zip(*caches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_a_runner_that_keeps_its_lengths_in_one_tensor_is_read_anew_each_step():
    common = StepsInCommon()
    groups = [make_steps(common=common) for _ in range(2)]
    tables = np.arange(24, dtype=np.int32)[None]
    now = step([199], [1], tables)
    for length in (200, 201, 264):
        now.seq_lens_cpu_upper_bound.fill_(length)
        now.seq_lens.fill_(length)
        for group in groups:
            assert group.adjust(now).seq_lens_cpu_upper_bound.tolist() == [stored_tokens(length - 1, LAYOUT) + 1]


def test_a_further_group_of_a_layout_costs_a_fraction_of_the_first():
    """Python and C calls, which do not depend on the machine; benchmarks/gpu_host_time.py has the time."""
    common, calls = StepsInCommon(), []
    groups, rows = [make_steps(common=common) for _ in range(2)], 8
    tables = np.arange(8 * 24, dtype=np.int32).reshape(rows, 24) % 64

    def count(frame, event, argument):
        calls[-1] += event in ("call", "c_call")

    for length in range(200, 203):
        now = step([length] * rows, [1] * rows, tables)
        for group in groups:
            calls.append(0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("vllm_tokenfilter.integration.gpu.steps.adjust_step", lambda *given: None)
                sys.setprofile(count)
                group.adjust(now)
                sys.setprofile(None)
    first, further = calls[-2:]
    assert first <= 90 and further <= 30 and further < first / 2, (first, further)


def test_a_step_in_which_nobody_seals_launches_no_seal(monkeypatch):
    steps = make_steps()
    launched = []
    monkeypatch.setattr(steps, "seal", lambda due, cache: launched.append(due.plan.num_chunks))
    tables = np.arange(24, dtype=np.int32)[None]
    for computed, count in ((0, 100), (100, 27), (127, 1), (128, 1), (129, 1)):
        steps.adjust(step([computed], [count], tables))
    assert launched == [1], "128 tokens are the first that seal"


def test_dummy_runs_captures_and_padding_leave_nothing_due_and_count_nothing(device):
    steps = make_steps(device=device)
    tables = np.zeros((2, 24), np.int32)
    for capturing in (True, False):
        steps.adjust(
            step([0, 0], [300, 200], tables, padded=1, prefilling=[False] * 2, dummy=True, device=device), capturing
        )
        assert not steps.anything_due
    steps.adjust(step([0, 127], [200, 1], tables, padded=1, device=device), capturing=True)
    assert not steps.anything_due and steps.counters.tokens_seen == 0
    # What looks like a decoding request to the host, but writes nowhere: the device seals nothing.
    before = steps._cache.saved_redundancy.clone()
    steps.adjust(step([127, 5], [1, 1], tables, dummy=True, device=device))
    assert steps.anything_due
    steps.adjust(step([0, 0], [1, 1], tables, device=device))
    assert torch.equal(steps._cache.saved_redundancy, before)


@pytest.mark.parametrize("kept", [48, 40, 16])
def test_another_layout_is_followed_in_the_buffers_that_graphs_captured(device, kept):
    """Blocks of 16 hold what 48 and 16 tokens leave, and 40 do not: then no prefix is shared, and no row is marked."""
    layers = make_layers(torch.bfloat16, 2, 64, 2, SIZE, 64, True, device)
    steps = make_steps(layers, mark_blocks=1, device=device)
    tables = np.random.default_rng(3).permutation(np.arange(1, 63))[:24].reshape(1, 24).astype(np.int32)
    captured = steps.adjust(step([0], [200], tables, device=device))
    layout = replace(LAYOUT, kept_per_chunk=kept)
    steps.use(settings(layout), layout, "")
    assert not steps.anything_due, "what the last request made due is not sealed by another layout"
    texts, length = [prose(2, 240, 64, torch.bfloat16, layer) for layer in range(2)], 0
    for count in (200, 1, 20, 1):
        now = step([length], [count], tables, device=device)
        adjusted = steps.adjust(now)
        stored = stored_tokens(length, layout)
        want = stored + np.arange(count)
        assert now.slot_mapping.tolist() == (tables[0][want // SIZE].astype(int) * SIZE + want % SIZE).tolist()
        assert adjusted.seq_lens.tolist() == [stored + count]
        assert adjusted.seq_lens.data_ptr() == captured.seq_lens.data_ptr()
        assert adjusted.block_table_tensor.data_ptr() == captured.block_table_tensor.data_ptr()
        used = -(-(stored + count) // SIZE)
        assert adjusted.block_table_tensor[0, :used].tolist() == tables[0][:used].tolist()
        for layer, (keys, values) in zip(layers, texts, strict=True):
            part = slice(length, length + count)
            write(layer, tables[0], stored, keys[:, part], values[:, part])
        length += count
    steps.adjust(step([length], [1], tables, device=device))
    for index, (keys, values) in enumerate(texts):
        sealed = (length - 64) // 64
        expected = seal_reference(keys[:, :length], values[:, :length], None, 0, sealed, steps.config, index)
        got = read(layers[index], tables[0], stored_tokens(length, layout))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_group_that_is_given_every_token_back_seals_nothing_and_says_why(device):
    steps = make_steps(mark_blocks=1, device=device)
    tables = np.arange(1, 25, dtype=np.int32)[None]
    steps.use(FilterConfig(pruning_ratio=0.0), None, "pruning_ratio_zero")
    steps.adjust(step([0], [200], tables, device=device))
    adjusted = steps.adjust(step([200], [1], tables, device=device))
    assert adjusted.seq_lens.tolist() == [201] and not steps.anything_due and steps.counters.seals == 0
    assert steps.counters.rows_dense == {"pruning_ratio_zero": 2} and steps.counters.rows_filtered == 0
    steps.use(settings(LAYOUT), LAYOUT, "")
    steps.adjust(step([0], [200], tables, device=device))
    assert steps.adjust(step([200], [1], tables, device=device)).seq_lens.tolist() == [201 - 64]


def test_marks_of_the_prefix_cache_are_taken_out_on_the_device(device):
    steps = make_steps(mark_blocks=1, device=device)
    own = np.arange(1, 24, dtype=np.int32)
    tables = np.array([[*own[:4], 0, *own[4:]], [*own, 30]], np.int32)
    now = step([128, 0], [40, 8], tables, device=device)
    adjusted = steps.adjust(now)
    removed = removed_tokens(128, LAYOUT, 2)
    assert adjusted.seq_lens.tolist() == [168 - removed, 8]
    assert adjusted.block_table_tensor[0, :7].tolist() == own[:7].tolist()
    assert now.slot_mapping[:40].tolist() == [own[(64 + i) // SIZE] * SIZE + (64 + i) % SIZE for i in range(40)]
    assert adjusted.seq_lens_cpu_upper_bound[0] >= adjusted.seq_lens[0], "the host may not know of the hit"
    assert adjusted.max_seq_len >= 168 - removed


@pytest.fixture
def capture():
    """What stands for a CUDA graph: a function that runs again what it was given; tests/gpu has a real one."""
    return lambda run: run() or run


def attend(query, cache, table, seq_lens):
    """Decode attention over the first `seq_lens` slots of each row, float32 [rows, heads, D]; waits for nothing."""
    stored = cache[table.long()].transpose(1, 2).flatten(2, 3).float()
    keys, values = stored.split(query.shape[-1], -1)
    scores = (query[:, :, None] * keys).sum(-1) * query.shape[-1] ** -0.5
    hidden = torch.arange(keys.shape[2], device=cache.device) >= seq_lens[:, None]
    return (scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)[..., None] * values).sum(2)


def test_a_captured_decode_step_over_changing_lengths_attends_to_what_the_reference_keeps(device, capture):
    """Writing and reading as a graph: captured once, replayed while lengths grow and chunks are sealed."""
    (layer,) = layers = make_layers(torch.bfloat16, 1, 48, 2, SIZE, 64, True, device)
    config = settings(LAYOUT)
    steps = FilteredSteps(config, LAYOUT, SIZE, 0, 2, 24, device, lambda: GpuCache.over(layers, [0], torch.bfloat16))
    tables = np.random.default_rng(5).permutation(48).reshape(2, 24).astype(np.int32)
    texts = [prose(2, 300, 64, torch.bfloat16, row) for row in range(2)]
    generator = torch.Generator().manual_seed(1)
    lengths = [120, 185]
    steps.adjust(step([0, 0], lengths, tables, device=device))
    for row, (keys, values) in enumerate(texts):
        write(layer, tables[row], 0, keys[:, : lengths[row]], values[:, : lengths[row]])
    # What a graph reads stays where it is.
    table = torch.from_numpy(tables).to(device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    new = torch.zeros(2, 2, 128, dtype=torch.bfloat16, device=device)
    query, out = (torch.zeros(2, 2, 64, device=device) for _ in range(2))
    seq_lens = None

    def forward():
        layer[slots // SIZE, :, slots % SIZE] = new
        out.copy_(attend(query, layer, table, seq_lens))

    replay = None
    for _ in range(20):
        now = step(lengths, [1, 1], tables, device=device)
        slots.copy_(now.slot_mapping)
        adjusted = steps.adjust(replace(now, slot_mapping=slots))
        tokens = [torch.cat([part[:, n] for part in text], -1) for text, n in zip(texts, lengths, strict=True)]
        new.copy_(torch.stack(tokens))
        asked = torch.randn(2, 2, 64, generator=generator)
        query.copy_(asked)
        if replay is None:
            seq_lens = adjusted.seq_lens
            replay = capture(forward)
        assert adjusted.seq_lens.data_ptr() == seq_lens.data_ptr()
        replay()
        for row, (keys, values) in enumerate(texts):
            last = (lengths[row] - 64) // 64
            old = seal_reference(keys[:, : lengths[row]], values[:, : lengths[row]], None, 0, last, config, 0)
            kept = [
                torch.cat([x, part[:, lengths[row], None]], 1).float() for x, part in zip(old, texts[row], strict=False)
            ]
            weights = (asked[row, :, None] * kept[0]).sum(-1).mul(64**-0.5).softmax(-1)
            want = (weights[..., None] * kept[1]).sum(1)
            torch.testing.assert_close(out[row].cpu(), want, atol=1e-4, rtol=1e-4)
        lengths = [n + 1 for n in lengths]
    assert steps.counters.seals == 3, "one of the prefill, and one of each row while it decodes"


class RecordingBuilder:
    """Stands in for a metadata builder of vLLM's: gives back what it was given."""

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False, **kwargs):
        return common_prefix_len, common_attn_metadata, fast_build, kwargs

    def build_for_cudagraph_capture(self, common_attn_metadata):
        _, given, *_ = self.build(0, common_attn_metadata)
        given.seq_lens.fill_(1)
        return given


def builder_over_a_recorder(steps):
    pytest.importorskip("vllm")
    from vllm_tokenfilter.integration.counters import StepCounters
    from vllm_tokenfilter.integration.gpu.backend import FilteringBuilder

    class Builder(FilteringBuilder, RecordingBuilder):
        def __init__(self):
            self._steps, self._capturing, self._dense_reason = steps, False, "configured_dense"
            self._common = StepsInCommon()
            self.plan = LayerPlan.of(FilterConfig(pruning_ratio=0.0), 3)
            self.counters = steps.counters if steps else StepCounters()

    return Builder()


def test_the_inner_builder_is_given_the_adjusted_step_and_whatever_else_the_runner_passes():
    builder = builder_over_a_recorder(make_steps())
    tables = np.arange(24, dtype=np.int32)[None]
    builder.build(0, step([0], [200], tables))
    now = step([200], [1], tables)
    prefix, given, fast, extra = builder.build(5, now, True, more=1)
    assert (prefix, fast, extra) == (0, True, {"more": 1}), "packed tokens are no common prefix"
    assert given.seq_lens.tolist() == [201 - 64] and given.max_seq_len == 201 - 64
    assert given.seq_lens_cpu_upper_bound.tolist() == [201 - 64]
    assert given.slot_mapping is now.slot_mapping and given.query_start_loc is now.query_start_loc
    assert given.slot_mapping.tolist() == [136]
    assert not builder.supports_update_block_table


def test_a_captured_graph_reads_the_buffers_that_later_steps_fill():
    builder = builder_over_a_recorder(make_steps())
    tables = np.arange(48, dtype=np.int32).reshape(2, 24)
    captured = builder.build_for_cudagraph_capture(step([0, 0], [1, 1], tables, prefilling=[False] * 2, dummy=True))
    assert captured.seq_lens.tolist() == [1, 1] and builder.counters.tokens_seen == 0
    assert captured.max_seq_len == 1, "the capture's own worst case is kept"
    builder.build(0, step([0, 0], [150, 200], tables))
    builder.build(0, step([150, 200], [1, 1], tables))
    assert captured.seq_lens.tolist() == [151 - 32, 201 - 64]


def test_a_builder_takes_another_plan_for_its_own_layers_and_their_skipping():
    builder, used = builder_over_a_recorder(make_steps()), []
    builder._skipping = SimpleNamespace(use=used.append)
    builder.plan = LayerPlan.of(FilterConfig(pruning_ratio=0.5), 4).only([1, 2])
    quarter = FilterConfig(pruning_ratio=0.25)
    builder.use(quarter, LayerPlan.of(quarter, 4))
    assert builder.plan.indices == [1, 2] and builder.plan.layouts == {quarter.layout} == set(used)
    assert builder._steps.layout == quarter.layout
    builder.use(dense := FilterConfig(pruning_ratio=0.0), LayerPlan.of(dense, 4))
    assert used[-1] is None and builder._steps.layout.removed_per_chunk == 0
    assert builder._dense_reason == "pruning_ratio_zero"


def test_a_group_of_dense_layers_passes_through_and_is_counted_with_its_reason():
    builder = builder_over_a_recorder(None)
    now = step([300], [1], np.arange(24, dtype=np.int32)[None])
    prefix, given, *_ = builder.build(3, now)
    assert prefix == 3 and given is now
    assert builder.counters.rows_dense == {"configured_dense": 1}


def test_layers_that_skip_are_told_of_every_step_and_every_seal_and_their_reads_are_counted_apart():
    steps, attached, followed = make_steps(), [], []
    builder = builder_over_a_recorder(steps)
    builder._skipping = SimpleNamespace(attach=lambda *arguments: attached.append(arguments))
    steps.followed_by(followed.append, 1)
    tables = np.arange(24, dtype=np.int32)[None]
    builder.build(0, step([0], [200], tables))
    assert not followed
    now = step([200], [1], tables)
    metadata = builder.build(0, now)
    assert [due.plan.num_chunks for due in followed] == [2]
    given, common, seq_lens, shared = attached[-1]
    assert given is metadata and common is now
    assert seq_lens.tolist() == [201] and shared.tolist() == [0]
    # Two layers, one of which skips and counts its reads on the device.
    counters = steps.counters
    assert (counters.reads_dense, counters.reads_filtered, counters.reads_done) == (2 * 201, 2 * 137, 137)


def test_a_group_that_keeps_every_token_can_skip_too():
    builder, attached = builder_over_a_recorder(None), []
    builder._skipping = SimpleNamespace(attach=lambda *arguments: attached.append(arguments))
    builder._num_skipping = 1
    now = step([300, 0], [1, 20], np.arange(48, dtype=np.int32).reshape(2, 24))
    builder.build(0, now)
    ((_, common, seq_lens, shared),) = attached
    assert common is now and seq_lens.tolist() == [301, 20] and shared is None
    assert (builder.counters.reads_dense, builder.counters.reads_done) == (3 * 301, 2 * 301)


class Event:
    """Stands in for a CUDA event: done when the test says so, at the millisecond it was recorded."""

    now = 0.0
    done = 0.0

    def record(self):
        Event.now += 5.0
        self.at = Event.now

    def query(self):
        return self.at <= Event.done

    def elapsed_time(self, other):
        assert other.query(), "asked of an event that is not done: that waits"
        return other.at - self.at


def test_the_time_of_seals_is_read_once_the_device_has_passed_them_and_never_waited_for(monkeypatch):
    from vllm_tokenfilter.integration.counters import StepCounters
    from vllm_tokenfilter.integration.gpu import clock as gpu_clock

    made = []
    monkeypatch.setattr(gpu_clock, "_event", lambda: made.append(Event()) or made[-1])
    counters = StepCounters()
    clock = gpu_clock.SealClock(counters, torch.device("cuda"))
    for _ in range(3):
        with clock.measure():
            pass
    clock.settle()
    assert counters.seal_seconds == 0 and len(made) == 6, "the device has done none yet"
    Event.done = made[3].at
    clock.settle()
    assert counters.seal_seconds == pytest.approx(2 * 0.005)
    with clock.measure():
        pass
    assert len(made) == 6, "events that were read are used again"
    Event.done = Event.now
    clock.settle()
    assert counters.seal_seconds == pytest.approx(4 * 0.005)


def test_the_steps_time_their_seals():
    steps = make_steps()
    tables = np.arange(24, dtype=np.int32)[None]
    steps.adjust(step([0], [200], tables))
    assert steps.counters.seal_seconds == 0, "warming the kernels up is no seal"
    steps.adjust(step([200], [1], tables))
    assert steps.counters.seals == 1 and steps.counters.seal_seconds > 0
