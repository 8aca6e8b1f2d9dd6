"""What the tests against the reference share."""

import pytest
import torch


@pytest.fixture(scope="session")
def model(model_path):
    """The embedded model in float32, for the reference."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokens(model_path, prose):
    """Ids of text that every installation has."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_path)(prose)["input_ids"]
    assert len(ids) > 4500, "the tests need more prose"
    return ids
