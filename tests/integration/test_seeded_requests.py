"""Draws for a prompt that is not read to its end leave a seeded generator where it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_tokenfilter.integration import seeded_requests


def test_draws_of_an_unfinished_prompt_are_taken_back_and_others_are_kept(monkeypatch):
    generators = {0: torch.Generator().manual_seed(7), 2: torch.Generator().manual_seed(7)}
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(generators=generators),
        discard_request_mask=SimpleNamespace(np=np.array([True, True, False])),
    )

    def sample(self, logits, spec_decode_metadata):
        return [torch.rand(1, generator=generator).item() for generator in self.input_batch.generators.values()]

    def bookkeep(self):
        return list(self.input_batch.generators)

    monkeypatch.setattr(GPUModelRunner, "_sample", sample)
    monkeypatch.setattr(GPUModelRunner, "_bookkeeping_sync", bookkeep)
    seeded_requests.take_draws_back()
    first, second = GPUModelRunner._sample(runner, None, None), GPUModelRunner._sample(runner, None, None)
    assert first[0] == second[0] == first[1] != second[1]
    assert GPUModelRunner._bookkeeping_sync(runner) == [2]
    assert runner.input_batch.generators.keys() == {0, 2}
