"""Which engine arguments select Token Filtering under vLLM's own `vllm serve`, and which are refused by name."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

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


@pytest.fixture
def on_an_h100(monkeypatch):
    """What vLLM chooses for an API server there, and what is logged."""
    said = []
    server = UsageContext.OPENAI_API_SERVER
    monkeypatch.setattr(EngineArgs, "get_batch_defaults", lambda self, ranks: ({server: 8192}, {server: 1024}))
    monkeypatch.setattr(workarounds, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    for level in ("info", "warning"):
        monkeypatch.setattr(workarounds.logger, level, lambda text, *values: said.append(text % values))

    def choose(**arguments):
        args = EngineArgs(model=MODEL, **arguments)
        workarounds._limit_steps(args, server)
        return args.max_num_batched_tokens, args.max_num_seqs, said

    return choose


@pytest.mark.parametrize(
    "arguments, budget",
    [
        ({}, 2048 + 1024),
        ({"max_num_seqs": 64}, 2048 + 64),
        ({"performance_mode": "throughput"}, 2048 + 2048),
        ({"max_num_batched_tokens": 8192}, 8192),
        ({"long_prefill_token_threshold": 1024}, None),
        ({"enable_chunked_prefill": False}, None),
    ],
)
def test_a_gpus_step_has_room_for_prompts_whatever_decodes(on_an_h100, arguments, budget):
    chosen, requests, said = on_an_h100(**arguments)
    assert chosen == budget and requests == arguments.get("max_num_seqs"), (
        "the limit of requests stays vLLM's or the user's"
    )
    ours = budget is not None and "max_num_batched_tokens" not in arguments
    assert len(said) == ours and all(f"={budget} (vLLM's default is 8192)" in line for line in said)
    assert all("2048 tokens of prompts, at most 512 of each" in line for line in said)


def test_a_step_that_lowers_the_number_of_requests_is_said(on_an_h100):
    chosen, requests, said = on_an_h100(max_num_batched_tokens=512)
    assert (chosen, requests) == (512, None)
    (line,) = said
    assert "lowers max_num_seqs from 1024 to max_num_batched_tokens=512" in line


@pytest.mark.parametrize("threshold, budget, grid", [(1024, 1024, 896), (256, 1024, 256), (0, 512, 384)])
def test_shorter_steps_than_were_asked_for_are_said(monkeypatch, threshold, budget, grid):
    said = []
    monkeypatch.setattr(workarounds.logger, "warning", lambda text, *values: said.append(text % values))
    scheduler = SimpleNamespace(
        enable_chunked_prefill=True, long_prefill_token_threshold=threshold, max_num_scheduled_tokens=None,
        max_num_batched_tokens=budget, max_num_seqs=100, async_scheduling=False,
    )  # fmt: skip
    config = SimpleNamespace(scheduler_config=scheduler, model_config=SimpleNamespace(max_model_len=4096))
    workarounds._cut_on_a_grid(config, FilterConfig.parse({"pruning_ratio": 0.5}))
    assert scheduler.long_prefill_token_threshold == grid
    assert len(said) == (grid != (threshold or 512))
    assert all(f"{grid} tokens, not the {threshold or 512}" in line and "max_num_seqs=100" in line for line in said)
