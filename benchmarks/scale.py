"""Simulate training with 1 to 4,096 samplers, and show where and why more samplers stop helping.

    python benchmarks/scale.py --out docs/results/scale

The simulation (`benchmarks/simulation.py`) has two workloads:

    cpu    the included task `judgement` on CPU cores. Its numbers are measured here first: the seconds of units with
           the package's own sampler in one process and in two, the seconds of the first process for each completion,
           the seconds of an update. The simulation must predict the time of two processes from their units.
    7b     the recipe gpu/qwen7b-gsm8k on H100s, with the rates of `vineppo plan --cluster`. The lengths of responses
           have the distribution of the solutions of GSM8K.

`same work`: the recipe's work is given to more samplers. `growing work`: each sampler brings 64 rollouts of its own.
Efficiency is the throughput divided by the number of samplers and by the throughput of one sampler; variants are
compared with one sampler of the design that they change. The script writes simulation.json, simulation.md and
simulation.png. `--calibration FILE` takes the measurements from an earlier simulation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # This makes the folder `benchmarks` importable.

from benchmarks.simulation import DESIGNS, PARTS, Machines, Workload, broadcast_seconds, run_units, simulate_iteration

MODEL, RECIPE = "embedded:judgement", "judgement"
UNIT_ROWS = {"cpu": 16, "7b": 64}
"""Workload -> completions of a unit."""
SAMPLERS = tuple(1 << k for k in range(13))
MOST_SAMPLERS = {"cpu": 64, "7b": SAMPLERS[-1]}
"""Workload -> largest number of samplers."""
RELATIVE_LENGTHS = (
    *(0.27, 0.34, 0.38, 0.42, 0.45, 0.48, 0.52, 0.54, 0.57, 0.60, 0.62, 0.65, 0.67, 0.70, 0.73, 0.76, 0.79, 0.81, 0.84),
    *(0.87, 0.90, 0.93, 0.97, 1.00, 1.03, 1.07, 1.11, 1.15, 1.20, 1.24, 1.29, 1.35, 1.41, 1.48, 1.56, 1.65, 1.76, 1.93),
    *(2.16, 2.66),
)
"""Forty equally likely lengths of a response, divided by the mean length: quantiles of the number of characters of the
7,473 training solutions of GSM8K (github.com/openai/grade-school-math) without their calculator annotations."""
TRUNCATED = 0.01
"""Share of responses that go on to the length limit (assumed)."""
SPREAD = 0.1
"""Standard deviation of the logarithm of a sampler's speed (assumed)."""
FAILURE_HOURS = 16_384 * 54 * 24 / 419
"""Mean hours between two failures of one GPU, about 50,700: 419 unexpected interruptions in 54 days on 16,384 H100s
(Llama Team, arXiv 2407.21783, section 3.3.4)."""
RESTART_SECONDS = 60.0
"""Seconds until a new sampler replaces a dead one: vLLM started in 34 s on a CPU (measured), and it gets the weights
(assumed)."""
FEWEST = 64
"""Least number of simulated iterations times samplers for each point, so that means over few samplers are stable."""
MANY, SEEDS_OF_MANY = 512, 2
"""From this number of samplers on, a point is the mean of so many iterations, which differ little from each other."""
LATENCY = 0.001
"""Seconds of a message (assumed)."""


# The measurements on this machine.


def unit_requests(count: int, rows: int) -> list[list[Any]]:
    """Return units of requests: one sample of each of `rows` prompts of the included task."""
    import vineppo
    from vineppo.training.parts import build_parts
    from vineppo.training.rollouts import draw_problems
    from vineppo.types import SampleRequest

    config = vineppo.build_config(vineppo.load_recipe(RECIPE), "grpo")
    parts = build_parts(config)
    problems = draw_problems(parts.task, 0, 1, count * rows)
    requests = [
        SampleRequest(parts.codec.prompt_ids(problem), 1, config.rollouts.max_new_tokens, seed=i)
        for i, problem in enumerate(problems)
    ]
    return [requests[start : start + rows] for start in range(0, len(requests), rows)]


def work_on_units(name: int, units: Any, tasks: Any, results: Any) -> None:
    """Sample units in a process with one thread until the task None comes.

    When the model is loaded, None is put into `results`; then, for each unit, (unit, process, seconds, CPU seconds,
    tokens).
    """
    import torch

    torch.set_num_threads(1)
    from vineppo.config.schema import ModelConfig
    from vineppo.model.policy import Policy
    from vineppo.sampling.build import build_sampler

    sampler = build_sampler(Policy.load(ModelConfig(path=MODEL)))
    sampler.sample(units[0][:2])
    results.put(None)
    while (unit := tasks.get()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = sum(len(c.token_ids) for group in sampler.sample(units[unit]) for c in group)
        results.put((unit, name, time.perf_counter() - wall, time.process_time() - cpu, tokens))


def measure_units(units: list[list[Any]], processes: int) -> dict[str, Any]:
    """Sample all units with a number of processes that take them from one queue.

    Returns:
        `seconds` until all are done, and lists over the units: `unit_seconds`, `unit_cpu_seconds`, `tokens`.
    """
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    workers = [context.Process(target=work_on_units, args=(i, units, tasks, results)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for _ in workers:
        results.get()  # all models are loaded
    start = time.perf_counter()
    for unit in range(len(units)):
        tasks.put(unit)
    found = sorted(results.get() for _ in units)
    seconds = time.perf_counter() - start
    for _ in workers:
        tasks.put(None)
    for worker in workers:
        worker.join()
    columns = list(zip(*found, strict=True))
    return {
        "processes": processes,
        "seconds": seconds,
        "unit_seconds": list(columns[2]),
        "unit_cpu_seconds": list(columns[3]),
        "tokens": list(columns[4]),
        "units_by_process": [columns[1].count(i) for i in range(processes)],
    }


class TimedSampler:
    """Adds up the CPU seconds in which the wrapped sampler samples. Everything else is that of the wrapped sampler."""

    def __init__(self, sampler: Any):
        self.sampler, self.seconds = sampler, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sample(self, requests: Any, on_finished: Any = None) -> Any:
        """Return what the wrapped sampler returns. `on_finished` is not called, so that grading comes afterwards."""
        start = time.process_time()
        found = self.sampler.sample(requests)
        self.seconds += time.process_time() - start
        return found


def measure_iteration(iterations: int = 3) -> dict[str, float]:
    """Measure the parts of training iterations of the recipe in this process, with one thread, in CPU seconds.

    Returns:
        Means per iteration: `rollouts`, `continuations`, their `tokens`, `serial_seconds` (everything in sampling and
        credit except the sampler), `sampler_seconds`, `update_seconds`; and `weight_bytes`.
    """
    import torch

    import vineppo
    from vineppo.training.parts import build_parts
    from vineppo.training.rollouts import draw_problems, generated_tokens

    torch.set_num_threads(1)
    config = vineppo.build_config(vineppo.load_recipe(RECIPE), "vineppo")
    parts = build_parts(config)
    timed = TimedSampler(parts.sampler.sampler)
    parts.sampler.sampler = timed
    sums = dict.fromkeys(("rollouts", "continuations", "tokens", "serial_seconds", "update_seconds"), 0.0)
    for iteration in range(1, iterations + 1):
        start = time.process_time()
        groups, _ = parts.sample(draw_problems(parts.task, 0, iteration, config.rollouts.num_problems), iteration)
        samples, metrics = parts.credit(groups, iteration)
        middle = time.process_time()
        rollouts = sum(len(group.rollouts) for group in groups)
        parts.learner.update(samples, iteration, rollouts)
        parts.update_sampler()
        sums["update_seconds"] += time.process_time() - middle
        sums["serial_seconds"] += middle - start
        sums["rollouts"] += rollouts
        sums["continuations"] += metrics["credit/mc_rollouts"]
        sums["tokens"] += generated_tokens(groups) + metrics["tokens/mc"]
    sums["serial_seconds"] -= timed.seconds
    sums["sampler_seconds"] = timed.seconds
    weights = sum(p.numel() * p.element_size() for p in parts.policy.model.parameters())
    return {name: value / iterations for name, value in sums.items()} | {"weight_bytes": float(weights)}


def command() -> str:
    """Return the command line of this program."""
    return " ".join(["python", "benchmarks/scale.py", *sys.argv[1:]])


def calibrate(units: int) -> dict[str, Any]:
    """Measure units with one process and with two, and iterations in this process."""
    requests = unit_requests(units, UNIT_ROWS["cpu"])
    runs = [measure_units(requests, processes) for processes in (1, 2)]
    for run in runs:
        speeds = [1.0] * run["processes"]
        run["predicted_seconds"] = run_units(run["unit_seconds"], speeds, "stealing").seconds
        run["predicted_from_one"] = run_units(runs[0]["unit_seconds"], speeds, "stealing").seconds
    iteration = measure_iteration()
    return {
        "command": command(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "runs": runs,
        "iteration": iteration,
        "serial_seconds_per_completion": iteration["serial_seconds"]
        / (iteration["rollouts"] + iteration["continuations"]),
    }


# The two workloads.

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def measured_draw(seconds: Sequence[float], measured_rows: int, share: float = 1.0) -> Draw:
    """Return a function that draws the seconds of units from measured ones.

    Args:
        seconds: measured seconds of units with `measured_rows` completions.
        share: factor of the seconds. They are also proportional to the number of rows.
    """

    def draw(generator: np.random.Generator, units: int, rows: int) -> np.ndarray:
        return share * rows / measured_rows * generator.choice(np.asarray(seconds), units)

    return draw


def longest_draw(mean: float, limit: int, seconds_per_token: float, whole: bool) -> Draw:
    """Return a function that draws the seconds of units which last as long as their longest completion.

    Args:
        mean: mean length of a response in tokens, before the limit.
        limit: largest length of a response.
        seconds_per_token: seconds of a decode step.
        whole: True for responses. False for continuations, which begin at a uniformly distributed place of a response.
    """

    def draw(generator: np.random.Generator, units: int, rows: int) -> np.ndarray:
        lengths = mean * generator.choice(np.asarray(RELATIVE_LENGTHS), (units, rows))
        lengths = np.minimum(lengths, limit)
        lengths = np.where(generator.random((units, rows)) < TRUNCATED, limit, lengths)
        if not whole:
            lengths = lengths * (1 - generator.random((units, rows)))
        return np.ceil(lengths).max(axis=1) * seconds_per_token

    return draw


def cpu_workload(calibration: dict[str, Any]) -> tuple[Workload, Machines]:
    """Return the measured workload: the recipe's iteration with 16 times as many rollouts and continuations."""
    iteration = calibration["iteration"]
    units = calibration["runs"][0]
    seconds = units["unit_cpu_seconds"]
    per_token = sum(seconds) / sum(units["tokens"])
    continuation_tokens = iteration["tokens"] - iteration["rollouts"] * sum(units["tokens"]) / (
        len(units["tokens"]) * UNIT_ROWS["cpu"]
    )
    unit_of_continuations = continuation_tokens / iteration["continuations"] * UNIT_ROWS["cpu"] * per_token
    workload = Workload(
        rollouts=round(iteration["rollouts"]),
        continuations=round(iteration["continuations"]),
        unit_rows=UNIT_ROWS["cpu"],
        rollout_seconds=measured_draw(seconds, UNIT_ROWS["cpu"]),
        continuation_seconds=measured_draw(
            seconds, UNIT_ROWS["cpu"], unit_of_continuations / (sum(seconds) / len(seconds))
        ),
        serial_seconds=calibration["serial_seconds_per_completion"],
        update_seconds=iteration["update_seconds"],
        trainers=1,
    )
    machines = Machines(
        samplers=1,
        per_node=2,
        spread=SPREAD,
        weight_bytes=iteration["weight_bytes"],
        link=1e9 / 8,
        latency=LATENCY,
        failure_seconds=FAILURE_HOURS * 3600,
        restart_seconds=RESTART_SECONDS,
    )
    return workload.times(16), machines


def gpu_workload() -> tuple[Workload, Machines]:
    """Return the workload of the recipe gpu/qwen7b-gsm8k with the rates of `vineppo plan --cluster`."""
    import vineppo
    from vineppo.plan import cluster_seconds as rates
    from vineppo.plan.cluster import cluster_plan
    from vineppo.plan.machines import NICS, cluster_of

    config = vineppo.build_config(vineppo.load_recipe("gpu/qwen7b-gsm8k"), "vineppo")
    cluster = cluster_of("1x8xh100-80gb")
    plan = cluster_plan(config, cluster)
    amounts, update = plan.amounts, plan.seconds["update"]
    mean, limit = amounts.rollout_tokens / amounts.rollouts, config.rollouts.max_new_tokens
    step = plan.shape.layers * rates.LAUNCH_SECONDS
    workload = Workload(
        rollouts=amounts.rollouts,
        continuations=round(amounts.mc_tokens / (mean / 2)),
        unit_rows=UNIT_ROWS["7b"],
        rollout_seconds=longest_draw(mean, limit, step, whole=True),
        continuation_seconds=longest_draw(mean, limit, step, whole=False),
        serial_seconds=rates.RANK_0_SECONDS,
        update_seconds=8 * (update["training passes"] + update["forward passes"]),
        trainers=config.learner.minibatch_size,
        update_fixed_seconds=update["all-gather"] + update["reduce-scatter"],
    )
    machines = Machines(
        samplers=1,
        per_node=8,
        spread=SPREAD,
        weight_bytes=2.0 * plan.shape.parameters,
        link=rates.LINK * NICS["h100"],  # one adapter of a node
        latency=LATENCY,
        failure_seconds=FAILURE_HOURS * 3600,
        restart_seconds=RESTART_SECONDS,
    )
    return workload, machines


def per_sampler(workload: Workload, rollouts: int = 64) -> Workload:
    """Return the part of a workload with this number of rollouts.

    The number of trainers has no limit if the workload had several, because the minibatch grows with the work.
    """
    share = rollouts / workload.rollouts
    return dataclasses.replace(
        workload,
        rollouts=rollouts,
        continuations=round(workload.continuations * share),
        update_seconds=workload.update_seconds * share,
        trainers=workload.trainers if workload.trainers == 1 else 1 << 30,
    )


# The sweeps.


def sweep(
    workload: Workload,
    machines: Machines,
    design: str,
    seeds: int,
    growing: bool,
    samplers: Sequence[int],
    reference: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Simulate iterations with growing numbers of samplers.

    Args:
        workload: the work of an iteration; of one sampler if `growing` is true.
        growing: whether the work grows with the number of samplers.
        samplers: numbers of samplers; the first one is 1.
        reference: the row of one sampler with which efficiencies are compared; None: that of this sweep.
    Returns:
        For each number: means over the seeds of the seconds, their parts, throughput, efficiency and waste.
    """
    rows: list[dict[str, Any]] = []
    for count in samplers:
        work = workload.times(count) if growing else workload
        found = [
            simulate_iteration(work, dataclasses.replace(machines, samplers=count), design, seed)
            for seed in range(max(seeds if count < MANY else SEEDS_OF_MANY, FEWEST // count))
        ]
        seconds = float(np.mean([result.total for result in found]))
        completions = work.rollouts + work.continuations
        rows.append(
            {
                "samplers": count,
                "seconds": seconds,
                "completions_per_second": completions / seconds,
                "parts": {part: float(np.mean([r.seconds[part] for r in found])) for part in PARTS},
                "busy": float(np.mean([r.useful for r in found])) / (count * seconds),
                "wasted": float(np.mean([r.wasted for r in found])) / (count * seconds),
                "failures": float(np.mean([r.failures for r in found])),
            }
        )
    first = reference or rows[0]
    for row in rows:
        row["efficiency"] = row["completions_per_second"] / row["samplers"] / first["completions_per_second"]
        row["lost"] = _lost(row, first, growing)
    return rows


def _lost(row: dict[str, Any], first: dict[str, Any], growing: bool) -> dict[str, float]:
    """Return part -> share of the iteration that perfect scaling from one sampler would not need."""
    ideal = 1 if growing else row["samplers"]
    return {part: (row["parts"][part] - first["parts"][part] / ideal) / row["seconds"] for part in PARTS}


def limit_of(rows: Sequence[dict[str, Any]], least: float = 0.5) -> dict[str, Any]:
    """Return the largest number of samplers with at least this efficiency, and the part that loses most beyond it."""
    last = max((row["samplers"] for row in rows if row["efficiency"] >= least), default=0)
    beyond = next((row for row in rows if row["samplers"] > last), None)
    reason = max(beyond["lost"], key=lambda part: beyond["lost"][part]) if beyond else None
    return {"samplers": last, "reason": reason, "share": beyond["lost"][reason] if beyond and reason else None}


def variants(workload: Workload, machines: Machines, growing: bool) -> dict[str, tuple[Workload, Machines, str]]:
    """Return changes of the design and of the machines, by name, each against stealing and copies with a tree."""
    best = DESIGNS[-1]
    change, other = dataclasses.replace, {}
    other["stealing and copies"] = (workload, machines, best)
    other["first process 10 times faster"] = (
        change(workload, serial_seconds=workload.serial_seconds / 10),
        machines,
        best,
    )
    for rows in (workload.unit_rows // 4, workload.unit_rows * 4):
        other[f"units of {rows} rows"] = (change(workload, unit_rows=rows), machines, best)
    for way in ("one source", "chain"):
        other[f"broadcast: {way}"] = (workload, change(machines, broadcast=way), best)
    other["speeds spread by 0.3"] = (workload, change(machines, spread=0.3), best)
    other["speeds spread by 0.3, no copies"] = (workload, change(machines, spread=0.3), "stealing")
    other["failures 1,000 times as often"] = (
        workload,
        change(machines, failure_seconds=machines.failure_seconds / 1000),
        best,
    )
    return other


def simulate(calibration: dict[str, Any], seeds: int, samplers: Sequence[int]) -> dict[str, Any]:
    """Run all sweeps. Return workload -> `same work` or `growing work` -> results."""
    results: dict[str, Any] = {}
    for name, (workload, machines) in {"cpu": cpu_workload(calibration), "7b": gpu_workload()}.items():
        results[name], counts = {}, [count for count in samplers if count <= MOST_SAMPLERS[name]]
        for mode, growing in (("same work", False), ("growing work", True)):
            work = per_sampler(workload) if growing else workload
            designs = {design: sweep(work, machines, design, seeds, growing, counts) for design in DESIGNS}
            first = designs[DESIGNS[-1]][0]
            changed = {
                label: sweep(w, m, design, seeds, growing, counts, first)
                for label, (w, m, design) in variants(work, machines, growing).items()
            }
            results[name][mode] = {
                "rollouts": work.rollouts,
                "continuations": work.continuations,
                "designs": designs,
                "limits": {design: limit_of(rows) for design, rows in designs.items()},
                "variants": {
                    label: {"limit": limit_of(rows), "last": rows[-1], "at_64": _row(rows, 64)}
                    for label, rows in changed.items()
                },
            }
        nodes = [count // machines.per_node for count in counts if count >= machines.per_node]
        results[name]["broadcast"] = [
            {"nodes": n}
            | {
                way: broadcast_seconds(way, n, machines.weight_bytes, machines.link, machines.latency)
                for way in ("one source", "tree", "chain")
            }
            for n in nodes
        ]
    return results


def _row(rows: Sequence[dict[str, Any]], samplers: int) -> dict[str, Any] | None:
    return next((row for row in rows if row["samplers"] == samplers), None)


# The report.


def markdown(result: dict[str, Any]) -> str:
    """Return the report."""
    calibration = result["calibration"]
    runs, iteration, machine = calibration["runs"], calibration["iteration"], calibration["machine"]
    lines = [
        "# Where more samplers stop helping",
        "",
        f"`{result['command']}`, simulated, means over {result['seeds']} seeds ("
        f"{SEEDS_OF_MANY} from {MANY} samplers on). The measurements behind the workload "
        f"`cpu` (`{calibration['command']}`) are from {machine['platform']} with {machine['cores']} cores, on which "
        f"other programs ran (load {machine['load']:.1f}). So the elapsed seconds below say little about the sampler; "
        "the simulation uses the CPU seconds.",
        "",
        "## The calibration",
        "",
        "| processes | elapsed seconds | simulated from the elapsed seconds of its units | from those of one process | "
        "units of each process | CPU seconds of a unit |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        units = ", ".join(map(str, run["units_by_process"]))
        lines.append(
            f"| {run['processes']} | {run['seconds']:.2f} | {run['predicted_seconds']:.2f} | "
            f"{run['predicted_from_one']:.2f} | {units} | "
            f"{np.mean(run['unit_cpu_seconds']):.4f} |"
        )
    lines += [
        "",
        f"An iteration of the recipe `{RECIPE}` in one process: {iteration['rollouts']:.0f} rollouts, "
        f"{iteration['continuations']:.0f} continuations, sampler {iteration['sampler_seconds']:.2f} s, first process "
        f"{iteration['serial_seconds']:.2f} s ({1e3 * calibration['serial_seconds_per_completion']:.2f} ms per "
        f"completion), update {iteration['update_seconds']:.2f} s.",
    ]
    for name, modes in result["results"].items():
        lines += _workload_lines(name, modes)
    return "\n".join(lines) + "\n"


def _workload_lines(name: str, modes: dict[str, Any]) -> list[str]:
    """Return the section about a workload."""
    lines = ["", f"## Workload {name}"]
    for mode in ("same work", "growing work"):
        found = modes[mode]
        whose = "" if mode == "same work" else " for each sampler"
        lines += [
            "",
            f"### {name}, {mode}: {found['rollouts']:,} rollouts, {found['continuations']:,} continuations{whose}",
        ]
        lines += [
            "",
            "Efficiency:",
            "",
            "| samplers | " + " | ".join(DESIGNS) + " |",
            "|---" * (len(DESIGNS) + 1) + "|",
        ]
        for i, row in enumerate(found["designs"][DESIGNS[0]]):
            cells = [f"{found['designs'][design][i]['efficiency']:.1%}" for design in DESIGNS]
            lines.append(f"| {row['samplers']:,} | " + " | ".join(cells) + " |")
        lines += ["", f"Seconds of an iteration with {DESIGNS[-1]}:", ""]
        lines += ["| samplers | " + " | ".join(PARTS) + " | sum | lost most by |", "|---" * (len(PARTS) + 3) + "|"]
        for row in found["designs"][DESIGNS[-1]]:
            part = max(row["lost"], key=lambda part: row["lost"][part])
            reason = f"{part} ({row['lost'][part]:.0%})" if row["lost"][part] > 0.005 else ""
            cells = [f"{row['parts'][name]:.2f}" for name in PARTS]
            lines.append(f"| {row['samplers']:,} | " + " | ".join(cells) + f" | {row['seconds']:.2f} | {reason} |")
        lines += [
            "",
            "| changed | most samplers with 50% efficiency | then lost by | efficiency at 64 | at the most samplers |",
        ]
        lines += ["|---|---|---|---|---|"]
        for label, figures in found["variants"].items():
            limit, at_64 = figures["limit"], figures["at_64"]
            reason = f"{limit['reason']} ({limit['share']:.0%})" if limit["reason"] else ""
            middle = f"{at_64['efficiency']:.1%}" if at_64 else ""
            lines.append(
                f"| {label} | {limit['samplers']:,} | {reason} | {middle} | {figures['last']['efficiency']:.1%} |"
            )
    lines += [
        "",
        f"### {name}, seconds of a broadcast",
        "",
        "| nodes | one source | tree | chain |",
        "|---|---|---|---|",
    ]
    for row in modes["broadcast"]:
        lines.append(f"| {row['nodes']:,} | {row['one source']:.2f} | {row['tree']:.2f} | {row['chain']:.2f} |")
    return lines


COLOURS = {"fixed shares": "#999999", "stealing": "#0072B2", "stealing and copies": "#D55E00"}
PART_COLOURS = dict(zip(PARTS, ("#CC79A7", "#56B4E9", "#0072B2", "#E69F00", "#009E73"), strict=True))


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw efficiency over samplers, and below it the parts of an iteration, for both ways to grow the 7B workload."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle("Simulated: 7B on H100s, 1 to 4,096 samplers", fontsize=14, fontweight="bold", x=0.01, ha="left")
    for column, mode in enumerate(("same work", "growing work")):
        found = result["results"]["7b"][mode]
        upper, lower = axes[0][column], axes[1][column]
        for design, rows in found["designs"].items():
            upper.plot(
                [row["samplers"] for row in rows],
                [row["efficiency"] for row in rows],
                marker="o",
                markersize=4,
                color=COLOURS[design],
                label=design,
            )
        if column:
            whose = f"{found['rollouts']} rollouts for each sampler"
        else:
            whose = f"{found['rollouts']} rollouts in all"
        upper.set_title(f"{mode}: {whose}", loc="left", fontsize=11)
        upper.set_ylim(0, 1.1)
        upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        rows = found["designs"][DESIGNS[-1]]
        shares = [[row["parts"][part] / row["seconds"] for row in rows] for part in PARTS]
        lower.stackplot([row["samplers"] for row in rows], shares, labels=PARTS, colors=list(PART_COLOURS.values()))
        lower.set_ylim(0, 1)
        lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        lower.set_xlabel("samplers")
    for one in axes.flat:
        one.set_xscale("log", base=2)
        one.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        one.grid(color="#DDDDDD", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("efficiency")
    axes[1][0].set_ylabel(f"share of an iteration\n({DESIGNS[-1]})")
    axes[0][1].legend(frameon=False, loc="lower left")
    axes[1][1].legend(loc="center left", framealpha=0.9)
    figure.savefig(path)


def parsed_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--calibration", type=Path, help="take the measurements from this simulation.json")
    parser.add_argument("--units", type=int, default=48, help="measured units")
    parser.add_argument("--seeds", type=int, default=5, help="simulated iterations per number of samplers")
    parser.add_argument("--most", type=int, default=SAMPLERS[-1], help="largest number of samplers")
    return parser.parse_args()


def main() -> None:
    """Measure, simulate and write the results."""
    arguments = parsed_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.calibration:
        calibration = json.loads(arguments.calibration.read_text())["calibration"]
    else:
        calibration = calibrate(arguments.units)
        (arguments.out / "simulation.json").write_text(json.dumps({"calibration": calibration}, indent=1) + "\n")
    samplers = [count for count in SAMPLERS if count <= arguments.most]
    result = {
        "command": command(),
        "seeds": arguments.seeds,
        "calibration": calibration,
        "results": simulate(calibration, arguments.seeds, samplers),
    }
    (arguments.out / "simulation.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "simulation.md").write_text(markdown(result))
    plot(result, arguments.out / "simulation.png")
    print(markdown(result))


if __name__ == "__main__":
    main()
