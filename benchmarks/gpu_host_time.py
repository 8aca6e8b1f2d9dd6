"""Host time that Token Filtering adds to a GPU's decode step, by KV-cache groups and rows; runs on any machine.

Each group's metadata builder is called as vLLM's runner calls it, over an inner builder that does nothing, with vLLM's
own description of a step. Kernels are not launched: what a launch takes on the host is missing here. The tensors lie on
the CPU, so the few copies of a step with seals are done instead of launched. A request of a random length between 500
and 7500 tokens decodes in each row; with many rows every step has chunks to seal.

The groups are Llama-3-8B's: `uniform`, all 32 layers alike; `tuned`, 8 dense layers and 24 pruned ones; `3 dense`,
which vLLM cuts into groups of three layers. Times are microseconds of the one thread that works, so that others on the
machine do not count.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.integration.counters import StepCounters
from vllm_tokenfilter.integration.gpu.backend import FilteringBuilder
from vllm_tokenfilter.integration.gpu.steps import FilteredSteps, StepsInCommon
from vllm_tokenfilter.kernels.gpu import compact, lengths, score
from vllm_tokenfilter.kernels.gpu.cache import GpuCache
from vllm_tokenfilter.layer_plan import LayerPlan
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result

OUT = Path(__file__).parent / "results" / "gpu_host_time.json"
#: Dense and filtered groups, and layers of a group.
MODELS = {"uniform": (0, 1, 32), "tuned": (1, 3, 8), "3 dense": (1, 10, 3)}
ROWS = (1, 8, 32, 256)
CONTEXT, BLOCK_SIZE, WARM_UP = 8192, 16, 20
#: Bytes of Llama-3-8B's weights in bfloat16, and of memory that an H100 reads in a second, from its data sheet.
WEIGHT_BYTES, BYTES_PER_SECOND = 2 * 8_030_261_248, 3.35e12


class NotLaunched:
    """Stands in for a Triton kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: None


class Inner:
    """Stands in for vLLM's builder."""

    def build(self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        """Give back what it is given."""
        return common


class Builder(FilteringBuilder, Inner):
    """A group's builder, made without an engine."""

    def __init__(self, config: FilterConfig, num_layers: int, filtered: bool, rows: int, common: StepsInCommon) -> None:
        self.plan = LayerPlan.of(config if filtered else FilterConfig(pruning_ratio=0.0), num_layers)
        self._common, self._capturing, self._dense_reason = common, False, next(iter(self.plan.dense), "")
        self._steps, self.counters = None, StepCounters()
        if filtered:
            caches = [torch.zeros(4, 8, BLOCK_SIZE, 256, dtype=torch.bfloat16) for _ in range(num_layers)]
            self._steps = FilteredSteps(
                config,
                config.layout,
                BLOCK_SIZE,
                1,
                rows,
                CONTEXT // BLOCK_SIZE + 1,
                torch.device("cpu"),
                lambda: GpuCache.over(caches, list(range(num_layers)), torch.bfloat16),
                common=common,
            )


def measure(dense: int, filtered: int, num_layers: int, rows: int, steps: int) -> list[list[float]]:
    """Microseconds of each group in each step, dense groups first."""
    config, common = FilterConfig(pruning_ratio=0.5), StepsInCommon()
    kinds = [False] * dense + [True] * filtered
    builders = [Builder(config, num_layers, kind, rows, common) for kind in kinds]
    draw = np.random.default_rng(0)
    lengths_now = draw.integers(500, 7500, rows, dtype=np.int32)
    shape = rows, CONTEXT // BLOCK_SIZE + 1
    tables = [torch.from_numpy(draw.integers(1, 1000, shape, dtype=np.int32)) for _ in kinds]
    starts, prefilling = torch.arange(rows + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.bool)
    samples = []
    gc.collect()
    for number in range(WARM_UP + steps):
        lengths_now = np.minimum(lengths_now + 1, CONTEXT)
        seq_lens = torch.from_numpy(lengths_now)
        spent = []
        for builder, table in zip(builders, tables, strict=True):
            step = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=rows,
                num_actual_tokens=rows,
                max_query_len=1,
                max_seq_len=int(lengths_now.max()),
                block_table_tensor=table,
                slot_mapping=torch.zeros(rows, dtype=torch.int64),
                is_prefilling=prefilling,
            )
            started = time.thread_time()
            builder.build(0, step)
            spent.append(1e6 * (time.thread_time() - started))
        if number >= WARM_UP:
            samples.append(spent)
    return samples


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the bounds of the middle four fifths."""
    tenths = statistics.quantiles(values, n=10)
    found = {"median": statistics.median(values), "tenth": tenths[0], "ninetieth": tenths[-1]}
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, default=OUT)
    options = parser.parse_args()
    lengths.adjust_step_kernel = score.score_kernel = compact.compact_kernel = NotLaunched()
    cells = []
    for name, (dense, filtered, num_layers) in MODELS.items():
        for rows in ROWS:
            samples = measure(dense, filtered, num_layers, rows, options.steps)
            groups = dense + filtered
            cell = {
                "model": name,
                "rows": rows,
                "groups": groups,
                "dense_groups": dense,
                "layers_of_a_group": num_layers,
                "step_us": spread([sum(one) for one in samples]),
                "group_us": spread([sum(one) / groups for one in samples]),
                "first_filtered_us": spread([one[dense] for one in samples]),
                "further_filtered_us": spread([us for one in samples for us in one[dense + 1 :]])
                if filtered > 1
                else None,
            }
            cells.append(cell)
            print(
                name, rows, "rows,", groups, "groups:", cell["step_us"], cell["group_us"], cell["further_filtered_us"]
            )
    shortest = 1e6 * WEIGHT_BYTES / BYTES_PER_SECOND
    tuned = next(cell for cell in cells if (cell["model"], cell["rows"]) == ("tuned", max(ROWS)))
    further = tuned["further_filtered_us"]["median"]
    result = {
        "kind": "gpu_host_time",
        **provenance(),
        "parameters": {"steps": options.steps, "context": CONTEXT, "block_size": BLOCK_SIZE, "pruning_ratio": 0.5},
        "cells": cells,
        #: A decode step reads the weights at least once: no step of an H100 is shorter.
        "shortest_step_us": round(shortest, 1),
        #: Groups whose builders take less than it; vLLM's own work on the host comes on top.
        "groups_in_shortest_step": int(shortest // further),
    }
    write_result(options.json, result)


if __name__ == "__main__":
    main()
