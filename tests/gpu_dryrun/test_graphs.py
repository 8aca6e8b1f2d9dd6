"""vLLM's whole GPU engine without a GPU, its forwards captured as CUDA graphs and replayed (`pretend_graphs.py`).

A tensor that is not where it was at the capture shows as a wrong token, or as memory that was freed since. Needs what
`test_dryrun.py` needs.
"""

import pytest

from tests import reference
from tests.gpu_dryrun.test_dryrun import (
    ENVIRONMENT,
    generate,
    hold_to_reference,
    prompt,
    random_llama,
    switched,
    switching,
)

pytestmark = ENVIRONMENT

#: Chunks as small as the prompts, so that most are sealed while they decode.
SMALL = {"pruning_ratio": 0.5, "chunk_size": 32, "recent_window": 32, "anchor_terms": 32}


def small(**others):
    return reference.Settings(C=32, W=32, M=32, **others)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of two layers, and its folder."""
    return random_llama(tmp_path_factory.mktemp("tiny"), 2)


def run(tiny, tmp_path, rounds, filtering, v2, mode, **llm):
    """What `generate` found, with graphs of this mode, which were replayed."""
    found = generate(tiny[1], tmp_path / "out.json", rounds, filtering, v2, graphs=mode, **llm)
    assert found["runner"].endswith(".gpu.model_runner" if v2 else ".gpu_model_runner")
    assert found["status"]["cudagraph_mode"] == mode
    assert found["graphs"]["replayed whole"] > 0
    assert (found["graphs"]["replayed pieces"] > 0) == ("PIECEWISE" in mode)
    return found


def test_a_padded_batch_gives_the_references_tokens(tiny, tmp_path):
    prompts = [prompt(length, length) for length in (58, 40, 70)]
    found = run(
        tiny, tmp_path, [prompts], SMALL, True, "FULL_DECODE_ONLY", enable_prefix_caching=False, new_tokens=8,
        max_num_seqs=4, max_num_batched_tokens=192,
    )  # fmt: skip
    assert found["graphs"]["captured whole"] == 3, "batches of 1, 2 and 4"
    hold_to_reference(tiny[0], found, prompts, small(ratio=0.5))


@pytest.mark.slow
def test_graphs_go_on_under_another_ratio(tiny, tmp_path):
    prompts, rounds = switching([0, 0.25], (66, 30, 94))
    found = run(
        tiny, tmp_path, rounds, SMALL, True, "FULL_AND_PIECEWISE", enable_prefix_caching=True, max_model_len=128
    )
    assert switched(found) == [(0, 0.5), (0.25, 0)]
    hold_to_reference(tiny[0], found, prompts, [small(ratio=ratio) for ratio in (0.5, 0.5, 0, 0, 0.25)])


PLANTED = {"freed": r"uses \(1,\) of torch.int32 that was freed since", "kept": "request 0 of 58 tokens"}


@pytest.mark.slow
@pytest.mark.parametrize("lengths", PLANTED)
def test_lengths_in_a_new_tensor_in_each_step_are_found_out(tiny, tmp_path, lengths):
    with pytest.raises(AssertionError, match=PLANTED[lengths]):
        found = run(
            tiny, tmp_path, [[prompt(58, 58)]], SMALL, True, "FULL_DECODE_ONLY", enable_prefix_caching=False,
            max_model_len=128, plant={"kept": lengths == "kept"},
        )  # fmt: skip
        hold_to_reference(tiny[0], found, [prompt(58, 58)], small(ratio=0.5))
