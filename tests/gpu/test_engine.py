"""vLLM's own engine on a GPU, TOKEN_FILTERING over each backend of vLLM's: against stock vLLM and the reference."""

import functools
import importlib.metadata
import importlib.util
import sys

import pytest
import torch

from tests import reference
from tests.gpu_dryrun import test_dryrun as engines

pytestmark = pytest.mark.gpu
tiny = engines.tiny

#: In bfloat16 the model itself is up to 0.05 from its own float32, and redundancies up to 0.07 (seen on a CPU).
BFLOAT16 = engines.Tolerance(logprob=0.15, tie=0.15, ties=1.0)
#: Tensor cores round float32 inputs of a product to ten bits.
FLOAT32 = engines.Tolerance(logprob=0.02, tie=0.02, ties=0.5)


def _absent(name):
    """Why a backend of vLLM's cannot run here, or None."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vLLM's CUDA wheel is not installed"
    if name == "FLASHINFER" and importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    if name == "FLASH_ATTN":
        if importlib.util.find_spec("vllm.vllm_flash_attn") is None:
            return "this vLLM brings no FlashAttention"
        if torch.cuda.get_device_capability() < (8, 0):
            return "FlashAttention needs compute capability 8.0"
    return None


@pytest.fixture(params=["TRITON_ATTN", "FLASH_ATTN", "FLASHINFER"])
def inner(request):
    if reason := _absent(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=[True, False], ids=["eager", "graphs"])
def run(request, inner, tiny, tmp_path):
    """Generates over `inner`, one file per call; prompts and everything else that shapes a step are the same."""

    def generate(name, rounds, filtering, v2=True, **llm):
        return engines.generate(
            tiny[1],
            tmp_path / f"{name}.json",
            rounds,
            None if filtering is None else {"inner_backend": inner, **filtering},
            v2,
            python=sys.executable,
            pretend=False,
            **{"dtype": _dtype(inner), "enforce_eager": request.param, "enable_prefix_caching": False, **llm},
        )

    return generate


def _dtype(inner):
    return "float32" if inner == "TRITON_ATTN" else "bfloat16"


def _prompts():
    return [engines.prompt(length, length) for length in engines.LENGTHS]


def test_ratio_zero_is_stock_vllm_bit_for_bit(run, inner):
    same = functools.partial(run, rounds=[_prompts()], block_size=16, logprobs=2)
    stock = same("stock", filtering=None, attention_backend=inner)
    ours = same("zero", filtering={"pruning_ratio": 0})
    assert ours["tokens"] == stock["tokens"]
    assert ours["logprobs"] == stock["logprobs"]
    assert ours["status"]["inner_backends"] == [inner]
    assert ours["status"]["layers"]["dense"] == {"pruning_ratio_zero": [0, 1]}


@pytest.mark.parametrize("v2", [True, False], ids=["model runner v2", "model runner v1"])
def test_half_gives_the_references_tokens(run, inner, tiny, v2):
    prompts = _prompts()
    found = run("half", [prompts], {"pruning_ratio": 0.5}, v2)
    assert found["builders"] == [f"FilteringBuilderOver{inner}"] and found["status"]["inner_backends"] == [inner]
    tolerance = FLOAT32 if _dtype(inner) == "float32" else BFLOAT16
    engines.hold_to_reference(tiny[0], found, prompts, reference.Settings(ratio=0.5), tolerance=tolerance)
    assert found["status"]["counters"]["tokens_pruned"] == found["status"]["counters"]["tokens_sealed"] // 2 > 0
    assert found["status"]["counters"]["seal_seconds"] > 0


def test_a_request_that_hits_the_prefix_cache_beside_dense_layers_gives_the_references_tokens(run, inner, tiny):
    if inner == "FLASHINFER":
        pytest.skip("prefix caching over FLASHINFER is refused")
    first = engines.prompt(600, 1)
    second = first[:500] + engines.prompt(90, 2)
    found = run("hit", [[first], [second]], {"pruning_ratio": 0.5, "dense_layers": [1]}, enable_prefix_caching=True)

    def taken_over(start, results):
        assert start >= 256 and start % 64 == 0, "nothing was taken over"
        return [[(0, start, results[0][1])] for _ in range(2)]

    settings = reference.Settings(ratio=0.5, dense_layers=(1,))
    tolerance = FLOAT32 if _dtype(inner) == "float32" else BFLOAT16
    engines.hold_to_reference(tiny[0], found, [first, second], settings, taken_over, tolerance)
