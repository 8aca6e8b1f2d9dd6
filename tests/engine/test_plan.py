"""The plan against vLLM itself: its sizing functions with our spec, and one real start."""

import itertools

import pytest

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.layer_plan import LayerFacts, LayerPlan
from vllm_tokenfilter.planning.capacity import Shape, kv_capacity
from vllm_tokenfilter.planning.model_shape import read_shape

pytest.importorskip("vllm", reason="vLLM is not installed")
SETTINGS = (
    {"pruning_ratio": 0},
    {"pruning_ratio": 0.5},
    {"pruning_ratio": 0.75, "chunk_size": 128, "recent_window": 256},
    {"pruning_ratio": 0.5, "first_layer": 7},
    {"pruning_ratio": 0.6, "dense_layers": [2, 17, 18]},
)
FULL, WINDOW = LayerFacts(), LayerFacts("sliding", 1024)
MODELS = {"full": (FULL,) * 30, "five to one": ((WINDOW,) * 5 + (FULL,)) * 5}


@pytest.fixture(scope="module")
def started(model_path):
    """One engine, started with layers of both kinds."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    llm = LLM(
        model_path,
        dtype="bfloat16",
        max_model_len=6000,
        kv_cache_memory_bytes=300_000_000,
        enforce_eager=True,
        attention_backend="TOKEN_FILTERING",
        additional_config={"token_filtering": {"pruning_ratio": 0.5, "first_layer": 5}},
    )
    yield llm
    llm.llm_engine.engine_core.engine_core.shutdown()
    monkeypatch.undo()


def test_the_plan_is_what_a_real_start_reports(started, model_path):
    cache = started.llm_engine.vllm_config.cache_config
    planned = kv_capacity(
        read_shape(model_path, "bfloat16", None),
        FilterConfig.parse({"pruning_ratio": 0.5, "first_layer": 5}),
        cache_bytes=300_000_000,
        context=6000,
        block_size=32,
        max_step_tokens=512,
    )
    assert planned.max_concurrency == pytest.approx(cache.kv_cache_max_concurrency, rel=0.02)
    assert planned.cache_tokens == pytest.approx(cache.kv_cache_size_tokens, rel=0.02)


@pytest.mark.parametrize("context", [1000, 8192])
@pytest.mark.parametrize("model", MODELS)
def test_the_plan_is_what_vllms_own_sizing_gives(started, monkeypatch, model, context):
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from tests.vllm_moved import planning
    from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec

    vllm_config = started.llm_engine.vllm_config
    monkeypatch.setattr(vllm_config.model_config, "max_model_len", context)
    layers, step = MODELS[model], vllm_config.scheduler_config.max_num_batched_tokens
    size = {"block_size": 32, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    for settings, memory in itertools.product(SETTINGS, (200_000_000, 900_000_000)):
        config = FilterConfig.parse(settings)
        specs = {}
        plan = LayerPlan.of(config, len(layers), dict(enumerate(layers)))
        for layer, row in zip(layers, plan.rows, strict=True):
            if layer.kind == "sliding":
                spec = SlidingWindowSpec(**size, sliding_window=layer.window)
            elif row.layout is not None:
                spec = FilteredAttentionSpec(**size, layout=row.layout, max_step_tokens=min(step, context))
            else:
                spec = FullAttentionSpec(**size)
            specs[f"layer.{row.index}"] = spec
        groups = planning.get_kv_cache_groups(vllm_config, specs)
        sized = planning.get_kv_cache_config_from_groups(vllm_config, groups, memory)
        tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(vllm_config, sized)
        shape = Shape(layers, num_kv_heads=3, head_size=64, element_bytes=2, weight_bytes=0)
        planned = kv_capacity(
            shape,
            config,
            cache_bytes=memory,
            context=context,
            block_size=32,
            max_step_tokens=step,
            steps_in_flight=vllm_config.max_concurrent_batches,
        )
        told = (settings, memory, len(groups))
        assert planned.max_concurrency == pytest.approx(concurrency, rel=0.02), told
        assert planned.cache_tokens == pytest.approx(tokens, rel=0.02), told
