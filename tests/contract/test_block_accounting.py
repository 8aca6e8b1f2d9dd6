"""vLLM's real KV-cache manager with our spec, driving a simulated worker: no block has two owners unless it is final.

The worker keeps, for every slot of every block, which token of which text was written there. Each step it runs the
seals that the step before made due, reads each row as attention would, and finds exactly what a sequence alone would
store.
"""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_tokenfilter.integration.cpu.block_tables import shared_chunks_of
from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
from vllm_tokenfilter.layout import Layout, removed_tokens, sealed_chunks, stored_tokens

BLOCK, STEP, LONGEST = 4, 16, 96
SHAPE = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
ONE_BLOCK = Layout(chunk_size=8, kept_per_chunk=4, recent_window=8, sink_tokens=2, anchor_terms=8)
TWO_BLOCKS = Layout(chunk_size=16, kept_per_chunk=8, recent_window=20, sink_tokens=2, anchor_terms=8)
UNSHARED = Layout(chunk_size=8, kept_per_chunk=3, recent_window=8, sink_tokens=2, anchor_terms=8)


def spec(layout):
    if layout is None:
        return FullAttentionSpec(**SHAPE)
    return FilteredAttentionSpec(**SHAPE, layout=layout, max_step_tokens=STEP)


def identity(tokens, position):
    """What a slot holds of the token at a position: it depends on the whole text before it."""
    return hash(tuple(tokens[: position + 1]))


def survivors(tokens, chunk, layout):
    """A choice that, like the real one, depends on nothing but the text up to the chunk's end."""
    positions = range(chunk * layout.chunk_size, (chunk + 1) * layout.chunk_size)
    ranked = sorted(positions, key=lambda p: (p >= layout.sink_tokens, identity(tokens, p)))
    return sorted(ranked[: layout.kept_per_chunk])


class Row:
    """One request as scheduler and worker see it."""

    def __init__(self, request):
        self.request = request
        self.tables = []


class Accounting(RuleBasedStateMachine):
    layouts = (ONE_BLOCK,)
    num_blocks = 40

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed):
        init_none_hash(sha256)
        self.draw = random.Random(seed)
        groups = [KVCacheGroupSpec([f"layer{i}"], spec(layout)) for i, layout in enumerate(self.layouts)]
        caching = UNSHARED not in self.layouts
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=self.num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=LONGEST,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=caching,
            log_stats=True,
        )
        self.pool = self.manager.block_pool
        self.memory = [np.zeros((self.num_blocks, BLOCK), object) for _ in groups]
        self.due = [[] for _ in groups]
        self.running, self.waiting, self.texts, self.names = [], [], [[1]], 0

    def new_request(self, prompt, output):
        self.names += 1
        request = Request(
            f"r{self.names}",
            prompt,
            SamplingParams(max_tokens=output),
            None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.waiting.append(Row(request))

    @rule(keep=st.integers(0, 80), more=st.integers(1, 30))
    def a_request_that_shares_a_prefix_arrives(self, keep, more):
        if len(self.waiting) < 4:
            prefix = self.draw.choice(self.texts)[:keep]
            prompt = (prefix + [self.draw.randrange(2, 50) for _ in range(more)])[: LONGEST - 20]
            self.texts = [*self.texts[-6:], prompt]
            self.new_request(prompt, 20)

    @rule(budget=st.integers(1, 40))
    def a_step_runs(self, budget):
        scheduled = []
        for row in list(self.running):
            if row not in self.running or budget <= 0:
                continue
            count = min(row.request.num_tokens - row.request.num_computed_tokens, STEP, budget)
            while (blocks := self.manager.allocate_slots(row.request, count)) is None:
                # The newest, or with priorities any, even one that the step already holds.
                victim = self.running.pop(self.draw.choice([-1, self.draw.randrange(len(self.running))]))
                scheduled = [(other, c) for other, c in scheduled if other is not victim]
                self.preempt(victim)
                if victim is row:
                    break
            else:
                self.extend(row, blocks)
                scheduled.append((row, count))
                budget -= count
        while self.waiting and budget > 0 and len(self.running) < 5:
            row = self.waiting[0]
            found, num_found, _ = self.manager.get_computed_blocks(row.request)
            for layout in filter(None, self.layouts if num_found else ()):
                assert num_found <= row.request.num_tokens - layout.recent_window, "the newest tokens are not raw"
            count = min(row.request.num_tokens - num_found, STEP, budget)
            blocks = self.manager.allocate_slots(
                row.request, count, num_found, found, full_sequence_must_fit=True, has_scheduled_reqs=bool(scheduled)
            )
            if blocks is None:
                break
            self.waiting.pop(0)
            row.request.num_computed_tokens = num_found
            row.tables = [list(ids) for ids in self.manager.get_block_ids(row.request.request_id)]
            self.running.append(row)
            scheduled.append((row, count))
            budget -= count
        assert scheduled or not (self.running or self.waiting) or budget <= 0, "nobody can ever go on"
        self.work(scheduled)
        for row, count in scheduled:
            row.request.num_computed_tokens += count
        for row, _ in scheduled:
            request = row.request
            if request.num_computed_tokens == request.num_tokens:
                if request.num_tokens == LONGEST or request.num_output_tokens == 20:
                    self.leave(row)
                else:
                    request.append_output_token_ids(self.draw.randrange(2, 50))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def a_request_is_aborted_or_finishes(self, which):
        self.leave(self.running[which % len(self.running)])

    @rule()
    def the_prefix_cache_is_dropped(self):
        if not self.running:
            assert self.manager.reset_prefix_cache()

    def extend(self, row, blocks):
        for table, new in zip(row.tables, blocks.get_block_ids(), strict=True):
            table.extend(new)

    def leave(self, row):
        self.running.remove(row)
        self.texts.append(list(row.request.all_token_ids))
        self.manager.free(row.request)

    def preempt(self, row):
        self.manager.free(row.request)
        row.request.num_computed_tokens = 0
        row.tables = []
        self.waiting.insert(0, row)

    def work(self, scheduled):
        for group, layout in enumerate(self.layouts):
            for due in self.due[group]:
                self.seal(group, layout, *due)
            self.due[group] = []
            shared = self.shared_chunks(group, layout, [row for row, _ in scheduled])
            for (row, count), chunks in zip(scheduled, shared, strict=True):
                self.attend(group, layout, row, count, chunks)

    def shared_chunks(self, group, layout, rows):
        """Read off the whole batch, behind whose rows lies what earlier rows left there."""
        if layout in (None, UNSHARED) or not rows:
            return [0] * len(rows)
        width = LONGEST // BLOCK
        tables = np.array([[self.draw.randrange(self.num_blocks) for _ in range(width)] for _ in rows], np.int32)
        tables *= np.array([[self.draw.random() < 0.5] for _ in rows])
        for line, row in zip(tables, rows, strict=True):
            line[: len(row.tables[group])] = row.tables[group]
        computed = np.array([row.request.num_computed_tokens for row in rows])
        return shared_chunks_of(tables, computed, BLOCK, layout).tolist()

    def slots(self, group, table, first, last):
        return [(table[slot // BLOCK], slot % BLOCK) for slot in range(first, last)]

    def attend(self, group, layout, row, count, shared):
        tokens, computed = list(row.request.all_token_ids), row.request.num_computed_tokens
        table, memory = list(row.tables[group]), self.memory[group]
        if layout is None:
            stored, expected = computed, list(range(computed + count))
        else:
            if shared:
                assert table.pop(shared * layout.kept_per_chunk // BLOCK) == 0
            stored = stored_tokens(computed, layout, shared)
            sealed = sealed_chunks(computed, layout, shared)
            kept = [p for chunk in range(sealed) for p in survivors(tokens, chunk, layout)]
            expected = kept + list(range(sealed * layout.chunk_size, computed + count))
            after = sealed_chunks(computed + count, layout, shared)
            if after > sealed:
                self.due[group].append((tokens, table, computed + count, sealed, after, shared))
        assert 0 not in table, "a slot lies in the null block"
        places = self.slots(group, table, 0, stored + count)
        for position, (block, inside) in zip(range(computed, computed + count), places[stored:], strict=True):
            memory[block, inside] = identity(tokens, position)
            assert self.pool.blocks[block].ref_cnt == 1, "a shared block is written"
        found = [memory[block, inside] for block, inside in places]
        assert found == [identity(tokens, position) for position in expected], "a row reads what is not its own"
        owned = {block.block_id for block in self.manager.coordinator.get_blocks(row.request.request_id)[group]}
        assert {block for block, _ in places} <= owned

    def seal(self, group, layout, tokens, table, length, first, last, shared):
        memory = self.memory[group]
        removed = removed_tokens(first * layout.chunk_size + layout.recent_window, layout, shared)
        assert removed == first * layout.removed_per_chunk
        kept = [p for chunk in range(first, last) for p in survivors(tokens, chunk, layout)]
        moved = kept + list(range(last * layout.chunk_size, length))
        sources = self.slots(group, table, 0, length - removed)
        values = [memory[sources[position - removed]] for position in moved]
        target = first * layout.kept_per_chunk
        for place, value in zip(self.slots(group, table, target, target + len(moved)), values, strict=True):
            memory[place] = value

    @invariant()
    def blocks_have_one_owner_unless_they_are_shared_by_hash(self):
        if not hasattr(self, "manager"):
            return
        owners = {}
        for row in self.running:
            for blocks in self.manager.coordinator.get_blocks(row.request.request_id):
                for block in blocks:
                    owners.setdefault(block.block_id, []).append(row)
        for block_id, rows in owners.items():
            block = self.pool.blocks[block_id]
            if block.is_null:
                continue
            assert block.ref_cnt == len(rows)
            assert len(rows) == 1 or block.block_hash is not None
        in_use = sum(1 for block_id in owners if not self.pool.blocks[block_id].is_null)
        assert self.pool.get_num_free_blocks() == self.num_blocks - 1 - in_use

    def teardown(self):
        if hasattr(self, "manager"):
            for row in list(self.running):
                self.leave(row)
            assert self.pool.get_num_free_blocks() == self.num_blocks - 1
            managers = self.manager.coordinator.single_type_managers
            assert all(not manager.req_to_blocks for manager in managers)


class ChunksOfTwoBlocks(Accounting):
    layouts = (TWO_BLOCKS,)


class FilteredBesideDense(Accounting):
    layouts = (None, ONE_BLOCK)
    num_blocks = 60


class TwoRatiosBesideDense(Accounting):
    layouts = (None, ONE_BLOCK, TWO_BLOCKS, ONE_BLOCK)
    num_blocks = 100


class NothingShared(Accounting):
    layouts = (UNSHARED,)


_LIMITS = settings(
    max_examples=40,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
for machine in (Accounting, ChunksOfTwoBlocks, FilteredBesideDense, TwoRatiosBesideDense, NothingShared):
    machine.TestCase.settings = _LIMITS
TestOneBlock = Accounting.TestCase
TestTwoBlocks = ChunksOfTwoBlocks.TestCase
TestFilteredBesideDense = FilteredBesideDense.TestCase
TestTwoRatiosBesideDense = TwoRatiosBesideDense.TestCase
TestNothingShared = NothingShared.TestCase
