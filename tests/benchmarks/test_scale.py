"""The simulation of many samplers: cases with closed forms, bounds of scheduling, failures, and what the tables say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from benchmarks.scale import RELATIVE_LENGTHS, limit_of, longest_draw, measured_draw, sweep
from benchmarks.simulation import (
    DESIGNS,
    NEVER,
    Machines,
    Workload,
    broadcast_seconds,
    run_units,
    simulate_iteration,
)


def constant(seconds: float) -> Any:
    return lambda generator, units, rows: np.full(units, seconds)


def workload(**changes: Any) -> Workload:
    """Return 64 rollouts and 128 continuations in units of 4 completions, 2 s each, without serial part and update."""
    values: dict[str, Any] = {
        "rollouts": 64,
        "continuations": 128,
        "unit_rows": 4,
        "rollout_seconds": constant(2.0),
        "continuation_seconds": constant(2.0),
        "serial_seconds": 0.0,
        "update_seconds": 0.0,
        "trainers": 1,
    }
    return Workload(**(values | changes))


@pytest.mark.parametrize("design", DESIGNS)
def test_one_sampler_needs_the_sum(design: str) -> None:
    outcome = run_units([1.0, 2.0, 4.0], [0.5], design)
    assert outcome.seconds == 14.0 == outcome.useful
    assert outcome.wasted == 0 == outcome.copies == outcome.failures
    assert outcome.done_by == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("units", "samplers"), [(12, 4), (13, 4), (3, 4), (1, 1), (4096, 4096)])
def test_equal_units_take_whole_rounds(design: str, units: int, samplers: int) -> None:
    outcome = run_units([2.5] * units, [1.0] * samplers, design)
    assert outcome.seconds == 2.5 * math.ceil(units / samplers)
    assert outcome.useful == 2.5 * units and len(outcome.done_by) == units


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("samplers", [2, 7, 40])
def test_the_bounds_of_list_scheduling(seed: int, samplers: int) -> None:
    seconds = np.random.default_rng(seed).exponential(size=100).tolist()
    total, longest = sum(seconds), max(seconds)
    taken = run_units(seconds, [1.0] * samplers, "stealing").seconds
    assert max(total / samplers, longest) <= taken <= total / samplers + (1 - 1 / samplers) * longest
    # With equal speeds a copy starts later than its original, so it never wins.
    copies = run_units(seconds, [1.0] * samplers, "stealing and copies")
    assert copies.seconds == taken and copies.useful == pytest.approx(total)
    shares = run_units(seconds, [1.0] * samplers, "fixed shares").seconds
    assert shares == pytest.approx(max(sum(seconds[i::samplers]) for i in range(samplers)))


def test_a_slow_sampler_holds_the_rest_only_without_copies() -> None:
    seconds, speeds = [1.0] * 4, [1.0, 0.1]
    assert run_units(seconds, speeds, "fixed shares").seconds == 20.0  # two units of the slow one
    stealing = run_units(seconds, speeds, "stealing")
    assert stealing.seconds == 10.0 and list(stealing.done_by.values()).count(1) == 1
    copies = run_units(seconds, speeds, "stealing and copies")
    # The fast one does units 0, 2 and 3, then a copy of unit 1; the slow one has worked 4 s for nothing.
    assert copies.seconds == 4.0 and copies.copies == 1 and copies.wasted == 4.0
    assert set(copies.done_by.values()) == {0}


def failing(at: dict[int, list[float]]) -> Any:
    """Return the function of the next failure: sampler -> times of its failures."""
    return lambda sampler, time: next((t for t in at.get(sampler, []) if t > time), NEVER)


def test_a_failed_unit_is_run_again() -> None:
    one = run_units([1.0], [1.0], "stealing", next_failure=failing({0: [0.5]}), restart=2.0)
    assert one.seconds == 3.5 and one.failures == 1 and one.wasted == 0.5 and one.useful == 1.0
    # The other sampler takes the unit when it is free, and does not wait for the restart.
    two = run_units([1.0, 1.0], [1.0, 1.0], "stealing", next_failure=failing({0: [0.5]}), restart=10.0)
    assert two.seconds == 2.0 and two.done_by == {0: 1, 1: 1}
    # Fixed shares wait for it.
    shares = run_units([1.0, 1.0], [1.0, 1.0], "fixed shares", next_failure=failing({0: [0.5]}), restart=10.0)
    assert shares.seconds == 11.5 and shares.done_by == {0: 0, 1: 1}


def test_an_idle_sampler_takes_the_unit_of_a_failed_one_at_once() -> None:
    outcome = run_units([1.0, 4.0], [1.0, 1.0], "stealing", next_failure=failing({1: [3.0]}), restart=50.0)
    assert outcome.seconds == 3.0 + 4.0 and outcome.done_by == {0: 0, 1: 0}
    # With copies, sampler 0 already works on it since 1 s, and nothing is run again.
    copies = run_units([1.0, 4.0], [1.0, 1.0], "stealing and copies", next_failure=failing({1: [3.0]}), restart=50.0)
    assert copies.seconds == 5.0 and copies.copies == 1 and copies.wasted == 3.0


@pytest.mark.parametrize("design", DESIGNS)
def test_all_units_are_done_whatever_fails(design: str) -> None:
    generator = np.random.default_rng(3)
    outcome = run_units(
        generator.exponential(size=300).tolist(),
        np.exp(generator.standard_normal(20)).tolist(),
        design,
        next_failure=lambda sampler, time: time + generator.exponential(4.0),
        restart=0.7,
    )
    assert sorted(outcome.done_by) == list(range(300)) and outcome.failures > 10


@pytest.mark.parametrize("samplers", [1, 2, 4, 8, 16])
def test_a_serial_part_gives_amdahls_law(samplers: int) -> None:
    # 96 s of units in 16 + 32 equal units, and 192 completions of 0.125 s in the first process.
    work = workload(serial_seconds=0.125)
    one, many = (simulate_iteration(work, Machines(n), "stealing", 0) for n in (1, samplers))
    serial = 24.0 / (24.0 + 96.0)
    assert one.total == 120.0
    assert many.total / one.total == pytest.approx(serial + (1 - serial) / samplers)


def test_parts_of_an_iteration() -> None:
    work = workload(update_seconds=12.0, trainers=4, update_fixed_seconds=0.5)
    machines = Machines(8, per_node=2, broadcast="one source", weight_bytes=10.0, link=5.0, latency=0.25)
    found = simulate_iteration(work, machines, "stealing", 0)
    assert found.seconds == {
        "broadcast": 4 * 2.25,  # four nodes
        "rollouts": 4.0,  # 16 units of 2 s on 8 samplers
        "continuations": 8.0,
        "first process": 0.0,
        "update": 12.0 / 4 + 0.5,
    }
    assert found.useful == 96.0
    assert simulate_iteration(work, machines, "stealing", 0) == found


@pytest.mark.parametrize(
    ("way", "nodes", "seconds"),
    [
        ("one source", 1, 2.5),
        ("one source", 100, 250.0),
        ("tree", 1, 2.5),
        ("tree", 3, 5.0),  # 1 copy, then 2, then 4: three nodes have it after two rounds
        ("tree", 4, 7.5),
        ("tree", 1023, 25.0),
        ("chain", 1, 4 * (0.5 + 0.5)),  # four pieces
        ("chain", 5, 8 * (0.5 + 0.5)),
    ],
)
def test_a_broadcast_by_hand(way: str, nodes: int, seconds: float) -> None:
    assert broadcast_seconds(way, nodes, size=10.0, speed=5.0, latency=0.5, pieces=4) == seconds


def test_lengths_of_units() -> None:
    assert np.mean(RELATIVE_LENGTHS) == pytest.approx(1.0, abs=0.01) and len(RELATIVE_LENGTHS) == 40
    generator = np.random.default_rng(0)
    whole = longest_draw(100, 250, 0.5, whole=True)(generator, 2000, 1)
    assert whole.max() == 125.0 and whole.min() == 13.5  # 0.27 x 100 tokens; at most 250
    assert whole.mean() == pytest.approx(0.5 * (0.99 * 100 + 0.01 * 250), rel=0.03)
    longest = longest_draw(100, 250, 0.5, whole=True)(generator, 200, 64)
    assert longest.mean() > 110  # nearly every unit of 64 has a long response
    rest = longest_draw(100, 10_000, 0.5, whole=False)(generator, 20_000, 1)
    assert rest.mean() == pytest.approx((whole.mean() + 0.01 * 0.5 * 9750) / 2, rel=0.1)
    drawn = measured_draw([1.0, 3.0], 16, 0.5)(generator, 100, 8)
    assert set(drawn) == {0.25, 0.75}  # half as many rows


def test_efficiency_and_what_is_lost() -> None:
    work = workload(serial_seconds=0.125)
    rows = sweep(work, Machines(1), "stealing", 2, False, (1, 4, 16))
    assert [row["seconds"] for row in rows] == [120.0, 24.0 + 24.0, 24.0 + 6.0]
    assert [row["efficiency"] for row in rows] == [1.0, 120 / 4 / 48, 120 / 16 / 30]
    # With 16 samplers, 30 s instead of 7.5 s: the first process takes 24 s instead of 1.5 s.
    assert rows[2]["lost"]["first process"] == pytest.approx(22.5 / 30)
    assert limit_of(rows) == {"samplers": 4, "reason": "first process", "share": pytest.approx(22.5 / 30)}
    assert rows[1]["busy"] == pytest.approx(96 / (4 * 48))
    growing = sweep(work, Machines(1), "stealing", 1, True, (1, 4))
    assert growing[1]["seconds"] == 96.0 + 4 * 24.0 and growing[1]["efficiency"] == pytest.approx(120 / 192)
    assert growing[1]["lost"]["first process"] == pytest.approx(72 / 192)


def test_copies_help_if_speeds_differ() -> None:
    work = workload(rollout_seconds=longest_draw(100, 300, 0.01, True))
    slow = Machines(16, spread=0.5)
    seconds = {
        design: np.mean([simulate_iteration(work, slow, design, seed).total for seed in range(20)])
        for design in DESIGNS
    }
    assert seconds["stealing and copies"] < seconds["stealing"] < seconds["fixed shares"]
