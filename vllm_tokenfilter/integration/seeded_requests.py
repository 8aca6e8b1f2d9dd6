"""A patch on CPU, as in `integration/workarounds.py`: a seeded request keeps its numbers while its prompt is read.

Symptom: a request with a seed and a prompt of several steps ends the engine ("CPU Generator does not use offset").
Cause: each step of a prompt draws a number for nothing, and vLLM takes it back by the generator's offset, which only
CUDA's have. Steps are short here, so this meets many prompts.
Twice is safe: the wrappers are marked. Inert: steps without such a request go straight through.
Delete when: vLLM takes the draw of a CPU generator back.

Source: vllm/v1/worker/gpu_model_runner.py (`_sample`, `_bookkeeping_sync`, `discard_request_mask`).
"""

import functools
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_MARK = "_token_filtering_takes_draws_back"


def take_draws_back() -> None:
    """Put a generator back to where it was before it drew for a token that is thrown away."""
    sample, bookkeep = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync
    if not current_platform.is_cpu() or hasattr(sample, _MARK):
        return

    @functools.wraps(sample)
    def _sample(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in _drawing_for_nothing(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    @functools.wraps(bookkeep)
    def _bookkeeping_sync(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        done = _drawing_for_nothing(self)
        generators = self.input_batch.generators
        for row in done:
            del generators[row]
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            generators.update(done)

    setattr(_sample, _MARK, True)
    GPUModelRunner._sample = _sample  # type: ignore[method-assign]
    GPUModelRunner._bookkeeping_sync = _bookkeeping_sync  # type: ignore[method-assign]


def _drawing_for_nothing(runner: GPUModelRunner) -> dict[int, torch.Generator]:
    """The generators of the rows that are in the middle of a prompt, by row."""
    discarded = runner.discard_request_mask.np
    return {row: generator for row, generator in runner.input_batch.generators.items() if discarded[row]}
