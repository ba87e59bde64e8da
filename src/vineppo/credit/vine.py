"""VinePPO: every reasoning step earns the change of value that it brought (arXiv 2410.01679)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vineppo.credit.advantages import node_advantages, spread_over_tokens, step_advantages
from vineppo.credit.sample import training_sample
from vineppo.steps import Splitter, step_ends
from vineppo.types import Alternative, CreditFn, Metrics, Problem, Rollout, RolloutGroup, StepCredit, TrainingSample
from vineppo.values import Node, NodeEstimator, State, Value, ValueCost, ValueEstimator


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
        cuts = [step_ends(rollout, splitter, token_texts, max_states) for _, rollout in owners]
        values, cost = estimator.evaluate(_states(owners, cuts), iteration)
        samples = [
            training_sample(rollout, spread_over_tokens(record.step_advantages, record.boundaries), credit=record)
            for (_, rollout), record in zip(owners, _records(owners, cuts, values), strict=True)
        ]
        return samples, vine_metrics(samples, cost)

    return credit


def vine_node_credit(
    estimator: NodeEstimator, splitter: Splitter, token_texts: Callable[[Sequence[int]], list[str]], max_states: int
) -> CreditFn:
    """VinePPO with alternatives: the continuations that came by a token are choices at that place like the response's.

    The same states, values and cost as `vine_credit`. But where that gives a whole step one advantage, here every
    token has its own from the continuations that passed it, and each of those that chose another token trains that one
    too (`node_advantages`; derivation in docs/algorithms.md). The step advantages are kept for the record.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        owners = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
        cuts = [step_ends(rollout, splitter, token_texts, max_states) for _, rollout in owners]
        values, nodes, cost = estimator.evaluate_nodes(_states(owners, cuts), owners, iteration)
        records = _records(owners, cuts, values)
        samples = [
            _node_sample(rollout, record, nodes_T)
            for (_, rollout), record, nodes_T in zip(owners, records, nodes, strict=True)
        ]
        alternatives = sum(len(sample.alternatives) for sample in samples)
        return samples, {**vine_metrics(samples, cost), "credit/alternatives": alternatives / max(1, len(samples))}

    return credit


def _states(owners: Sequence[tuple[Problem, Rollout]], cuts: Sequence[Sequence[int]]) -> list[State]:
    return [
        State(problem, rollout.prompt_ids, rollout.response_ids[:start], rollout)
        for (problem, rollout), ends in zip(owners, cuts, strict=True)
        for start in (0, *ends[:-1])
    ]


def _records(
    owners: Sequence[tuple[Problem, Rollout]], cuts: Sequence[Sequence[int]], values: Sequence[Value]
) -> list[StepCredit]:
    remaining = iter(values)
    return [
        _record(rollout, ends, [next(remaining) for _ in ends]) for (_, rollout), ends in zip(owners, cuts, strict=True)
    ]


def _record(rollout: Rollout, ends_S: Sequence[int], values_S: Sequence[Value]) -> StepCredit:
    return StepCredit(
        boundaries=tuple(ends_S),
        values=tuple(value.mean for value in values_S),
        num_mc_rollouts=tuple(value.num_mc_rollouts for value in values_S),
        step_advantages=tuple(step_advantages([value.mean for value in values_S], rollout.reward)),
    )


def _node_sample(rollout: Rollout, record: StepCredit, nodes_T: Sequence[Node]) -> TrainingSample:
    before_T = spread_over_tokens(record.values, record.boundaries)
    behind_T = spread_over_tokens((*record.values[1:], rollout.reward), record.boundaries)
    advantages_T: list[float] = []
    alternatives: list[Alternative] = []
    for t, (node, before, behind) in enumerate(zip(nodes_T, before_T, behind_T, strict=True)):
        own, others = node_advantages(behind, before, node.followed, [reward for _, reward in node.left])
        advantages_T.append(own)
        alternatives += [Alternative(t, token, a) for (token, _), a in zip(node.left, others, strict=True) if a != 0]
    return training_sample(rollout, advantages_T, credit=record, alternatives=alternatives)


def vine_metrics(samples: Sequence[TrainingSample], cost: ValueCost) -> Metrics:
    """What the credit cost and how it looks."""
    advantages = [a for sample in samples if sample.credit for a in sample.credit.step_advantages]
    return {
        "tokens/mc": float(cost.tokens),
        "credit/mc_rollouts": float(cost.mc_rollouts),
        "credit/states": float(cost.states),
        "credit/distinct_states": float(cost.distinct_states),
        "credit/steps_per_response": cost.states / max(1, len(samples)),
        "credit/zero_step_share": sum(a == 0 for a in advantages) / max(1, len(advantages)),
    }
