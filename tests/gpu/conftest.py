"""Tests that need an NVIDIA GPU: run with -m gpu, skipped with a reason where there is none. See docs/gpu.md."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here, or a PyTorch without CUDA")


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.fixture
def capture():
    """A CUDA graph of what it is given, launched once before so that everything is compiled."""

    def graph_of(run):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    return graph_of
