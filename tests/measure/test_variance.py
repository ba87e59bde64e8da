"""The noise of advantages in the enumerable world, and the parts of the gradient's variance, against known numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.measure.test_agreement import rollout, session, world
from vineppo.config.measure import VarianceSpec
from vineppo.measure.agreement import Gold
from vineppo.measure.estimates import StateTable, state_table
from vineppo.measure.gradients import Spread, spread_of, step_gradients
from vineppo.measure.output import about_brackets
from vineppo.measure.variance import (
    Series,
    _noise_of_values,
    _series,
    kind_of,
    predicted_variances,
    recommendation,
)


def table() -> StateTable:
    s, w = session(), world()
    outcomes = {o.rollout.response_ids: o.rollout for o in w.outcomes}
    responses = [s.cut(i, w.problem, outcomes[ids]) for i, ids in enumerate([(1, 2, 3, 0), (2, 2, 1, 1), (4, 0)])]
    return state_table(responses, 0, 0)


def exact_variances(t: StateTable) -> np.ndarray:
    """Exact variance of the reward at the states around each step, summed, shape (steps,)."""
    variances = np.array([world().moments[state.response_ids][1] for state in t.states])
    return t.variances(variances)


def test_measured_variances_are_the_exact_ones_over_k() -> None:
    t, spec = table(), VarianceSpec(repeats=400)
    exact = exact_variances(t)
    for k in (1, 4):
        measured = _series(session(), t, spec, "fresh", k).variances
        assert measured.sum() == pytest.approx(exact.sum() / k, rel=0.08)
        assert measured == pytest.approx(exact / k, rel=0.35)


def test_reuse_has_less_variance_between_neighbouring_states() -> None:
    """The likelier the response, the more continuations two neighbouring states share."""
    w, s, spec = world(), session(), VarianceSpec(repeats=300)
    likely = max((o for o in w.outcomes if len(o.rollout.response_ids) == 4), key=lambda o: o.probability)
    t = state_table([s.cut(0, w.problem, likely.rollout)], 0, 0)
    fresh, reuse = (_series(s, t, spec, method, 3).variances.sum() for method in ("fresh", "reuse"))
    assert reuse < 0.85 * fresh


def test_the_prediction_from_gold_is_unbiased() -> None:
    t, s = table(), session()
    found = []
    for i in range(60):
        gold = Gold.of_rewards(s.rewards(t.states, 5, f"gold {i}"))
        found.append(predicted_variances(t, gold, 5).sum())
    assert np.mean(found) == pytest.approx(exact_variances(t).sum(), rel=0.06)


def test_kinds_of_steps() -> None:
    assert kind_of(0.5, 0.8, True, 0.25) == "last"
    assert kind_of(0.5, 0.8, False, 0.25) == "decisive"
    assert kind_of(0.02, 0.04, False, 0.25) == kind_of(0.97, 1.0, False, 0.25) == "settled"
    assert kind_of(0.02, 0.06, False, 0.25) == "open"


def test_variances_of_a_series_by_hand() -> None:
    assert Series("fresh", 1, np.array([[0.0, 1.0], [2.0, 1.0]]), 0.0).variances.tolist() == [2.0, 0.0]


# --- the gradient ---


def test_projected_gradients_have_the_length_of_the_output_layers_gradient() -> None:
    """The mean squared length over directions is that of the exact gradient of the output matrix, from autograd."""
    w, s = world(), session()
    response = s.cut(0, w.problem, rollout((1, 2, 0), 1.0))
    model, weight = w.policy.model, w.policy.model.get_output_embeddings().weight
    ids = torch.tensor([(*w.prompt_ids, 1, 2, 0)])
    logprobs = (model(input_ids=ids).logits / w.temperature).log_softmax(-1)
    steps = [torch.autograd.grad(logprobs[0, 1 + t, a], weight, retain_graph=True)[0] for t, a in enumerate((1, 2, 0))]
    for advantages in ((1.0, 0.0, 0.0), (0.3, -0.2, 0.5)):
        exact = sum(a * g for a, g in zip(advantages, steps, strict=True))
        rows = [step_gradients(w.policy, [response], w.temperature, seed)[0] for seed in range(30)]
        lengths = [float(((np.array(advantages) @ r) ** 2).sum()) for r in rows]
        assert np.mean(lengths) == pytest.approx(float((exact**2).sum()), rel=0.1)


def test_the_parts_of_the_variance_are_recovered() -> None:
    """Gradients with the known variances 3 (problems), 5 (responses) and 2 (noise), in 10 directions."""
    generator = np.random.default_rng(0)
    P, G, D = 3000, 3, 10

    def draw(variance: float, *shape: int) -> np.ndarray:
        return generator.standard_normal((*shape, D)) * (variance / D) ** 0.5

    rows = (draw(3, P, 1) + draw(5, P, G) + draw(2, P, G)).reshape(P * G, D)
    spread = spread_of(rows, np.full(P * G, 2.0), np.repeat(np.arange(P), G))
    assert spread.problems == pytest.approx(3, rel=0.08) and spread.responses == pytest.approx(5, rel=0.03)


def test_the_error_at_a_budget_is_that_of_a_simulation() -> None:
    """With 60 tokens of 10 per response and G = 2 there are 3 problems: error 60 * Var(mean) = 10 * (2 * 3 + 5 + 2)."""
    assert Spread(3.0, 5.0).error(2.0, 10.0, 2) == 130
    variance_of_mean = (3 + (5 + 2) / 2) / 3
    assert Spread(3.0, 5.0).error(2.0, 10.0, 2) == pytest.approx(60 * variance_of_mean)


def test_the_noise_of_values_in_the_gradient_by_hand() -> None:
    """V(s_0) is subtracted in step 0; V(s_1) is subtracted in step 1 and added in step 0."""
    rows = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert _noise_of_values(rows, np.array([0.5, 0.1])) == pytest.approx(0.5 * 1 + 0.1 * (1 + 4))


def row(method: str, k: int, error: float, high: float = 1.0) -> dict[str, Any]:
    return {"method": method, "k": k, "group_size": 1, "error": {"mean": error, "low": 1.0, "high": high}}


def test_the_recommendation_names_the_best_and_its_neighbours() -> None:
    rows = [row("none", 0, 2.5), row("reuse", 2, 1.04), row("reuse", 4, 1.0), row("reuse", 9, 1.6)]
    near = [{"method": "reuse", "k": k, "group_size": 1} for k in (2, 4)]
    result = {"num_problems": 10, "budget": {"rows": rows, "best": near[1], "near": near}}
    assert recommendation(result) == (
        "Use K = 4 with reuse continuations (K = 2, 4 are within 5%) and 1 response per problem: without "
        "continuations, the squared error of the gradient at the same tokens is 2.50 times as large."
    )
    rows[0]["error"]["mean"] = 1.0
    best = {"method": "none", "k": 0, "group_size": 1}
    result["budget"] = {"rows": rows, "best": best, "near": []}
    clear = "Use no continuations here: at the same tokens, the best Monte-Carlo credit (reuse, K = 4) has 1.20 times"
    rows[2]["error"] = {"mean": 1.2, "low": 1.1, "high": 1.3}
    rows[1]["error"]["mean"] = 1.25
    assert recommendation(result) == f"{clear} the squared error of the gradient."


def test_the_recommendation_is_uncertain_with_few_problems_or_wide_intervals() -> None:
    rows = [row("none", 0, 1.0), row("reuse", 4, 1.2), row("reuse", 9, 1.6)]
    rows[1]["error"]["low"] = 1.1
    plain, vines = ({"rows": rows, "best": rows[n], "near": []} for n in (0, 1))
    unsure = "the order is uncertain with so few problems."
    assert not recommendation({"num_problems": 10, "budget": plain}).endswith(unsure)
    assert recommendation({"num_problems": 9, "budget": plain}).endswith(unsure)
    assert not recommendation({"num_problems": 10, "budget": vines}).endswith(unsure)
    assert recommendation({"num_problems": 9, "budget": vines}).endswith(unsure)
    rows[1]["error"] |= {"low": 0.9, "high": 1.5}  # vines may be no worse, and no better
    assert recommendation({"num_problems": 10, "budget": plain}).endswith(unsure)
    assert recommendation({"num_problems": 10, "budget": vines}).endswith(unsure)


def test_reports_say_that_intervals_of_few_problems_are_too_narrow() -> None:
    assert about_brackets(10) == "Brackets are 95% bootstrap intervals over problems."
    assert about_brackets(2).endswith(" 2 problems are too few for them: they are too narrow, so measure at least 10.")
