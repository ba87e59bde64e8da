"""VinePPO: every reasoning step earns the change of value that it brought (arXiv 2410.01679)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vineppo.advantages import spread_over_tokens, step_advantages
from vineppo.credit.sample import training_sample
from vineppo.steps import Splitter, merge_steps
from vineppo.types import CreditFn, Metrics, Rollout, RolloutGroup, StepCredit, TrainingSample
from vineppo.values import State, Value, ValueCost, ValueEstimator


def vine_credit(
    estimator: ValueEstimator, splitter: Splitter, token_texts: Callable[[Sequence[int]], list[str]], max_states: int
) -> CreditFn:
    """Bind VinePPO's credit function.

    For every rollout:
      1. cut the response into steps 0 = b_0 < b_1 < ... < b_S = T;
      2. s_i = prompt + response[:b_i]; V(s_i) = mean reward of K continuations of s_i, for 0 <= i < S;
      3. A_i = V(s_{i+1}) - V(s_i), and reward - V(s_{S-1}) for the last step;
      4. every token of step i gets A_i.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        owners = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
        cuts = [merge_steps(splitter(token_texts(rollout.response_ids)), max_states) for _, rollout in owners]
        states = [
            State(problem, rollout.prompt_ids, rollout.response_ids[:start], rollout)
            for (problem, rollout), ends in zip(owners, cuts, strict=True)
            for start in (0, *ends[:-1])
        ]
        values, cost = estimator.evaluate(states, iteration)
        remaining = iter(values)
        samples = [
            _sample(rollout, ends, [next(remaining) for _ in ends])
            for (_, rollout), ends in zip(owners, cuts, strict=True)
        ]
        return samples, _metrics(samples, cost)

    return credit


def _sample(rollout: Rollout, ends_S: Sequence[int], values_S: Sequence[Value]) -> TrainingSample:
    advantages_S = step_advantages([value.mean for value in values_S], rollout.reward)
    record = StepCredit(
        boundaries=tuple(ends_S),
        values=tuple(value.mean for value in values_S),
        num_mc_rollouts=tuple(value.num_mc_rollouts for value in values_S),
        step_advantages=tuple(advantages_S),
    )
    return training_sample(rollout, spread_over_tokens(advantages_S, ends_S), credit=record)


def _metrics(samples: Sequence[TrainingSample], cost: ValueCost) -> Metrics:
    advantages = [a for sample in samples if sample.credit for a in sample.credit.step_advantages]
    return {
        "tokens/mc": float(cost.tokens),
        "credit/mc_rollouts": float(cost.mc_rollouts),
        "credit/states": float(cost.states),
        "credit/distinct_states": float(cost.distinct_states),
        "credit/steps_per_response": cost.states / max(1, len(samples)),
        "credit/zero_step_share": sum(a == 0 for a in advantages) / max(1, len(advantages)),
    }
