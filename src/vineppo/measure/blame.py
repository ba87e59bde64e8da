"""Test by intervention whether the blamed step caused the failure, for `vineppo blame`.

The blamed step of a response is the one with the largest drop of the Monte-Carlo value. Resampling a step keeps what
stands before it and lets the policy write this step and all that follows again. The effect of resampling step i is the
success of continuations from the state before it minus the success of continuations from the state after it, which keep
the step. Both are measured with new continuations that had no part in the choice of the step, so the choice does not
bias the result. The control is a random step at the same depth of a response to another problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vineppo.config.measure import BlameSpec
from vineppo.measure.agreement import Gold
from vineppo.measure.checkers import checker_of_problem
from vineppo.measure.intervals import bootstrap
from vineppo.measure.session import Response, Say, Session, mean_tokens_left
from vineppo.run.records import step_texts
from vineppo.seeds import derive_seed
from vineppo.types import RolloutGroup, UserError
from vineppo.values import State


@dataclass(frozen=True)
class Step:
    """One step of one of the responses."""

    response: int
    """Index of the response."""
    index: int
    """Number of steps before it in the response."""


@dataclass(frozen=True)
class Trial:
    """A blamed step and its controls."""

    blamed: Step
    control: Step
    """Step at the same depth of a random response to another problem."""
    sibling: Step | None
    """Random other step of the same response; None if the response has a single step."""


def measure_blame(spec: BlameSpec, say: Say) -> dict[str, Any]:
    """Resample blamed steps and control steps, and compare the changes of success.

    Returns:
        The content of blame.json; docs/measuring.md explains the keys. `difference` is the effect of resampling the
        blamed step minus that of the control.
    Raises:
        UserError: if the model or the task cannot be used, or too few responses have failed.
    """
    session = Session.open(spec, say)
    groups = session.groups()
    responses = _responses(session, spec, groups)
    values = _values(session, spec, responses)
    drops = [_drops(response, row) for response, row in zip(responses, values, strict=True)]
    trials = choose_trials(drops, [r.problem_index for r in responses], session.seed("controls"))
    if not trials:
        raise UserError("no blamed step has a control at the same depth; give more problems (--num_problems)")
    say(f"{len(trials)} blamed steps; effects from {spec.score} continuations on each side")
    effects = _effects(session, spec, responses, trials)
    problems = [responses[trial.blamed.response].problem_index for trial in trials]
    summary = summarise(problems, effects, spec.seed)
    return {
        "kind": "blame",
        "which": spec.which,
        "k": spec.k,
        "score": spec.score,
        "num_problems": len(set(problems)),
        "num_responses": len(trials),
        "mean_reward": float(np.mean([r.reward for g in groups for r in g.rollouts if r.reward is not None])),
        **summary,
        "drop": _mean([max(drops[t.blamed.response]) for t in trials], problems, spec.seed),
        "same_step": float(np.mean([is_blamed(drops, trial.control) for trial in trials])),
        "trials": _rows(responses, drops, trials, effects),
        "checked": _checked(session, spec, groups),
        "tokens": session.tokens,
        "seconds": session.seconds,
    }


def _responses(session: Session, spec: BlameSpec, groups: Sequence[RolloutGroup]) -> list[Response]:
    """Return the responses whose steps are blamed: the first failed ones (or all) of each problem."""
    chosen: list[list[Response]] = []
    for index, group in enumerate(groups):
        known = [rollout for rollout in group.rollouts if rollout.reward is not None]
        wanted = [r for r in known if spec.which == "all" or (r.reward or 0.0) < spec.threshold]
        if wanted:
            chosen.append([session.cut(index, group.problem, rollout) for rollout in wanted[: spec.responses]])
    costs = [
        sum(
            spec.k * mean_tokens_left(r, range(len(r.ends))) + 4 * spec.score * len(r.rollout.response_ids) for r in own
        )
        for own in chosen
    ]
    responses = [response for own in chosen[: session.affordable(costs, "blame")] for response in own]
    if len(responses) < 2:
        raise UserError(
            f"{len(responses)} responses {'can be used' if spec.which == 'all' else 'have failed'}; the test needs at "
            f"least 2; give more problems (--num_problems){'' if spec.which == 'all' else ' or --which all'}"
        )
    session.say(f"{len(responses)} responses of {len({r.problem_index for r in responses})} problems, {spec.which}")
    return responses


def _values(session: Session, spec: BlameSpec, responses: Sequence[Response]) -> list[np.ndarray]:
    """Return the Monte-Carlo values that choose the blamed steps: one row per response, shape (S,)."""
    states = [response.state(step) for response in responses for step in range(len(response.ends))]
    means = Gold.of_rewards(session.rewards(states, spec.k, "values that choose")).values
    ends = np.cumsum([len(response.ends) for response in responses])
    return np.split(np.nan_to_num(means), ends[:-1])


def _drops(response: Response, values: np.ndarray) -> list[float]:
    """Return by how much the value falls within each step; after the last step it is the reward."""
    after = np.append(values[1:], response.reward)
    return (values - after).tolist()


def blamed_step(drops: Sequence[float]) -> int:
    """Return the index of the largest drop, the earliest of several equal ones."""
    return max(range(len(drops)), key=lambda step: (drops[step], -step))


def is_blamed(drops: Sequence[Sequence[float]], step: Step) -> bool:
    """Return whether a step is the blamed step of its response."""
    return blamed_step(drops[step.response]) == step.index


def choose_trials(drops: Sequence[Sequence[float]], problems: Sequence[int], seed: int) -> list[Trial]:
    """Choose the blamed step of every response, and its controls at random.

    The control is a step with the same number of steps before it, drawn from all responses to other problems; it may be
    the blamed step of its own response. A response is left out if there is none.

    Args:
        drops: drop of each step of each response.
        problems: index of the problem of each response.
        seed: seed of the draws.
    """
    trials = []
    for number, row in enumerate(drops):
        index = blamed_step(row)
        others = [n for n, other in enumerate(drops) if problems[n] != problems[number] and len(other) > index]
        if not others:
            continue
        control = Step(others[derive_seed(seed, number, "control") % len(others)], index)
        rest = [step for step in range(len(row)) if step != index]
        sibling = Step(number, rest[derive_seed(seed, number, "sibling") % len(rest)]) if rest else None
        trials.append(Trial(Step(number, index), control, sibling))
    return trials


def _effects(
    session: Session, spec: BlameSpec, responses: Sequence[Response], trials: Sequence[Trial]
) -> dict[str, np.ndarray]:
    """Measure the effects of resampling the steps of all trials with new continuations.

    Returns:
        `blamed`, `control` and `sibling`: effect of each trial, shape (trials,), NaN without a sibling; `resampled` and
        `kept`: success after resampling the blamed step, and of continuations that keep it.
    """
    steps = [step for t in trials for step in (t.blamed, t.control, t.sibling) if step is not None]
    before = [responses[step.response].state(step.index) for step in steps]
    after = [_state_after(responses[step.response], step.index) for step in steps]
    resampled = Gold.of_rewards(session.rewards(before, spec.score, "resampled")).values
    kept_states = [state for state in after if state is not None]
    measured = iter(Gold.of_rewards(session.rewards(kept_states, spec.score, "kept")).values)
    kept = np.array(
        [
            responses[step.response].reward if state is None else next(measured)
            for step, state in zip(steps, after, strict=True)
        ]
    )
    effect = dict(zip([(id(t), kind) for t in trials for kind in _kinds(t)], resampled - kept, strict=True))
    firsts = [i for i, key in enumerate(effect) if key[1] == "blamed"]
    found = {
        kind: np.array([effect.get((id(t), kind), np.nan) for t in trials]) for kind in ("blamed", "control", "sibling")
    }
    return {**found, "resampled": resampled[firsts], "kept": kept[firsts]}


def _kinds(trial: Trial) -> list[str]:
    return ["blamed", "control", *(["sibling"] if trial.sibling else [])]


def _state_after(response: Response, index: int) -> State | None:
    """Return the state after a step, or None if the response ends with it."""
    return response.state(index + 1) if index + 1 < len(response.ends) else None


def summarise(problems: Sequence[int], effects: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Return the means of the effects and of their differences, with intervals over problems.

    Args:
        problems: problem of each trial.
        effects: the arrays that `_effects` returns.
        seed: seed of the bootstrap.
    """
    rows = {
        "difference": effects["blamed"] - effects["control"],
        "difference_sibling": effects["blamed"] - effects["sibling"],
        **{name: effects[name] for name in ("blamed", "control", "sibling", "resampled", "kept")},
    }
    found = bootstrap(problems, lambda chosen, labels: {n: _nanmean(row[chosen]) for n, row in rows.items()}, seed=seed)
    return {name: interval.as_dict() for name, interval in found.items()}


def _nanmean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _mean(values: Sequence[float], problems: Sequence[int], seed: int) -> dict[str, Any]:
    """Return a mean with its interval over problems."""
    array = np.array(values)
    found = bootstrap(problems, lambda rows, labels: {"mean": _nanmean(array[rows])}, seed=seed)
    return found["mean"].as_dict()


def _rows(
    responses: Sequence[Response], drops: Sequence[Sequence[float]], trials: Sequence[Trial], effects: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return one row per trial for blame.json."""
    return [
        {
            "problem": responses[trial.blamed.response].problem.id,
            "step": trial.blamed.index,
            "steps": len(drops[trial.blamed.response]),
            "drop": drops[trial.blamed.response][trial.blamed.index],
            **{name: float(effects[name][n]) for name in ("resampled", "kept", "blamed", "control", "sibling")},
        }
        for n, trial in enumerate(trials)
    ]


# --- steps that a machine can check ---


def first_wrong_score(truth: Sequence[int | None], predicted: Sequence[int | None]) -> dict[str, float]:
    """Score predictions of the first wrong step.

    Args:
        truth: index of the first wrong step of each response, or None if no step is wrong.
        predicted: predicted index, or None for no wrong step.
    Returns:
        `precision`: share of the predictions that name the wrong step exactly; `recall`: share of the responses with a
        wrong step whose step is named; `f1`: their harmonic mean, 0 if nothing is named rightly; NaN if there is
        neither a wrong step nor a prediction.
    """
    hits = sum(t is not None and t == p for t, p in zip(truth, predicted, strict=True))
    named, wrong = sum(p is not None for p in predicted), sum(t is not None for t in truth)
    if not named and not wrong:
        return {name: float("nan") for name in ("precision", "recall", "f1")}
    return {
        "precision": hits / named if named else float("nan"),
        "recall": hits / wrong if wrong else float("nan"),
        "f1": 2 * hits / (named + wrong),
    }


def _checked(session: Session, spec: BlameSpec, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Compare the largest drop with the first wrong step, and measure how often the policy recovers from a wrong step.

    The responses are the first one of every problem, whether it failed or not: failed responses alone would hide
    recoveries.

    Returns:
        An empty dictionary if the steps of the task cannot be checked.
    """
    checker = checker_of_problem(spec.task.name, groups[0].problem)
    if checker is None:
        return {}
    responses = [
        session.cut(index, group.problem, known[0])
        for index, group in enumerate(groups)
        if (known := [rollout for rollout in group.rollouts if rollout.reward is not None])
    ]
    costs = [
        spec.k * mean_tokens_left(r, range(len(r.ends))) + spec.score * len(r.rollout.response_ids) / 2
        for r in responses
    ]
    responses = responses[: session.affordable(costs, "steps that are checked")]
    session.say(f"steps that are checked: {len(responses)} responses")
    drops = [_drops(r, row) for r, row in zip(responses, _values(session, spec, responses), strict=True)]
    texts = [step_texts(r.rollout.response_ids, r.ends, session.codec.decode) for r in responses]
    truth = [checker(r.problem, steps) for r, steps in zip(responses, texts, strict=True)]
    predicted = [blamed_step(row) if max(row) >= spec.drop else None for row in drops]
    problems = [r.problem_index for r in responses]

    def scores(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return first_wrong_score([truth[i] for i in rows], [predicted[i] for i in rows])

    found = {name: value.as_dict() for name, value in bootstrap(problems, scores, seed=spec.seed).items()}
    wrong = [(r, t) for r, t in zip(responses, truth, strict=True) if t is not None]
    after = [(r, _state_after(r, t)) for r, t in wrong]
    open_states = [(r, s) for r, s in after if s is not None]
    values = Gold.of_rewards(session.rewards([s for _, s in open_states], spec.score, "after a wrong step")).values
    recovery = {"mean": None, "low": None, "high": None}
    if len(values):
        recovery = _mean(values.tolist(), [r.problem_index for r, _ in open_states], spec.seed)
    return {
        "responses": len(responses),
        "with_wrong_step": len(wrong),
        "drop": spec.drop,
        **found,
        "chance": float(np.mean([1 / len(r.ends) for r, _ in wrong])) if wrong else float("nan"),
        "recovery": recovery,
        "right_with_wrong_step": float(np.mean([r.reward >= spec.threshold for r, _ in wrong])) if wrong else None,
        "wrong_without_wrong_step": sum(
            t is None and r.reward < spec.threshold for r, t in zip(responses, truth, strict=True)
        ),
    }
