"""The CPU sealing kernel: what it is told, checked and handed to seal.c.

Score, select and compact in place, over every layer and request of a step at once; the maths is in seal.c and,
readable, in kernels/reference.py. Compiled for the machine on first use (build.py); needs no memory beyond a few
chunks.

Source: docs/algorithm.md (redundancy), docs/layout.md (slots).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_tokenfilter.kernels.cpu.build import load_kernel
from vllm_tokenfilter.kernels.cpu.cache import PagedCache, pointer, structure
from vllm_tokenfilter.kernels.plan import DuePlan
from vllm_tokenfilter.kernels.rules import SELECTOR_CODES, ScoreRule
from vllm_tokenfilter.layout import Layout

# What a call of the kernel does.
WHOLE, SCORE, SEAL = range(3)


@dataclass(frozen=True)
class DueSeals:
    """A plan with copies of what it needs of the step, which the next step overwrites; one entry per due row."""

    plan: DuePlan  #: which chunks.
    block_tables: NDArray[np.int32]  #: int32 [num_due_rows, num_blocks], the rows' blocks in order.
    shared_chunks: NDArray[np.int64]  #: int64 [num_due_rows], chunks that came sealed from the prefix cache.

    @classmethod
    def snapshot(cls, plan: DuePlan, block_tables: NDArray[np.int32], shared_chunks: NDArray[np.int64]) -> "DueSeals":
        """Copy the due rows of a step."""
        return cls(plan, block_tables[plan.rows, : plan.num_blocks].copy(), shared_chunks[plan.rows])


def seal_chunks(
    cache: PagedCache,
    saved_redundancy: NDArray[np.float32],
    due: DueSeals,
    layout: Layout,
    rule: ScoreRule,
    layer_indices: NDArray[np.int64],
    num_threads: int,
    gather_heads: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    carried: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Seal the due chunks of a step in every layer; the cache and `saved_redundancy` change in place.

    Args:
        cache: the layers' cache, which holds all tokens of the due rows.
        saved_redundancy: float32 [num_layers, num_blocks * block_size] by physical slot: what an earlier seal
            scored and a later one needs.
        due: what to seal.
        layout: the layout's integers.
        rule: how tokens are ranked.
        layer_indices: int64 [num_layers], the layers' indices in the model.
        num_threads: threads of PyTorch's pool to run on.
        gather_heads: where KV heads are split over ranks, makes the scores of all heads from this rank's: float32
            [num_layers, num_scored_chunks, 2, num_kv_heads, chunk_size], keys' scores first. None for one rank.
        carried: int64 [num_layers, num_blocks * block_size] by physical slot, moved along with raw tokens; None if
            nothing is carried for them.

    Returns:
        int32 [num_layers, num_due_chunks, kept_per_chunk]: the offsets inside each chunk that stayed, ascending,
        ordered by row, then chunk; -1 where the selector is "recency", which chooses from the whole request.
    """
    plan, num_layers = due.plan, len(cache.layer_starts)
    assert layout.anchor_terms <= layout.chunk_size <= layout.recent_window
    assert (plan.first_chunk < plan.last_chunk).all()
    ends = np.cumsum(plan.last_chunk - plan.first_chunk)
    chosen = np.empty((num_layers, int(ends[-1]), layout.kept_per_chunk), np.int32)
    of_rows = plan.num_tokens, plan.first_chunk, plan.last_chunk, due.shared_chunks, ends
    pointers = (pointer(array, np.int64) for array in of_rows)
    tables = pointer(due.block_tables, np.int32), due.block_tables.shape[1]
    rows = structure(*tables, len(plan.rows), *pointers)  # struct seal_rows of seal.c
    arguments: tuple[Any, ...] = (
        ctypes.byref(cache.struct),
        ctypes.byref(_rule_struct(layout, rule)),
        ctypes.byref(rows),
        ctypes.c_int64(num_layers),
        pointer(layer_indices, np.int64),
        pointer(saved_redundancy, np.float32),
        ctypes.c_int64(saved_redundancy.shape[1]),
        None if carried is None else pointer(carried, np.int64),
        pointer(chosen, np.int32),
        ctypes.c_int64(num_threads),
    )
    kernel = load_kernel().seal_chunks
    # Baselines that look at no key or value choose alike on every rank.
    if gather_heads is None or rule.selector in ("random", "recency"):
        kernel(*arguments, ctypes.c_int64(WHOLE), None, ctypes.c_int64(cache.num_kv_heads))
        return chosen
    own = np.zeros((num_layers, plan.num_tasks, 2, cache.num_kv_heads, layout.chunk_size), np.float32)
    kernel(*arguments, ctypes.c_int64(SCORE), pointer(own, np.float32), ctypes.c_int64(own.shape[3]))
    scores = gather_heads(own)
    kernel(*arguments, ctypes.c_int64(SEAL), pointer(scores, np.float32), ctypes.c_int64(scores.shape[3]))
    return chosen


def _rule_struct(layout: Layout, rule: ScoreRule) -> ctypes.Structure:
    """`struct seal_rule` of seal.c."""
    sizes = layout.chunk_size, layout.kept_per_chunk, layout.sink_tokens, layout.anchor_terms
    codes = SELECTOR_CODES[rule.selector], rule.fusion_code, rule.seed
    return structure(*sizes, *codes, rule.decay, rule.decay**layout.anchor_terms)
