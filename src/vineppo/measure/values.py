"""Compare estimated values of states with gold values, for `vineppo values`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vineppo.config.measure import ValuesSpec
from vineppo.measure import agreement
from vineppo.measure.agreement import Gold
from vineppo.measure.choices import choice_results
from vineppo.measure.critics import Critic, load_critic
from vineppo.measure.estimates import (
    StateTable,
    critic_values,
    group_means,
    monte_carlo,
    state_table,
    tempo_values,
)
from vineppo.measure.intervals import MIN_PROBLEMS, bootstrap
from vineppo.measure.session import Say, Session, mean_tokens_left
from vineppo.statistics import Interval
from vineppo.types import RolloutGroup, UserError

DEPTH_BINS = 5
"""Number of bins of the relative depth of a state."""


@dataclass(frozen=True)
class Estimate:
    """An estimate of the values of all states, and of the advantages of all steps."""

    label: str
    values: np.ndarray
    """Value of each state, shape (n,); NaN if there is none."""
    advantages: np.ndarray
    """Advantage of each step, shape (steps,)."""


def measure_values(spec: ValuesSpec, say: Say) -> dict[str, Any]:
    """Measure how well estimates of values agree with gold values.

    Args:
        spec: the settings.
        say: prints a line of progress.
    Returns:
        The content of values.json; docs/measuring.md explains the keys.
    Raises:
        UserError: if the model, the task or the value network cannot be used.
    """
    session = Session.open(spec, say)
    critic = load_critic(spec.critic, session.policy) if spec.critic else None
    groups = session.groups()
    table = _table(session, spec, groups)
    states = table.states
    say(f"gold: {len(states)} states of {len(table.responses)} responses, {spec.gold} continuations each")
    rewards = session.rewards(states, spec.gold, "gold")
    gold = Gold.of_rewards(rewards)
    estimates = _estimates(session, spec, groups, table, critic)
    results = {e.label: _result(e, gold, table, spec) for e in estimates}
    choices = choice_results(session, spec, table, critic, gold.values) if spec.choices else {}
    return {
        "kind": "values",
        "num_problems": len(set(table.problems.tolist())),
        "num_responses": len(table.responses),
        "num_states": len(states),
        "num_steps": len(table.befores),
        "gold": spec.gold,
        "threshold": spec.threshold,
        "critic": spec.critic,
        "mean_reward": float(np.mean([r.reward for g in groups for r in g.rollouts if r.reward is not None])),
        "gold_mean": float(np.nanmean(gold.values)),
        "gold_noise": float(np.sqrt(np.nanmean(gold.variances))),
        "gold_spread": float(np.nanstd(gold.values)),
        "states_per_depth": np.bincount(
            np.clip((table.depths * DEPTH_BINS).astype(int), 0, DEPTH_BINS - 1), minlength=DEPTH_BINS
        ).tolist(),
        "estimates": results,
        "choices": choices,
        "picture": _picture(results, len(set(table.problems.tolist()))),
        "tokens": session.tokens,
        "seconds": session.seconds,
    }


def _table(session: Session, spec: ValuesSpec, groups: Sequence[RolloutGroup]) -> StateTable:
    """Choose the responses whose states are valued, as many as the token limit allows."""
    responses = [
        [session.cut(i, group.problem, r) for r in group.rollouts if r.reward is not None][: spec.responses]
        for i, group in enumerate(groups)
    ]
    per_state = spec.gold + 2 * sum(spec.k)
    costs = [
        per_state
        * sum(mean_tokens_left(r, range(len(r.ends))) * min(1, (spec.steps or 10**9) / len(r.ends)) for r in own)
        for own in responses
    ]
    count = session.affordable(costs, "values")
    chosen = [response for own in responses[:count] for response in own]
    if not chosen:
        raise UserError("no response of the chosen problems has a reward; give more problems (--num_problems)")
    return state_table(chosen, spec.steps, session.seed("steps"))


def _estimates(
    session: Session, spec: ValuesSpec, groups: Sequence[RolloutGroup], table: StateTable, critic: Critic | None
) -> list[Estimate]:
    """Compute all estimates of the values of the states."""
    states, found = table.states, []

    def add(label: str, values: np.ndarray) -> None:
        found.append(Estimate(label, values, table.advantages(values)))

    for k in spec.k:
        session.say(f"estimates with K = {k}")
        add(f"fresh MC, K = {k}", monte_carlo(session, states, k, reuse=False))
        if session.sampler.capabilities.excluded_first:
            add(f"reuse, K = {k}", monte_carlo(session, states, k, reuse=True))
    if critic:
        add("critic", critic_values(critic, states))
    add("TEMPO", tempo_values(groups, table))
    means = group_means(groups, table)
    # The value is the same before and after a step, so its differences would be 0. RLOO's advantage is used instead.
    found.append(Estimate("group mean", means, table.rewards - means[table.befores]))
    return found


def _result(estimate: Estimate, gold: Gold, table: StateTable, spec: ValuesSpec) -> dict[str, Any]:
    """Return all numbers of an estimate, as intervals over problems."""
    problems, depths = table.problems, table.depths
    gold_steps = Gold(table.advantages(gold.values), table.variances(gold.variances))
    known = np.isfinite(estimate.values) & np.isfinite(gold.values) & np.isfinite(gold.variances)
    step_problems = problems[table.befores]
    known_steps = np.isfinite(estimate.advantages) & np.isfinite(gold_steps.values) & np.isfinite(gold_steps.variances)

    def of_states(rows: np.ndarray, labels: np.ndarray) -> Mapping[str, float]:
        part, values = Gold(gold.values[rows], gold.variances[rows]), estimate.values[rows]
        return {
            **agreement.of_values(part, values, labels),
            **agreement.of_labels(part, values, spec.threshold),
            **agreement.of_depth(part, values, depths[rows], DEPTH_BINS),
        }

    def of_steps(rows: np.ndarray, labels: np.ndarray) -> Mapping[str, float]:
        part = Gold(gold_steps.values[rows], gold_steps.variances[rows])
        return agreement.of_advantages(part, estimate.advantages[rows])

    numbers: dict[str, Interval] = {}
    for statistic, known_rows, labels in ((of_states, known, problems), (of_steps, known_steps, step_problems)):
        places = np.flatnonzero(known_rows)
        if len(places):
            numbers |= bootstrap(
                labels[places],
                lambda rows, drawn, p=places, f=statistic: f(p[rows], drawn),  # type: ignore[misc]
                seed=spec.seed,
            )
    rows = agreement.calibration(estimate.values[known], gold.values[known])
    return {
        "states": int(known.sum()),
        **{name: interval.as_dict() for name, interval in numbers.items()},
        "calibration": [list(row) for row in rows],
    }


def _picture(results: Mapping[str, Any], num_problems: int) -> dict[str, str]:
    """Say for each estimate whether its error grows along the response: `grows`, `falls` or `not resolved`.

    Nothing is said with fewer than `MIN_PROBLEMS` problems, because a percentile bootstrap of so few is too narrow.
    """
    words = {}
    for label, result in results.items():
        trend = result.get("trend", {})
        low, high = trend.get("low"), trend.get("high")
        if num_problems < MIN_PROBLEMS or low is None or high is None or math.isnan(low):
            words[label] = "not resolved"
        else:
            words[label] = "grows" if low > 0 else "falls" if high < 0 else "not resolved"
    return words
