"""Add up numbers that a device computes, and wait for the device only when the sums are needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

Parts = Mapping[str, tuple[torch.Tensor, float]]
"""Name of a sum -> (a scalar tensor, the number by which it is divided)."""


class Sums:
    """Sums of quotients by name. The numbers stay on the device until `totals` adds them up as Python's floats."""

    def __init__(self) -> None:
        self._keys: list[tuple[str, float]] = []
        self._numbers: list[torch.Tensor] = []

    def add(self, parts: Parts) -> None:
        """Add one quotient to each sum."""
        for name, (number, divisor) in parts.items():
            self._keys.append((name, divisor))
            self._numbers.append(number.detach())

    def totals(self) -> dict[str, float]:
        """Wait for the device, and return all sums."""
        totals: dict[str, float] = {}
        values = []
        if self._numbers:
            # No number is rounded: the widest dtype holds all of them.
            widest = functools.reduce(torch.promote_types, {number.dtype for number in self._numbers})
            values = torch.stack([number.to(widest) for number in self._numbers]).tolist()
        for (name, divisor), value in zip(self._keys, values, strict=True):
            totals[name] = totals.get(name, 0.0) + value / divisor
        return totals
