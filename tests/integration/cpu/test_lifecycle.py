"""A worker's start and end without an engine: vLLM's own attention layers, planned when their weights are ready."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from vllm_tokenfilter.integration import lifecycle, plugin, worker
from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec

NAME = "model.layers.{}.self_attn.attn"
MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256}
MODEL |= {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(lifecycle, "logger", SimpleNamespace(info=lambda form, *values: lines.append(form % values)))
    return lines


@pytest.fixture
def load(tmp_path, logged):
    """Loads five layers: full attention, full attention, a window, alibi, and one that reads the first one's cache."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    plugin.register()

    def loaded(settings, stage=range(5)):
        vllm_config = EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            dtype="float32",
            attention_backend="TOKEN_FILTERING",
            additional_config={"token_filtering": settings},
        ).create_engine_config()
        kinds = ({}, {}, {"per_layer_sliding_window": 64}, {"alibi_slopes": [0.1] * 4})
        kinds += ({"kv_sharing_target_layer_name": NAME.format(0)},)
        with set_current_vllm_config(vllm_config):
            layers = [
                Attention(
                    4, 32, 0.1, num_kv_heads=2, cache_config=vllm_config.cache_config, prefix=NAME.format(i), **own
                )
                for i, own in enumerate(kinds)
                if i in stage
            ]
            for layer in layers:
                layer.process_weights_after_loading(torch.float32)
        return vllm_config, layers

    return loaded


def spec_of(layer, vllm_config):
    return layer.attn_backend.customize_spec(layer.get_kv_cache_spec(vllm_config))


def worker_of(vllm_config, layers, *groups):
    """A worker whose KV-cache groups hold these layers."""
    builders = [
        layers[group[0]].attn_backend.get_builder_cls()(
            spec_of(layers[group[0]], vllm_config), [NAME.format(i) for i in group], vllm_config, torch.device("cpu")
        )
        for group in groups
    ]
    made = worker.WorkerStatus()
    made.model_runner = SimpleNamespace(attn_groups=[[SimpleNamespace(metadata_builders=[own])] for own in builders])
    made.vllm_config = vllm_config
    return made, builders


def test_layers_are_planned_by_what_vllm_knows_of_them_and_ask_for_blocks_by_it(load, logged):
    vllm_config, layers = load({"dense_layers": [1], "attention_skipping": {"ratio": 0.25}})
    plan = lifecycle.planned_model(vllm_config).plan
    assert plan.filtered == [0] and plan.rows[4].layout == plan.rows[0].layout
    assert plan.dense == {"configured_dense": [1], "sliding_window_layer": [2], "alibi_layer": [3]}
    assert plan.skipping == [0, 1]
    reasons = {"sliding_window_layer": [2], "alibi_layer": [3], "reads_another_layers_cache": [4]}
    assert plan.unskipped == reasons
    kinds = [FilteredAttentionSpec, FullAttentionSpec, SlidingWindowSpec, FullAttentionSpec]
    assert [type(spec_of(layer, vllm_config)) for layer in layers[:4]] == kinds
    (block,) = logged
    assert block.startswith("Token Filtering is on: backend TOKEN_FILTERING over CPU_ATTN\n  layers filtered: 0\n")
    assert "  layers that cannot skip: 4 (reads_another_layers_cache)" in block


@pytest.fixture
def groups_of(monkeypatch):
    """Forms the attention groups of a KV-cache group as Model Runner V2 does, and gives the layers of each."""
    attn_utils = pytest.importorskip("vllm.v1.worker.gpu.attn_utils")
    monkeypatch.setattr(attn_utils.AttentionGroup, "create_metadata_builders", lambda self, **arguments: None)
    monkeypatch.setattr(attn_utils, "get_attn_cg_support", lambda groups, vllm_config: None)
    monkeypatch.setattr(attn_utils, "prepare_kernel_block_sizes", lambda *arguments: [])

    def formed(vllm_config, layers, owners):
        groups = [KVCacheGroupSpec([NAME.format(i)], spec_of(layers[i], vllm_config)) for i in owners]
        config = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)
        monkeypatch.setattr(attn_utils.AttentionGroup, "metadata_builders", [], raising=False)
        found, _, _ = attn_utils.init_attn_backend(config, vllm_config, torch.device("cpu"))
        return [[group.layer_names for group in groups] for groups in found]

    return formed


def test_a_layer_that_reads_anothers_cache_has_its_metadata_from_the_same_builder(load, groups_of):
    """A builder of its own would know nothing of what was removed, or seal it twice."""
    vllm_config, layers = load({"dense_layers": [1]})
    assert groups_of(vllm_config, layers, [0, 1]) == [[[NAME.format(0), NAME.format(4)]], [[NAME.format(1)]]]


def test_a_pipeline_stage_plans_its_own_layers_by_their_place_in_the_model(load):
    settings = {"pruning_ratio": 0.4, "schedule": {"kind": "tail", "share": 0.8}}
    plan = lifecycle.planned_model(load(settings, stage=(0, 1))[0]).plan
    assert plan.dense == {"configured_dense": [0]} and plan.filtered == plan.indices[1:] == [1]


def test_a_worker_tells_of_all_its_groups_and_takes_other_settings(load):
    vllm_config, layers = load({"dense_layers": [1], "attention_skipping": {"ratio": 0.25}})
    made, builders = worker_of(vllm_config, layers, [0, 4], [1, 3])
    status = made.token_filtering_status()
    assert status["layers"]["filtered"] == [0] and [len(group["plan"]["rows"]) for group in status["groups"]] == [2, 2]
    assert [layer.impl.skips for layer in layers] == [0, 1, None, None, None]
    made.token_filtering_use({"pruning_ratio": 0.75, "dense_layers": [1]})
    assert builders[0].layout.kept_per_chunk == 16 and builders[1].layout is None
    assert layers[0].impl.skips is None
    assert made.token_filtering_status()["settings"]["pruning_ratio"] == 0.75


def test_the_totals_of_a_worker_are_one_line(load, logged):
    vllm_config, layers = load({"dense_layers": [1]})
    made, builders = worker_of(vllm_config, layers, [0], [1])
    for builder in builders:
        builder.counters.tokens_seen += 300
    builders[0].counters.count_sealed(128, 64)
    del logged[:], made, builder, builders[0]
    gc.collect()
    assert not logged, "a group is still at work"
    del builders
    gc.collect()
    (line,) = logged
    assert line.startswith("Token Filtering totals: 300 tokens seen, 128 sealed, 64 pruned per filtered layer;")
