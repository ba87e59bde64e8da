"""Warnings about a running training: signs in the metrics that training does not work. Each is given once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vineppo.credit.sample import reward_of
from vineppo.training.guards import Deviation, Guards
from vineppo.types import RolloutGroup, TrainingSample, TrainingWarning

_IN_A_ROW = 3
"""Number of iterations in a row that show a sign before the warning is given."""
_ENDS = 5
"""Number of iterations at the start and at the end of the run whose mean rewards are compared."""
_WRONG_DIRECTION = -0.05
"""Correlation of advantages with changes of log-probabilities below which the update has the wrong direction."""
_KL_STEP = 0.5
"""KL divergence of one iteration, in nats per token, above which the steps are too large."""
_KL_TOTAL = 1.0
"""KL divergence from the reference model, in nats per token, above which the policy has left the reference model."""
_WORSE_THAN_CONSTANT = -0.05
"""Explained variance below which a value network is clearly worse than a constant. If it predicts about the same number
everywhere, its explained variance is slightly below 0."""
_STANDARD_ERRORS = 5.0

Line = Mapping[str, Any]


@dataclass
class Watch:
    """Reads the metrics of every iteration and warns once about each sign of a fault.

    The state is not part of a checkpoint: after a resume it starts anew.

    Attributes:
        guards: the guards of the run, whose probes show whether updates change the policy.
        max_new_tokens: maximum length of a response in tokens.
        given: names of the warnings that have been given, with their texts.
    """

    guards: Guards
    max_new_tokens: int
    given: dict[str, str] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    """The metrics of the first and the last iterations."""
    problems: int = 1
    """Number of problems per iteration."""
    value_errors: Deviation = field(default_factory=Deviation)
    """Sums over the groups with a Monte-Carlo value of their prompt: this value minus the mean reward."""

    def after_iteration(self, line: Line, groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample]) -> None:
        """Add the metrics of an iteration, and warn with `warnings.warn` about signs that are new."""
        self.lines.append(line)
        if len(self.lines) > 2 * _ENDS:
            del self.lines[_ENDS]
        self.problems = max(1, len(groups))
        errors = _value_errors(groups, samples)
        self.value_errors.add(sum(errors), sum(error**2 for error in errors), len(errors))
        signs = {
            "truncated": self._truncated(),
            "no reward": self._no_reward(),
            "equal rewards": self._equal_rewards(),
            "no signal": self._no_signal(),
            "frozen": self._frozen(),
            "direction": self._direction(),
            "entropy": self._entropy(),
            "step": self._kl_step(),
            "reference": self._kl_total(),
            "critic": self._critic(),
            "reward": self._reward(),
            "values": self._values(),
            "temperature": self._temperature(),
        }
        for name, text in signs.items():
            if text and name not in self.given:
                self.given[name] = f"iteration {line['iteration']}: {text}"
                warnings.warn(self.given[name], TrainingWarning, stacklevel=2)

    def _last(self, key: str, count: int = _IN_A_ROW, missing: float = math.nan) -> list[float]:
        """Return a metric of the last iterations, oldest first; empty if there are fewer than `count` iterations."""
        values = [line.get(key, missing) for line in self.lines[-count:]]
        return [math.nan if value is None else float(value) for value in values] if len(values) == count else []

    def _truncated(self) -> str:
        if self._last("response/truncated_share", 1) == [1.0]:
            return (
                f"all responses reached rollouts.max_new_tokens ({self.max_new_tokens}) without an end; raise "
                "rollouts.max_new_tokens, set rollouts.stop, or check that the model's end-of-sequence token is right"
            )
        return ""

    def _no_reward(self) -> str:
        if self.lines[-1].get("reward/mean", 0.0) is None:
            return (
                "every reward function returned None for all rollouts, so their advantages are 0; if this happens "
                "often, raise rollouts.num_problems, or remove the problems without a reward from the data"
            )
        return ""

    def _equal_rewards(self) -> str:
        if self._last("reward/std") == [0.0] * _IN_A_ROW:
            reward = self.lines[-1]["reward/mean"]
            return (
                f"all rewards of the last {_IN_A_ROW} iterations are {reward:g}, so there is nothing to learn from; "
                "check the reward function with some responses (rollouts/*.parquet), or use easier or harder problems"
            )
        return ""

    def _no_signal(self) -> str:
        advantages = self._last("credit/advantage_abs_mean", missing=0.0)
        if any(self._last("credit/alternatives", missing=0.0)):
            return ""
        if advantages == [0.0] * _IN_A_ROW and any(std > 0 for std in self._last("reward/std")):
            return (
                f"all advantages of the last {_IN_A_ROW} iterations are 0 although the rewards differ; check the "
                "credit function, or raise rollouts.group_size"
            )
        return ""

    def _frozen(self) -> str:
        first, last = self.guards.first_probe, self.guards.last_probe
        trained = any(line.get("policy/lr") and line.get("policy/grad_norm") for line in self.lines[:-1])
        if first and last and last is not first and trained and first.policy_logprobs == last.policy_logprobs:
            return (
                "the updates do not change the policy: the log-probabilities of the probe's known tokens are the same "
                "as at the start; check that the optimizer has the model's parameters, and that learner.lr is not too "
                "small for the model's dtype"
            )
        return ""

    def _direction(self) -> str:
        direction = self.guards.direction
        if direction is not None and direction < _WRONG_DIRECTION:
            return (
                "the update made tokens with positive advantages less likely and those with negative advantages more "
                f"likely (correlation {direction:.2f}); check the sign of the loss"
            )
        return ""

    def _entropy(self) -> str:
        first, last = self.lines[0].get("policy/entropy"), self._last("policy/entropy")
        if first is not None and last and min(last) > 2 * first + 0.5:
            return (
                f"the entropy has risen from {first:.2f} to {last[-1]:.2f} nats per token: the responses become "
                "random; lower learner.lr or learner.entropy_coefficient, or raise learner.kl.coefficient"
            )
        return ""

    def _kl_step(self) -> str:
        (kl,) = self._last("policy/kl_old", 1) or [0.0]
        if kl > _KL_STEP:
            return (
                f"the updates of one iteration changed the policy by {kl:.2f} nats per token (policy/kl_old); lower "
                "learner.lr, learner.epochs or learner.max_grad_norm"
            )
        return ""

    def _kl_total(self) -> str:
        line = self.lines[-1]
        per_token = line.get("kl/ref", 0.0) / max(1.0, line["response/length_mean"])
        if per_token > _KL_TOTAL:
            return (
                f"the policy is {per_token:.2f} nats per token away from the reference model (kl/ref); raise "
                "learner.kl.coefficient or lower learner.lr"
            )
        return ""

    def _critic(self) -> str:
        values = self._last("value/explained_variance", _ENDS)
        # In the first iterations, a new value network is often worse than a constant.
        if self.lines[-1]["iteration"] > 2 * _ENDS and values and max(values) < _WORSE_THAN_CONSTANT:
            return (
                f"the value network is worse than a constant (explained variance {values[-1]:.2f}, below "
                f"{_WORSE_THAN_CONSTANT} in the last {_ENDS} iterations); check its targets (the returns), lower its "
                "learning rate, or train it alone at first (value_only_iterations)"
            )
        return ""

    def _reward(self) -> str:
        if len(self.lines) < 2 * _ENDS:
            return ""
        ends = self.lines[:_ENDS], self.lines[-_ENDS:]
        if any(line["reward/mean"] is None for end in ends for line in end):
            return ""
        means = [sum(line["reward/mean"] for line in end) / _ENDS for end in ends]
        variance = sum(line["reward/std"] ** 2 for end in ends for line in end) / (_ENDS**2 * self.problems)
        if means[0] - means[1] > _STANDARD_ERRORS * math.sqrt(variance):
            return (
                f"the mean reward has fallen from {means[0]:.3f} at the start to {means[1]:.3f}; check the sign of the "
                "advantages and of the reward, or lower learner.lr"
            )
        return ""

    def _temperature(self) -> str:
        others = sorted(self.guards.other_temperatures)
        if others:
            return (
                f"continuations were sampled at temperature {others[0]:g}, but the rollouts at "
                f"{self.guards.temperature:g} (rollouts.temperature): values of another policy make the advantages "
                "biased, unless the algorithm intends it"
            )
        return ""

    def _values(self) -> str:
        count, mean = round(self.value_errors.count), self.value_errors.mean
        if count < 30:
            return ""
        # By rounding, equal errors may have a variance just below 0 and a mean just above 0.
        variance = max(0.0, (self.value_errors.variance - count * mean**2) / (count - 1))
        if abs(mean) > max(1e-9, _STANDARD_ERRORS * math.sqrt(variance / count)):
            return (
                f"the Monte-Carlo values of the prompts differ from the mean reward by {mean:+.3f} on average over "
                f"{count} groups, which is not chance; continuations must be sampled and graded in the same way as "
                "responses"
            )
        return ""


def _value_errors(groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample]) -> list[float]:
    """Return the Monte-Carlo value of each group's prompt minus the mean reward of the group.

    Groups without a Monte-Carlo value of the prompt, or with a rollout without a reward, are left out. The expectation
    of a difference is 0.
    """
    values = {
        id(sample.rollout): sample.credit.values[0]
        for sample in samples
        if sample.rollout is not None
        and sample.credit
        and sample.credit.values
        and any(sample.credit.num_mc_rollouts[:1])
    }
    return [
        sum(values[id(rollout)] - reward_of(rollout) for rollout in group.rollouts) / len(group.rollouts)
        for group in groups
        if group.rollouts and all(id(rollout) in values for rollout in group.rollouts)
    ]
