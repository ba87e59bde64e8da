"""The progress of a run, and the metrics of an iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vineppo.types import Metrics, RolloutGroup, TrainingSample


@dataclass(frozen=True)
class Progress:
    """The progress of a run. A run can be resumed from its progress and the state of its learner.

    The state of a random number generator is not needed, because every seed is derived from the run's seed and names
    such as the iteration.
    """

    recipe: str = ""
    iteration: int = 0
    rollout_tokens: int = 0
    mc_tokens: int = 0
    trained_tokens: int = 0
    seconds_train: float = 0.0
    seconds_eval: float = 0.0
    seconds_total: float = 0.0
    """Seconds of the earlier processes of this run, up to the checkpoint."""
    accuracy_before: dict[str, float | None] = field(default_factory=dict)
    best_validation_accuracy: float | None = None
    evaluated_iteration: int | None = None
    """The last iteration after which the validation accuracy was measured."""
    evaluated_accuracy: float | None = None
    """The validation accuracy after that iteration."""
    best_checkpoint: int | None = None
    """Iteration of the checkpoint with the best validation accuracy; the later one if two are equal. None if no
    checkpoint was evaluated."""
    best_checkpoint_accuracy: float | None = None


def with_best_checkpoint(progress: Progress) -> Progress:
    """Return the progress that a checkpoint of this iteration contains: it may be the best checkpoint."""
    accuracy, best = progress.evaluated_accuracy, progress.best_checkpoint_accuracy
    if progress.evaluated_iteration != progress.iteration or accuracy is None or (best is not None and accuracy < best):
        return progress
    return replace(progress, best_checkpoint=progress.iteration, best_checkpoint_accuracy=accuracy)


def advance(
    progress: Progress,
    rollout_tokens: int,
    samples: Sequence[TrainingSample],
    credit: Metrics,
    seconds: Mapping[str, float],
    epochs: int,
) -> Progress:
    """Return the progress after one more iteration.

    Args:
        rollout_tokens: number of tokens sampled for the rollouts; a prefix that several rollouts share counts once.
        credit: metrics of the credit function.
        seconds: duration of each phase of the iteration.
        epochs: number of passes over the samples.
    """
    return replace(
        progress,
        iteration=progress.iteration + 1,
        rollout_tokens=progress.rollout_tokens + rollout_tokens,
        mc_tokens=progress.mc_tokens + int(credit.get("tokens/mc", 0)),
        trained_tokens=progress.trained_tokens + epochs * sum(sum(sample.loss_mask) for sample in samples),
        seconds_train=progress.seconds_train + sum(seconds.values()),
    )


def metrics_line(
    progress: Progress, groups: list[RolloutGroup], metrics: Metrics, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return the metrics that an iteration writes to metrics.jsonl as one line."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return {
        **metrics,
        "iteration": progress.iteration,
        **cumulative(progress),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(unbiased=False).item(),
        "response/length_mean": sum(lengths) / len(lengths),
        "response/length_min": min(lengths),
        "response/length_max": max(lengths),
        "response/truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }


def cumulative(progress: Progress) -> dict[str, float]:
    """Return the numbers of tokens and seconds since the start of the run, for every line of metrics.jsonl."""
    return {
        "tokens/rollouts": progress.rollout_tokens,
        "tokens/mc": progress.mc_tokens,
        "tokens/generated": progress.rollout_tokens + progress.mc_tokens,
        "tokens/trained": progress.trained_tokens,
        "seconds/train": progress.seconds_train,
    }
