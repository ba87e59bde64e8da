"""GRPO-lambda: the group-relative advantage, spread over the tokens by eligibility traces (arXiv 2510.00194).

A trace says how much a token takes part in an error that is observed later. It starts at 1 when the token is sampled
and is multiplied by lambda with every later token. The only error of a response is its advantage in the group, because
no value network predicts the values of the states in between.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vineppo.config.settings import Settings
from vineppo.credit.advantages import grpo_advantages, leave_one_out_advantages
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.sample import training_sample
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


class GRPOLambdaSettings(Settings):
    """GRPO-lambda: the advantage of a response in its group, weighted per token by eligibility traces."""

    trace_lambda: float = Field(0.99, ge=0, le=1)
    """Lambda: factor by which a trace decays with every later token. With 1 all tokens of a response get the same
    advantage, as in GRPO."""
    errors: Literal["last", "all"] = "last"
    """Where the error of a response, which is its advantage in the group, is observed. `last`: at its last token, so
    that the token sampled n tokens before the end gets lambda to the power of n of it. `all`: at every token, so that a
    token gets the mean of its traces at this and all later tokens of the response; traces beyond the end are 0. This
    keeps the credit of most tokens and lowers only that of the last ones."""
    baseline: Literal["group", "others"] = "group"
    """`group`: mean reward of the group, including the response, as in GRPO. `others`: mean reward of the other
    responses, as in RLOO."""
    scale_by_std: bool = True
    """For `baseline: group`: divide the advantages of a group by the standard deviation of its rewards (plus 1e-4)."""


def trace_weights(num_tokens: int, trace_lambda: float, errors: str) -> list[float]:
    """Return the weight of each token of a response, shape (T,).

    Let n be the number of tokens after a token. With the errors `last` the weight is lambda^n. With `all` it is
    (1 - lambda) * (1 + lambda + ... + lambda^n) = 1 - lambda^(n + 1): the sum of the traces at this and all later
    tokens of the response, as a share of the sum for an endless response.

    Args:
        num_tokens: T, the number of tokens of the response.
        trace_lambda: lambda. With 1, all weights are 1.
        errors: `last` or `all`.
    """
    if trace_lambda == 1:
        return [1.0] * num_tokens
    left = range(num_tokens - 1, -1, -1)
    return [trace_lambda**n if errors == "last" else 1 - trace_lambda ** (n + 1) for n in left]


def grpo_lambda_credit(settings: GRPOLambdaSettings) -> CreditFn:
    """Build the credit function of GRPO-lambda.

    The credit function also returns the metric `credit/zero_group_share`, as for GRPO. A rollout without a reward has
    advantages of 0 and is in no baseline.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples: list[TrainingSample] = []
        for group in groups:
            rewards = [rollout.reward for rollout in group.rollouts]
            if settings.baseline == "others":
                advantages = leave_one_out_advantages(rewards)
            else:
                advantages = grpo_advantages(rewards, settings.scale_by_std)
            for rollout, advantage in zip(group.rollouts, advantages, strict=True):
                weights = trace_weights(len(rollout.response_ids), settings.trace_lambda, settings.errors)
                samples.append(training_sample(rollout, [weight * advantage for weight in weights]))
        equal_groups = sum(len({rollout.reward for rollout in group.rollouts} - {None}) <= 1 for group in groups)
        return samples, {"credit/zero_group_share": equal_groups / len(groups)}

    return credit


GRPO_LAMBDA = Algorithm(
    name="grpo_lambda",
    label="GRPO-lambda",
    build=lambda settings, parts: grpo_lambda_credit(settings),
    settings=GRPOLambdaSettings,
    min_group_size=2,
    colour="#44AA99",
)
