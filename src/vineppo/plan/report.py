"""Format the prediction for a run as the text that `vineppo plan` prints."""

from __future__ import annotations

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.plan.amounts import Plan
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


def _duration(seconds: float) -> str:
    """Format a number of seconds in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
