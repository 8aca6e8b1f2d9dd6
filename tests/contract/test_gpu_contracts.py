"""What vLLM's GPU modules must go on doing for integration/gpu/; checked without a GPU, where need be as source."""

import ast
import dataclasses
import inspect
import types
from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

from vllm_tokenfilter.config import FilterConfig  # noqa: E402
from vllm_tokenfilter.integration import dispatch, layers, refusals, registration  # noqa: E402
from vllm_tokenfilter.integration.gpu import backend as gpu_backend  # noqa: E402
from vllm_tokenfilter.integration.gpu import skipping, steps  # noqa: E402

ROOT = Path(vllm.__file__).parent
# flashinfer is not installed beside CPU torch, so its module is read and not imported.
FILES = {
    "FLASH_ATTN": ("flash_attn.py", "FlashAttention"),
    "FLASHINFER": ("flashinfer.py", "FlashInfer"),
    "TRITON_ATTN": ("triton_attn.py", "TritonAttention"),
}


def source(*parts):
    return ROOT.joinpath(*parts).read_text()


def classes(name):
    tree = ast.parse(source("v1", "attention", "backends", FILES[name][0]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def method(node, name):
    return next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name), None)


def arguments(function):
    return [argument.arg for argument in function.args.posonlyargs + function.args.args + function.args.kwonlyargs]


@pytest.mark.parametrize("name", gpu_backend.INNER_BACKENDS)
def test_the_inner_backends_are_built_and_called_as_we_wrap_them(name):
    found = classes(name)
    stem = FILES[name][1]
    builder = found[f"{stem}MetadataBuilder"]
    hint = "integration/gpu/backend.py (FilteringBuilder) wraps this signature"
    assert arguments(method(builder, "__init__"))[:5] == [
        "self", "kv_cache_spec", "layer_names", "vllm_config", "device",
    ], hint  # fmt: skip
    build = arguments(method(builder, "build"))
    assert build[:4] == ["self", "common_prefix_len", "common_attn_metadata", "fast_build"], hint
    backend = found[f"{stem}Backend"]
    assert f'return "{name}"' in ast.unparse(method(backend, "get_name")).replace("'", '"')
    assert method(backend, "get_impl_cls") and method(backend, "get_builder_cls")
    assert "alibi_slopes" in ast.unparse(found[f"{stem}Impl"]), "integration/layers.py asks the implementation for it"


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_a_wrapped_backend_answers_for_the_one_inside_and_is_found_by_its_path(name):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    inner = AttentionBackendEnum[name].get_class()
    ours = gpu_backend.backend_over(name)
    assert resolve_obj_by_qualname(".".join(ours.full_cls_name())) is ours
    assert ours.get_name() == inner.get_name() == name
    assert ours.get_supported_kernel_block_sizes() == inner.get_supported_kernel_block_sizes()
    builder, theirs = ours.get_builder_cls(), inner.get_builder_cls()
    assert issubclass(builder, theirs) and issubclass(ours.get_impl_cls(), inner.get_impl_cls())
    assert builder._cudagraph_support == theirs._cudagraph_support
    assert builder.get_cudagraph_support.__func__ is theirs.get_cudagraph_support.__func__
    assert builder.build is gpu_backend.FilteringBuilder.build
    assert not builder.supports_update_block_table


def test_the_base_builder_has_the_hooks_we_override():
    for name in ("build", "build_for_cudagraph_capture", "supports_update_block_table"):
        assert hasattr(AttentionMetadataBuilder, name), f"integration/gpu/backend.py overrides {name}"
    assert "self.build(" in inspect.getsource(AttentionMetadataBuilder.build_for_cudagraph_capture)


def test_a_step_says_what_we_read_and_takes_what_we_replace():
    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    read = set(steps.RunnerStep.__annotations__)
    given = {field.name for field in dataclasses.fields(steps.Adjusted)} | {"_num_computed_tokens_cache"}
    assert read | given <= names, "integration/gpu/steps.py reads and replaces fields of CommonAttentionMetadata"


@pytest.mark.parametrize(
    "parts",
    [("v1", "worker", "gpu", "attn_utils.py"), ("v1", "worker", "gpu_model_runner.py")],
    ids=["model runner v2", "model runner v1"],
)
def test_both_runners_pass_host_lengths_and_whether_a_row_prefills(parts):
    text = source(*parts)
    assert "seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound" in text, "integration/gpu/steps.py plans with it"
    assert "is_prefilling=" in text, "integration/gpu/steps.py tells dummy runs by it"


@pytest.mark.parametrize(
    "parts, taken, handed_on",
    [
        (
            ("v1", "worker", "gpu", "attn_utils.py"),
            "        seq_lens_cpu_upper_bound = seq_lens_cpu_upper_bound[:num_reqs]\n",
            "            seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,\n",
        ),
        (
            ("v1", "worker", "gpu_model_runner.py"),
            "        seq_lens_cpu_upper_bound = self.optimistic_seq_lens_cpu[:num_reqs_padded]\n",
            "            cm = copy(cm_base)  # shallow copy\n",
        ),
    ],
    ids=["model runner v2", "model runner v1"],
)
def test_both_runners_take_one_new_view_of_the_lengths_for_all_groups_of_a_step(parts, taken, handed_on):
    text = source(*parts)
    assert text.count(taken) == 1 and handed_on in text, "integration/gpu/steps.py (StepsInCommon) knows a step by it"
    assert text.index(taken) < text.index(handed_on, text.index(taken)), "before the loop over groups"


def test_a_prefix_hit_is_looked_up_for_all_groups_of_a_layout_at_once():
    text = source("v1", "core", "kv_cache_coordinator.py")
    assert "kv_cache_group_ids=group_ids,\n" in text, (
        "kernels/gpu/due.py (snapshot): they take over equally many chunks"
    )


def test_host_lengths_are_int32_and_a_steps_description_can_be_copied():
    for parts, text in (
        (
            ("v1", "worker", "gpu", "model_runner.py"),
            "seq_lens_cpu_upper_bound_np = np.zeros(num_reqs_padded, dtype=np.int32)",
        ),
        (
            ("v1", "worker", "gpu_model_runner.py"),
            "self.optimistic_seq_lens_cpu = torch.zeros(\n            self.max_num_reqs, dtype=torch.int32",
        ),
    ):
        assert text in source(*parts), "integration/gpu/steps.py (LayoutStep) hands lengths on in their own type"
    assert not hasattr(CommonAttentionMetadata, "__slots__"), "integration/gpu/backend.py changes a copy's fields"
    assert not hasattr(CommonAttentionMetadata, "__post_init__")


def test_the_upper_bound_of_lengths_is_exact_without_speculation():
    text = source("v1", "attention", "backend.py")
    text = " ".join(text[text.index("    seq_lens_cpu_upper_bound: torch.Tensor") :][:500].split())
    assert "Precise for prefill rows and for all rows outside async spec decode" in text, (
        "integration/gpu/steps.py takes the bound for the length; refusals.py refuses speculative decoding"
    )


def test_slots_of_dummy_runs_are_negative_and_lie_where_the_forward_reads_them():
    text = source("v1", "worker", "gpu", "block_table.py")
    assert "self.slot_mappings.fill_(PAD_SLOT_ID)" in text, "kernels/gpu/lengths.py tells dummy rows by it"
    assert "PAD_SLOT_ID = -1" in source("v1", "attention", "backends", "utils.py")
    assert "return slot_mappings[:, :num_tokens_padded]" in text, "slots are a view that we rewrite in place"


def test_graphs_are_made_by_the_calls_that_the_dry_run_stands_in_for():
    """tests/gpu_dryrun/pretend_graphs.py"""
    assert "graph = torch.cuda.CUDAGraph()" in source("v1", "worker", "gpu", "cudagraph_utils.py")
    assert "with torch.cuda.graph(" in source("compilation", "cuda_graph.py")
    pieces = source("compilation", "breakable_cudagraph.py")
    assert "g.capture_begin(pool=self.pool)" in pieces and "self.segments.append(self._current_graph.replay)" in pieces
    layer = source("model_executor", "layers", "attention", "attention.py")
    assert "@eager_break_during_capture\n@maybe_transfer_kv_layer\ndef unified_attention_with_output(" in layer
    assert layer.count("direct_register_custom_op(") >= 2, "operations whose bodies are looked into"
    assert "_cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS" in source(
        "v1", "attention", "backends", "triton_attn.py"
    )


def test_vllm_validates_a_selected_backend_and_then_asks_for_its_path():
    from vllm.v1.attention.selector import AttentionSelectorConfig

    known = set(inspect.signature(AttentionBackend.validate_configuration).parameters)
    assert set(AttentionSelectorConfig._fields) | {"device_capability"} == known, (
        "integration/dispatch.py hands what it is asked on to vLLM's own choice"
    )
    text = source("platforms", "cuda.py")
    body = text[text.index("def get_attn_backend_cls") :][:1400]
    assert body.index("validate_configuration(") < body.index("_backend_cls_path(backend_class)")
    assert "backend_cls.full_cls_name()" in text


TRITON = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"


@pytest.fixture
def chosen(monkeypatch):
    """Which backend `inner_backend: auto` is, or why none; vLLM chooses `own`, and `valid` serve the layer too."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    class Flashinfer(AttentionBackend):
        """Its module needs a package that is not installed here."""

        get_name = staticmethod(lambda: "FLASHINFER")
        get_impl_cls = get_builder_cls = None

    resolve = dispatch.resolve_obj_by_qualname
    monkeypatch.setattr(dispatch, "resolve_obj_by_qualname", lambda path: Flashinfer if path == "FI" else resolve(path))
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    layer = dict.fromkeys(AttentionSelectorConfig._fields, False) | {"head_size": 64}

    def choice(own, valid=(), prefix_caching=True, ratio=0.5):
        def choose(selected, config, num_heads=None):
            assert config.head_size == 64
            if selected is None:
                return own
            if selected.name in valid:
                return "a path"
            raise ValueError("not valid for this configuration")

        config = types.SimpleNamespace(
            additional_config={"token_filtering": {"pruning_ratio": ratio}},
            cache_config=types.SimpleNamespace(enable_prefix_caching=prefix_caching),
        )
        monkeypatch.setattr(dispatch, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(type(current_platform), "get_attn_backend_cls", staticmethod(choose))
        monkeypatch.setattr(
            gpu_backend, "backend_over", lambda name: types.SimpleNamespace(__qualname__=f"OVER_{name}")
        )
        reasons = dispatch.AutoBackend.validate_configuration(device_capability=None, **layer)
        return reasons or dispatch.AutoBackend.full_cls_name()[1]

    return choice


def test_inner_backend_auto_stands_for_what_vllm_would_choose(chosen):
    assert chosen(TRITON) == "OVER_TRITON_ATTN"
    assert dispatch.AutoBackend.full_cls_name()[0] == "vllm_tokenfilter.integration.dispatch"
    assert chosen("FI", prefix_caching=False) == chosen("FI", ratio=0) == "OVER_FLASHINFER"


def test_where_prefixes_are_shared_inner_backend_auto_is_what_serves_the_layer_beside_flashinfer(chosen):
    assert chosen("FI", ("FLASH_ATTN", "TRITON_ATTN")) == "OVER_FLASH_ATTN"
    assert chosen("FI", ("TRITON_ATTN",)) == "OVER_TRITON_ATTN"
    (reason,) = chosen("FI")
    assert "inner_backend=FLASHINFER" in reason and "--no-enable-prefix-caching" in reason


def test_inner_backend_auto_says_so_where_vllms_choice_cannot_be_filtered(chosen):
    (reason,) = chosen("vllm.v1.attention.backends.flex_attention.FlexAttentionBackend")
    assert "FLEX_ATTENTION" in reason and "TRITON_ATTN" in reason


@pytest.mark.parametrize("inner, ratio, caching, refused", [
    ("FLASHINFER", 0.5, True, True), ("FLASHINFER", 0.5, False, False),
    ("FLASHINFER", 0, True, False), ("FLASH_ATTN", 0.5, True, False), ("auto", 0.5, True, False),
])  # fmt: skip
def test_flashinfer_named_beside_prefix_caching_is_refused_before_weights_load(
    monkeypatch, inner, ratio, caching, refused
):
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    config = FilterConfig.parse({"inner_backend": inner, "pruning_ratio": ratio})
    assert refusals.FLASHINFER_PREFIXES in refusals.REFUSALS
    vllm_config = types.SimpleNamespace(cache_config=types.SimpleNamespace(enable_prefix_caching=caching))
    assert bool(refusals.FLASHINFER_PREFIXES.found(vllm_config, config)) == refused


def test_norms_are_refused_where_heads_of_the_cache_have_scales_of_their_own():
    (row,) = (row for row in refusals.REFUSALS if row.setting == "selector" and "norms" in row.reason)

    def refused(selector, strategy):
        scheme = types.SimpleNamespace(kv_cache_scheme={"strategy": strategy} if strategy else None)
        return row.found(types.SimpleNamespace(quant_config=scheme), FilterConfig.parse({"selector": selector}))

    assert refused("key_norm", "attn_head") and refused("value_key_norm", "attn_head")
    assert not refused("anchor", "attn_head") and not refused("key_norm", "tensor") and not refused("key_norm", None)
    assert not row.found(types.SimpleNamespace(quant_config=None), FilterConfig.parse({"selector": "key_norm"}))
    ours = "integration/refusals.py asks as vLLM's layers do"
    text = source("model_executor", "layers", "attention", "attention.py")
    assert 'getattr(quant_config, "kv_cache_scheme", None)' in text, ours
    assert 'kv_cache_scheme.get("strategy") == "attn_head"' in text, ours


def test_a_layers_backend_is_kept_for_the_process_until_another_engine_is_configured():
    from vllm.v1.attention import selector

    ours = "integration/workarounds.py clears it, since the key has none of our settings"
    assert list(inspect.signature(selector._cached_get_attn_backend).parameters) == [
        "backend", "attn_selector_config", "num_heads", "_run_kv_cache_dtype",
    ], ours  # fmt: skip
    assert callable(selector._cached_get_attn_backend.cache_clear), ours


def test_the_registered_path_leads_to_the_dispatch():
    module, _, name = registration.BACKEND_PATH.rpartition(".")
    assert (module, name) == (dispatch.__name__, "SELECTED_BACKEND")


def test_the_kv_cache_is_packed_as_the_kernels_read_it():
    for name in gpu_backend.INNER_BACKENDS:
        text = source("v1", "attention", "backends", FILES[name][0])
        assert ".transpose(1, 2).split(" in text, "kernels/gpu/cache.py takes [blocks, heads, tokens, key and value]"


def test_kernel_warmup_is_the_name_the_dry_run_replaces():
    assert "kernel_warmup(self)" in source("v1", "worker", "gpu_worker.py"), "tests/gpu_dryrun/pretend_cuda.py"


def test_what_the_dry_run_replaces_takes_what_vllm_passes():
    pretended = ast.parse((Path(__file__).parents[1] / "gpu_dryrun" / "pretend_cuda.py").read_text())
    ours = next(node for node in ast.walk(pretended) if getattr(node, "name", "") == "in_pytorch")
    sampler = ast.parse(source("v1", "sample", "ops", "topk_topp_sampler.py"))
    calls = [node for node in ast.walk(sampler) if isinstance(node, ast.Call)]
    calls = [node for node in calls if ast.unparse(node.func) == "apply_top_k_top_p_triton"]
    assert calls, "tests/gpu_dryrun/pretend_cuda.py: _skip_warmup"
    for call in calls:
        given = arguments(ours)[len(call.args) :]
        assert len(call.args) <= 3 and {word.arg for word in call.keywords} <= set(given), (
            "tests/gpu_dryrun/pretend_cuda.py: _skip_warmup"
        )


def test_triton_attention_takes_lengths_from_the_device_alone():
    """integration/gpu/skipping.py shortens them inside the forward, where nothing can be planned any more."""
    path = ROOT / "v1" / "attention" / "ops" / "triton_unified_attention.py"
    tree = ast.parse(path.read_text())
    function = next(node for node in tree.body if getattr(node, "name", "") == "unified_attention")
    handed_on = [node.value for node in ast.walk(function) if isinstance(node, ast.keyword)]
    read = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == "max_seqlen_k"]
    assert all(node in handed_on for node in read), (
        "a host-side length decides something; see integration/gpu/skipping.py"
    )
    assert "seq_lens_ptr=seqused_k" in path.read_text()
    body = ast.unparse(method(classes("TRITON_ATTN")["TritonAttentionImpl"], "forward"))
    assert "seqused_k = attn_metadata.seq_lens" in body and "output_block_scale" in body


def test_triton_metadata_holds_what_a_layer_that_skips_reads():
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

    names = {field.name for field in dataclasses.fields(TritonAttentionMetadata)}
    read = {"query_start_loc", "seq_lens", "block_table", "slot_mapping", "num_actual_tokens", "max_query_len"}
    assert read <= names, "integration/gpu/skipping.py (SkippingGroup.attach)"
    assert not hasattr(TritonAttentionMetadata, "__slots__"), "integration/gpu/skipping.py sets an attribute of its own"


def test_a_layers_forward_writes_the_cache_and_then_hands_its_own_metadata_to_the_implementation():
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    assert not TritonAttentionBackend.forward_includes_kv_cache_update, "integration/gpu/skipping.py scores cached keys"
    text = source("model_executor", "layers", "attention", "attention.py")
    body = " ".join(text[text.index("def unified_attention_with_output(") :][:1400].split())
    call = "self.impl.forward( self, query, key, value, kv_cache, attn_metadata, output=output,"
    assert call in body, "integration/gpu/skipping.py (SkippingImpl.forward)"
    assert "self.impl.supports_quant_query_input" in text and "_k_scale" in text and "_v_scale" in text


def test_an_implementation_that_may_skip_keeps_queries_and_outputs_in_the_models_type():
    impl = gpu_backend.backend_over("TRITON_ATTN").get_impl_cls()
    names = [owner.__name__ for owner in impl.__mro__[:4]]
    assert names == ["ImplOverTRITON_ATTN", "SkippingImpl", "PlanningImpl", "TritonAttentionImpl"]
    assert impl.skipping is None
    assert impl.forward is skipping.SkippingImpl.forward
    theirs = AttentionBackendEnum.TRITON_ATTN.get_class().get_impl_cls()
    assert "fused_output_quant_supported" in vars(theirs), "integration/gpu/skipping.py overrides it"
    assert "self.supports_quant_query_input = " in inspect.getsource(theirs.__init__)


def test_backends_that_plan_ahead_are_refused_with_skipping_and_no_other():
    text = source("v1", "attention", "backends", "flash_attn.py")
    assert "self.aot_schedule = get_flash_attn_version() == 3" in text, "refusals.py says that FLASH_ATTN plans ahead"
    assert "seq_lens_cpu" in source("v1", "attention", "backends", "flashinfer.py"), "and FLASHINFER, on the host"


@pytest.fixture
def on_cuda(monkeypatch):
    class Cuda:
        device_type = "cuda"
        is_cpu = staticmethod(lambda: False)
        is_cuda = staticmethod(lambda: True)

    monkeypatch.setattr(refusals, "current_platform", Cuda)


@pytest.mark.parametrize("inner, ratio, refused", [
    ("auto", 0.5, True), ("FLASH_ATTN", 0.5, True), ("FLASHINFER", 0.5, True), ("TRITON_ATTN", 0.5, False),
    ("FLASH_ATTN", 0, False),
])  # fmt: skip
def test_the_refusal_names_setting_value_and_remedy(on_cuda, inner, ratio, refused):
    config = FilterConfig.parse({"attention_skipping": {"ratio": ratio}, "inner_backend": inner})
    about = [refusal for refusal in refusals.REFUSALS if refusal.setting == "inner_backend"]
    sentences = [r.sentence(value) for r in about if (value := r.found(None, config))]
    assert len(sentences) == refused
    for sentence in sentences:
        assert f"inner_backend={inner} " in sentence and "inner_backend: TRITON_ATTN" in sentence


@pytest.mark.parametrize("setting, value", [("enable_dbo", True), ("ubatch_size", 2)])
def test_every_way_to_split_a_step_is_refused(on_cuda, setting, value):
    from vllm.config import ParallelConfig

    def found(parallel_config):
        vllm_config = types.SimpleNamespace(parallel_config=parallel_config)
        about = (row for row in refusals.REFUSALS if row.setting in ("enable_dbo", "ubatch_size"))
        return {row.setting: seen for row in about if (seen := row.found(vllm_config, FilterConfig()))}

    split = types.SimpleNamespace(**{"enable_dbo": False, "ubatch_size": 0, setting: value})
    assert ParallelConfig.use_ubatching.fget(split), "vLLM splits steps by these alone: integration/refusals.py"
    assert found(split) == {setting: value}
    assert found(ParallelConfig()) == {}


def test_the_decode_kernels_are_called_as_the_benchmark_calls_them():
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    hint = "benchmarks/gpu_decoding.py calls it by these names"
    code = (Path(__file__).parents[2] / "benchmarks" / "gpu_decoding.py").read_text()
    calls = {
        ast.unparse(node.func): {keyword.arg for keyword in node.keywords if keyword.arg}
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
    }
    known = set(inspect.signature(unified_attention).parameters)
    segments = {"seq_threshold_3D", "num_par_softmax_segments"}
    segments |= {"softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"}
    assert calls["dict"] | calls["self._unified_attention"] | segments <= known, hint
    assert triton_attn.MIN_LAUNCH_GRID_SIZE_2D > 0 and triton_attn.NUM_PAR_SOFTMAX_SEGMENTS > 0, hint
    # FlashAttention's own module is in vLLM's CUDA wheel alone; vLLM's call of it is here.
    impl = classes("FLASH_ATTN")["FlashAttentionImpl"]
    used = {
        keyword.arg
        for node in ast.walk(impl)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "flash_attn_varlen_func"
        for keyword in node.keywords
    }
    assert calls["dict"] | calls["self._flash_attention"] <= used, hint
    text = source("v1", "attention", "backends", "fa_utils.py")
    assert "flash_attn_varlen_func," in text and "def get_flash_attn_version(" in text and "head_size: int" in text, (
        hint
    )


def test_a_tensor_parallel_group_gathers_over_a_dimension():
    from vllm.distributed.parallel_state import GroupCoordinator

    assert list(inspect.signature(GroupCoordinator.all_gather).parameters)[:3] == ["self", "input_", "dim"], (
        "integration/gpu/backend.py joins the ranks' scores over the heads"
    )


def test_layers_that_read_anothers_cache_share_its_attention_group_if_they_share_its_class_and_query_heads():
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec
    from vllm.v1.worker import utils

    ours = "integration/layers.py gives readers their owners' class, so that one builder makes the metadata of both"
    groups = [KVCacheGroupSpec(["a"], None), KVCacheGroupSpec(["b"], None)]
    utils.add_kv_sharing_layers_to_kv_cache_groups({"c": "a"}, groups)
    assert [group.layer_names for group in groups] == [["a", "c"], ["b"]], ours
    v1, v2 = source("v1", "worker", "gpu_model_runner.py"), source("v1", "worker", "gpu", "attn_utils.py")
    assert "key = (full_cls_name, layer_kv_cache_spec, num_heads_q)" in v1, ours
    assert "key = (attn_backend.full_cls_name(), layer_kv_cache_spec, num_heads_q)" in v2, ours
    assert v1.count('getattr(layers[layer_name], "num_heads", 0)') == 1, ours


def test_a_layer_knows_its_own_number_of_kv_heads_where_layers_differ():
    from vllm.config.model_arch import ModelArchitectureConfig

    whole = object.__new__(ModelArchitectureConfig)
    object.__setattr__(whole, "total_num_kv_heads", 8)
    object.__setattr__(whole, "per_layer_overrides", [{}, {"total_num_kv_heads": 2}])
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(model_arch_config=whole))
    assert [layers.total_kv_heads(config, index) for index in (0, 1)] == [8, 2], "a seal joins this many heads' scores"
