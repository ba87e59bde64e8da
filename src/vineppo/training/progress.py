"""Define the progress of a run (counts and durations since its start), and compute the metrics of an iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vineppo.types import Metrics, RolloutGroup, TrainingSample


@dataclass(frozen=True)
class Progress:
    """The progress of a run, which is saved in every checkpoint.

    It contains no state of a random number generator, because every seed is derived from the run's seed and names such
    as the iteration.
    """

    recipe: str = ""
    """Name of the recipe, or empty."""
    iteration: int = 0
    """Number of completed iterations."""
    rollout_tokens: int = 0
    """Number of tokens sampled for rollouts."""
    mc_tokens: int = 0
    """Number of tokens sampled for MC rollouts."""
    trained_tokens: int = 0
    """Number of trained tokens, counted once in each epoch."""
    seconds_train: float = 0.0
    """Seconds of sampling, credit computation and updates."""
    seconds_eval: float = 0.0
    """Seconds of evaluation."""
    seconds_total: float = 0.0
    """Seconds of the whole run until the checkpoint from which this process resumed the run; 0 in a new run."""
    accuracy_before: dict[str, float | None] = field(default_factory=dict)
    """Accuracy before training as {mean, low, high}; empty if the run has not measured it yet."""
    greedy_before: dict[str, float | None] = field(default_factory=dict)
    """Accuracy of greedy decoding before training as {mean, low, high}; empty if it was not measured."""
    best_validation_accuracy: float | None = None
    """Highest accuracy of an evaluation on the validation problems, or None before the first evaluation."""
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


def is_new_best(progress: Progress) -> bool:
    """Return whether the evaluation after this iteration is better than that of every checkpoint before."""
    accuracy, best = progress.evaluated_accuracy, progress.best_checkpoint_accuracy
    if progress.evaluated_iteration != progress.iteration or accuracy is None:
        return False
    return best is None or accuracy > best


def with_evaluation(progress: Progress, accuracy: float | None, seconds: float) -> Progress:
    """Return the progress after an evaluation on the validation problems.

    Args:
        accuracy: the measured accuracy, or None if no response has a reward.
        seconds: duration of the evaluation.
    """
    accuracies = (progress.best_validation_accuracy, accuracy)
    return replace(
        progress,
        seconds_eval=progress.seconds_eval + seconds,
        best_validation_accuracy=max((mean for mean in accuracies if mean is not None), default=None),
        evaluated_iteration=progress.iteration,
        evaluated_accuracy=accuracy,
    )


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
        samples: the training samples of the iteration.
        credit: metrics of the credit function, including the number of MC tokens as `tokens/mc`.
        seconds: duration of each phase of the iteration in seconds.
        epochs: number of passes of the learner over the samples.
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
    """Return the metrics of an iteration, which become one line of metrics.jsonl.

    Args:
        progress: the progress after the iteration.
        groups: the rollouts of the iteration.
        metrics: metrics of the credit function, the learner and the task.
        seconds: duration of each phase of the iteration in seconds.
    Returns:
        The metrics. Those of the reward are None if no rollout has a reward.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    known = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    rewards = torch.tensor(known, dtype=torch.float64)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return {
        **metrics,
        "iteration": progress.iteration,
        **cumulative(progress),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "reward/mean": rewards.mean().item() if known else None,
        # The rounded mean of equal rewards may differ from them, and the standard deviation would then not be 0.
        "reward/std": (rewards.std(unbiased=False).item() if len(set(known)) > 1 else 0.0) if known else None,
        "response/length_mean": sum(lengths) / len(lengths),
        "response/length_min": min(lengths),
        "response/length_max": max(lengths),
        "response/truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }


def cumulative(progress: Progress) -> dict[str, float]:
    """Return the metrics that count from the start of the run: numbers of tokens, and seconds of training."""
    return {
        "tokens/rollouts": progress.rollout_tokens,
        "tokens/mc": progress.mc_tokens,
        "tokens/generated": progress.rollout_tokens + progress.mc_tokens,
        "tokens/trained": progress.trained_tokens,
        "seconds/train": progress.seconds_train,
    }


def totals(progress: Progress) -> dict[str, Any]:
    """Return the entries of summary.json that follow from the progress at the end of a run."""
    return {
        "best_validation_accuracy": progress.best_validation_accuracy,
        "best_checkpoint": progress.best_checkpoint,
        "iterations": progress.iteration,
        "seconds": progress.seconds_train,
        "seconds_eval": progress.seconds_eval,
        "tokens": {
            "rollouts": progress.rollout_tokens,
            "mc": progress.mc_tokens,
            "generated": progress.rollout_tokens + progress.mc_tokens,
            "trained": progress.trained_tokens,
        },
    }
