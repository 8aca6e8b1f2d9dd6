"""Decode attention and sealing on an NVIDIA GPU: our path over n tokens, and the same kernel over n and over stored(n).

A step of decoding is the attention of its layers in one CUDA graph, as vLLM runs it; ours has our own launch before it.
The three cases alternate, ratios are taken inside a repeat, and medians with their spread are reported. A seal is timed
against the bytes it must move, at the speed of a plain copy on the same device. Kernels are first held to attention in
plain PyTorch. `make bench-gpu` writes benchmarks/results/gpu_attention.json; `--interpret` runs the same code, tiny, in
Triton's interpreter on a CPU: its times mean nothing.
"""

import functools
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_decoding import (
    KERNELS,
    DeviceTimer,
    HostTimer,
    Kernel,
    Requests,
    Run,
    Shape,
    copy_bandwidth,
    graph_of,
    interpret_triton,
    seal_bytes_floor,
)
from rich.console import Console
from rich.table import Table

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.layout import stored_tokens
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result

OUT = Path(__file__).parent / "results" / "gpu_attention.json"
SHAPES = {"Llama-3-8B": Shape(32, 32, 8, 128), "Llama-2-13B": Shape(40, 40, 40, 128)}
CONTEXTS, BATCHES = (8192, 32768, 131072), (1, 8, 32)
#: Tokens of a prefill step, vLLM's budget under our defaults.
PREFILL_STEP = 512
TINY_SHAPES, TINY_CONTEXTS, TINY_BATCHES, TINY_PREFILL_STEP = {"tiny": Shape(1, 2, 1, 64)}, (128,), (1, 2), 64
#: Of the device's free memory, what the caches may take.
MEMORY_SHARE = 0.85
#: How far a kernel's output may be from plain attention, relative, rounding of bfloat16 included.
_ERROR = 0.02


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


class Bench:
    """One run: the device, the settings, and what was measured so far."""

    def __init__(self, config: FilterConfig, repeats: int, block_size: int, interpret: bool) -> None:
        self.config, self.repeats, self.block_size = config, repeats, block_size
        self.prefill_step = TINY_PREFILL_STEP if interpret else PREFILL_STEP
        self.device = torch.device("cpu" if interpret else "cuda")
        # The interpreter cannot store what vLLM's kernel makes of bfloat16.
        self.dtype = torch.float32 if interpret else torch.bfloat16
        self.timer: DeviceTimer | HostTimer = HostTimer() if interpret else DeviceTimer()
        self.bandwidth = copy_bandwidth(self.device, self.timer, 1 << 20 if interpret else 1 << 30)
        self.decode: list[dict[str, Any]] = []
        self.sealing: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []

    def measure(self, name: str, shape: Shape, batch: int, context: int) -> None:
        """Everything for one shape, batch and context, or the reason why not."""
        cell = {"shape": name, "batch": batch, "context": context}
        tokens = context + 1
        needed = batch * -(-tokens // self.block_size) * self.block_size * shape.token_bytes(self.dtype)
        layers = min(shape.layers, self._available() // needed)
        if not layers:
            self.skipped.append({**cell, "reason": f"one layer's cache takes {needed / 2**30:.1f} GiB"})
            return
        cell["layers_measured"] = int(layers)
        requests = Requests(shape, int(layers), batch, tokens, self.block_size, self.device, self.dtype)
        alone = self._seals(cell, requests, context - 1, 1, 1)
        together = alone if batch == 1 else self._seals(cell, requests, context - 1, 1, batch)
        if batch == 1:
            self._seals(cell, requests, context - self.prefill_step, self.prefill_step, 1)
        for make in KERNELS:
            kernel = make(shape, batch, self.device)
            if kernel.unavailable:
                self.skipped.append({**cell, "kernel": kernel.name, "reason": kernel.unavailable})
            else:
                self._attention(cell, shape, requests, kernel, together, alone)

    def _available(self) -> int:
        if self.device.type != "cuda":
            return 1 << 30
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0] * MEMORY_SHARE)

    def _seals(self, cell: dict[str, Any], requests: Requests, computed: int, new: int, rows: int) -> float:
        """Time the seals of a step of `new` tokens for each of `rows` requests; the median, in seconds."""
        steps, cache = requests.steps(self.config)
        due = requests.due(self.config, computed, new, rows)

        def run() -> None:
            steps.seal(requests.due(self.config, computed, new, rows), cache)

        run()  # compiles
        samples = [self.timer.seconds(run) for _ in range(self.repeats)]
        floor = seal_bytes_floor(cache, due.plan, self.config.layout)
        self.sealing.append(
            {
                **cell,
                "rows": rows,
                "new_tokens": new,
                "chunks": due.plan.num_chunks,
                "seconds": spread(samples),
                "bytes_floor": floor,
                "times_floor": spread([sample * self.bandwidth / floor for sample in samples]),
                "samples": samples,
            }
        )
        return statistics.median(samples)

    def _attention(
        self, cell: dict[str, Any], shape: Shape, requests: Requests, kernel: Kernel, together: float, alone: float
    ) -> None:
        """Time one decode step of a kernel three ways."""
        batch, context, device = cell["batch"], cell["context"], self.device
        steps, _ = requests.steps(self.config)
        step = requests.decode_step(context)
        adjusted = steps.adjust(step)
        assert not steps.anything_due, "a seal would hide in the step"
        stored = stored_tokens(context, self.config.layout) + 1
        assert adjusted.max_seq_len == stored
        query = torch.randn(batch, shape.query_heads, shape.head_size, device=device).to(self.dtype)
        out = {name: torch.empty_like(query) for name in ("ours", "stock", "stock at stored")}
        fixed = torch.full((batch,), stored, dtype=torch.int32, device=device)

        def attend(name: str, seq_lens: torch.Tensor, longest: int, table: torch.Tensor) -> Run:
            def layers() -> None:
                for cache in requests.caches:
                    kernel.attend(query, cache, seq_lens, longest, table, out[name])

            return graph_of(layers, device)

        over_buffers = attend("ours", adjusted.seq_lens, adjusted.max_seq_len, adjusted.block_table_tensor)

        def ours() -> None:
            steps.adjust(step)
            over_buffers()

        cases: dict[str, Run] = {
            "ours": ours,
            "stock": attend("stock", step.seq_lens, context + 1, requests.table),
            "stock at stored": attend("stock at stored", fixed, stored, requests.table),
        }
        samples: dict[str, list[float]] = {name: [] for name in cases}
        for repeat in range(-1, self.repeats):
            for name, run in cases.items() if repeat % 2 else reversed(cases.items()):
                seconds = self.timer.seconds(run)
                if repeat >= 0:
                    samples[name].append(seconds)
        assert torch.equal(out["ours"], out["stock at stored"]), "the two did not read the same"
        for name, slots in (("ours", stored), ("stock", context + 1)):
            plain = requests.plain_attention(query, slots)
            error = (out[name][0, : len(plain)].float() - plain).norm() / plain.norm()
            assert error < _ERROR, f"{kernel.name} is off by {error:.1%} ({name})"
        host = HostTimer()
        chunk, decoding = self.config.chunk_size, statistics.median(samples["ours"])
        self.decode.append(
            {
                **cell,
                "kernel": kernel.name,
                "stored": stored,
                "seconds": {name: spread(values) for name, values in samples.items()},
                "speedup": _ratio(samples, "stock", "ours"),
                "against_stored": _ratio(samples, "ours", "stock at stored"),
                # A row seals once in a chunk of tokens: all rows in one step, or each in a step of its own.
                "sealing_share": {
                    "together": _share(together / chunk, decoding),
                    "one by one": _share(batch * alone / chunk, decoding),
                },
                "host_seconds": statistics.median(
                    host.seconds(functools.partial(steps.adjust, step)) for _ in range(self.repeats)
                ),
                "samples": samples,
            }
        )


def _ratio(samples: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    return spread([a / b for a, b in zip(samples[above], samples[below], strict=True)])


def _share(sealing: float, attention: float) -> float:
    return sealing / (sealing + attention)


def device_facts(device: torch.device, bandwidth: float) -> dict[str, Any]:
    """What the figures depend on."""
    facts: dict[str, Any] = {"name": "Triton's interpreter", "copy_bytes_per_s": bandwidth}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    import triton

    return {**facts, "triton": triton.__version__}


def show(bench: Bench, console: Console) -> None:
    decode = Table("shape", "kernel", "batch", "context", "layers", "ms", "speed-up", "to stored", "sealing")
    for cell in bench.decode:
        decode.add_row(
            cell["shape"],
            cell["kernel"],
            *(str(cell[key]) for key in ("batch", "context", "layers_measured")),
            f"{1000 * cell['seconds']['ours']['median']:.3f}",
            *(f"{cell[key]['median']:.3f}" for key in ("speedup", "against_stored")),
            f"{cell['sealing_share']['together']:.2%}",
        )
    sealing = Table("shape", "rows", "context", "layers", "chunks", "ms", "times the floor")
    for cell in bench.sealing:
        sealing.add_row(
            cell["shape"],
            *(str(cell[key]) for key in ("rows", "context", "layers_measured", "chunks")),
            f"{1000 * cell['seconds']['median']:.3f}",
            f"{cell['times_floor']['median']:.2f}",
        )
    console.print(decode, sealing)
    for cell in bench.skipped:
        console.print("skipped: " + ", ".join(f"{key} {value}" for key, value in cell.items()))


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Result file; without it nothing is written by --interpret.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 16,
    pruning_ratio: Annotated[float, typer.Option(help="The filter's ratio.")] = 0.5,
    interpret: Annotated[bool, typer.Option(help="Try the code, tiny, without a GPU.")] = False,
) -> None:
    """Measure, print tables, write the JSON."""
    if interpret:
        interpret_triton()
    elif not torch.cuda.is_available():
        raise SystemExit("No NVIDIA GPU here, or a PyTorch without CUDA; --interpret tries the code without one.")
    console = Console()
    started = time.perf_counter()
    shapes, contexts, batches = SHAPES, CONTEXTS, BATCHES
    if interpret:
        shapes, contexts, batches = TINY_SHAPES, TINY_CONTEXTS, TINY_BATCHES
    bench = Bench(FilterConfig(pruning_ratio=pruning_ratio), repeats, block_size, interpret)
    for name, shape in shapes.items():
        for context in contexts:
            for batch in batches:
                console.print(f"{name}: {batch} x {context} tokens ...")
                bench.measure(name, shape, batch, context)
    show(bench, console)
    result = {
        "benchmark": "gpu_attention",
        **provenance(),
        "device": device_facts(bench.device, bench.bandwidth),
        "interpreted": interpret,
        "parameters": {
            "repeats": repeats,
            "block_size": block_size,
            "pruning_ratio": pruning_ratio,
            "chunk_size": bench.config.chunk_size,
            "recent_window": bench.config.recent_window,
            "prefill_step": bench.prefill_step,
            "dtype": str(bench.dtype).removeprefix("torch."),
            "shapes": {name: vars(shape) for name, shape in shapes.items()},
        },
        "decode": bench.decode,
        "sealing": bench.sealing,
        "skipped": bench.skipped,
        "seconds": round(time.perf_counter() - started),
    }
    out = out or (None if interpret else OUT)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_result(out, result)
        console.print(f"Written: {out}")


if __name__ == "__main__":
    typer.run(main)
