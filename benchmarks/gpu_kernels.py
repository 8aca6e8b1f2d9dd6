"""Every GPU kernel through Triton's own compiler, which needs no GPU: what each is made of, for the models' shapes.

The launchers themselves are called, with tensors of the shapes vLLM allocates, so that Triton specializes each kernel
as it would on a device; nothing is launched. Kept of each: registers, bytes spilled, instructions, shared memory, and
how wide a thread's accesses to cache elements are. `python benchmarks/gpu_kernels.py` writes
benchmarks/results/gpu_kernels.json; tests/kernels/gpu/test_compile.py holds the same to its limits.
"""

import linecache
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from vllm_tokenfilter.config import AttentionSkipping, FilterConfig
from vllm_tokenfilter.kernels.gpu import lengths, rows, skip, substitutes
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.kernels.gpu.carry import CarriedOnDevice, follow_seals
from vllm_tokenfilter.kernels.gpu.due import DueSealsOnDevice
from vllm_tokenfilter.kernels.gpu.seal import seal_chunks
from vllm_tokenfilter.kernels.rules import ScoreRule, SkipRule
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result

OUT = Path(__file__).parent / "results" / "gpu_kernels.json"
CAPABILITIES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
BLOCK_SIZES = (16, 32, 64, 128)
#: Shared memory that one program may take, in bytes: CUDA C++ Programming Guide, technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Rows and tokens of vLLM's buffers on a large GPU, and entries of a row of its block table.
MAX_REQS, MAX_TOKENS, MAX_BLOCKS = 1024, 8192, 512


@dataclass(frozen=True)
class Shape:
    """A model's attention: query heads, KV heads, head size."""

    query_heads: int
    kv_heads: int
    head_size: int


#: The models the gate is about, and two more for the head sizes in between.
SHAPES = {
    "Llama-3-8B": Shape(32, 8, 128),
    "Llama-2-13B": Shape(40, 40, 128),
    "Qwen2.5-7B": Shape(28, 4, 128),
    "Phi-4": Shape(40, 10, 128),
    "Gemma-3-12B": Shape(16, 8, 256),
    "Llama-3.2-1B": Shape(32, 8, 64),
    "Phi-3-mini": Shape(32, 32, 96),
}
#: One per head size for every block size; what is quick enough for `make test`.
QUICK = (("Llama-3-8B", 16), ("Gemma-3-12B", 16))


class CompileOnly(DriverBase):
    """Triton's view of a GPU of one compute capability that only compiles; a device for each, so that none shares."""

    capability = CAPABILITIES[0]

    @staticmethod
    def is_active() -> bool:
        """See `DriverBase`."""
        return True

    def get_current_target(self) -> GPUTarget:
        """See `DriverBase`."""
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """See `DriverBase`."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """See `DriverBase`."""
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        """See `DriverBase`."""
        return 0

    def map_python_to_cpp_type(self, type_: str) -> str:
        """See `DriverBase`."""
        return type_

    def get_benchmarker(self) -> Any:
        """See `DriverBase`."""
        raise NotImplementedError("nothing runs here")


class Compiler:
    """Records what the launchers compile; nothing is launched from its making on, in this process."""

    def __init__(self) -> None:
        self._driver, self._found = CompileOnly(), {}
        triton.runtime.driver.set_active(self._driver)
        run = JITFunction.run

        def compile_only(kernel: JITFunction, *args: Any, **options: Any) -> Any:
            compiled = run(kernel, *args, **{**options, "warmup": True})
            self._found[compiled.hash] = compiled
            return compiled

        JITFunction.run = compile_only

    def of(self, capability: int, shape: Shape, dtype: torch.dtype, block_size: int) -> Iterator[Any]:
        """What the launchers compile for one deployment, each kernel once."""
        self._driver.capability, self._found = capability, {}
        launch_all(shape, dtype, block_size)
        return iter(self._found.values())


def launch_all(shape: Shape, dtype: torch.dtype, block_size: int) -> None:
    """Call every launcher as a server with default settings does, in a decode step and in a prefill step."""
    config = FilterConfig(pruning_ratio=0.5, attention_skipping=AttentionSkipping(ratio=0.25))
    layout, rule, width = config.layout, SkipRule.of(config), shape.query_heads * shape.head_size
    # As vLLM lays it out by default: a block's tokens, then their heads.
    storage = torch.empty(4, block_size, shape.kv_heads, 2 * shape.head_size, dtype=dtype)
    cache = GpuCache.over([storage.transpose(1, 2)] * 2, [0, 1], dtype)
    plan = DueSealsOnDevice.nothing(layout, torch.device("cpu")).plan
    tables, starts = _integers(MAX_REQS, MAX_BLOCKS), _integers(MAX_REQS + 1)
    due = DueSealsOnDevice.snapshot(plan, tables, _integers(MAX_REQS))
    seal_chunks(cache, due, layout, ScoreRule.of(config))
    seq_lens, slots = _integers(MAX_REQS), torch.zeros(MAX_TOKENS, dtype=torch.int64)
    buffers = lengths.StepBuffers.make(MAX_REQS, MAX_BLOCKS, torch.device("cpu"))
    mark = max(1, 32 // block_size)
    for mark_blocks in (0, mark):
        lengths.adjust_step(starts, seq_lens, tables, slots, buffers, layout, block_size, mark_blocks)
    handed = rows.SkipBuffers.make(MAX_REQS, MAX_TOKENS, shape.kv_heads, torch.device("cpu"))
    rows.describe_rows(starts, seq_lens, seq_lens, handed, layout)
    carried, one = CarriedOnDevice.over(cache, width), torch.ones(1)
    query = torch.zeros(MAX_REQS, shape.query_heads, shape.head_size, dtype=torch.bfloat16)
    for decoding in (True, False):
        step = rows.SkipRowsOnDevice(starts, seq_lens, tables, slots, MAX_REQS, MAX_REQS, decoding)
        skip.decide(carried, rule, step, handed, 0, 2500, "window")
    for name in ("none", "window", "running_output"):
        substitutes.put_substitute(
            carried, rule, step, handed, 0, name, query, torch.zeros_like(query), 0.1, 0.0, one, one
        )
    follow_seals(carried, due, layout)


def _integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def described(compiled: Any) -> dict[str, Any]:
    """What a compiled kernel is made of; a dict for JSON."""
    sass = compiled.asm["sass"]
    return {
        "kernel": compiled.metadata.name,
        "warps": compiled.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", _resources(compiled.asm["cubin"]))[1]),
        "spilled": {way: _bytes(sass, code) for way, code in (("stored", "STL"), ("loaded", "LDL"))},
        "instructions": len(re.findall(r"^[^\t]*\t.*;", sass, re.MULTILINE)),
        "shared_bytes": compiled.metadata.shared,
        "narrowest_access": narrowest_access(compiled.asm["ptx"]),
    }


def _resources(cubin: bytes) -> str:
    """What NVIDIA's tool says a kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _bytes(sass: str, code: str) -> int:
    """Bytes that the instructions `code` move, each counted once."""
    widths = re.findall(rf"\b{code}(?:\.\w+)*?(?:\.(8|16|64|128|U8|S8|U16|S16))?\s", sass)
    return sum(int(width.strip("US") or 32) // 8 for width in widths)


def narrowest_access(ptx: str) -> dict[str, int]:
    """Bytes a thread takes at once where cache elements are read or written, by the line of our source; the least."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx))
    found: dict[str, int] = {}
    line, told = "", False
    for text in ptx.splitlines():
        # Inside of one access LLVM counts the lines of its assembly on: the first place named is that of the source.
        if "begin inline asm" in text:
            told = False
        elif (place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text)) and not told:
            line = linecache.getline(files[place[1]], int(place[2])).strip()
            told = True
        elif "end inline asm" in text:
            told = False
        if not re.search(r"tl\.(load|store)\(base\b", line):
            continue
        if access := re.search(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s", text):
            width = int(access[1] or 1) * int(access[2]) // 8
        elif access := re.search(r"\bcp\.async\.c[ag]\.shared\.global.*\],\s*0x(\w+)", text):
            width = int(access[1], 16)
        else:
            continue
        found[line] = min(width, found.get(line, width))
    return found


def compiled_kernels(
    models: list[tuple[str, int]], capabilities: tuple[int, ...] = CAPABILITIES
) -> list[dict[str, Any]]:
    """Compile for models and block sizes in every dtype and generation; what is alike once, with its cases."""
    compiler, found = Compiler(), {}
    for capability in capabilities:
        for name, block_size in models:
            for dtype, type_ in DTYPES.items():
                for compiled in compiler.of(capability, SHAPES[name], type_, block_size):
                    key = capability, compiled.hash
                    if key not in found:
                        found[key] = {"capability": capability, **described(compiled), "cases": []}
                    found[key]["cases"].append(f"{name} {dtype} {block_size}")
    return list(found.values())


def main(quick: bool = False, out: Path = OUT) -> None:
    """Compile every kernel, or two models' with --quick, and write the JSON."""
    every = [(name, size) for name in SHAPES for size in BLOCK_SIZES]
    kernels = compiled_kernels(list(QUICK) if quick else every)
    write_result(out, {"kind": "gpu_kernels", **provenance(), "triton": triton.__version__, "kernels": kernels})


if __name__ == "__main__":
    typer.run(main)
