"""Every file in configs/ is a vLLM --config file that vLLM's own parser takes, with settings of ours that hold."""

from pathlib import Path

import pytest
import yaml

from vllm_tokenfilter.config import FilterConfig

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_tokenfilter.integration.plugin import register

    register()
    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_parses(parser, path):
    settings = yaml.safe_load(path.read_text())
    FilterConfig.parse((settings.get("additional-config") or {}).get("token_filtering"))
    parsed = parser.parse_args(["--config", str(path)])
    assert parsed.max_model_len == settings["max-model-len"]
    if path.stem != "dense":
        assert parsed.attention_backend == "TOKEN_FILTERING"
        ours = parsed.additional_config["token_filtering"]
        pruned = 0.7583 if path.stem.endswith("-75") else 0.5
        assert ours["pruning_ratio"] == pruned or ours["attention_skipping"]["ratio"] == pruned
