"""GRPO-lambda: the weights of its traces by hand, and its bias in the enumerable world."""

from __future__ import annotations

import pytest

from tests.credit.enumerated import cosine, error, length, of_groups
from tests.credit.test_credit import group_with, response_part
from tests.credit.test_ground_truth import world
from vineppo.credit.grpo import grpo_credit
from vineppo.credit.grpo_lambda import GRPOLambdaSettings, grpo_lambda_credit, trace_weights


def test_weights_by_hand() -> None:
    assert trace_weights(3, 0.5, "last") == [0.25, 0.5, 1.0]
    assert trace_weights(3, 0.5, "all") == [0.875, 0.75, 0.5]
    assert trace_weights(2, 0.0, "last") == [0.0, 1.0] and trace_weights(2, 0.0, "all") == [1.0, 1.0]
    assert trace_weights(2, 1.0, "last") == trace_weights(2, 1.0, "all") == [1.0, 1.0]


@pytest.mark.parametrize("errors", ["last", "all"])
def test_weights_are_sums_of_traces(errors: str) -> None:
    """The trace of token t at token u is lambda^(u - t)."""
    T, decay = 7, 0.8
    for t, weight in enumerate(trace_weights(T, decay, errors)):
        traces = [decay ** (u - t) for u in range(t, T)]
        assert weight == pytest.approx(traces[-1] if errors == "last" else (1 - decay) * sum(traces))


def test_credit_by_hand() -> None:
    samples, metrics = grpo_lambda_credit(GRPOLambdaSettings(trace_lambda=0.5, scale_by_std=False))(
        [group_with([1, 0]), group_with([1, None, 1])], 1
    )
    assert [response_part(sample) for sample in samples] == [
        [0.25, 0.5], [-0.125, -0.25, -0.5], [0.0] * 2, [0.0] * 3, [0.0] * 4,
    ]  # fmt: skip
    assert metrics == {"credit/zero_group_share": 0.5}


def test_lambda_1_is_grpo() -> None:
    groups = [group_with([1, 0, None, 0.5])]
    ours, _ = grpo_lambda_credit(GRPOLambdaSettings(trace_lambda=1))(groups, 1)
    theirs, _ = grpo_credit(scale_by_std=True)(groups, 1)
    assert [sample.advantages for sample in ours] == [sample.advantages for sample in theirs]


@pytest.mark.parametrize(
    ("errors", "decay", "expected_length", "expected_cosine"),
    [
        ("last", 1.0, 1, 1),
        ("last", 0.9, 0.9161, 0.99619),
        ("last", 0.5, 0.6295, 0.88688),
        ("all", 0.9, 0.1755, 0.92487),
        ("all", 0.5, 0.6852, 0.97255),
    ],
)
def test_traces_are_biased(errors: str, decay: float, expected_length: float, expected_cosine: float) -> None:
    """With the baseline of RLOO, the expected gradient is exact at lambda 1 only: the weights depend on the length."""
    w = world(3)
    settings = GRPOLambdaSettings(trace_lambda=decay, errors=errors, baseline="others")
    gradient, exact = of_groups(w, grpo_lambda_credit(settings), 2), 2 * w.table_gradient
    assert (error(gradient, exact) < 1e-9) == (decay == 1)
    assert length(gradient, exact) == pytest.approx(expected_length, abs=1e-3)
    assert cosine(gradient, exact) == pytest.approx(expected_cosine, abs=1e-4)
