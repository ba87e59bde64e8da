"""One part of the check: its settings, its time, and its results so far."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vineppo.run.clock import peak_memory

GIB = 1 << 30
Cells = dict[str, Any]


class OutOfTime(Exception):
    """The time of a part is over."""


@dataclass
class Part:
    """The settings and the time of one part of the check, and the results that it has recorded so far."""

    device: str
    small: bool
    model: str
    """Directory of a model with trained weights, or an empty text."""
    out: Path
    deadline: float
    """Value of `time.perf_counter()` at which the part should end."""
    save: Callable[[], None]
    facts: Cells = field(default_factory=dict)
    tables: dict[str, list[Cells]] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds until the part should end."""
        return self.deadline - time.perf_counter()

    def check(self, seconds: float = 0.0) -> None:
        """Raise OutOfTime if less than `seconds` are left."""
        if self.left() < seconds:
            raise OutOfTime

    def row(self, table: str, cells: Mapping[str, Any]) -> None:
        """Add a row to a table, and write all results."""
        self.tables.setdefault(table, []).append(dict(cells))
        self.save()

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.startswith("cuda")

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Return the result of a function and its seconds, including the work that it left on the GPU."""
        self.wait()
        began = time.perf_counter()
        result = work()
        self.wait()
        return result, time.perf_counter() - began

    def wait(self) -> None:
        """Wait until the GPU has finished all work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Free the memory that is no longer used, and reset the peak."""
        gc.collect()
        if self.cuda and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Return the peak memory in GiB: of the GPU since the last `clear`, or on a CPU of the process."""
        return round(peak_memory(torch.device(self.device)) / GIB, 3)
