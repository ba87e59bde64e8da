"""Colour, marker and line of each algorithm."""

from __future__ import annotations

from typing import NamedTuple


class _Style(NamedTuple):
    label: str
    colour: str
    marker: str
    line: str


STYLES: dict[str, _Style] = {
    "vineppo": _Style("VinePPO", "#D55E00", "o", "-"),
    "ppo": _Style("PPO", "#0072B2", "s", "-"),
    "grpo": _Style("GRPO", "#009E73", "^", "--"),
    "rloo": _Style("RLOO", "#CC79A7", "D", "--"),
    "reinforce": _Style("REINFORCE", "#56B4E9", "v", ":"),
}
