"""Attention skipping in a GPU layer's forward, with stand-ins: launches are recorded, and tensors hold no data.

On the meta device whatever asks for a value raises: that nothing here waits for a device, or depends on what it holds,
is so shown for every launch of a step and its layers.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.layout import Layout

pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.gpu.skipping import SkippingGroup, SkippingImpl
from vllm_tokenfilter.kernels.gpu import carry, rows, skip, substitutes
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice

META = torch.device("meta")
MAX_REQS, MAX_TOKENS, HEADS, KV_HEADS, DIMS = 9, 64, 4, 2, 64
SUBSTITUTES = {"none": "put_zero", "window": "attend_window", "running_output": "average_outputs"}


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, arguments) of every launch, in order."""
    made = []

    def record(module, name):
        class Kernel:
            def __getitem__(self, grid):
                return lambda **arguments: made.append((name, grid, arguments))

        monkeypatch.setattr(module, f"{name}_kernel", Kernel())

    for module, names in {
        rows: ["describe_rows"],
        skip: ["compare_tokens", "decide_rows"],
        carry: ["carry_scores", "carry_means"],
        substitutes: SUBSTITUTES.values(),
    }.items():
        for name in names:
            record(module, name)
    return made


@dataclass
class Metadata:
    """What vLLM's builder makes, as far as a layer that skips reads it."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    num_actual_tokens: int
    max_query_len: int


def metadata_of(num_reqs, num_tokens, max_query_len):
    def integers(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device=META)

    return Metadata(
        integers(num_reqs + 1),
        integers(num_reqs),
        integers(num_reqs, 8),
        integers(num_tokens, dtype=torch.int64),
        num_tokens,
        max_query_len,
    )


class Inner:
    """Stands for an implementation of vLLM's: remembers the metadata it was given."""

    scale, logits_soft_cap = 0.125, 0

    def __init__(self):
        self._token_filtering_config = SimpleNamespace(
            additional_config={"token_filtering": {"attention_skipping": {"ratio": 0.5}}}
        )
        self.supports_quant_query_input, self.given = True, []

    def fused_output_quant_supported(self, quant_key):
        return True

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, extra=None):
        self.given.append((attn_metadata, output_scale, extra))
        return output


class Impl(SkippingImpl, Inner):
    pass


def group_of(substitute="none", layout=None, num_layers=2):
    config = FilterConfig.parse({"attention_skipping": {"ratio": 0.5, "substitute": substitute}})
    layers = {
        3 + index: SimpleNamespace(
            impl=Impl(),
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_size=DIMS,
            _k_scale=torch.empty(1, device=META),
            _v_scale=torch.empty(1, device=META),
        )
        for index in range(num_layers)
    }
    caches = [torch.empty(7, KV_HEADS, 16, 2 * DIMS, dtype=torch.bfloat16, device=META) for _ in layers]
    opened = []

    def open_cache():
        opened.append(1)
        return GpuCache.over(caches, list(layers), torch.bfloat16)

    units = tuple(1000 * index for index in range(8))
    group = SkippingGroup(config, layers, units, layout, MAX_REQS, MAX_TOKENS, META, StepCounters(), open_cache)
    return group, list(layers.values()), opened


WARM_UP = ["describe_rows", "compare_tokens", "decide_rows"]


def run_step(group, layers, num_reqs, num_tokens, max_query_len, shared=None):
    metadata = metadata_of(num_reqs, num_tokens, max_query_len)
    group.attach(metadata, metadata, metadata.seq_lens, shared)
    outputs = []
    for layer in layers:
        query = torch.empty(num_tokens, HEADS, DIMS, dtype=torch.bfloat16, device=META)
        outputs.append(torch.empty(num_tokens, HEADS, DIMS, dtype=torch.bfloat16, device=META))
        layer.impl.forward(layer, query, None, None, None, metadata, outputs[-1], output_scale=None, extra=5)
    return metadata, outputs


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1 << 30, 1 << 31))


@pytest.mark.parametrize("substitute", SUBSTITUTES)
def test_a_layer_decides_attends_to_the_shortened_lengths_and_substitutes(launches, memory, substitute):
    group, layers, opened = group_of(substitute)
    metadata, outputs = run_step(group, layers, 5, 5, 1)
    per_layer = ["compare_tokens", "decide_rows", SUBSTITUTES[substitute]]
    assert [name for name, *_ in launches] == [*WARM_UP, *2 * per_layer]
    by_name = {}
    for name, grid, arguments in launches[len(WARM_UP) :]:
        by_name.setdefault(name, []).append((grid, arguments))
    assert [grid for grid, _ in by_name["compare_tokens"]] == 2 * [(5, KV_HEADS)]
    for place, (grid, arguments) in enumerate(by_name["decide_rows"]):
        assert grid == (5,) and arguments["TILE"] == 1
        assert (arguments["layer"], arguments["ratio"]) == (place, 1000 * (3 + place))
    for layer, output, (_, arguments) in zip(layers, outputs, by_name[SUBSTITUTES[substitute]], strict=True):
        ((given, output_scale, extra),) = layer.impl.given
        assert (output_scale, extra) == (None, 5) and arguments["output"] is output
        assert given.seq_lens.shape == (5,) and given.seq_lens._base is by_name["decide_rows"][0][1]["read_lens"]
        assert given.block_table is metadata.block_table and given.query_start_loc is metadata.query_start_loc
    assert opened == [1]


def test_a_steps_launches_depend_on_its_shape_alone_and_write_where_the_last_one_did(launches):
    group, layers, _ = group_of()
    run_step(group, layers, 1, 1, 1)
    launches.clear()
    run_step(group, layers, 5, 5, 1)
    first = launches[:]
    launches.clear()
    run_step(group, layers, 5, 5, 1)
    for (name, grid, arguments), (again, other_grid, others) in zip(first, launches, strict=True):
        assert (name, grid, list(arguments)) == (again, other_grid, list(others))
        for argument, other in zip(arguments.values(), others.values(), strict=True):
            if isinstance(argument, torch.Tensor):
                assert argument.shape == other.shape and argument.dtype == other.dtype
            else:
                assert argument == other
    ours = {id(tensor) for tensor in vars(group._buffers).values()}
    written = [{id(x) for x in arguments.values()} & ours for _, _, arguments in first]
    assert written == [{id(x) for x in arguments.values()} & ours for _, _, arguments in launches]
    assert all(written[:3])


def test_a_prefill_step_goes_the_same_way(launches):
    group, layers, _ = group_of()
    run_step(group, layers, 3, 60, 40)
    assert [arguments["TILE"] for name, _, arguments in launches if name == "decide_rows"] == [32, 32, 32]


def test_steps_beyond_what_the_buffers_were_made_for_are_no_silent_overrun(launches):
    group, layers, _ = group_of()
    with pytest.raises(AssertionError, match="more rows"):
        run_step(group, layers, MAX_REQS + 1, MAX_REQS + 1, 1)
    with pytest.raises(AssertionError, match="more tokens"):
        run_step(group, layers, 2, MAX_TOKENS + 1, 40)


def test_a_seal_takes_what_is_carried_for_tokens_along(launches, memory):
    layout = Layout(64, 32, 64, 4, 64)
    group, layers, _ = group_of("running_output", layout)
    plan = SimpleNamespace(rows=[0])
    tables = torch.empty(1, 4, dtype=torch.int32, device=META)
    shared = torch.empty(1, dtype=torch.int32, device=META)
    of_rows, of_tasks = torch.empty(5, 1, device=META), torch.empty(2, 2, device=META)
    due = DueSealsOnDevice(plan, tables, shared, of_rows, of_tasks)
    group.follow(due)
    assert not launches, "nothing is carried before the first step"
    run_step(group, layers, 1, 1, 1, shared)
    launches.clear()
    group.follow(due)
    assert [(name, grid) for name, grid, *_ in launches] == [("carry_scores", (1, 2)), ("carry_means", (1, 2, 2))]
    assert (launches[0][2]["C"], launches[0][2]["K"]) == (64, 32)


def test_means_that_do_not_fit_beside_the_cache_are_refused_in_words(launches, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1 << 10, 1 << 31))
    group, layers, _ = group_of("running_output")
    with pytest.raises(UnsupportedError, match=r"substitute=running_output .* GiB are free; lower gpu_memory"):
        run_step(group, layers, 1, 1, 1)


def test_a_layer_that_does_not_skip_and_a_profiling_run_are_vllms_own(launches):
    impl = Impl()
    impl.forward(None, None, None, None, None, "metadata", "output")
    assert impl.given == [("metadata", None, None)] and not launches
    _, layers, _ = group_of()
    layers[0].impl.forward(layers[0], None, None, None, None, None, "output")
    assert layers[0].impl.given == [(None, None, None)] and not launches


def test_queries_and_outputs_stay_in_the_models_type_where_attention_may_be_skipped():
    impl = Impl()
    assert not impl.supports_quant_query_input and not impl.fused_output_quant_supported("fp8")


def test_what_the_device_counted_is_read_when_it_is_asked_for():
    group, _, _ = group_of()
    buffers, counters = vars(group._buffers), group._counters
    counters.reads_done = 1000  # of layers that do not skip
    for totals, decided in ([[3, 1, 50], [4, 2, 7]], 7), ([[5, 1, 50], [4, 2, 7]], 9):
        buffers["totals"] = torch.tensor(totals)
        group.settle()
        found = counters.attentions_decided, counters.attentions_skipped, counters.reads_done
        assert found == (decided, 3, 1057)
