"""Measure the noise of Monte-Carlo advantages and what it does to the policy gradient, for `vineppo variance`.

The values of the same states are estimated several times with independent continuations. The variance of a step's
advantage over these repeats is compared with the binomial prediction p (1 - p) / K + p' (1 - p') / K, where p and p'
are the values before and after the step (without p' after the last step, whose value is the known reward). With reuse,
the two estimates share continuations, so the variance is lower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vineppo.config.measure import VarianceSpec
from vineppo.measure.agreement import Gold
from vineppo.measure.estimates import StateTable, monte_carlo, state_table
from vineppo.measure.gradients import Spread, gradients_of, spread_of, step_gradients
from vineppo.measure.intervals import MIN_PROBLEMS, bootstrap
from vineppo.measure.session import Response, Say, Session, mean_tokens_left
from vineppo.types import RolloutGroup, UserError

KINDS = ("settled", "open", "decisive", "last")
"""Kinds of steps, see `kind_of`."""
GROUP_SIZES = (1, 2, 4, 8)
"""Numbers of responses per problem in the table of splits."""


@dataclass(frozen=True)
class Series:
    """Repeated estimates with one method and one K."""

    method: str
    """`fresh` or `reuse`."""
    k: int
    advantages: np.ndarray
    """Advantage of each step in each repeat, shape (repeats, steps)."""
    tokens: float
    """Tokens of the continuations per response."""

    @property
    def variances(self) -> np.ndarray:
        """Variance of each advantage over the repeats, shape (steps,)."""
        result: np.ndarray = self.advantages.var(axis=0, ddof=1)
        return result


def measure_variance(spec: VarianceSpec, say: Say) -> dict[str, Any]:
    """Measure the variance of advantages over K, and the K with the smallest error of the gradient at a token budget.

    Returns:
        The content of variance.json; docs/measuring.md explains the keys.
    Raises:
        UserError: if the model or the task cannot be used.
    """
    session = Session.open(spec, say)
    groups = session.groups()
    responses = _responses(session, spec, groups)
    table = state_table(responses, 0, 0)
    states = table.states
    say(f"{len(states)} states of {len(responses)} responses: {spec.gold} continuations each for the prediction")
    rewards = session.rewards(states, spec.gold, "gold")
    _check_spread(rewards, responses)
    gold = _known_gold(rewards)
    series = [
        _series(session, table, spec, method, k)
        for k in spec.k
        for method in ("fresh", "reuse")
        if method == "fresh" or session.sampler.capabilities.excluded_first
    ]
    say("gradients of the output layer")
    rows = step_gradients(session.policy, responses, spec.temperature, session.seed("directions"))
    lengths = np.array([len(r.rollout.response_ids) for r in responses], dtype=float)
    return {
        "kind": "variance",
        "num_problems": len({r.problem_index for r in responses}),
        "num_responses": len(responses),
        "num_steps": len(table.befores),
        "gold": spec.gold,
        "repeats": spec.repeats,
        "decisive": spec.decisive,
        "mean_reward": float(np.mean([r.reward for r in responses])),
        "tokens_per_response": float(lengths.mean()),
        "by_kind": _by_kind(table, rewards, series, spec),
        "exponents": _exponents(series),
        "budget": best_split(_Costs(table, gold, series, rows, lengths), spec.seed),
        "tokens": session.tokens,
        "seconds": session.seconds,
    }


def _check_spread(rewards: np.ndarray, responses: Sequence[Response]) -> None:
    """Raise UserError if no two rewards differ.

    Args:
        rewards: rewards of the continuations of each state, shape (states, gold); NaN if unknown.
        responses: the responses that were cut into steps.
    """
    found = {*rewards[np.isfinite(rewards)].tolist(), *(r.reward for r in responses)}
    if len(found) < 2:
        raise UserError(_NO_SPREAD)


_NO_SPREAD = (
    "all responses and continuations have the same reward, so no advantage varies; give another model or task, or more "
    "problems (--num_problems)"
)


def _responses(session: Session, spec: VarianceSpec, groups: Sequence[RolloutGroup]) -> list[Response]:
    """Return all responses with a reward of as many problems as the token limit allows, at least two per problem."""
    chosen = []
    for index, group in enumerate(groups):
        known = [rollout for rollout in group.rollouts if rollout.reward is not None]
        if len(known) >= 2:
            chosen.append([session.cut(index, group.problem, rollout) for rollout in known])
    if len(chosen) < 2:
        raise UserError("fewer than two problems have two responses with a reward; give more problems (--num_problems)")
    per_state = spec.gold + 1.5 * spec.repeats * sum(spec.k)
    costs = [per_state * sum(mean_tokens_left(r, range(len(r.ends))) for r in own) for own in chosen]
    return [response for own in chosen[: session.affordable(costs, "variance")] for response in own]


def _series(session: Session, table: StateTable, spec: VarianceSpec, method: str, k: int) -> Series:
    """Estimate the advantages of all steps `spec.repeats` times."""
    before, states = session.tokens, table.states
    rows = []
    for repeat in range(spec.repeats):
        values = monte_carlo(session, states, k, method == "reuse", iteration=1 + repeat)
        rows.append(table.advantages(np.nan_to_num(values)))
    tokens = (session.tokens - before) / spec.repeats / len(table.responses)
    session.say(f"{method}, K = {k}: {tokens:,.0f} tokens per response")
    return Series(method, k, np.stack(rows), tokens)


def kind_of(before: float, after: float, is_last: bool, decisive: float) -> str:
    """Return the kind of a step.

    `last`: the response ends with it. `decisive`: its value changes by at least `decisive`. `settled`: both values are
    below 0.05 or both are above 0.95, so nearly all continuations agree. `open`: the others.

    Args:
        before: gold value before the step.
        after: gold value after it.
        is_last: whether the response ends with the step.
        decisive: the setting.
    """
    if is_last:
        return "last"
    if abs(after - before) >= decisive:
        return "decisive"
    return "settled" if max(before, after) < 0.05 or min(before, after) > 0.95 else "open"


def predicted_variances(table: StateTable, gold: Gold, count: int) -> np.ndarray:
    """Return the binomial prediction of the variance of each advantage for K = 1, shape (steps,).

    Args:
        gold: gold values from `count` continuations. Their variances times `count` are unbiased estimates of p (1 - p).
        count: N of the gold values.
    """
    return table.variances(gold.variances * count)


def _known_gold(rewards: np.ndarray) -> Gold:
    """Return the gold values of rewards, shape (n, N), with 0 for states none of whose continuations has a reward."""
    gold = Gold.of_rewards(rewards)
    return Gold(np.nan_to_num(gold.values), np.nan_to_num(gold.variances))


def _by_kind(table: StateTable, rewards: np.ndarray, series: Sequence[Series], spec: VarianceSpec) -> dict[str, Any]:
    """Return for each kind of step, method and K the measured and the predicted variance, and their ratio.

    One half of the gold continuations decides the kinds, the other half gives the prediction. With the same ones for
    both, settled steps would have predictions that are too small, because the kind selects small ones.

    Args:
        rewards: reward of every gold continuation of each state, shape (n, N).
    """
    gold, other = _known_gold(rewards[:, ::2]), _known_gold(rewards[:, 1::2])
    after = np.where(table.afters >= 0, gold.values[table.afters], table.rewards)
    before = gold.values[table.befores]
    kinds = np.array(
        [kind_of(b, a, last < 0, spec.decisive) for b, a, last in zip(before, after, table.afters, strict=True)]
    )
    predicted = predicted_variances(table, other, spec.gold // 2)
    problems = table.problems[table.befores]
    result: dict[str, Any] = {}
    for kind in (*KINDS, "all"):
        chosen = np.flatnonzero((kinds == kind) | (kind == "all"))
        if not len(chosen):
            continue
        rows = []
        for s in series:
            measured, expected = s.variances[chosen], predicted[chosen] / s.k

            def statistic(
                picked: np.ndarray, labels: np.ndarray, m: np.ndarray = measured, e: np.ndarray = expected
            ) -> Mapping[str, float]:
                total = float(e[picked].mean())
                mean = float(m[picked].mean())
                return {"measured": mean, "ratio": mean / total if total > 1e-9 else float("nan")}

            found = bootstrap(problems[chosen], statistic, seed=spec.seed)
            rows.append(
                {
                    "method": s.method,
                    "k": s.k,
                    "predicted": float(expected.mean()),
                    **{name: value.as_dict() for name, value in found.items()},
                }
            )
        result[kind] = {"steps": len(chosen), "rows": rows}
    return result


def _exponents(series: Sequence[Series]) -> dict[str, float | None]:
    """Return the slope of log(mean variance) over log(K) of each method; independent continuations have -1."""
    result: dict[str, float | None] = {}
    for method in ("fresh", "reuse"):
        points = [(s.k, s.variances.mean()) for s in series if s.method == method and s.variances.mean() > 0]
        if len({k for k, _ in points}) < 2:
            result[method] = None
            continue
        x, y = np.log(np.array(points, dtype=float)).T
        result[method] = float(np.polyfit(x, y, 1)[0])
    return result


# --- the error of the gradient at a token budget ---


class _Costs:
    """What the error at a budget needs, per response: costs, noise of the gradient, and gradients with gold values."""

    def __init__(
        self, table: StateTable, gold: Gold, series: Sequence[Series], rows: Sequence[np.ndarray], lengths: np.ndarray
    ):
        counts = [len(response.ends) for response in table.responses]
        cuts = np.cumsum(counts)[:-1]

        def split(advantages: np.ndarray) -> list[np.ndarray]:
            return np.split(advantages, cuts)

        exact = table.advantages(gold.values)
        whole = np.split(table.rewards, cuts)
        firsts = [gold.values[table.befores[start]] for start in (0, *cuts)]
        self.problems = np.array([r.problem_index for r in table.responses])
        self.lengths = lengths
        self.gold = gradients_of(rows, split(exact))
        # The noise of gold in the gradient, from the variances of the values: V(s_i) enters two advantages.
        self.gold_noise = np.array(
            [_noise_of_values(r, v) for r, v in zip(rows, np.split(gold.variances[table.befores], cuts), strict=True)]
        )
        baseline = [row - first for row, first in zip(whole, firsts, strict=True)]
        self.without = gradients_of(rows, baseline)
        self.arms: list[tuple[str, int, float, np.ndarray]] = []
        for s in series:
            repeats = np.stack([gradients_of(rows, split(a)) for a in s.advantages])  # (repeats, n, D)
            self.arms.append((s.method, s.k, s.tokens, repeats.var(axis=0, ddof=1).sum(-1)))


def _noise_of_values(rows: np.ndarray, variances: np.ndarray) -> float:
    """Return the variance of a response's gradient from independent errors of its values.

    The value before step i is subtracted from the advantage of step i and added to that of step i - 1.

    Args:
        rows: gradient of each step, shape (S, D).
        variances: variance of the value before each step, shape (S,).
    """
    changes = -rows
    changes[1:] += rows[:-1]
    return float(((changes**2).sum(1) * variances).sum())


def best_split(costs: _Costs, seed: int) -> dict[str, Any]:
    """Return the relative error at a token budget of every method, K and G, and which is best.

    Returns:
        `rows`: method, k, group_size, `error` relative to the best (an interval over problems); `equal_responses`:
        the same for equal numbers of responses in place of tokens, with G = 1; `best`: method, k and group size;
        `near`: those within 5% of the best; `tokens` and `noise` per response of every method and K; `spread`: the
        parts of the variance.
    """

    def errors(picked: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        spread = spread_of(costs.gold[picked], costs.gold_noise[picked], labels)
        length = float(costs.lengths[picked].mean())
        # Without continuations: reward minus the exact value of the prompt, as RLOO with a large group.
        plain = spread_of(costs.without[picked], np.zeros(len(picked)), labels)
        result = {"none 0 equal_responses": spread.problems + plain.responses}
        for method, k, _, noise in costs.arms:
            result[f"{method} {k} equal_responses"] = spread.error(float(noise[picked].mean()), 1.0, 1)
        least = min(result.values())
        result = {key: value / least if least > 0 else float("nan") for key, value in result.items()}
        at_tokens = {}
        for size in GROUP_SIZES:
            at_tokens[f"none 0 {size}"] = Spread(spread.problems, plain.responses).error(0.0, length, size)
            for method, k, tokens, noise in costs.arms:
                cost = length + tokens
                at_tokens[f"{method} {k} {size}"] = spread.error(float(noise[picked].mean()), cost, size)
        best = min(at_tokens.values())
        return result | {key: value / best if best > 0 else float("nan") for key, value in at_tokens.items()}

    found = bootstrap(costs.problems, errors, seed=seed, num_resamples=200)
    rows: list[dict[str, Any]] = []
    equal: dict[str, Any] = {}
    for key, value in found.items():
        method, k, size = key.split()
        if size == "equal_responses":
            equal[f"{method} {k}"] = value.as_dict()
            continue
        rows.append({"method": method, "k": int(k), "group_size": int(size), "error": value.as_dict()})
    if any(row["error"]["mean"] is None for row in rows):  # the smallest error is 0
        raise UserError(_NO_SPREAD)
    best = min(rows, key=lambda row: row["error"]["mean"])
    spread = spread_of(costs.gold, costs.gold_noise, costs.problems)
    return {
        "rows": rows,
        "equal_responses": equal,
        "best": {name: best[name] for name in ("method", "k", "group_size")},
        "near": [
            {name: row[name] for name in ("method", "k", "group_size")} for row in rows if row["error"]["mean"] < 1.05
        ],
        "tokens": {f"{method} {k}": tokens for method, k, tokens, _ in costs.arms},
        "noise": {f"{method} {k}": float(noise.mean()) for method, k, _, noise in costs.arms},
        "spread": {"problems": spread.problems, "responses": spread.responses},
    }


_UNSURE = "; the order is uncertain with so few problems"


def recommendation(result: Mapping[str, Any]) -> str:
    """Return one line that says which K to use for this model and task."""
    budget, best = result["budget"], result["budget"]["best"]
    rows = {(r["method"], r["k"], r["group_size"]): r["error"] for r in budget["rows"]}
    if best["method"] == "none":
        others = [row for row in budget["rows"] if row["method"] != "none"]
        second = min(others, key=lambda row: row["error"]["mean"])
        low = second["error"]["low"]
        sure = result["num_problems"] >= MIN_PROBLEMS and low is not None and low > 1
        return (
            f"Use no continuations here: at the same tokens, the best Monte-Carlo credit ({second['method']}, K = "
            f"{second['k']}) has {second['error']['mean']:.2f} times the squared error of the gradient"
            f"{'' if sure else _UNSURE}."
        )
    without = min(row["error"]["mean"] for row in budget["rows"] if row["method"] == "none")
    near = sorted({n["k"] for n in budget["near"] if n["method"] == best["method"]})
    also = f" (K = {', '.join(map(str, near))} are within 5%)" if len(near) > 1 else ""
    high = rows[best["method"], best["k"], best["group_size"]]["high"]
    sure = result["num_problems"] >= MIN_PROBLEMS and high is not None and high <= 1.05
    return (
        f"Use K = {best['k']} with {best['method']} continuations{also} and {best['group_size']} response"
        f"{'s' * (best['group_size'] > 1)} per problem: without continuations, the squared error of the gradient at "
        f"the same tokens is {without:.2f} times as large{'' if sure else _UNSURE}."
    )
