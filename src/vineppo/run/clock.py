"""Seconds of an iteration's phases, and the process's peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Timer:
    """Seconds spent in each phase of an iteration: `with timer("sample"): ...`, then `timer.pop()`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase, also when the block raises. Do not nest phases."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last call, and start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def peak_memory(device: Any) -> int:
    """Bytes that this process has needed at most, on the accelerator (a torch.device) or of the machine's memory."""
    if device.type == "cuda":
        import torch  # heavy, and not needed to open a run's directory

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
