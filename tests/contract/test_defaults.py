"""What vLLM chooses where the user chooses nothing: our checks and builders take it for granted."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import CacheConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.integration import plugin, refusals

SETTINGS = {
    "nothing filtered": {"pruning_ratio": 0},
    "skipping alone": {"pruning_ratio": 0, "attention_skipping": {"ratio": 0.5}},
    "filtered": {"pruning_ratio": 0.5},
}


def configuration(model, settings, **arguments):
    plugin.register()
    engine = {"model": model, "skip_tokenizer_init": True, "attention_backend": "TOKEN_FILTERING"}
    return EngineArgs(**engine, additional_config={"token_filtering": settings}, **arguments).create_engine_config()


@pytest.fixture(autouse=True)
def on_cpu():
    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's CPU build")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_defaults_are_accepted_before_and_after_the_platform_chooses_a_block_size(tiny_model, monkeypatch, settings):
    """Before the model is loaded vLLM's default may stand in the configuration; it is nobody's choice."""
    ours = "integration/refusals.py: block_size"
    vllm_config = configuration(tiny_model, settings)
    assert refusals.unsupported_reasons(vllm_config, refusals.settings_of(vllm_config)) == [], ours
    # Layers that are built name their backends; nothing else of them is asked.
    with set_current_vllm_config(vllm_config):
        backends = [AttentionBackendEnum.CPU_ATTN.get_class()]
        monkeypatch.setattr(type(current_platform), "_find_non_ssm_backends", classmethod(lambda *_: backends))
        current_platform.update_block_size_for_backend(vllm_config)
    assert vllm_config.cache_config.block_size % 32 == 0, ours
    assert refusals.unsupported_reasons(vllm_config, refusals.settings_of(vllm_config)) == [], ours


def test_a_block_size_the_user_chose_is_told_from_a_default():
    ours = "integration/refusals.py: _chosen_block_size"
    default = CacheConfig()
    assert default.block_size == CacheConfig.DEFAULT_BLOCK_SIZE and not default.user_specified_block_size, ours
    assert CacheConfig(block_size=CacheConfig.DEFAULT_BLOCK_SIZE).user_specified_block_size, ours


@pytest.mark.parametrize("size", [16, 48])
def test_a_block_size_that_the_kernels_cannot_read_is_refused_where_the_user_chose_it(tiny_model, size):
    with pytest.raises(UnsupportedError, match=f"block_size={size} must be a multiple of 32"):
        configuration(tiny_model, {"pruning_ratio": 0}, block_size=size)


def test_on_cpu_the_engine_uses_the_runner_that_our_builder_and_the_scoring_engine_are_made_for(
    tiny_model, monkeypatch
):
    assert not configuration(tiny_model, {}).use_v2_model_runner, (
        "vLLM chooses Model Runner V2 on CPU: integration/cpu/builder.py and integration/offline/ are made for V1"
    )
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    # vLLM refuses it first where it looks for Triton's CPU backend.
    ours, theirs = r"VLLM_USE_V2_MODEL_RUNNER=True .*leave it out on CPU", "Model Runner V2 requires Triton"
    with pytest.raises((UnsupportedError, ValueError), match=f"{ours}|{theirs}"):
        configuration(tiny_model, {})
