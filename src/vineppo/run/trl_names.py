"""Add the names that TRL, the reinforcement learning library of Hugging Face, uses for metrics with the same meaning.

Trackers and callbacks receive these metrics under both names. docs/metrics.md lists the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRL_NAMES = {
    "reward/mean": "reward",
    "response/length_mean": "completions/mean_length",
    "response/length_min": "completions/min_length",
    "response/length_max": "completions/max_length",
    "response/truncated_share": "completions/clipped_ratio",
    "credit/zero_group_share": "frac_reward_zero_std",
    "policy/entropy": "entropy",
    "policy/clip_share": "clip_ratio/region_mean",
    "policy/grad_norm": "grad_norm",
    "policy/lr": "learning_rate",
    "policy/objective": "loss",
    "eval/accuracy": "eval_reward",
}
"""Name of a metric in this package -> name of the metric with the same meaning in TRL."""


def with_trl_names(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics with additional keys: the names of TRL for the metrics that the line contains.

    Args:
        line: name of a metric in this package -> value.
    """
    return {**line, **{trl_name: line[name] for name, trl_name in TRL_NAMES.items() if name in line}}
