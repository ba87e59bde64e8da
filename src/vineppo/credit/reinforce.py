"""REINFORCE (Williams 1992): an advantage is a reward minus the mean reward of all other rollouts of the iteration."""

from __future__ import annotations

from vineppo.credit.advantages import leave_one_out_advantages
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.sample import training_sample
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


def reinforce_credit() -> CreditFn:
    """Build the credit function of REINFORCE.

    The advantage of a response is its reward minus the mean reward of all other rollouts of the iteration, including
    rollouts of other problems. All tokens of a response get the advantage of the response. Rollouts without a reward
    are in no baseline, and their advantage is 0.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        advantages = leave_one_out_advantages([rollout.reward for rollout in rollouts])
        samples = [
            training_sample(rollout, [advantage] * len(rollout.response_ids))
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ]
        return samples, {}

    return credit


REINFORCE = Algorithm(
    name="reinforce",
    label="REINFORCE",
    build=lambda settings, parts: reinforce_credit(),
    min_rollouts=2,
    colour="#56B4E9",
)
