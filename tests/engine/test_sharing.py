"""Layers that read another layer's cache: as that layer left it, on a real engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import reference, sharing
from tests.engine.driver import Engine, check

#: Reader -> owner.
READS = {2: 0, 3: 1}


@pytest.mark.parametrize("skipping", [0, 0.5], ids=["filtered alone", "owners skip too"])
def test_readers_find_what_the_owner_kept(monkeypatch, tiny_subject, tokens, skipping):
    from vllm.model_executor.models import llama

    monkeypatch.setattr(llama, "Attention", sharing.reading_attention(READS))
    settings = {"pruning_ratio": 0.5, "dense_layers": [1]}
    if skipping:
        settings["attention_skipping"] = {"ratio": skipping, "substitute": "window"}
    engine = Engine(
        monkeypatch,
        tiny_subject.path,
        settings,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        enable_prefix_caching=not skipping,
        kv_cache_memory_bytes=40 * tiny_subject.block_bytes,
    )
    engine.settings = reference.Settings(ratio=0.5, dense_layers=(1,), reads=READS)
    if skipping:
        engine.settings.skip, engine.settings.substitute = (skipping, skipping, 0, 0), "window"
    try:
        names = [f"request{length}." for length in (20, 129, 500)]
        for name, length in zip(names, (20, 129, 500), strict=True):
            engine.add(name, tokens[:length] if length == 500 else tokens[length : 2 * length], 72)
        engine.drain()
        if not skipping:
            names.append("again.")
            engine.add("again.", tokens[:500], 20)
            engine.drain()
            assert engine.records["again."].runs[0].start, "nothing was taken over"
        check(engine, tiny_subject.model, names)
        status, builders = engine.status(), len(engine.builders())
    finally:
        engine.close()
    assert status["layers"]["filtered"] == [0] and status["layers"]["dense"] == {"configured_dense": [1, 3]}
    assert [[row["index"] for row in group["plan"]["rows"]] for group in status["groups"]] == [[0, 2], [1, 3]]
    assert builders == 2, "readers have their owners' metadata"
    assert status["counters"]["tokens_pruned"] > 0


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, model_path):
    """A small random Gemma 3n: six layers, full attention and windows, of which the last three read another's cache."""
    import torch
    from transformers import AutoTokenizer, Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3nTextConfig(
        vocab_size=49152, vocab_size_per_layer_input=1000, hidden_size=64, hidden_size_per_layer_input=16,
        intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_kv_shared_layers=3, sliding_window=64, layer_types=kinds, laurel_rank=8, altup_num_inputs=2,
        activation_sparsity_pattern=None, max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma")
    Gemma3nForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_gemma_3n_is_stock_vllm_at_ratio_zero_and_filtered_at_half(gemma, tmp_path):
    starts = {"stock": {}}
    for name, ratio in (("zero", 0), ("half", 0.5)):
        starts[name] = {
            "attention_backend": "TOKEN_FILTERING",
            "additional_config": {"token_filtering": {"pruning_ratio": ratio}},
        }
    tasks = [
        {
            "llm": {"model": gemma, "enforce_eager": True, "max_num_batched_tokens": 512, "block_size": 32, **llm},
            "out": str(tmp_path / name),
            "log": str(tmp_path / "log"),
            "prompts": 8,
            "status": name != "stock",
        }
        for name, llm in starts.items()
    ]
    subprocess.run([sys.executable, str(Path(__file__).parent / "generate.py"), json.dumps(tasks)], check=True)
    stock, zero, half = (json.loads((tmp_path / name).read_text()) for name in starts)
    assert (zero["tokens"], zero["logprobs"]) == (stock["tokens"], stock["logprobs"])
    assert half["logprobs"] != stock["logprobs"]
    (status,) = half["status"]
    # Layers 3 and 5 read the cache of layer 2, and layer 4 that of layer 1.
    assert status["layers"]["filtered"] == [0, 2] and status["layers"]["dense"] == {"sliding_window_layer": [1, 4]}
    assert status["counters"]["tokens_pruned"] > 0
