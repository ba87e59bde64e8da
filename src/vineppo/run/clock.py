"""Measure the time of each phase of an iteration, and the peak memory of the process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Timer:
    """Measure the seconds spent in each phase of an iteration: `with timer("sample"): ...`, then `timer.pop()`.

    Args:
        clock: function that returns the current time in seconds.
        on_phase: function that is called with the name of each phase when the phase begins.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, on_phase: Callable[[str], None] | None = None
    ) -> None:
        self._clock, self._on_phase = clock, on_phase
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the duration of the `with` block to a phase, even if the block raises an exception.

        Blocks must not be nested, because the time of the inner block would count twice.
        """
        if self._on_phase is not None:
            self._on_phase(phase)
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def pop(self) -> dict[str, float]:
        """Return a dictionary from each phase to its seconds since the last call of `pop`, and start again from 0."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def peak_memory(device: Any) -> int:
    """Return the peak memory of this process in bytes: GPU memory for a CUDA device, else main memory.

    Args:
        device: a `torch.device`.
    """
    if device.type == "cuda":
        import torch  # imported here because the import is slow, and on the CPU it is not needed

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    # ru_maxrss is in bytes on macOS, and in kibibytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
