"""Which engine arguments select Token Filtering under vLLM's own `vllm serve`, and which are refused by name."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.engine.arg_utils import EngineArgs

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.integration import refusals, registration, workarounds

#: A folder, so that no hub is asked.
MODEL = str(Path(__file__).parent)
OURS = {"token_filtering": {"pruning_ratio": 0.25}}


@pytest.fixture(autouse=True)
def names():
    registration.register_names()


@pytest.mark.parametrize(
    "given, selected",
    [
        ({}, False),
        ({"attention_backend": "CPU_ATTN"}, False),
        ({"additional_config": {"schedule": 1}}, False),
        ({"additional_config": OURS}, True),
        ({"additional_config": OURS, "attention_backend": "auto"}, True),
        ({"additional_config": {"token-filtering": {"pruning-ratio": 0.25}}}, True),
        ({"attention_backend": "TOKEN_FILTERING"}, True),
        ({"attention_backend": "token_filtering"}, True),
        ({"attention_config": {"backend": "token_filtering"}}, True),
        ({"attention_config": {"backend_per_kind": {"full_attention": "CPU_ATTN"}}}, False),
        # Selected, so that the start is refused; see below.
        ({"attention_config": {"backend_per_kind": {"full_attention": "TOKEN_FILTERING"}}}, True),
    ],
)
def test_the_backend_is_selected_by_name_or_by_settings(given, selected):
    args = EngineArgs(model=MODEL, **given)
    assert workarounds._select(args) is selected
    if "additional_config" in given and selected:
        assert args.additional_config == OURS
        assert args.attention_backend is registration.register_names()


def test_a_backend_for_some_kinds_of_layers_is_refused():
    row = next(row for row in refusals.REFUSALS if row.setting == "attention_config.backend_per_kind")

    class Deployment:
        attention_config = EngineArgs(
            model=MODEL, attention_config={"backend_per_kind": {"full_attention": "TOKEN_FILTERING"}}
        ).attention_config

    assert row.found(Deployment, None) == ["full_attention"]
    Deployment.attention_config = EngineArgs(model=MODEL).attention_config
    assert not row.found(Deployment, None)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"additional_config": {"token_filter": {}}}, "additional_config.token_filter is not a key"),
        ({"additional_config": {"token-filtering": 0.5}}, "token_filtering=0.5 must be a mapping"),
        (
            {"additional_config": OURS, "attention_backend": "CPU_ATTN"},
            "attention_backend=CPU_ATTN leaves",
        ),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        workarounds._select(EngineArgs(model=MODEL, **given))


@pytest.mark.parametrize("beside", [{"pruning_ratio": 0.25}, {"pruning-ratio": 0.25}, "some text"])
def test_settings_beside_our_key_are_refused_where_the_backend_is_selected(beside):
    args = EngineArgs(model=MODEL, attention_backend="TOKEN_FILTERING", additional_config=beside)
    assert workarounds._select(args)
    with pytest.raises(ConfigError, match="additional_config"):
        workarounds._prepare(args, None)


def test_prefix_caching_that_cannot_help_is_switched_off_and_the_log_says_what_fits(monkeypatch):
    lines = []
    monkeypatch.setattr(workarounds.logger, "info", lambda form, *values: lines.append(form % values))
    args = EngineArgs(model=MODEL, block_size=32)
    workarounds._choose_blocks(args, FilterConfig.parse({"pruning_ratio": 0.75}))
    assert args.enable_prefix_caching is False
    assert "prefix caching, on by default, is switched off" in lines[0] and "chunk_size=128" in lines[0]
