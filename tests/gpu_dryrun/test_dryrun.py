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

ENVIRONMENT = pytest.mark.skipif(not Path(PYTHON).exists(), reason="run tests/gpu_dryrun/setup.sh first")

pytestmark = [pytest.mark.slow, ENVIRONMENT]

NEW_TOKENS = 12
#: Prompts of 10 to 600 tokens; those of 186 and 250 are sealed while they decode.
LENGTHS = (10, 186, 333, 600)


def random_llama(folder, num_layers):
    """A random Llama with grouped heads, saved to a folder; and the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights.data, 0, 0.08)
    model.save_pretrained(folder)
    return model, str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of two layers, and its folder."""
    return random_llama(tmp_path_factory.mktemp("tiny"), 2)


def prompt(length, seed):
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def generate(
    folder,
    out,
    rounds,
    filtering,
    v2,
    python=PYTHON,
    pretend=True,
    logprobs=None,
    reads=None,
    graphs=None,
    plant=None,
    new_tokens=NEW_TOKENS,
    **llm,
):
    """What `generate.py` found; stock vLLM where `filtering` is None."""
    ours = {
        "attention_backend": "TOKEN_FILTERING",
        "additional_config": {"token_filtering": {"inner_backend": "TRITON_ATTN", **(filtering or {})}},
    }
    task = {
        "model": folder,
        "rounds": rounds,
        "new_tokens": new_tokens,
        "out": str(out),
        "pretend": pretend,
        "logprobs": logprobs,
        "graphs": graphs,
        **({} if plant is None else {"plant": plant}),
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
    """Every token the engine produced is the reference's likeliest; choices agree but for near ties.

    `settings` are everybody's, or a list with each request's own.
    """
    everyone = settings if isinstance(settings, list) else [settings] * len(prompts)
    choices, skips = {}, {}
    for name, life, layer, chunk, kept in found["seals"]:
        if kept[0] >= 0:
            choices.setdefault((name, life), {})[layer, chunk] = kept
    for name, life, layer, skipped in found["skips"]:
        skips.setdefault((name, life), {}).setdefault(layer, []).extend(skipped)
    results = []
    for name, ids, output, settings in zip(found["names"], prompts, found["tokens"], everyone, strict=True):
        full, everything = next(key for key in found["steps"] if key.partition("-")[0] == name), ids + output
        # Of each position, by how much the token chosen for the next is below the likeliest one.
        gaps, judged = {}, len(ids) - 1
        for life, (start, steps) in enumerate(lives(found["steps"][full])):
            # Async scheduling may have asked for one token more than was wanted.
            while start + sum(steps) >= len(everything):
                steps.pop()
            end, skipped = start + sum(steps), skips.get((full, life))
            result = reference.run(
                model, everything[:end], steps, settings, choices.get((full, life)), tie=tolerance.tie,
                taken_over=taken_over(start, results) if start else None, backend_skips=skipped,
            )  # fmt: skip
            for layer, decisions in (skipped or {}).items():
                assert result.skipped[layer].tolist() == [bool(skip) for skip in decisions[:end]]
            assert result.near_ties <= tolerance.ties * max(result.choices, 50)
            for position in range(judged, end):
                gap = float(result.logprobs[position].max() - result.logprobs[position, everything[position + 1]])
                gaps[position] = min(gap, gaps.get(position, gap))
            # With async scheduling a preemption may lose the token just sampled: the next life samples it again.
            judged = max(judged, end - 1)
        assert list(gaps) == list(range(len(ids) - 1, len(everything) - 1))
        assert max(gaps.values()) < tolerance.logprob, f"request {name} of {len(ids)} tokens"
        results.append((start, result))
    return results


def lives(steps):
    """A request's steps, (computed before, count), as (start, [counts]) of each of its lives: a preempted one begins
    another."""
    found = []
    for computed, count in steps:
        if not found or computed != sum(found[-1][1]) + found[-1][0]:
            found.append((computed, []))
        found[-1][1].append(count)
    return found


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


@pytest.mark.parametrize("v2", [True, False], ids=["model runner v2", "model runner v1"])
def test_another_ratio_holds_for_who_comes_after_it_was_asked_for(tiny, tmp_path, v2):
    model, folder = tiny
    prompts, rounds = switching([0, 0.25], (186, 40, 190))
    found = generate(folder, tmp_path / "out.json", rounds, {"pruning_ratio": 0.5}, v2, enable_prefix_caching=True)
    assert switched(found) == [(0, 0.5), (0.25, 0)]
    settings = [reference.Settings(ratio=ratio) for ratio in (0.5, 0.5, 0, 0, 0.25)]
    hold_to_reference(model, found, prompts, settings)


def switching(ratios, lengths):
    """Five prompts, and rounds in which they are asked for: two before a switch, two while these are drained, one after
    another switch. One of them comes three times: what the prefix cache has of it was made under another ratio."""
    again, short, later = (prompt(length, length) for length in lengths)
    first = [again, short, {"switch": ratios[0], "at": 4}, {"prompt": again, "at": 5}, {"prompt": later, "at": 6}]
    return [again, short, again, later, again], [first, [{"switch": ratios[1]}, again]]


def switched(found):
    """(new, previous) ratio of each switch, the last of which is in force."""
    assert found["status"]["settings"]["pruning_ratio"] == found["switched"][-1]["effective_ratio"]
    return [(answer["effective_ratio"], answer["previous"]) for answer in found["switched"]]


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
    assert status["attentions_skipped"] == sum(sum(skipped) for *_, skipped in found["skips"]) > 0
    # The last token that is asked for is never computed, unless async scheduling did it ahead.
    decided = sum(2 * (len(result.skipped[0]) - own.warmup) for _, result in results[1:])
    assert decided <= status["attentions_decided"] <= decided + 2 * len(prompts)
    assert status["reads_done"] < status["reads_filtered"] <= status["reads_dense"]
