"""The GPU kernels through Triton's real compiler, which needs no GPU: the interpreter accepts what it would not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

CODE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_tokenfilter.kernels.gpu import carry, compact, lengths, rows, score, skip, substitutes

ARGUMENTS = {
    "*i64": "layer_addresses layer_indices slot_mapping totals",
    "*i32": "block_tables task_rows task_chunks first_chunk last_chunk shared_chunks num_tokens first_task kept "
    "query_start_loc seq_lens stored_lens clean_tables rows debts read_lens below skipped",
    "*fp32": "saved_redundancy known head_scores scratch scores means weights key_scale value_scale",
    "*bf16": "query output",
    "fp32": "decay_log2 decay scale softcap",
    "i64": "block_stride head_stride saved_stride carried_stride",
    "i32": "block_tables_stride clean_tables_stride layer num_blocks num_heads num_reqs num_scored_heads num_tasks "
    "output_stride query_stride ratio rows_stride seed sinks skipped_reads token_stride warmup_tokens",
}
TYPES = {name: type_ for type_, names in ARGUMENTS.items() for name in names.split()}
SHAPE = dict(C=64, K=32, D=128, BLOCK_SIZE=16)
SEAL = dict(SHAPE, BLOCK_D=128, TILE=16, ENCODING=1, ALIGNMENT=16)
LENGTHS = dict(C=64, K=32, W=64, BLOCK_SIZE=16, MARK_BLOCKS=1, MARKED=True, NO_SEALS=1 << 30, TILE=128)
STEP = dict(D=128, BLOCK_SIZE=16, BLOCK_D=128, BLOCK_R=256, TILE=32, ENCODING=1, ALIGNMENT=16)
DECIDE = dict(HISTORY=64, UNITS=10000, PATIENCE=8, BLOCK_SIZE=16, BLOCK_N=64, CAPACITY=8192, FUSION=0)
WINDOW = dict(SINKS=4, WINDOW=64, GROUP=4, BLOCK_G=16)
KERNELS = [
    (score.score_kernel, dict(SEAL, M=64, SELECTOR=0)),
    (score.score_kernel, dict(SEAL, M=64, SELECTOR=0, ENCODING=3)),
    (score.score_kernel, dict(SEAL, M=64, SELECTOR=1)),
    (compact.compact_kernel, dict(SEAL, BLOCK_C=64, FUSION=0)),
    (lengths.adjust_step_kernel, LENGTHS),
    (rows.describe_rows_kernel, dict(C=64, K=32, W=64, FILTERED=True)),
    (skip.compare_tokens_kernel, dict(STEP, M=64, CAPACITY=8192)),
    (skip.compare_tokens_kernel, dict(STEP, M=64, CAPACITY=8192, ENCODING=3)),
    (skip.decide_rows_kernel, dict(DECIDE, TILE=32)),
    (skip.decide_rows_kernel, dict(DECIDE, TILE=1)),
    (substitutes.put_zero_kernel, dict(WIDTH=4096, TILE=1024)),
    (substitutes.attend_window_kernel, dict(WINDOW, **STEP)),
    (substitutes.attend_window_kernel, dict(WINDOW, **dict(STEP, ENCODING=3))),
    (substitutes.average_outputs_kernel, dict(WIDTH=4096, BLOCK_SIZE=16, TILE=128)),
    (carry.carry_scores_kernel, dict(C=64, K=32, BLOCK_SIZE=16, TILE=128)),
    (carry.carry_means_kernel, dict(C=64, K=32, WIDTH=4096, BLOCK_SIZE=16, TILE=128)),
]
for kernel, constants in KERNELS:
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    for capability in (80, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
"""


def test_the_kernels_compile_for_two_generations_of_gpus():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


GATE = """
import gpu_kernels
kernels = gpu_kernels.compiled_kernels(list(gpu_kernels.QUICK), (90,))
assert {"score_kernel", "compact_kernel", "compare_tokens_kernel", "attend_window_kernel"} <= {
    kernel["kernel"] for kernel in kernels
}
for kernel in kernels:
    assert not any(kernel["spilled"].values()), kernel
    assert kernel["shared_bytes"] <= gpu_kernels.SHARED_LIMIT[kernel["capability"]], kernel
    for line, width in kernel["narrowest_access"].items():
        # One token alone is spread over all threads, and so is a window's tile of 16 tokens of one byte an element.
        alone = "base + place" in line or "base + D + place" in line
        window_of_bytes = kernel["kernel"] == "attend_window_kernel" and width == 8 and "fp8" in kernel["cases"][0]
        assert width == 16 or alone or window_of_bytes, (line, kernel)
"""


def test_no_kernel_spills_and_cache_elements_are_moved_16_bytes_at_a_time():
    path = os.pathsep.join([str(BENCHMARKS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", GATE],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_recorded_kernels_of_a_seal_spill_nothing_on_any_generation():
    recorded = json.loads((BENCHMARKS / "results" / "gpu_kernels.json").read_text())["kernels"]
    seals = [kernel for kernel in recorded if kernel["kernel"] in ("score_kernel", "compact_kernel")]
    assert {kernel["capability"] for kernel in seals} == {80, 90, 100}
    assert not any(sum(kernel["spilled"].values()) for kernel in seals)
    # What others spill is a register or two.
    assert max(kernel["spilled"]["stored"] for kernel in recorded) <= 8


SEALS = """
import os
import numpy as np
import torch
import triton
from triton.runtime.jit import JITFunction
import sys, tests.gpu_dryrun
sys.path[:0] = tests.gpu_dryrun.__path__
import pretend_cuda
del os.environ["TRITON_INTERPRET"]  # the compiler is what is looked at
from vllm_tokenfilter.kernels.gpu import seal as gpu
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.rules import ScoreRule
from vllm_tokenfilter.kernels.plan import plan_seals
from vllm_tokenfilter.layout import Layout

pretend_cuda.pretend_driver()
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what["key"])
launch = JITFunction.run
JITFunction.run = lambda self, *args, **options: launch(self, *args, **{**options, "warmup": True})
layout = Layout(64, 32, 64, 4, 64)
cache = GpuCache.over([torch.zeros(4, 2, 16, 128, dtype=torch.bfloat16)], [0], torch.bfloat16)
gpu.warm_up(cache, layout, ScoreRule())
assert len(compiled) == 2, compiled
for lengths in ([128], [128, 200, 128], [192] * 4, [512, 300, 128, 128, 129], [4096] * 16):
    plan = plan_seals(np.zeros(len(lengths), np.int64), np.array(lengths), 16, layout)
    tables = torch.zeros(len(lengths), plan.num_blocks + 3, dtype=torch.int32)
    due = DueSealsOnDevice.snapshot(plan, tables, torch.zeros(len(lengths), dtype=torch.int32))
    gpu.seal_chunks(cache, due, layout, ScoreRule())
assert len(compiled) == 2, f"{len(compiled) - 2} compilations while requests wait"
"""


def test_no_seal_waits_for_the_compiler_once_the_kernels_are_warm():
    done = subprocess.run([sys.executable, "-c", SEALS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
