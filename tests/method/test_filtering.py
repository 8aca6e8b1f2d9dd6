"""The score against the design's formula in float64 NumPy, and against a case worked by hand."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_tokenfilter import filtering
from vllm_tokenfilter.config import Fusion, Selector
from vllm_tokenfilter.kernels.rules import FUSION_CODES, SELECTOR_CODES


def formula(keys, values, decay, terms, fusion):
    """Redundancy of every token, straight from docs/algorithm.md: one loop per token and head, float64."""
    heads, num_tokens, _ = keys.shape
    similar = np.zeros((2, heads, num_tokens))
    for which, x in enumerate((keys, values)):
        for h in range(heads):
            for t in range(1, num_tokens):
                anchor = np.zeros(x.shape[2])
                weights = 0.0
                for j in range(1, min(terms, t) + 1):
                    weight = (1 - decay) * decay ** (j - 1)
                    anchor += weight * x[h, t - j]
                    weights += weight
                anchor /= weights
                size = np.linalg.norm(x[h, t]) * np.linalg.norm(anchor)
                similar[which, h, t] = x[h, t] @ anchor / size if size > 0 else 0.0
    mean, variance = similar.mean(1), similar.var(1)
    match fusion:
        case "key":
            return mean[0]
        case "value":
            return mean[1]
        case "mean":
            return mean.mean(0)
        case "variance_aware":
            total = variance.sum(0)
            share = np.where(total > 0, variance[1] / np.where(total > 0, total, 1), 0.5)
            return share * mean[0] + (1 - share) * mean[1]


def test_every_name_of_a_setting_has_a_code_of_its_own():
    for names, codes in ((get_args(Fusion), FUSION_CODES), (get_args(Selector), SELECTOR_CODES)):
        assert set(names) == set(codes) and len(set(codes.values())) == len(codes)


@pytest.mark.parametrize("fusion", get_args(Fusion))
@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 8),
    num_tokens=st.integers(1, 40),
    dims=st.sampled_from([8, 64]),
    decay=st.floats(0.05, 0.99),
    terms=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_redundancy_is_the_formula(fusion, heads, num_tokens, dims, decay, terms, seed):
    draw = np.random.default_rng(seed)
    keys = draw.normal(0.3, 1, (heads, num_tokens, dims)).astype(np.float32)
    values = draw.normal(0.1, 1, (heads, num_tokens, dims)).astype(np.float32)
    got = filtering.redundancy(torch.tensor(keys), torch.tensor(values), decay=decay, terms=terms, fusion=fusion)
    want = formula(keys.astype(np.float64), values.astype(np.float64), decay, terms, fusion)
    # Where the heads nearly agree the weight is near zero over zero, and rounding shows.
    tolerance = 2e-3 if fusion == "variance_aware" else 2e-4
    np.testing.assert_allclose(got.numpy(), want, atol=tolerance)


def test_a_case_worked_by_hand():
    # Two heads of dimension two; token 2 is compared with the mean of token 1 (weight 1) and token 0 (weight 0.5).
    keys = torch.tensor([[[1.0, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [1, 0]]])
    values = torch.tensor([[[1.0, 0], [1, 0], [1, 0]], [[0, 1], [0, 1], [0, 2]]])
    got = filtering.redundancy(keys, values, decay=0.5, terms=2, fusion="variance_aware")
    # Token 0 has no predecessor: 0. Token 1: keys 0 and 1 over heads (mean 0.5, variance 0.25), values 1 and 1
    # (variance 0): the heads agree on the value, so it alone counts: 1. Token 2: values again 1 and 1: 1.
    assert got.tolist() == pytest.approx([0, 1, 1])
    mean = filtering.redundancy(keys, values, decay=0.5, terms=2, fusion="mean")
    key_of_token_2 = (1 / math.sqrt(1.25) + 1) / 2  # cos([0, 1], [0.5, 1]) and 1
    assert mean.tolist() == pytest.approx([0, 0.75, (key_of_token_2 + 1) / 2])


def test_one_head_is_the_plain_mean():
    keys, values = torch.randn(1, 30, 16), torch.randn(1, 30, 16)
    arguments = {"decay": 0.9, "terms": 8}
    fused = filtering.redundancy(keys, values, fusion="variance_aware", **arguments)
    assert torch.equal(fused, filtering.redundancy(keys, values, fusion="mean", **arguments))


def test_only_the_last_terms_predecessors_count():
    keys, values = torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    whole = filtering.redundancy(keys, values, decay=0.9, terms=8, fusion="variance_aware")
    changed = keys.clone()
    changed[:, :20] = 0
    other = filtering.redundancy(changed, values, decay=0.9, terms=8, fusion="variance_aware")
    torch.testing.assert_close(whole[28:], other[28:])
    assert not torch.allclose(whole[20:28], other[20:28])


@given(
    st.lists(st.integers(-3, 3), min_size=4, max_size=32).flatmap(
        lambda scores: st.tuples(st.just(scores), st.integers(1, len(scores)))
    ),
    st.integers(0, 4),
)
def test_kept_are_the_least_redundant_the_older_of_equals_and_always_the_sinks(case, sinks):
    scores, keep = case
    sinks = min(sinks, keep)
    offsets = filtering.kept(torch.tensor(scores, dtype=torch.float32), keep, sinks).tolist()
    rest = sorted(range(sinks, len(scores)), key=lambda i: (scores[i], i))
    assert offsets == sorted([*range(sinks), *rest[: keep - sinks]])
