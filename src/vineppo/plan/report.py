"""Format the prediction for a run as the text that `vineppo plan` prints."""

from __future__ import annotations

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.plan.amounts import Plan
from vineppo.plan.cluster import ClusterPlan
from vineppo.plan.cluster_memory import PERMANENT, SAMPLING, UPDATE
from vineppo.plan.shape import GIB


def report(plan: Plan, config: Config) -> list[str]:
    """Return the lines of text about a prediction.

    Args:
        plan: the prediction.
        config: configuration of the run.
    """
    amounts, n = plan.amounts, plan.iterations
    seconds = plan.seconds_per_iteration * n
    lines = [
        f"{find_algorithm(config.algorithm).label} on {config.model.path}: {amounts.rollouts} rollouts per iteration, "
        f"{n:,} iterations, {n * amounts.updates:,} updates",
        f"  ({plan.source})",
        f"  tokens per iteration  {amounts.rollout_tokens:,.0f} rollouts, {amounts.mc_tokens:,.0f} MC rollouts "
        f"({amounts.steps_per_response:.1f} steps per response)",
        f"  total tokens          {n * (amounts.rollout_tokens + amounts.mc_tokens):,.0f}",
        "  seconds per iteration "
        + ", ".join(f"{phase} {value:.1f}" for phase, value in plan.seconds.items())
        + f": {plan.seconds_per_iteration:.1f}",
        f"  total time            {_duration(seconds)} (without evaluation)",
    ]
    kinds = [f"{kind} {value / GIB:.2f}" for kind, value in plan.memory.items() if value and kind != "peak"]
    lines += [
        f"  memory in GiB         {', '.join(kinds)}",
        f"  peak                  {plan.memory['peak'] / GIB:.2f} GiB of {plan.available / GIB:.1f}",
    ]
    if plan.variants:
        lines.append("  other settings (MC tokens and seconds per iteration):")
        lines += [f"    {name:<42} {tokens:>12,.0f} {seconds:>8.1f} s" for name, tokens, seconds in plan.variants]
    return lines


def cluster_report(plan: ClusterPlan, config: Config) -> list[str]:
    """Return the lines of text about a prediction for a cluster.

    Args:
        plan: the prediction.
        config: configuration of the run.
    """
    amounts, n, ranks = plan.amounts, plan.iterations, plan.cluster.ranks
    samplers = ranks // plan.tensor_parallel
    tokens, label = amounts.rollout_tokens + amounts.mc_tokens, find_algorithm(config.algorithm).label
    lines = [
        f"{label} on {config.model.path} ({plan.shape.parameters / 1e9:.2f}B parameters, {config.model.dtype}), "
        f"cluster {plan.cluster.name}: {_number(ranks, 'GPU')}, {_number(samplers, 'sampler')}",
        f"  an iteration          {amounts.rollouts:,} rollouts, {amounts.updates} updates, "
        f"{amounts.rollout_tokens:,.0f} + {amounts.mc_tokens:,.0f} tokens (rollouts + MC rollouts)",
        "  GiB of a GPU",
        *_memory_lines(plan),
        f"    {'peak':<19} {plan.memory['peak'] / GIB:8.1f} of {plan.available / GIB:.1f} that can be used",
        "  seconds per iteration",
    ]
    for phase, parts in plan.seconds.items():
        named = ", ".join(f"{part} {value:.2f}" for part, value in parts.items() if value)
        lines.append(f"    {phase:<19} {plan.phases[phase]:8.1f}" + (f"   {named}" if named else ""))
    lines += [
        f"    {'sum':<19} {plan.seconds_per_iteration:8.1f}   {tokens / plan.seconds_per_iteration:,.0f} tokens/s",
        f"  the run               {n:,} iterations, {_duration(n * plan.seconds_per_iteration)} (without evaluation)",
        *(f"  limit                 {limit}" for limit in plan.limits),
        "  assumptions",
        *(f"    {assumption.source:<10} {assumption.text}" for assumption in plan.assumptions),
    ]
    return lines


def _memory_lines(plan: ClusterPlan) -> list[str]:
    """Return one line for each time in which kinds of memory are in use: always, sampling, updates."""
    times = (("always", PERMANENT), ("while sampling", SAMPLING), ("while updating", UPDATE))
    lines = []
    for name, kinds in times:
        named = ", ".join(f"{kind} {plan.memory[kind] / GIB:.2f}" for kind in kinds if plan.memory[kind])
        lines.append(f"    {name:<19} {sum(plan.memory[kind] for kind in kinds) / GIB:8.1f}   {named}")
    return lines


def _number(count: int, name: str) -> str:
    """Return a number with a name, such as `1 GPU` or `8 GPUs`."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Format a number of seconds in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
