"""Build a training sample from a rollout and the advantages of its response tokens, for all credit functions.

No reward function applies to some rollouts, so that they have no reward. `with_reward` leaves them out before credit is
computed, and `one_per_rollout` adds their training samples, whose advantages are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from vineppo.types import Alternative, MCRollout, Problem, Rollout, RolloutGroup, StepCredit, TrainingSample, UserError


def training_sample(
    rollout: Rollout,
    advantages_T: Sequence[float],
    *,
    returns_T: Sequence[float] | None = None,
    values_T: Sequence[float] | None = None,
    credit: StepCredit | None = None,
    alternatives: Sequence[Alternative] = (),
    weights_T: Sequence[float] | None = None,
    mc_rollouts: Sequence[MCRollout] = (),
) -> TrainingSample:
    """Build a training sample in which all response tokens are trained.

    The lists with the suffix _T have one entry for each of the T response tokens, shape (T,). The lists of the training
    sample also have entries for the prompt tokens, which are 0.

    Args:
        rollout: the rollout whose response tokens are trained.
        advantages_T: advantage of each response token.
        returns_T: target of the value network for the state before each response token; None without a value network.
        values_T: prediction of the value network for the state before each response token; None without a value
            network.
        credit: steps, values and step advantages, which are only written to the records of the run.
        alternatives: tokens that are trained in addition to the response's tokens.
        weights_T: weight of each response token in the loss; None means 1 for every token.
        mc_rollouts: continuations from which the credit was computed, which are only written to the records of the run.
    Raises:
        UserError: if a list contains something other than numbers.
    """
    zeros = (0.0,) * len(rollout.prompt_ids)

    def of_sequence(values_T: Sequence[float]) -> tuple[float, ...]:
        """Convert a list with one number per response token to one per token of prompt and response."""
        try:
            return zeros + tuple(map(float, values_T))  # float() also converts entries of numpy arrays and tensors
        except (TypeError, ValueError):
            raise UserError(
                f"training_sample got {str(values_T)[:80]}; it needs a list with one number for each response token"
            ) from None

    return TrainingSample(
        token_ids=rollout.prompt_ids + rollout.response_ids,
        loss_mask=(0,) * len(rollout.prompt_ids) + (1,) * len(rollout.response_ids),
        sampler_logprobs=zeros + rollout.sampler_logprobs,
        advantages=of_sequence(advantages_T),
        returns=None if returns_T is None else of_sequence(returns_T),
        values=None if values_T is None else of_sequence(values_T),
        credit=credit,
        alternatives=tuple(alternatives),
        weights=None if weights_T is None else of_sequence(weights_T),
        rollout=rollout,
        mc_rollouts=tuple(mc_rollouts),
    )


def with_reward(groups: Sequence[RolloutGroup]) -> list[tuple[Problem, Rollout]]:
    """Return (problem, rollout) for every rollout that has a reward, in the order of the groups."""
    return [(group.problem, rollout) for group in groups for rollout in group.rollouts if rollout.reward is not None]


def one_per_rollout(groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Return one training sample per rollout, in the order of the groups.

    Args:
        groups: all rollouts.
        samples: one training sample for every rollout that has a reward, in the order of the groups. A rollout without
            a reward gets a sample with advantages of 0.
    """
    remaining = iter(samples)
    return [
        training_sample(rollout, [0.0] * len(rollout.response_ids)) if rollout.reward is None else next(remaining)
        for group in groups
        for rollout in group.rollouts
    ]


def reward_of(rollout: Rollout) -> float:
    """Return the reward of a rollout that has one."""
    assert rollout.reward is not None, "the rollout has no reward; `with_reward` leaves such rollouts out"
    return rollout.reward
