"""The plan: vLLM's start-up figures, predicted without vLLM."""

import json
from pathlib import Path

import pytest

from tests.command import run_command
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import PlanError
from vllm_tokenfilter.layer_plan import LayerFacts
from vllm_tokenfilter.layout import stored_tokens
from vllm_tokenfilter.planning.capacity import Shape, kv_capacity

REPORTED = Path(__file__).parents[2] / "benchmarks" / "results" / "capacity.json"
SMOLLM2 = Shape((LayerFacts(),) * 30, num_kv_heads=3, head_size=64, element_bytes=2, weight_bytes=269_000_000)
SETTINGS = {
    "stock": None,
    "r=0.5": {"pruning_ratio": 0.5},
    "r=0.75": {"pruning_ratio": 0.75},
    "first third dense, r=0.5": {"pruning_ratio": 0.5, "first_layer": 10},
    "layers 15-19 dense, r=0.6": {"pruning_ratio": 0.6, "dense_layers": [15, 16, 17, 18, 19]},
}


def capacity(shape=SMOLLM2, settings=None, **arguments):
    config = None if settings is None else FilterConfig.parse(settings)
    defaults = {"cache_bytes": 1 << 30, "context": 8192, "block_size": 32, "max_step_tokens": 512}
    return kv_capacity(shape, config, **{**defaults, **arguments})


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_what_vllm_reported_at_start(name):
    told = json.loads(REPORTED.read_text())["reported"][name]
    planned = capacity(settings=SETTINGS[name])
    assert planned.max_concurrency == pytest.approx(told["max_concurrency"], rel=0.02)
    assert planned.cache_tokens == pytest.approx(told["tokens"], rel=0.02)


def test_a_step_of_decoding_reads_what_is_stored():
    config = FilterConfig.parse(SETTINGS["r=0.5"])
    assert capacity().bytes_per_token == 30 * 3 * 64 * 2 * 2
    assert capacity(settings=SETTINGS["r=0.5"]).read_bytes == stored_tokens(8192, config.layout) * 23040


def test_ranks_share_heads_until_each_has_one():
    shape = Shape((LayerFacts(),) * 32, num_kv_heads=8, head_size=128, element_bytes=2, weight_bytes=0)
    one = capacity(shape, cache_bytes=8 << 30)
    four, sixteen = (capacity(shape, cache_bytes=8 << 30, tensor_parallel=ranks) for ranks in (4, 16))
    assert four.max_concurrency == pytest.approx(4 * one.max_concurrency)
    assert sixteen.max_concurrency == pytest.approx(8 * one.max_concurrency)
    assert four.read_bytes == one.read_bytes and sixteen.read_bytes == 2 * one.read_bytes


def test_a_cache_too_small_for_one_request_is_refused():
    with pytest.raises(PlanError, match="context=8192 needs 256 blocks"):
        capacity(cache_bytes=100 << 20)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """The configuration of a small Llama, without its weights."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    path.write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **sizes, **heads}))
    return path


def test_weights_and_overhead_are_taken_off_the_gpu(config_file):
    pytest.importorskip("torch", reason="torch is not installed")
    done = run_command(
        "plan", "--model-config", config_file, "--gpu-memory", 1, "--overhead", 0.5, "--context", 4096, "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    attention, mlp, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128, 2 * 64
    parameters = 1000 * 64 + 4 * (attention + mlp + norms) + 64
    assert report["memory"]["weight_bytes"] == 2 * parameters
    assert report["memory"]["cache_bytes"] == int(0.92 * 2**30 - 2 * parameters - 0.5 * 2**30)
    stock, half = report["settings"]
    assert stock["name"] == "stock vLLM" and stock["bytes_per_token"] == 4 * 2 * 16 * 2 * 2
    assert half["times_stock"] > 1.7


def test_the_settings_of_a_file_are_planned_for(config_file, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    schedule = "{kind: per_layer, ratios: [0.75, 0, 0.75, 0]}"
    settings = f"{{pruning_ratio: 0.375, chunk_size: 128, recent_window: 128, schedule: {schedule}}}"
    (tmp_path / "tuned.yaml").write_text(f"additional-config: {{token_filtering: {settings}}}")
    sizes = ("--gpu-memory", 1, "--overhead", 0.5, "--context", 4096)
    done = run_command("plan", "--model-config", config_file, *sizes, "--config", tmp_path / "tuned.yaml", "--json")
    assert done.returncode == 0, done.stderr
    stock, tuned = json.loads(done.stdout)["settings"]
    assert tuned["name"] == "tuned" and 1.3 < tuned["times_stock"] < 1.6 and stock["name"] == "stock vLLM"


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "bloom", "hidden_size": 64, "n_layer": 4, "n_head": 4},
        {"model_type": "mpt", "d_model": 64, "n_layers": 4, "n_heads": 4, "attn_config": {"alibi": True}},
        {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": True},
    ],
    ids=lambda model: model["model_type"],
)
def test_layers_with_alibi_stay_dense_as_on_the_server(tmp_path, model):
    pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model))
    done = run_command("plan", "--model-config", path, "--kv-cache", 1, "--context", 4096, "--ratio", 0.5, "--json")
    assert done.returncode == 0, done.stderr
    stock, half = json.loads(done.stdout)["settings"]
    assert half["times_stock"] == 1.0 and half["read_bytes"] == stock["read_bytes"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--gpu-memory", "0.4"], "leaves nothing for the KV cache"),
        (["--gpu-memory", "-3"], "gpu-memory=-3 must be a number above 0"),
        ([], "gpu-memory is missing"),
        (["--gpu-memory", "1", "--ratio", "1.5"], "pruning_ratio=1.5"),
        (["--gpu-memory", "1", "--dtype", "int4"], "dtype=int4 must be auto or one of"),
        (["--gpu-memory", "1", "--tensor-parallel-size", "3"], "does not divide the 2 KV heads"),
        (["--gpu-memory", "1", "--gpu-memory-utilization", "2"], "gpu-memory-utilization=2 must be above 0"),
    ],
)
def test_what_cannot_be_planned_ends_in_one_sentence(config_file, arguments, sentence):
    done = run_command("plan", "--model-config", config_file, "--context", "512", *arguments)
    assert done.returncode == 2 and sentence in done.stderr.strip().splitlines()[-1], done.stderr


def test_a_model_that_is_not_there_ends_in_one_sentence(tmp_path):
    done = run_command("plan", "--model-config", tmp_path / "nowhere", "--context", "512", "--gpu-memory", "8")
    assert done.returncode == 2 and "cannot be read" in done.stderr.strip().splitlines()[-1]
