"""vLLM's whole GPU engine without a GPU, TOKEN_FILTERING over TRITON_ATTN, against the independent reference.

Needs the second environment that `tests/gpu_dryrun/setup.sh` makes; `GPU_DRYRUN_PYTHON` names its Python, else
`.venv-gpu-dryrun` is looked for. See docs/gpu.md.
"""

import json
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import reference

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("GPU_DRYRUN_PYTHON") or str(ROOT / ".venv-gpu-dryrun" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(PYTHON).exists(), reason="run tests/gpu_dryrun/setup.sh first"),
]

NEW_TOKENS = 12
#: Prompts of 10 to 600 tokens; those of 186 and 250 are sealed while they decode.
LENGTHS = (10, 186, 333, 600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama with grouped heads, and its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=512, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights.data, 0, 0.08)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, str(folder)


def prompt(length, seed):
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def generate(folder, out, rounds, filtering, v2, python=PYTHON, pretend=True, logprobs=None, reads=None, **llm):
    """What `generate.py` found; stock vLLM where `filtering` is None."""
    ours = {
        "attention_backend": "TOKEN_FILTERING",
        "additional_config": {"token_filtering": {"inner_backend": "TRITON_ATTN", **(filtering or {})}},
    }
    task = {
        "model": folder,
        "rounds": rounds,
        "new_tokens": NEW_TOKENS,
        "out": str(out),
        "pretend": pretend,
        "logprobs": logprobs,
        "llm": {
            "dtype": "float32", "max_model_len": 768, "max_num_seqs": 4, "max_num_batched_tokens": 256,
            **({} if filtering is None else ours),
            **llm,
        },
        **({"reads": reads} if reads else {}),
    }  # fmt: skip
    done = subprocess.run(
        [python, "tests/gpu_dryrun/generate.py", json.dumps(task)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_USE_V2_MODEL_RUNNER": "1" if v2 else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text())


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may be from the float32 reference.

    Attributes:
        logprob: of the token chosen, from the likeliest one's.
        tie: redundancies this close may be swapped.
        ties: share of the choices in which some were.
    """

    logprob: float = 1e-3
    tie: float = 1e-4
    ties: float = 0.02


def hold_to_reference(model, found, prompts, settings, taken_over=None, tolerance=Tolerance()):
    """Every token the engine produced is the reference's likeliest; choices agree but for near ties."""
    choices = {}
    for name, layer, chunk, kept in found["seals"]:
        choices.setdefault(name, {})[layer, chunk] = kept
    skips = {}
    for name, layer, skipped in found["skips"]:
        skips.setdefault(name, {}).setdefault(layer, []).extend(skipped)
    results = []
    for name, ids, output in zip(found["names"], prompts, found["tokens"], strict=True):
        full = next(key for key in found["steps"] if key.partition("-")[0] == name)
        steps, tokens = found["steps"][full], (ids + output)[:-1]
        start = len(tokens) - sum(steps)
        # Async scheduling may have asked for one token more than was wanted.
        while start < 0:
            steps, start = steps[:-1], start + steps[-1]
        pieces = taken_over(start, results) if start else None
        own = {key: kept for key, kept in choices.get(full, {}).items() if kept[0] >= 0}
        skipped = skips.get(full)
        result = reference.run(
            model, tokens, steps, settings, own, tie=tolerance.tie, taken_over=pieces, backend_skips=skipped
        )
        for layer, decisions in (skipped or {}).items():
            assert result.skipped[layer].tolist() == [bool(skip) for skip in decisions[: len(tokens)]]
        assert result.near_ties <= tolerance.ties * max(result.choices, 50)
        logprobs = result.logprobs[len(ids) - 1 : len(ids) - 1 + len(output)]
        chosen = logprobs[torch.arange(len(output)), output]
        assert (logprobs.max(1).values - chosen).max() < tolerance.logprob, f"request {name} of {len(ids)} tokens"
        results.append((start, result))
    return results


@pytest.mark.parametrize("v2", [True, False], ids=["model runner v2", "model runner v1"])
def test_the_engine_gives_the_references_tokens(tiny, tmp_path, v2):
    model, folder = tiny
    prompts = [prompt(length, length) for length in LENGTHS]
    found = generate(folder, tmp_path / "out.json", [prompts], {"pruning_ratio": 0.5}, v2, enable_prefix_caching=False)
    assert found["runner"].endswith(".gpu.model_runner" if v2 else ".gpu_model_runner")
    status = found["status"]
    assert status["inner_backends"] == ["TRITON_ATTN"] and status["layers"]["filtered"] == [0, 1]
    assert found["builders"] == ["FilteringBuilderOverTRITON_ATTN"]
    hold_to_reference(model, found, prompts, reference.Settings(ratio=0.5))
    sealed = sum((length + NEW_TOKENS - 1 - 64) // 64 for length in LENGTHS if length > 128)
    status = status["counters"]
    assert status["tokens_sealed"] == 64 * sealed and status["tokens_pruned"] == 32 * sealed
    assert status["seal_seconds"] > 0, "the events around seals were not read"


@pytest.mark.parametrize("v2", [True, False], ids=["model runner v2", "model runner v1"])
def test_a_request_gets_the_same_answer_alone_and_beside_others(tiny, tmp_path, v2):
    prompts = [prompt(length, length) for length in LENGTHS]
    rounds = [[prompts[3]], [prompts[2]], prompts]
    found = generate(tiny[1], tmp_path / "out.json", rounds, {"pruning_ratio": 0.5}, v2, enable_prefix_caching=False)
    steps = [found["steps"][next(key for key in found["steps"] if key.partition("-")[0] == n)] for n in found["names"]]
    assert steps[0][:4] == [192, 192, 192, 24] and steps[1][:2] == [192, 141]
    for alone, beside in ((0, 5), (1, 4)):
        assert found["tokens"][alone] == found["tokens"][beside]
        assert steps[alone][:NEW_TOKENS] == steps[beside][:NEW_TOKENS]


def test_a_request_that_hits_the_prefix_cache_beside_dense_layers_gives_the_references_tokens(tiny, tmp_path):
    model, folder = tiny
    first = prompt(600, 1)
    second = first[:500] + prompt(90, 2)
    settings = {"pruning_ratio": 0.5, "dense_layers": [1]}
    found = generate(folder, tmp_path / "out.json", [[first], [second]], settings, True, enable_prefix_caching=True)

    def taken_over(start, results):
        assert start >= 256 and start % 64 == 0, "nothing was taken over"
        writer = results[0][1]
        return [[(0, start, writer)] for _ in range(2)]

    results = hold_to_reference(
        model, found, [first, second], reference.Settings(ratio=0.5, dense_layers=(1,)), taken_over
    )
    assert results[1][0] > 0
    assert found["status"]["layers"]["dense"] == {"configured_dense": [1]}


@pytest.mark.parametrize("v2", [True, False], ids=["model runner v2", "model runner v1"])
def test_a_layer_that_reads_anothers_cache_finds_what_the_owner_kept(tiny, tmp_path, v2):
    model, folder = tiny
    prompts = [prompt(length, length) for length in LENGTHS[:3]]
    found = generate(
        folder, tmp_path / "out.json", [prompts], {"pruning_ratio": 0.5}, v2, reads={1: 0}, enable_prefix_caching=False
    )
    assert found["status"]["layers"]["filtered"] == [0] and found["status"]["layers"]["dense"] == {}
    hold_to_reference(model, found, prompts, reference.Settings(ratio=0.5, reads={1: 0}))
    assert found["status"]["counters"]["tokens_pruned"] > 0


SKIPPING = {
    "none, on model runner v1": ({"pruning_ratio": 0}, {"ratio": 0}, "none", False),
    "window beside filtering": ({"pruning_ratio": 0.5}, {"ratio": 0.5}, "window", True),
    "running_output beside filtering and a dense layer": (
        {"pruning_ratio": 0.5, "dense_layers": [0]},
        {"ratio": 0.5, "dense_layers": (0,)},
        "running_output",
        True,
    ),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_attention_is_skipped_as_the_reference_skips_it(tiny, tmp_path, name):
    model, folder = tiny
    settings, others, substitute, v2 = SKIPPING[name]
    prompts = [prompt(length, length) for length in LENGTHS[:3]]
    skipping = {"ratio": 0.5, "substitute": substitute, "skip_window": 32}
    found = generate(
        folder, tmp_path / "out.json", [prompts], {**settings, "attention_skipping": skipping}, v2,
        enable_prefix_caching=False,
    )  # fmt: skip
    own = reference.Settings(**others, skip=(0.5, 0.5), substitute=substitute, skip_window=32)
    results = hold_to_reference(model, found, prompts, own)
    status = found["status"]
    assert status["layers"]["skipping"] == [0, 1] and status["layers"]["unskipped"] == {}
    status = status["counters"]
    assert status["attentions_skipped"] == sum(sum(skipped) for _, _, skipped in found["skips"]) > 0
    # The last token that is asked for is never computed, unless async scheduling did it ahead.
    decided = sum(2 * (len(result.skipped[0]) - own.warmup) for _, result in results[1:])
    assert decided <= status["attentions_decided"] <= decided + 2 * len(prompts)
    assert status["reads_done"] < status["reads_filtered"] <= status["reads_dense"]
