"""Engines in processes of their own, as users start them: stock, ours dense, ours filtered, by every name and mode."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parent / "generate.py")


@pytest.fixture(scope="module")
def generate(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    done = {}

    def run(name, environment=None, prompts=32, status=False, **llm):
        if name not in done:
            out = folder / f"{name}.json"
            llm = {"model": model_path, "enforce_eager": True, **llm}
            task = {"out": str(out), "llm": llm, "prompts": prompts, "status": status}
            process = subprocess.run(
                [sys.executable, SCRIPT, json.dumps(task)],
                env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **(environment or {})},
                capture_output=True,
                text=True,
                check=False,
            )
            assert out.exists(), process.stdout[-3000:] + process.stderr[-3000:]
            done[name] = json.loads(out.read_text()), process.stdout + process.stderr
        return done[name]

    return run


HALF = {"token_filtering": {"pruning_ratio": 0.5}}


def test_installed_but_not_configured_is_stock_vllm_bit_for_bit(generate):
    stock, _ = generate("stock", {"VLLM_PLUGINS": "none"}, enable_prefix_caching=False)
    installed, _ = generate("installed", enable_prefix_caching=False)
    assert installed == stock


def test_ratio_zero_is_stock_vllm_bit_for_bit(generate):
    stock, _ = generate("stock", {"VLLM_PLUGINS": "none"}, enable_prefix_caching=False)
    ours, log = generate(
        "zero",
        status=True,
        enable_prefix_caching=False,
        attention_backend="TOKEN_FILTERING",
        additional_config={"token_filtering": {"pruning_ratio": 0}},
    )
    assert ours["tokens"] == stock["tokens"]
    assert ours["logprobs"] == stock["logprobs"]
    assert ours["status"][0]["layers"]["dense"] == {"pruning_ratio_zero": list(range(30))}
    assert "filters no layer" in log


def test_a_spawned_engine_filters_counts_and_says_so(generate):
    ours, log = generate("half", prompts=8, status=True, attention_backend="TOKEN_FILTERING", additional_config=HALF)
    stock, _ = generate("stock", {"VLLM_PLUGINS": "none"}, enable_prefix_caching=False)
    status = ours["status"][0]
    assert status["backend"] == "TOKEN_FILTERING" and status["layers"]["filtered"] == list(range(30))
    status = status["counters"]
    assert 0 < status["tokens_pruned"] == status["tokens_sealed"] // 2 < status["tokens_seen"]
    assert status["rows_dense"]["shorter_than_window_and_chunk"] > 0
    assert ours["logprobs"] != stock["logprobs"][:8], "nothing changed, so nothing was filtered"
    assert "Token Filtering is on" in log and "layers filtered: 0-29" in log
    assert "prefix caching: on, sealed chunks are shared" in log
    assert "Token Filtering totals" in log, "the counters were not logged at shutdown"


def test_custom_and_settings_alone_select_the_same_backend(generate):
    named, _ = generate("half", prompts=8, status=True, attention_backend="TOKEN_FILTERING", additional_config=HALF)
    custom, _ = generate("custom", prompts=8, status=True, attention_backend="CUSTOM", additional_config=HALF)
    assert custom["tokens"] == named["tokens"] and custom["logprobs"] == named["logprobs"]
    assert custom["status"][0]["counters"]["tokens_pruned"] == named["status"][0]["counters"]["tokens_pruned"]


@pytest.mark.slow
def test_settings_without_a_backend_name_select_it_too(generate):
    named, _ = generate("half", prompts=8, status=True, attention_backend="TOKEN_FILTERING", additional_config=HALF)
    implied, _ = generate("implied", prompts=8, status=True, additional_config=HALF)
    assert implied["tokens"] == named["tokens"]


@pytest.mark.slow
def test_a_compiled_engine_filters(generate):
    compiled, _ = generate(
        "compiled",
        prompts=8,
        status=True,
        enforce_eager=False,
        attention_backend="TOKEN_FILTERING",
        additional_config=HALF,
    )
    assert compiled["status"][0]["counters"]["tokens_pruned"] > 0
    assert all(len(tokens) == 64 for tokens in compiled["tokens"])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            {"enable_prefix_caching": True, "additional_config": {"token_filtering": {"pruning_ratio": 0.75}}},
            "pruning_ratio=0.75 (16 tokens kept) shares whole blocks",
        ),
        (
            {"disable_hybrid_kv_cache_manager": True, "additional_config": {"token_filtering": {"first_layer": 3}}},
            "disable_hybrid_kv_cache_manager=True gives all layers the blocks of one kind",
        ),
        (
            {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
            "kv_events_config=enable_kv_cache_events",
        ),
        ({"block_size": 48}, "block_size=48 must be a multiple of 32"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"additional_config": {"token_filtering": {"dense_layers": [30]}}}, "dense_layers=[30] names layers"),
        ({"additional_config": {"token_filtering": {"first_layer": 30}}}, "leaves no layer to filter"),
        ({"additional_config": {"token_filtering": {"prunning_ratio": 0.5}}}, "did you mean pruning_ratio?"),
        ({"attention_backend": "CPU_ATTN", "additional_config": HALF}, "without effect"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative",
        ),
    ],
)
def test_what_cannot_hold_is_refused_in_a_sentence_before_weights_load(model_path, arguments, sentence):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_tokenfilter.errors import TokenFilterError

    with pytest.raises(TokenFilterError) as refusal:
        EngineArgs(model=model_path, **{"attention_backend": "TOKEN_FILTERING", **arguments}).create_engine_config()
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "arguments, budget, longest",
    [
        ({}, 512, 512),
        ({"max_model_len": 256}, 512, 256),
        ({"max_model_len": 256, "max_num_seqs": 1024}, 1024, 256),
        ({"max_num_batched_tokens": 8192}, 8192, 512),
        ({"max_num_batched_tokens": 8192, "long_prefill_token_threshold": 2048}, 8192, 2048),
        ({"enable_chunked_prefill": False}, 8192, 0),
    ],
)
def test_steps_are_short_unless_the_user_sets_them(model_path, arguments, budget, longest):
    from vllm.engine.arg_utils import EngineArgs

    ours = {"attention_backend": "TOKEN_FILTERING", "additional_config": HALF}
    scheduler = EngineArgs(model=model_path, **ours, **arguments).create_engine_config().scheduler_config
    assert (scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold) == (budget, longest)
