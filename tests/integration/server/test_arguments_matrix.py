"""`vllm-tokenfilter serve` gives vLLM the engine arguments that `vllm serve` has, over the ways to spell them.

Documented differences: the attention backend and `additional_config` are ours, answers in flight may finish at the end,
and a `false` in a file counts however its key is written.
"""

import os

import pytest
import yaml

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_tokenfilter.integration import versions
from vllm_tokenfilter.integration.server.arguments import SHUTDOWN_TIMEOUT_S, server_arguments, server_parser

MODEL = "some/model"
OURS = {"attention_backend", "additional_config"}

FLAGS = [
    "",
    "--port 8001",
    "--port=8001",
    "--max-model-len 1k",
    "--max_model_len 1024",
    "--max_model_len=auto",
    "--max-model-l -1",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--no_enable_prefix_caching",
    "--enforce-eager",
    "--no-enforce-e",
    "-tp 2",
    "-tp=2",
    "--tensor_parallel_size=2",
    "-dp 2 -pp 2",
    "-O3",
    "-O 3",
    "-O=3",
    "--optimization-level 1",
    "-cc.mode=3",
    "-cc.pass_config.fuse_norm_quant=true -cc.cudagraph_mode NONE",
    '--compilation-config {"mode":3,"cudagraph_capture_sizes":[1,2]}',
    "--compilation_config.cudagraph_capture_sizes+ 1,2",
    "--cudagraph-capture-sizes 1 2 4",
    "--attention-config.flash_attn_version 3",
    "-ac.use_trtllm_attention=false",
    '-ac {"flash_attn_version":3}',
    "--hf-overrides.rope_scaling.factor 2.5",
    '--hf_overrides {"a":"x=y"}',
    "--kv-cache-memory-bytes 1.5g",
    "--gpu-memory-utilization=.5",
    "--max-num-batched-tokens 2k --max-num-seqs 4",
    "--served-model-name a b c",
    "--served_model_name=a",
    "--seed=-1",
    "--hf-token",
    "--hf-token abc",
    "--disable-log-stats",
    "--dtype half --dtype bfloat16",
    "--load-format dummy --quantization fp8",
    "--limit-mm-per-prompt.image 2",
    "--scheduling-policy priority --async-scheduling",
    "--override-generation-config.temperature 0.5",
    "--override-generation-config.temperature -0.5 --port 8001",
    "--generation-config vllm --trust-remote-code",
    "--kv-transfer-config.kv_connector X --kv-transfer-config.kv_role kv_both --kv-transfer-config.engine_id e",
    "--shutdown-timeout 5",
    "--shutdown_timeo=1",
    "--revision v1.0 --tokenizer -tok",
]

FILES = [
    {"port": 8001, "max-model-len": 1024},
    {"max_model_len": "1k", "tensor_parallel_size": 2},
    {"enable-prefix-caching": False, "enforce-eager": False, "async-scheduling": True},
    {"served-model-name": ["a", "b"], "cudagraph-capture-sizes": [1, 2]},
    {"served-model-name": []},
    {"compilation-config": {"mode": 3, "pass_config": {"fuse_norm_quant": True}}},
    {"compilation-config": '{"mode": 3}'},
    {"compilation-config.mode": 3, "dtype": "half"},
    {"hf-overrides": {"a": [1, None, "x"], "b": {"c": 0.5}}},
    {"tokenizer": None, "quantization": None, "headless": False},
    {"model": "another/model", "seed": -1},
    {"optimization-level": 3, "gpu-memory-utilization": 0.5},
    {"no-enable-prefix-caching": True},
    {"shutdown_timeout": 5},
    {"revision": "1.10", "tokenizer-mode": "slow", "kv-cache-memory-bytes": "2G"},
]


@pytest.fixture(scope="module")
def parser():
    return versions.make_arg_parser(FlexibleArgumentParser())


def spelled(parsed):
    """Every argument of the server and its engine, without what is ours."""
    named = {name: repr(value) for name, value in vars(parsed).items() if name not in OURS | {"config"}}
    return named | ({"shutdown_timeout": str(SHUTDOWN_TIMEOUT_S)} if parsed.shutdown_timeout == 0 else {})


def parse(parser, words):
    server_parser()  # makes the backend's name known
    parsed = parser.parse_args(words)
    parsed.model = parsed.model_tag or parsed.model  # as vLLM's `serve` begins
    parsed.model_tag = None
    return parsed


@pytest.fixture(autouse=True)
def no_list_of_plugins(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_mean_what_they_mean_to_vllm(parser, flags):
    # A word with a dash of its own stands behind its flag's equals sign, as for vLLM.
    flags = flags.replace("--tokenizer -tok", "--tokenizer=-tok").split()
    theirs, ours = parse(parser, [MODEL, *flags]), parse(parser, server_arguments([MODEL, *flags], 0.5))
    assert spelled(ours) == spelled(theirs)
    assert ours.attention_backend == "TOKEN_FILTERING"
    assert ours.additional_config == {"token_filtering": {"pruning_ratio": 0.5}}


@pytest.mark.parametrize("settings", FILES, ids=str)
@pytest.mark.parametrize("flags", ["", "--max-model-len 2048 -cc.mode=1", "--no-enable-prefix-caching --port 8002"])
def test_a_file_means_what_it_means_to_vllm(parser, tmp_path, settings, flags):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    words = [MODEL, *flags.split(), "--config", str(path)]
    theirs = parse(parser, words)
    for given in (words, [MODEL, f"--config={path}", *flags.split()]):
        assert spelled(parse(parser, server_arguments(given, None))) == spelled(theirs)


@pytest.mark.parametrize(
    "name, value", [("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_LOGGING_LEVEL", "DEBUG"), ("HF_HUB_OFFLINE", "0")]
)
def test_the_environment_stays_as_it_is_given(monkeypatch, tmp_path, parser, name, value):
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    server_arguments([MODEL], None)
    assert dict(os.environ) == before
