"""How long seals take on a GPU, without a step waiting for one.

A pair of events goes into the stream around each seal; once the device has passed them, which is looked at when the
next seal starts and when somebody asks, their distance is added to the counters. A seal that is still on its way is
missing from the figure until then.

Source: https://docs.pytorch.org/docs/stable/generated/torch.cuda.Event.html.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_tokenfilter.integration.counters import StepCounters


class SealClock:
    """Adds the time of seals to `counters.seal_seconds`."""

    def __init__(self, counters: StepCounters, device: torch.device) -> None:
        self._counters = counters
        self._on_device = device.type == "cuda"
        self._running: deque[tuple[Any, Any]] = deque()
        self._idle: list[tuple[Any, Any]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time what is launched inside on the current stream."""
        if not self._on_device:
            started = time.perf_counter()
            yield
            self._counters.seal_seconds += time.perf_counter() - started
            return
        self.settle()
        begin, end = self._idle.pop() if self._idle else (_event(), _event())
        begin.record()
        yield
        end.record()
        self._running.append((begin, end))

    def settle(self) -> None:
        """Take over the seals that are done; waits for none."""
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            self._counters.seal_seconds += begin.elapsed_time(end) / 1000
            self._idle.append((begin, end))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
