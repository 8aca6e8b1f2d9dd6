"""Every file in configs/ is a vLLM --config file that vLLM's own parser takes, with settings of ours that hold."""

import json
from pathlib import Path

import pytest
import yaml

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.local.settings_file import read_settings

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_tokenfilter.integration import plugin, versions

    plugin.register()
    return versions.make_arg_parser(FlexibleArgumentParser())


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


def test_the_embedded_model_is_served_with_what_tune_found_unless_told_otherwise():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm_tokenfilter.integration.server import arguments as serve

    found = json.loads((FILES[0].parents[1] / "benchmarks" / "results" / "tuning.json").read_text())["settings"]
    tuned = next(path for path in FILES if path.stem == "smollm2-135m-tuned")
    for settings in (serve.EMBEDDED_FILTER, read_settings(tuned).model_dump(mode="json")):
        assert FilterConfig.parse(settings).model_dump(mode="json") == found

    def settings_of(flags, file=None, ratio=None):
        arguments = serve.server_arguments([*flags, *([f"--config={file}"] if file else [])], ratio)
        return json.loads(arguments[arguments.index("--additional-config") + 1])["token_filtering"]

    assert settings_of([]) == serve.EMBEDDED_FILTER
    assert settings_of([], ratio=0.25) == {"pruning_ratio": 0.25}
    assert settings_of(["--additional-config", '{"token_filtering": {}}']) == {}
    assert settings_of(["some/model"]) == settings_of(["--model", "some/model"]) == {}
    uniform = next(path for path in FILES if path.stem == "smollm2-135m")
    assert "schedule" not in settings_of([], str(uniform))
