"""Whole-answer credit: one number per response, from the rewards of other responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vineppo.credit.advantages import grpo_advantages, leave_one_out_advantages
from vineppo.credit.sample import training_sample
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample

Baseline = Callable[[Sequence[float]], list[float]]


def group_credit(advantages_of: Baseline) -> CreditFn:
    """GRPO and RLOO: a response is compared with the other responses to the same problem."""

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples: list[TrainingSample] = []
        for group in groups:
            advantages_G = advantages_of([rollout.reward for rollout in group.rollouts])
            samples.extend(
                training_sample(rollout, [advantage] * len(rollout.response_ids))
                for rollout, advantage in zip(group.rollouts, advantages_G, strict=True)
            )
        undecided = sum(len({rollout.reward for rollout in group.rollouts}) == 1 for group in groups)
        return samples, {"credit/zero_group_share": undecided / len(groups)}

    return credit


def grpo_credit(scale_by_std: bool) -> CreditFn:
    """GRPO (arXiv 2402.03300); without the standard deviation it is Dr. GRPO's (arXiv 2503.20783)."""
    return group_credit(lambda rewards: grpo_advantages(rewards, scale_by_std))


def rloo_credit() -> CreditFn:
    """RLOO (arXiv 2402.14740): against the mean of the group's other responses."""
    return group_credit(leave_one_out_advantages)


def reinforce_credit() -> CreditFn:
    """REINFORCE (Williams 1992) with the mean reward of all other rollouts of the iteration as its baseline."""

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        advantages = leave_one_out_advantages([rollout.reward for rollout in rollouts])
        samples = [
            training_sample(rollout, [advantage] * len(rollout.response_ids))
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ]
        return samples, {}

    return credit
