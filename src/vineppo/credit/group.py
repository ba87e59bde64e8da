"""Credit functions that give all tokens of a response the same advantage, computed from the rewards of its group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vineppo.credit.sample import training_sample
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


def group_credit(advantages_of: Callable[[Sequence[float]], list[float]]) -> CreditFn:
    """Build a credit function that compares each response with the other responses to the same problem.

    Args:
        advantages_of: maps the rewards of a group, shape (G,), to advantages, shape (G,).
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples: list[TrainingSample] = []
        for group in groups:
            advantages_G = advantages_of([rollout.reward for rollout in group.rollouts])
            samples.extend(
                training_sample(rollout, [advantage] * len(rollout.response_ids))
                for rollout, advantage in zip(group.rollouts, advantages_G, strict=True)
            )
        equal_groups = sum(len({rollout.reward for rollout in group.rollouts}) == 1 for group in groups)
        return samples, {"credit/zero_group_share": equal_groups / len(groups)}

    return credit
