"""Cost models from synthetic timings, break-evens, and costs on data-sheet GPUs by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vineppo.config.measure import ScalingSpec
from vineppo.measure import scaling
from vineppo.measure.costmodel import CostModel, break_even, fit_cost
from vineppo.measure.gpus import MODELS, gpu_rows, gpus_for, iteration_seconds
from vineppo.measure.longchain import fixed_tokens
from vineppo.types import UserError

STEPS = [10, 25, 50, 250, 500]


@pytest.mark.parametrize(
    "truth", [(0.02, 2e-3, 1e-4, 0.0), (0.0, 0.0, 3e-5, 2e-8), (0.1, 0.0, 0.0, 0.0), (0.01, 1e-3, 2e-5, 3e-8)]
)
def test_the_coefficients_of_synthetic_timings_are_recovered(truth: tuple[float, ...]) -> None:
    model = CostModel(truth)
    found = fit_cost(STEPS, [model.seconds(n) for n in STEPS])
    assert found.coefficients == pytest.approx(truth, rel=1e-6, abs=1e-12)


def test_noisy_timings_predict_a_held_out_length_and_have_no_negative_coefficient() -> None:
    truth, generator = CostModel((0.0, 1e-3, 2e-5, 0.0)), np.random.default_rng(0)
    for _ in range(20):
        noisy = [truth.seconds(n) * float(np.exp(0.05 * generator.standard_normal())) for n in STEPS]
        found = fit_cost(STEPS, noisy)
        assert min(found.coefficients) >= 0
        assert found.seconds(100) == pytest.approx(truth.seconds(100), rel=0.15)


@pytest.mark.parametrize(("method", "error"), [("fixed_k", 0.05), ("reuse", 0.07), ("bisection", 0.1)])
def test_published_timings_predict_a_length_that_was_not_fitted(method: str, error: float) -> None:
    """docs/results/length has measured seconds of 10 to 500 steps; 100 steps are left out of the fit."""
    rows = json.loads((Path(__file__).parents[2] / "docs/results/length/length.json").read_text())["rows"]
    seconds = {row["steps"]: row["seconds"] for row in rows if row["method"] == method}
    held_out = seconds.pop(100)
    assert fit_cost(list(seconds), list(seconds.values())).seconds(100) == pytest.approx(held_out, rel=error)


def test_wrong_timings_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        fit_cost([1, 2], [0.0, 1.0])


def test_break_even_by_hand() -> None:
    """2 n^2 and 40 n are equal at n = 20; n^2 + 1 and n never are."""
    assert break_even(lambda n: 2 * n**2, lambda n: 40 * n, 1000) == pytest.approx(20)
    assert break_even(lambda n: 40 * n, lambda n: 2 * n**2, 1000) == pytest.approx(20)
    assert break_even(lambda n: n**2 + 1, lambda n: n, 1000) is None
    assert break_even(lambda n: 2 * n**2, lambda n: 40 * n, 10) is None
    # (n - 5) (n - 50) changes its sign twice; the first one counts.
    assert break_even(lambda n: (n - 5) * (n - 50), lambda n: 0, 1000) == pytest.approx(5)


def test_a_held_out_length_is_not_fitted() -> None:
    truth = CostModel((0.0, 0.0, 1e-3, 0.0))
    rows = [{"method": "reuse", "steps": n, "seconds": truth.seconds(n), "tokens": 0.0} for n in STEPS]
    rows.append({"method": "reuse", "steps": 100, "seconds": 2 * truth.seconds(100), "tokens": 0.0})
    fit = scaling._model_of(rows, "reuse", 100)
    assert fit is not None and fit["fitted"] == STEPS
    assert fit["held_out"]["error"] == pytest.approx(-0.5)
    assert scaling._model_of(rows[:2], "reuse", 100) is None


def test_the_share_of_tokens_is_interpolated() -> None:
    rows = [
        {"method": "reuse", "steps": n, "tokens": share * fixed_tokens(n, 3, 9)}
        for n, share in ((10, 0.4), (1000, 0.1))
    ]
    share = scaling.share_of_tokens(rows, "reuse", 9, 3)
    assert [share(n) for n in (1, 10, 100, 1000, 5000)] == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.1])


def test_costs_on_a_gpu_by_hand() -> None:
    """7B on four A100: decoding 10 steps of 30 tokens is limited by arithmetic at 6% of the speed."""
    shape = MODELS["7B"]
    assert gpus_for(MODELS["1.1B"], "a100") == 1 and gpus_for(shape, "a100") == 4
    assert gpus_for(MODELS["70B"], "h100") == 64  # 32 bytes * 69e9 parameters in 0.8 * 80 GiB each: 32.1
    flops = 4 * 312e12
    found = iteration_seconds(shape, "4xa100", 10, 9)
    tokens = 512 * 9 * 30 * 55
    assert found["continuations"] == pytest.approx(2 * shape.parameters * tokens / (0.06 * flops))
    forward = 2 * shape.parameters * 512 * (300 + 120) / (0.12 * flops)
    assert found["value network"] == pytest.approx(7 * forward)
    rows = gpu_rows(("a100",), 9, {"fixed_k": lambda steps: 1.0})
    first = next(row for row in rows if row["model"] == "7B")["lengths"][0]
    assert first["continuations"] / first["value_network"] == pytest.approx(found["continuations"] / (7 * forward))


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="gpus contains v100; allowed: t4"):
        gpu_rows(("v100",), 9, {})


def test_a_short_measurement_has_every_part() -> None:
    spec = ScalingSpec(steps=(4, 6, 8, 12), held_out=8, k=2, responses=2, repeats=1, width=144, gpus=("h100",))
    result = scaling.measure_scaling(spec, lambda line: None)
    fixed = {row["steps"]: row["tokens"] for row in result["rows"] if row["method"] == "fixed_k"}
    assert fixed == {n: fixed_tokens(n, 3, 2) for n in spec.steps}
    assert set(result["models"]) == {"fixed_k", "reuse", "bisection", "value network"}
    assert all(fit["held_out"]["steps"] == 8 for fit in result["models"].values())
