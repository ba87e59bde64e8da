"""Test whether an estimate of values recognises the best of five sampled next steps (section 7 of the VinePPO paper).

At a state, five next steps are sampled from the policy. The value of a step is the value of the state after it, or the
reward if the response ends with the step. An estimate chooses the step with its largest value
(`agreement.choice_score`). Estimates that come from the group of the response have no value for other next steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vineppo.config.measure import ValuesSpec
from vineppo.measure.agreement import Gold, choice_score
from vineppo.measure.critics import Critic
from vineppo.measure.estimates import StateTable, critic_values, monte_carlo
from vineppo.measure.intervals import bootstrap
from vineppo.measure.session import Response, Session
from vineppo.seeds import derive_seed
from vineppo.types import Completion, Rollout
from vineppo.values import State

ACTIONS = 5
"""Number of next steps that are sampled at a state."""


@dataclass(frozen=True)
class Choice:
    """The next steps that were sampled at one state."""

    problem_index: int
    states: list[State]
    """State after each of the five steps."""
    rewards: list[float]
    """Reward of the response if it ends with the step; NaN if it goes on."""


def choice_results(
    session: Session, spec: ValuesSpec, table: StateTable, critic: Critic | None, values: np.ndarray
) -> dict[str, Any]:
    """Let fresh Monte-Carlo estimates and the value network choose among five next steps.

    Args:
        values: gold value of each state of the table, shape (n,). States that are neither nearly lost nor nearly won
            are taken first, because the next step decides nothing at the others. The gold values of the next steps are
            independent of these.
    Returns:
        `states`: number of states at which the steps differ; `estimates`: label -> accuracy, chance, regret and
        chance_regret as intervals over problems. Empty if there is no such state.
    """
    choices = _sampled(session, spec, table, values)
    places = [(n, a) for n, choice in enumerate(choices) for a in range(ACTIONS) if math.isnan(choice.rewards[a])]
    states = [choices[n].states[a] for n, a in places]
    session.say(f"one of five: {len(choices)} states, {len({s.key for s in states})} different next states")
    rewards = session.rewards(states, spec.gold, "gold of choices")
    gold = Gold.of_rewards(rewards)
    gold_values = _spread(choices, places, gold.values)
    gold_variances = _spread(choices, places, gold.variances, ended=0.0)
    estimates = {f"fresh MC, K = {k}": monte_carlo(session, states, k, reuse=False, iteration=1) for k in spec.k}
    if critic:
        estimates["critic"] = critic_values(critic, states)
    scores: dict[str, list[dict[str, float]]] = {}
    problems = []
    for n, choice in enumerate(choices):
        own = {
            label: choice_score(Gold(gold_values[n], gold_variances[n]), _spread(choices, places, estimate)[n])
            for label, estimate in estimates.items()
        }
        known = {label: score for label, score in own.items() if score is not None}
        if len(known) == len(own):
            problems.append(choice.problem_index)
            for label, score in known.items():
                scores.setdefault(label, []).append(score)
    if not problems:
        return {}
    return {
        "sampled_states": len(choices),
        "states": len(problems),
        "estimates": {label: _intervals(problems, rows, spec.seed) for label, rows in scores.items()},
    }


def _intervals(problems: Sequence[int], rows: Sequence[Mapping[str, float]], seed: int) -> dict[str, Any]:
    """Return the mean of every score with its interval over problems."""
    arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    found = bootstrap(
        problems, lambda chosen, labels: {name: float(a[chosen].mean()) for name, a in arrays.items()}, seed=seed
    )
    return {name: interval.as_dict() for name, interval in found.items()}


def _spread(
    choices: Sequence[Choice], places: Sequence[tuple[int, int]], values: np.ndarray, ended: float | None = None
) -> np.ndarray:
    """Return numbers per choice and step, shape (choices, 5): of open states, and the reward where a response ended.

    Args:
        places: (choice, step) of each open state.
        values: number of each open state, shape (open states,).
        ended: number of a step with which the response ended; None means its reward.
    """
    result = np.array([choice.rewards if ended is None else [ended] * ACTIONS for choice in choices])
    for (n, a), value in zip(places, values, strict=True):
        result[n, a] = value
    return result


def _sampled(session: Session, spec: ValuesSpec, table: StateTable, values: np.ndarray) -> list[Choice]:
    """Sample five next steps at each of `spec.choices` states, undecided ones first and otherwise drawn at random."""
    every, seed = table.states, session.seed("choice")
    order = sorted(range(len(every)), key=lambda i: (not 0.05 < values[i] < 0.95, derive_seed(seed, i)))
    open_states = [i for i in order if len(every[i].response_ids) < spec.max_new_tokens][: spec.choices]
    states = [every[i] for i in open_states]
    estimator = session.monte_carlo(ACTIONS, "next steps")
    requests = [estimator.request(state, 0, ACTIONS) for state in states]
    rewards, completions = estimator.graded(states, requests)
    session.tokens += sum(len(c.token_ids) for group in completions for c in group)
    choices = []
    for i, state, row, group in zip(open_states, states, rewards, completions, strict=True):
        problem_index = table.responses[table.response_of[i]].problem_index
        steps = [_next_state(session, state, c, reward) for c, reward in zip(group, row, strict=True)]
        choices.append(Choice(problem_index, [s for s, _ in steps], [r for _, r in steps]))
    return choices


def _next_state(session: Session, state: State, completion: Completion, reward: float | None) -> tuple[State, float]:
    """Return the state after the first step of a continuation, and NaN; or the reward if the response ends there."""
    prefix = state.response_ids
    rollout = Rollout(
        state.prompt_ids,
        prefix + completion.token_ids,
        (state.rollout.sampler_logprobs[: len(prefix)] if state.rollout else ()) + completion.logprobs,
        completion.finish_reason,
        "",
        reward,
    )
    response: Response = session.cut(0, state.problem, rollout)
    end = next(end for end in response.ends if end > len(prefix))
    if end == len(rollout.response_ids):
        return state, 0.0 if reward is None else reward
    return State(state.problem, state.prompt_ids, rollout.response_ids[:end]), math.nan
