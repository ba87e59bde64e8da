"""Grids of settings for `vineppo tune`: the combinations of values that are tried for each algorithm."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vineppo.compare.arms import parse_values, short_name, with_setting
from vineppo.compare.spec import Arm
from vineppo.types import UserError

Grid = Mapping[str, Sequence[str]]
"""Dotted key -> values. A key such as `KEY+OTHER` stands for several settings that change together."""


def grids_of(algorithms: Sequence[Arm], texts: Iterable[str]) -> dict[str, Grid]:
    """Return the grid of each algorithm, by name.

    Args:
        algorithms: the algorithms, as arms without settings.
        texts: grids such as `learner.lr=1e-4,2e-4` for all algorithms, or `grpo:rollouts.group_size=2,4` for one, whose
            values replace those for all. A key in the section of an algorithm belongs to this algorithm only.
            `KEY+OTHER=A,B` gives both settings the same value, `KEY+OTHER=A:B,C:D` two values.
    Raises:
        UserError: if a text has another form, or names an algorithm that is not tuned.
    """
    names = {arm.name for arm in algorithms}
    shared: dict[str, tuple[str, ...]] = {}
    own: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in names}
    for text in texts:
        place, values = parse_values(text, "--grid")
        name, _, key = place.rpartition(":")
        name = name or (key.split(".")[0] if key.split(".")[0] in names else "")
        if name and name not in names:
            raise UserError(f"--grid {text}: {name} is not tuned; algorithms: {', '.join(sorted(names))}")
        (own[name] if name else shared)[key] = values
    return {name: {**shared, **own[name]} for name in names}


def cells_of(arm: Arm, grid: Grid, count: int | None) -> tuple[Arm, ...]:
    """Return the cells of an algorithm, as arms whose names show the values of the grid.

    Args:
        arm: the algorithm, as an arm without settings.
        grid: the grid of the algorithm.
        count: number of cells, chosen at random in a way that depends on the name of the algorithm only; None takes all
            combinations.
    Raises:
        UserError: if there are fewer combinations than `count`, or a value has too few or too many parts.
    """
    points = list(itertools.product(*grid.values()))
    if count is not None and len(points) < count:
        raise UserError(f"the grid of {arm.name} has {len(points)} combinations, but --cells is {count}; add values")
    if count is not None and len(points) > count:
        chosen = sorted(random.Random(arm.name).sample(range(len(points)), count))
        points = [points[i] for i in chosen]
    cells, firsts = [], [keys.split("+")[0] for keys in grid]
    for point in points:
        cell = arm
        for keys, value in zip(grid, point, strict=True):
            key, *tied = keys.split("+")
            first, *others = value.split(":") if tied and ":" in value else [value] * (1 + len(tied))
            if len(others) != len(tied):
                raise UserError(f"--grid {keys}: {value} has {1 + len(others)} values for {1 + len(tied)} settings")
            shown = first if set(others) <= {first} else "+".join((first, *others))
            cell = with_setting(cell, key, shown, short_name(key, firsts))
            cell = replace(cell, overrides={**cell.overrides, **dict(zip((key, *tied), (first, *others), strict=True))})
        cells.append(cell)
    return tuple(cells)
