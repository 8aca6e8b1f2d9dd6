"""What the CPU builder makes of a step, with vLLM's own builder below it replaced by one that gives back the step."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.cpu import sealing
from vllm_tokenfilter.integration.cpu.builder import TokenFilteringMetadataBuilder
from vllm_tokenfilter.integration.offline.mixed_layouts import OfflineBuilder
from vllm_tokenfilter.layer_plan import LayerFacts, LayerPlan
from vllm_tokenfilter.layout import Layout

BLOCK = 32
LAYOUT = Layout(chunk_size=64, kept_per_chunk=32, recent_window=64, sink_tokens=4, anchor_terms=64)


@pytest.fixture
def make(monkeypatch):
    """Makes a builder of one layer and its reader; `sealed` of it lists the due seals that were run."""
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", lambda self, prefix, common, fast: common)
    monkeypatch.setattr(sealing, "seal", lambda due, *rest: due)

    def builder_of(kind=TokenFilteringMetadataBuilder, layout=LAYOUT, shares=False):
        builder = kind.__new__(kind)
        builder.layout, builder.config, builder.block_size, builder.counters = layout, None, BLOCK, StepCounters()
        builder.due = builder.skipping = None
        builder.skipping_layers, builder._layers, builder._shares = [], {0: None}, shares
        builder._dense_reason = "" if layout else "configured_dense"
        # The second layer reads the first one's cache.
        builder.plan = LayerPlan.of(FilterConfig(), 2, {0: LayerFacts(), 1: LayerFacts(reads=0)})
        builder._cache = "the cache"
        return builder

    return builder_of


def step(num_computed, query_lens, tables, dummy=False):
    """A step whose new tokens lie, as far as vLLM knows, behind all tokens before them."""
    tables, query_lens = np.array(tables, np.int32), np.array(query_lens)
    seq_lens = np.array(num_computed) + query_lens
    positions = [np.arange(end - count, end) for end, count in zip(seq_lens, query_lens, strict=True)]
    slots = [table[where // BLOCK] * BLOCK + where % BLOCK for table, where in zip(tables, positions, strict=True)]
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32))
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
        num_reqs=len(query_lens),
        num_actual_tokens=int(query_lens.sum()),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.from_numpy(tables),
        slot_mapping=torch.from_numpy(np.concatenate(slots).astype(np.int64) - (10**6 if dummy else 0)),
    )


def blocks(first):
    return [first + index for index in range(12)]


def test_a_row_reads_what_is_stored_and_writes_behind_it(make):
    builder = make()
    now = step([200, 30], [1, 1], [blocks(1), blocks(20)])
    made = builder.build(0, now)
    # Of 200 tokens two chunks are sealed, each of which lost 32: token 200 goes into slot 136, in the fifth block.
    assert made.seq_lens.tolist() == [201 - 64, 31] and made.max_seq_len == 201 - 64
    assert made.slot_mapping is now.slot_mapping, "the forward holds the same tensor"
    assert now.slot_mapping.tolist() == [5 * BLOCK + 136 - 128, 20 * BLOCK + 30]
    assert (builder.counters.rows_filtered, builder.counters.rows_dense) == (1, {"shorter_than_window_and_chunk": 1})
    assert (builder.counters.reads_dense, builder.counters.reads_done) == (2 * (201 + 31), 2 * (201 + 31 - 64))


def test_what_a_step_makes_due_is_sealed_before_the_next_and_once(make):
    builder = make()
    builder.build(0, step([0], [200], [blocks(1)]))
    due = builder.due
    assert (due.plan.first_chunk.tolist(), due.plan.last_chunk.tolist(), due.shared_chunks.tolist()) == ([0], [2], [0])
    assert builder.counters.seals == 0
    builder.build(0, step([200], [1], [blocks(1)]))
    assert builder.due is None and builder.counters.seals == 1
    assert (builder.counters.tokens_sealed, builder.counters.tokens_pruned) == (128, 64)
    assert builder.seal_due() is None


def test_a_dummy_run_seals_what_is_due_and_leaves_nothing(make):
    builder = make()
    builder.build(0, step([0], [200], [blocks(1)]))
    dummy = step([0], [300], [blocks(1)], dummy=True)
    slots = dummy.slot_mapping.clone()
    assert builder.build(0, dummy) is dummy and torch.equal(dummy.slot_mapping, slots)
    assert builder.due is None and builder.counters.seals == 1 and builder.counters.tokens_seen == 200


def test_a_mark_is_taken_out_and_chunks_that_came_sealed_are_not_sealed_again(make):
    builder = make(shares=True)
    # Two chunks taken over: their two blocks, the mark, and the row's own blocks.
    tables = [[7, 8, 0, *blocks(20)]]
    now = step([128], [130], tables)
    made = builder.build(0, now)
    assert made.block_table_tensor[0, :5].tolist() == [7, 8, 20, 21, 22]
    assert now.block_table_tensor[0, :4].tolist() == [7, 8, 0, 20], "the runner's own table stays"
    assert now.slot_mapping[0] == 20 * BLOCK
    due = builder.due
    assert (due.plan.first_chunk.tolist(), due.plan.last_chunk.tolist(), due.shared_chunks.tolist()) == ([2], [3], [2])


def test_dense_layers_pass_through_and_are_counted_with_their_reason(make):
    builder = make(layout=None)
    now = step([200], [1], [blocks(1)])
    assert builder.build(0, now) is now and builder.due is None
    assert builder.counters.rows_dense == {"configured_dense": 1}


def test_offline_the_layers_of_one_layout_write_without_moving_those_of_another(make):
    builder, seen = make(OfflineBuilder), []
    builder.observer = seen.append
    now = step([0], [200], [blocks(1)])
    builder.build(0, now)
    due, now = builder.due, step([200], [1], [blocks(1)])
    slots = now.slot_mapping.clone()
    made = builder.build(0, now)
    assert torch.equal(now.slot_mapping, slots) and made.slot_mapping.tolist() == [5 * BLOCK + 136 - 128]
    assert seen == [due]
