"""Measure the accuracy of the model of a run: before, during and after training."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from vineppo.config.schema import EvalConfig
from vineppo.model.codec import Codec
from vineppo.training.evaluate import Measurement, accuracy_metrics, measure
from vineppo.training.progress import Progress, with_evaluation
from vineppo.training.rollouts import problem_range
from vineppo.types import Sampler, Split, Task

Accuracy = dict[str, float | None]
"""A mean reward with its confidence interval: {mean, low, high}."""


@dataclass(frozen=True)
class Evaluator:
    """Samples and grades responses of the current policy to held-out problems.

    The problems are the same in every evaluation. The sampling seeds depend on the seed of the run and on the time of
    the evaluation (before or after training, or the iteration).
    """

    codec: Codec
    sampler: Sampler
    task: Task
    settings: EvalConfig
    """Settings of the section `eval`."""
    max_new_tokens: int
    """Response budget in tokens."""
    stop: tuple[str, ...]
    """Strings at which a response ends."""
    seed: int
    """Seed of the run."""

    def during_training(self, progress: Progress) -> tuple[Progress, dict[str, float | None]]:
        """Measure the accuracy (mean reward) on the validation problems.

        Returns:
            (progress with the duration of the evaluation and the best accuracy so far, metrics of the evaluation).
            The accuracy is None if no response has a reward.
        """
        began = time.perf_counter()
        measurement = self._measure("validation", self.settings.num_problems, ("eval", progress.iteration))
        metrics = accuracy_metrics(measurement, self.seed)
        seconds = time.perf_counter() - began
        return with_evaluation(progress, metrics["eval/accuracy"], seconds), {**metrics, "seconds/eval": seconds}

    def final(self, progress: Progress, when: Literal["before", "after"]) -> tuple[Progress, Accuracy, Accuracy]:
        """Measure the accuracies before or after training, on `final_num_problems` problems of the split `split`.

        Returns:
            (progress with the duration of the evaluation, accuracy of sampled responses, accuracy of greedy responses).
            If `final_num_problems` is 0, nothing is measured and the values of the first accuracy are None. The second
            one is empty if it is not measured.
        """
        if not self.settings.final_num_problems:
            return progress, {"mean": None, "low": None, "high": None}, {}
        began = time.perf_counter()
        split, count = self.settings.split, self.settings.final_num_problems
        sampled = self._measure(split, count, (when,)).mean_reward(0).as_dict()
        greedy: Accuracy = {}
        if self.settings.greedy:
            greedy = self._measure(split, count, (when, "greedy"), greedy=True).mean_reward(0).as_dict()
        seconds = progress.seconds_eval + time.perf_counter() - began
        return replace(progress, seconds_eval=seconds), sampled, greedy

    def _measure(
        self, split: Split, count: int, address: tuple[int | str, ...], *, greedy: bool = False
    ) -> Measurement:
        """Sample and grade responses to the first `count` problems of a split.

        Args:
            address: values from which the sampling seeds are derived, in addition to the seed of the run.
            greedy: decode one greedy response per problem instead of `num_samples` at `temperature`.
        """
        return measure(
            self.codec,
            self.sampler,
            self.task,
            problem_range(self.task, split, count),
            num_samples=1 if greedy else self.settings.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0 if greedy else self.settings.temperature,
            stop=self.stop,
            address=(self.seed, *address),
        )
