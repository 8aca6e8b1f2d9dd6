"""Engines in processes of their own, as users start them: stock, ours dense, ours filtered, by every name and mode."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parent / "generate.py")
HALF = {"token_filtering": {"pruning_ratio": 0.5}}
OURS = {"attention_backend": "TOKEN_FILTERING"}
#: name -> arguments of LLM.
STARTS = {
    "stock": {"enable_prefix_caching": False},
    "installed": {"enable_prefix_caching": False},
    "zero": {
        **OURS,
        "enable_prefix_caching": False,
        "additional_config": {"token_filtering": {"pruning_ratio": 0}},
    },
    "half": {**OURS, "additional_config": HALF},
    "custom": {"attention_backend": "CUSTOM", "additional_config": HALF},
    "implied": {"additional_config": HALF},
    "compiled": {**OURS, "enforce_eager": False, "additional_config": HALF},
}
#: Engines that one process starts one after the other, each in a process of its own.
TOGETHER = [("stock",), ("installed", "zero", "half", "custom"), ("implied",), ("compiled",)]


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def started(request):
    """The model that is started, and how many layers it has."""
    name, layers = ("tiny_model", 4) if request.param == "tiny" else ("model_path", 30)
    return request.getfixturevalue(name), layers


@pytest.fixture(scope="module")
def generate(started, tmp_path_factory):
    """What an engine generated, by the name of its start, and its log."""
    folder = tmp_path_factory.mktemp("generated")

    def file(name, kind):
        return folder / f"{name}.{kind}"

    def start(names):
        tasks = [
            {
                "out": str(file(name, "json")),
                "log": str(file(name, "log")),
                "llm": {"model": started[0], "enforce_eager": True, **STARTS[name]},
                "prompts": 32 if "additional_config" not in STARTS[name] or name == "zero" else 8,
                "status": "additional_config" in STARTS[name],
            }
            for name in names
        ]
        environment = {"VLLM_PLUGINS": "none"} if names == ("stock",) else {}
        done = subprocess.run(
            [sys.executable, SCRIPT, json.dumps(tasks)],
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        logs = [file(name, "log").read_text() for name in names if file(name, "log").exists()]
        assert done.returncode == 0, done.stderr[-2000:] + "".join(logs)[-3000:]

    def found(name):
        if not file(name, "json").exists():
            start(next(names for names in TOGETHER if name in names))
        return json.loads(file(name, "json").read_text()), file(name, "log").read_text()

    return found


def test_installed_but_not_configured_is_stock_vllm_bit_for_bit(generate):
    stock, _ = generate("stock")
    installed, _ = generate("installed")
    assert installed == stock


def test_ratio_zero_is_stock_vllm_bit_for_bit(generate, started):
    stock, _ = generate("stock")
    ours, log = generate("zero")
    assert ours["tokens"] == stock["tokens"]
    assert ours["logprobs"] == stock["logprobs"]
    assert ours["status"][0]["layers"]["dense"] == {"pruning_ratio_zero": list(range(started[1]))}
    assert "filters no layer" in log


def test_a_spawned_engine_filters_counts_and_says_so(generate, started):
    ours, log = generate("half")
    stock, _ = generate("stock")
    status = ours["status"][0]
    assert status["backend"] == "TOKEN_FILTERING" and status["layers"]["filtered"] == list(range(started[1]))
    status = status["counters"]
    assert 0 < status["tokens_pruned"] == status["tokens_sealed"] // 2 < status["tokens_seen"]
    assert status["rows_dense"]["shorter_than_window_and_chunk"] > 0
    assert ours["logprobs"] != stock["logprobs"][:8], "nothing changed, so nothing was filtered"
    assert "Token Filtering is on" in log and f"layers filtered: 0-{started[1] - 1}" in log
    assert "prefix caching: on, sealed chunks are shared" in log
    assert "Token Filtering totals" in log, "the counters were not logged at shutdown"


def test_custom_and_settings_alone_select_the_same_backend(generate):
    named, _ = generate("half")
    custom, _ = generate("custom")
    assert custom["tokens"] == named["tokens"] and custom["logprobs"] == named["logprobs"]
    assert custom["status"][0]["counters"]["tokens_pruned"] == named["status"][0]["counters"]["tokens_pruned"]


@pytest.mark.slow
def test_settings_without_a_backend_name_select_it_too(generate):
    named, _ = generate("half")
    implied, _ = generate("implied")
    assert implied["tokens"] == named["tokens"]


@pytest.mark.slow
def test_a_compiled_engine_filters(generate):
    compiled, _ = generate("compiled")
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
            "disable_hybrid_kv_cache_manager=True gives all layers blocks of one kind",
        ),
        (
            {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
            "kv_events_config=enable_kv_cache_events",
        ),
        ({"pipeline_parallel_size": 2, "enforce_eager": True}, "pipeline_parallel_size=2 needs a compiled model"),
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
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls=vllm.v1.core.sched"),
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
        ({}, 512 + 128, 512),
        ({"max_model_len": 256}, 512 + 128, 256),
        ({"max_num_seqs": 1024}, 512 + 1024, 512),
        ({"performance_mode": "throughput"}, 512 + 256, 512),
        ({"max_num_batched_tokens": 512}, 512, 384),
        ({"max_num_batched_tokens": 128}, 128, 64),
        ({"max_num_batched_tokens": 32, "max_num_seqs": 8}, 32, 32),
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
    assert scheduler.get_scheduler_cls().__name__ == "GridScheduler"
