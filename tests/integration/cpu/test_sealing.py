"""What surrounds a CPU seal: the heads of all ranks, and what skipping carries by block."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.cpu import sealing
from vllm_tokenfilter.integration.cpu.skipping import SkippingLayers
from vllm_tokenfilter.kernels.cpu.seal import DueSeals
from vllm_tokenfilter.kernels.plan import plan_seals
from vllm_tokenfilter.layout import Layout

LAYOUT = Layout(chunk_size=64, kept_per_chunk=32, recent_window=64, sink_tokens=4, anchor_terms=64)


def cache_of(own_heads, total_heads):
    return sealing.FilteredCache([0, 1], SimpleNamespace(num_kv_heads=own_heads), np.zeros((2, 8)), total_heads)


@pytest.fixture
def ranks(monkeypatch):
    """Makes this process one of some ranks, given every rank's scores."""

    def of(scores):
        def all_gather(everyones, own, group):
            assert own.shape == scores[0].shape and group == "the ranks"
            for place, one in zip(everyones, scores, strict=True):
                place.copy_(one)

        group = SimpleNamespace(world_size=len(scores), cpu_group="the ranks")
        monkeypatch.setattr(sealing, "get_tp_group", lambda: group)
        monkeypatch.setattr(torch.distributed, "all_gather", all_gather)

    return of


def scores_of(heads):
    """Scores [2 layers, 3 chunks, 2, heads, 8] that say whose they are."""
    return torch.tensor(heads, dtype=torch.float32).view(1, 1, 1, -1, 1).expand(2, 3, 2, -1, 8).contiguous()


@pytest.mark.parametrize("num_ranks, total", [(2, 4), (4, 2), (2, 2)])
def test_a_seal_joins_every_head_once_in_the_models_order(monkeypatch, ranks, num_ranks, total):
    own, replicas = max(1, total // num_ranks), max(1, num_ranks // total)
    ranks([scores_of(list(range(rank // replicas * own, rank // replicas * own + own))) for rank in range(num_ranks)])
    joined = []

    def seal_chunks(paged, saved, due, layout, rule, layer_indices, num_threads, gather_heads, carried):
        joined.append(gather_heads(scores_of(list(range(own))).numpy()))
        return np.zeros((2, 3, 32), np.int32)

    monkeypatch.setattr(sealing, "seal_chunks", seal_chunks)
    sealing.seal(None, cache_of(own, total), LAYOUT, FilterConfig())
    assert joined[0].shape == (2, 3, 2, total, 8) and joined[0][1, 2, 1, :, 5].tolist() == list(range(total))


def test_a_rank_that_has_every_head_asks_nobody(monkeypatch):
    asked = []
    monkeypatch.setattr(sealing, "seal_chunks", lambda *arguments: asked.append(arguments[7]))
    sealing.seal(None, cache_of(3, 3), LAYOUT, FilterConfig())
    assert asked == [None]


def test_what_is_carried_by_block_follows_the_newest_token():
    layers = SkippingLayers.__new__(SkippingLayers)
    layers.paged = SimpleNamespace(block_size=32)
    # Each block's own number, in two layers.
    layers.anchors = np.tile(np.arange(40, dtype=np.float32)[None, :, None], (2, 1, 3))
    layers._means = layers.anchors.copy()
    tables = np.arange(40, dtype=np.int32).reshape(2, 20)[:, ::-1].copy()
    # The first row has 200 tokens, of which two chunks are sealed now; the second had one sealed and seals another.
    computed, lengths = np.array([0, 190]), np.array([200, 195])
    plan = plan_seals(computed, lengths, 32, LAYOUT)
    layers.follow(DueSeals.snapshot(plan, tables, np.zeros(2, np.int64)), LAYOUT)
    newest = [199, 194 - 32]
    moved = [199 - 64, 194 - 64]
    expected = np.arange(40, dtype=np.float32)
    for row in range(2):
        expected[tables[row, moved[row] // 32]] = tables[row, newest[row] // 32]
    for carried in (layers.anchors, layers._means):
        assert (carried == expected[None, :, None]).all()
