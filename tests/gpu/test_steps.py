"""Steps on a GPU: tests/integration/gpu/test_steps.py, a real CUDA graph among them, and that nothing waits."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.integration.gpu.test_steps import (
    make_steps,
    step,
    test_a_captured_decode_step_over_changing_lengths_attends_to_what_the_reference_keeps,  # noqa: F401
    test_dummy_runs_captures_and_padding_leave_nothing_due_and_count_nothing,  # noqa: F401
    test_lives_of_requests_leave_in_the_cache_what_the_reference_keeps,  # noqa: F401
    test_marks_of_the_prefix_cache_are_taken_out_on_the_device,  # noqa: F401
)

pytestmark = pytest.mark.gpu

#: What the host calls to wait for the device, and the copy that does.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")


@pytest.fixture(params=[0, 1], ids=["no prefixes shared", "prefixes shared"])
def decoding(request, device):
    """Steps whose kernels are compiled, and 80 decode steps of two requests, three of which have seals to run."""
    tables = np.arange(1, 49, dtype=np.int32).reshape(2, 24)
    steps = make_steps(mark_blocks=request.param, device=device)
    steps.adjust(step([0, 0], [150, 200], tables, device=device))
    made = [step([150 + i, 200 + i], [1, 1], tables, device=device) for i in range(120)]
    for first in made[:40]:
        steps.adjust(first)  # the first one runs the prefill's seal: every path was taken once
    torch.cuda.synchronize()
    return steps, made[40:]


def test_no_call_of_a_decode_step_waits_for_the_device(decoding):
    steps, made = decoding
    before = steps.counters.seals
    torch.cuda.set_sync_debug_mode("error")
    try:
        for now in made:
            steps.adjust(now)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.counters.seals > before, "no seal was run, so nothing was shown about seals"


def test_the_profiler_sees_no_wait_in_a_decode_step(decoding):
    steps, made = decoding
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    before = steps.counters.seals
    with torch.profiler.profile(activities=activities) as profile:
        for now in made:
            with torch.profiler.record_function("one step"):
                steps.adjust(now)
    assert steps.counters.seals > before
    events = profile.events()
    on_host = torch.autograd.DeviceType.CPU
    inside = [event.time_range for event in events if event.name == "one step" and event.device_type == on_host]
    assert len(inside) == len(made)
    waits = [
        event.name
        for event in events
        if event.name in WAITS and any(span.start <= event.time_range.start <= span.end for span in inside)
    ]
    assert not waits, waits
    assert any("adjust_step_kernel" in event.name for event in events), "the profiler saw no kernel of ours"


def test_seals_are_timed_by_the_device(decoding):
    steps, made = decoding
    for now in made:
        steps.adjust(now)
    torch.cuda.synchronize()
    steps.clock.settle()
    per_seal = steps.counters.seal_seconds / steps.counters.seals
    assert 0 < per_seal < 0.1, "seconds of a seal of two requests and two layers"


def test_a_seal_is_no_compilation(decoding):
    import triton

    steps, made = decoding
    compiled = []
    hook, triton.knobs.runtime.jit_post_compile_hook = (
        triton.knobs.runtime.jit_post_compile_hook,
        lambda **what: compiled.append(what["key"]),
    )
    try:
        for now in made:
            steps.adjust(now)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert not compiled
