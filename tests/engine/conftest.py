"""What the tests against the reference share."""

from dataclasses import dataclass

import pytest
import torch

from tests import tiny


@dataclass(frozen=True)
class Subject:
    """A model that engines are tested with.

    Attributes:
        path: its folder.
        model: the same in float32, for the reference.
        block_bytes: bytes of one block of 32 tokens in float32.
    """

    path: str
    model: torch.nn.Module
    block_bytes: int

    @property
    def num_layers(self):
        return self.model.config.num_hidden_layers


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def model(model_path):
    """The embedded model in float32, for the reference."""
    return load(model_path)


@pytest.fixture(scope="session")
def embedded(model_path, model):
    """SmolLM2-135M: 30 layers, 3 KV heads of 64."""
    return Subject(model_path, model, 32 * 30 * 3 * 64 * 2 * 4)


@pytest.fixture(scope="session")
def tiny_subject(tiny_model):
    return Subject(tiny_model, load(tiny_model), tiny.BLOCK_BYTES)


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def subject(request):
    """A tiny model, whose arithmetic is as exact a test; and the embedded one where there is time."""
    return request.getfixturevalue("tiny_subject" if request.param == "tiny" else "embedded")


@pytest.fixture(scope="session")
def tokens(model_path, prose):
    """Ids of text that every installation has."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_path)(prose)["input_ids"]
    assert len(ids) > 4500, "the tests need more prose"
    return ids
