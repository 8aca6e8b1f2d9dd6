"""What the GPU backend takes from vLLM's layers and process groups, with stand-ins."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.integration.gpu import backend as gpu_backend
from vllm_tokenfilter.kernels.gpu.cache import ENCODINGS


@pytest.mark.parametrize("ranks, total", [(2, 4), (4, 2), (4, 1)])
def test_ranks_join_every_head_once_in_the_models_order(monkeypatch, ranks, total):
    own, replicas = max(1, total // ranks), max(1, ranks // total)
    heads = [list(range(rank // replicas * own, rank // replicas * own + own)) for rank in range(ranks)]
    scores = [torch.tensor(rank, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(2, 3, -1, 2, 8) for rank in heads]

    class Group:
        def all_gather(self, mine, dim):
            assert mine.shape == scores[0].shape
            return torch.cat(scores, dim)

    monkeypatch.setattr(gpu_backend, "get_tp_group", Group)
    joined = gpu_backend._gather_heads(total, scores[0])
    assert joined.shape == (2, 3, total, 2, 8) and joined[1, 2, :, 0, 5].tolist() == list(range(total))


def layer(kv_cache_dtype, dtype):
    """A layer as vLLM makes it: its cache of fp8 is allocated as bytes."""
    cache = torch.empty(4, 2, 16, 128, dtype=dtype)
    return SimpleNamespace(num_kv_heads=2, head_size=64, kv_cache=cache, kv_cache_dtype=kv_cache_dtype)


@pytest.mark.parametrize(
    "kv_cache_dtype, allocated, read_as",
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("fp8", torch.uint8, torch.float8_e4m3fn),
        ("fp8_e5m2", torch.uint8, torch.float8_e5m2),
    ],
)
def test_the_type_of_a_cache_is_its_layers_own(kv_cache_dtype, allocated, read_as):
    """Not the server's: kv_cache_dtype_skip_layers keeps some layers in the model's type beside a cache of fp8."""
    cache = gpu_backend._open_cache({3: layer(kv_cache_dtype, allocated)})
    assert (cache.encoding, cache.element_size) == (ENCODINGS[read_as], read_as.itemsize)


def test_a_type_that_cannot_be_read_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"kv_cache_dtype=int8 gives a KV cache .* use kv_cache_dtype=auto"):
        gpu_backend._open_cache({3: layer("int8", torch.int8)})
