"""The layout arithmetic against a list that is really packed, for all valid settings."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokenfilter.layout import (
    Layout,
    next_stop,
    peak_slots,
    removed_tokens,
    sealed_chunks,
    shares_prefixes,
    stored_tokens,
)


@st.composite
def layouts(draw):
    chunk = draw(st.integers(2, 96))
    keep = draw(st.integers(1, chunk))
    return Layout(
        chunk_size=chunk,
        kept_per_chunk=keep,
        recent_window=draw(st.integers(chunk, 3 * chunk)),
        sink_tokens=draw(st.integers(0, keep)),
        anchor_terms=draw(st.integers(1, chunk)),
    )


def pack(positions, sealed, total, layout):
    """Seal a list of positions as docs/layout.md tells, one chunk at a time, keeping the first K of each."""
    while (total - layout.recent_window) // layout.chunk_size > sealed:
        first = sealed * layout.chunk_size
        chunk = [p for p in positions if first <= p < first + layout.chunk_size]
        assert len(chunk) == layout.chunk_size, "a chunk was sealed twice or before it was complete"
        gone = set(chunk[layout.kept_per_chunk :])
        positions = [p for p in positions if p not in gone]
        sealed += 1
    return positions, sealed


@given(layouts(), st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_every_step_finds_and_leaves_the_slots_of_a_list_that_is_really_packed(layout, steps):
    positions, sealed, computed = [], 0, 0
    for new in steps:
        for position in range(computed, computed + new):
            assert position - removed_tokens(computed, layout) == len(positions)
            positions.append(position)
        positions, sealed = pack(positions, sealed, computed + new, layout)
        computed += new
        assert sealed == sealed_chunks(computed, layout)
        assert len(positions) == stored_tokens(computed, layout)
        assert computed - len(positions) == removed_tokens(computed, layout)
        raw = positions[sealed * layout.kept_per_chunk :]
        assert raw == list(range(sealed * layout.chunk_size, computed)), "raw tokens are not all of the newest"
        assert [positions.index(p) for p in raw] == [p - removed_tokens(computed, layout) for p in raw]


@given(layouts(), st.integers(0, 10_000))
def test_the_newest_tokens_stay_raw_and_chunks_are_sealed_as_soon_as_they_may(layout, length):
    sealed = sealed_chunks(length, layout)
    assert sealed >= 0
    assert sealed == 0 or sealed * layout.chunk_size <= length - layout.recent_window
    assert (sealed + 1) * layout.chunk_size > length - layout.recent_window
    assert (length >= layout.first_seal) == (sealed > 0)


@given(layouts(), st.integers(0, 10_000))
def test_stored_tokens_never_shrink_by_more_than_a_chunk_removes_nor_exceed_the_length(layout, length):
    now, then = stored_tokens(length, layout), stored_tokens(length + 1, layout)
    assert then - now in (1, 1 - layout.removed_per_chunk)
    assert 0 <= now <= length


@given(layouts(), st.integers(1, 400), st.integers(1, 500))
def test_the_peak_is_the_most_any_cut_into_steps_needs(layout, length, most):
    needed = [stored_tokens(c, layout) + step for c in range(length) for step in [min(most, length - c)]]
    assert peak_slots(length, most, layout) == max(needed)


@given(layouts(), st.integers(0, 40), st.integers(0, 3000))
def test_chunks_taken_over_sealed_count_until_the_own_ones_catch_up(layout, shared, own):
    length = shared * layout.chunk_size + own
    sealed = sealed_chunks(length, layout, shared)
    assert sealed == max(shared, sealed_chunks(length, layout))
    assert stored_tokens(length, layout, shared) == length - sealed * layout.removed_per_chunk
    assert stored_tokens(length, layout, shared) <= stored_tokens(length, layout)


@given(layouts(), st.integers(1, 900), st.integers(0, 900), st.integers(0, 600))
def test_steps_end_on_the_grid_at_the_prompts_end_and_where_chunks_are_due(layout, prompt, output, grid):
    starts, length = [], 0
    while length < prompt + output:
        starts.append(length)
        length = next_stop(length, prompt, grid, layout)
        assert starts[-1] < length <= starts[-1] + (grid or 10_000)
    assert [start for start in starts if start < prompt] == [*range(0, prompt, grid or prompt)]
    assert output == 0 or prompt in starts
    for start, end in itertools.pairwise(starts):
        if start >= prompt:
            assert sealed_chunks(start, layout) == sealed_chunks(end - 1, layout)


@given(layouts(), st.lists(st.integers(0, 5000), min_size=1))
def test_integers_arrays_and_tensors_agree(layout, lengths):
    for function in (sealed_chunks, removed_tokens, stored_tokens):
        want = [function(length, layout) for length in lengths]
        assert function(np.array(lengths), layout).tolist() == want
        assert function(torch.tensor(lengths), layout).tolist() == want
        assert function(np.array(lengths), layout, np.full(len(lengths), 9)).tolist() == [
            function(length, layout, 9) for length in lengths
        ]


def test_the_example_of_the_documentation():
    layout = Layout(chunk_size=64, kept_per_chunk=32, recent_window=64, sink_tokens=4, anchor_terms=64)
    assert [sealed_chunks(n, layout) for n in (0, 64, 127, 128, 191, 192, 4000)] == [0, 0, 0, 1, 1, 2, 61]
    assert stored_tokens(4000, layout) == 4000 - 61 * 32 == 2048
    assert layout.effective_ratio == 0.5


@pytest.mark.parametrize(
    "chunk, kept, block, shares",
    [(64, 32, 32, True), (128, 32, 32, True), (64, 16, 32, False), (96, 32, 64, False), (64, 64, 32, False)],
)
def test_prefixes_are_shared_where_chunks_and_what_they_keep_fill_whole_blocks(chunk, kept, block, shares):
    assert shares_prefixes(Layout(chunk, kept, chunk, 4, 32), block) == shares
