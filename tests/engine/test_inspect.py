"""What `inspect` shows is what the engine did."""

import numpy as np
import pytest
import torch

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.filtering import kept, redundancy
from vllm_tokenfilter.inspection.compare import PRUNED, RAW, inspect_text
from vllm_tokenfilter.inspection.text import InspectedText

pytest.importorskip("vllm", reason="vLLM is not installed")
NUM_TOKENS, STEP = 600, 32
CONFIG = FilterConfig(pruning_ratio=0.5, dense_layers=(3,))


@pytest.fixture(scope="module")
def seen(model_path, tokens):
    """One inspection, and the keys and values it saw."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm_tokenfilter.integration.offline import observing, scoring

    observed = []
    original = observing.observe
    monkeypatch.setattr(observing, "observe", lambda *args: observed.append(original(*args)) or observed[-1])
    engine = scoring.ScoringEngine(model_path, NUM_TOKENS + 1, max_num_seqs=1, max_step_tokens=STEP)
    text = InspectedText(tokens[:NUM_TOKENS], ["x"] * NUM_TOKENS, 0)
    seen = inspect_text(engine, text, CONFIG, STEP)
    steps = []
    engine.feed([tokens[:200]], STEP, lambda index, start, hidden: steps.append(len(hidden)))
    yield seen, observed[0], steps
    engine.close()
    monkeypatch.undo()


def test_every_sealed_chunk_of_a_filtered_layer_shows_its_share(seen):
    states = seen[0].states
    sealed = (NUM_TOKENS - 64) // 64 * 64
    assert (states[3] == RAW).all() and (states[:, sealed:] == RAW).all()
    chunks = np.delete(states, 3, 0)[:, :sealed].reshape(29, -1, 64)
    assert ((chunks == PRUNED).sum(-1) == 32).all()
    assert (states[:, :4] != PRUNED).all(), "a sink was pruned"
    assert seen[0].dense_layers == {"configured_dense": [3]} and seen[0].num_filtered_layers == 29


def test_a_sequence_that_is_alone_is_fed_in_the_steps_asked_for(seen):
    assert seen[2] == [STEP] * 6 + [200 - 6 * STEP]


def test_what_is_shown_pruned_is_what_the_method_says_of_the_cached_keys(seen):
    inspection, observation, _ = seen
    agreed = total = 0
    for row in (0, 10, 29):
        rank = redundancy(observation.keys[row], observation.values[row], decay=0.9, terms=64, fusion="variance_aware")
        for chunk in range((NUM_TOKENS - 64) // 64):
            stays = kept(rank[64 * chunk : 64 * chunk + 64], 32, 4 if chunk == 0 else 0)
            shown = np.flatnonzero(inspection.states[row, 64 * chunk : 64 * chunk + 64] != PRUNED)
            agreed += len(set(stays.tolist()) & set(shown.tolist()))
            total += 32
    assert agreed >= 0.99 * total, f"{agreed} of {total}"


def test_dense_probabilities_are_the_models_own(seen, model):
    inspection = seen[0]
    with torch.no_grad():
        logits = model(torch.tensor([inspection.text.ids])).logits[0, :-1].double()
    own = logits.softmax(-1).gather(1, torch.tensor(inspection.text.ids[1:])[:, None])[:, 0].numpy()
    # The engine computes in bfloat16.
    assert np.abs(own - inspection.dense_probability).mean() < 0.01


def test_nothing_changes_before_the_first_seal_and_something_after(seen):
    inspection = seen[0]
    change = np.abs(inspection.filtered_probability - inspection.dense_probability)
    assert change[:128].max() == 0 and inspection.kl[:128].max() < 1e-9
    assert change[160:].max() > 0 and inspection.kl[160:].max() > 1e-4
    assert inspection.same_choice[:128].all()
