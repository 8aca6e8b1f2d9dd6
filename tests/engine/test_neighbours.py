"""The same answer whatever else is served: requests alone, and the same ones in a random crowd, in float32."""

import pytest

from tests import tiny
from tests.engine.crowd import Crowd, differences, random_requests

#: How far log-probabilities of one request may be apart; where stock vLLM's are further apart, its figure holds.
SPREAD = 1e-4
TUNED = {0.25: [0, 0.5, 0.5, 0], 0.5: [0.25, 0.75, 0.75, 0.25], 0.75: [0.625, 0.875, 0.875, 0.625]}


def settings(ratio, kind):
    schedule = {"schedule": {"kind": "per_layer", "ratios": TUNED[ratio]}} if kind == "tuned" else {}
    return {
        "attention_backend": "TOKEN_FILTERING",
        "additional_config": {"token_filtering": {"pruning_ratio": ratio, **schedule}},
    }


def alone_and_together(model, tokens, count, **arguments):
    """(answers that differ, largest difference), and how often a request was preempted in the crowd."""
    crowd = Crowd(
        model,
        max_model_len=2048,
        max_num_seqs=8,
        enable_prefix_caching=False,
        scheduling_policy="priority",
        **arguments,
    )
    try:
        asked = random_requests(count, tokens, longest=1500, seed=3)
        alone, before = crowd.alone(asked), crowd.preemptions
        return differences(alone, crowd.together(asked)), crowd.preemptions - before
    finally:
        crowd.close()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="module")
def spread(tiny_model, tokens):
    """Stock vLLM's own difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        (_, worst), _ = alone_and_together(tiny_model, tokens, 200, kv_cache_memory_bytes=80 * tiny.BLOCK_BYTES)
    return max(worst, SPREAD)


def test_requests_in_a_crowd_get_the_answers_they_get_alone(tiny_model, tokens):
    memory = 48 * tiny.BLOCK_BYTES
    (differ, worst), preempted = alone_and_together(
        tiny_model, tokens, 14, kv_cache_memory_bytes=memory, **settings(0.5, "uniform")
    )
    assert preempted, "the pool was large enough for everyone"
    assert (differ, worst <= SPREAD) == (0, True), f"{differ} answers differ, log-probabilities by {worst}"


@pytest.mark.slow
@pytest.mark.parametrize("budget", [256, 512, 2048])
@pytest.mark.parametrize("kind", ["uniform", "tuned"])
@pytest.mark.parametrize("ratio", TUNED)
def test_two_hundred_requests_in_a_crowd_get_the_answers_they_get_alone(
    tiny_model, tokens, spread, ratio, kind, budget
):
    (differ, worst), preempted = alone_and_together(
        tiny_model,
        tokens,
        200,
        max_num_batched_tokens=budget,
        kv_cache_memory_bytes={0.25: 60, 0.5: 48, 0.75: 40}[ratio] * tiny.BLOCK_BYTES * (2 if kind == "tuned" else 1),
        **settings(ratio, kind),
    )
    print(f"ratio {ratio}, {kind}, budget {budget}: {differ}, {worst:.2e}, {preempted} preemptions")
    assert preempted, "the pool was large enough for everyone"
    assert (differ, worst <= spread) == (0, True), f"{differ} answers differ, log-probabilities by {worst}"
