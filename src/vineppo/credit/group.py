"""Build the credit functions of GRPO and RLOO, which compare the rewards of the responses to the same problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vineppo.credit.sample import training_sample
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


def group_credit(advantages_of: Callable[[Sequence[float | None]], list[float]]) -> CreditFn:
    """Build a credit function that computes one advantage per response from the rewards of its group.

    A group consists of the G responses to one problem. All tokens of a response get the advantage of the response. The
    credit function also returns the metric `credit/zero_group_share`: the share of groups whose rewards are all equal,
    not counting responses without a reward.

    Args:
        advantages_of: function that maps the rewards of a group, shape (G,), to the advantages, shape (G,). A reward is
            None if no reward function applies to the response.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples: list[TrainingSample] = []
        for group in groups:
            advantages_G = advantages_of([rollout.reward for rollout in group.rollouts])
            samples.extend(
                training_sample(rollout, [advantage] * len(rollout.response_ids))
                for rollout, advantage in zip(group.rollouts, advantages_G, strict=True)
            )
        equal_groups = sum(len({rollout.reward for rollout in group.rollouts} - {None}) <= 1 for group in groups)
        return samples, {"credit/zero_group_share": equal_groups / len(groups)}

    return credit
