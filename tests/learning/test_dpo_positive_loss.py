"""The DPO-positive loss against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vineppo.learning.losses import dpo_positive_loss


def loss_and_gradient(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, *, beta: float, penalty: float
) -> tuple[float, float, float, float]:
    """Return (loss, argument of the sigmoid, derivative by `chosen`, derivative by `rejected`)."""
    c, r = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected))
    c0, r0 = (torch.tensor([value], dtype=torch.float64) for value in (ref_chosen, ref_rejected))
    loss, margins = dpo_positive_loss(c, r, c0, r0, beta, penalty)
    loss.backward()
    assert c.grad is not None and r.grad is not None
    return loss.item(), margins.item(), c.grad.item(), r.grad.item()


def test_a_right_response_that_became_less_probable_is_penalised_inside_the_sigmoid() -> None:
    """The log-ratios are -2 and -3: 0.1 * (-2 + 3 - 50 * 2) = -9.9. Outside the sigmoid the loss would be 100.64."""
    loss, margin, by_chosen, by_rejected = loss_and_gradient(-12, -23, -10, -20, beta=0.1, penalty=50)
    assert margin == pytest.approx(-9.9)
    assert loss == pytest.approx(math.log(1 + math.exp(9.9))) == pytest.approx(9.90005, abs=1e-5)
    # The derivative of -log sigmoid(m) is sigmoid(m) - 1; that of m is 0.1 * 51 and -0.1.
    slope = 1 / (1 + math.exp(9.9)) - 1
    assert by_chosen == pytest.approx(5.1 * slope)
    assert by_rejected == pytest.approx(-0.1 * slope)


def test_a_right_response_that_became_more_probable_has_the_loss_of_dpo() -> None:
    """The log-ratios are 1 and -3: 0.3 * 4 = 1.2, with any penalty."""
    for penalty in (0.0, 50.0):
        loss, margin, by_chosen, by_rejected = loss_and_gradient(-9, -23, -10, -20, beta=0.3, penalty=penalty)
        assert margin == pytest.approx(1.2)
        assert loss == pytest.approx(math.log(1 + math.exp(-1.2))) == pytest.approx(0.26328, abs=1e-5)
        assert by_chosen == pytest.approx(-by_rejected) == pytest.approx(0.3 * (1 / (1 + math.exp(-1.2)) - 1))


@pytest.mark.parametrize("rounding", [-3e-5, 0.0, 3e-5])
def test_rounding_errors_do_not_decide_about_the_penalty(rounding: float) -> None:
    """At the starting model the loss is log 2 and its derivative that of DPO, although the penalty has a kink there."""
    loss, _, by_chosen, by_rejected = loss_and_gradient(-10 + rounding, -20, -10, -20, beta=0.1, penalty=50)
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert (by_chosen, by_rejected) == pytest.approx((-0.05, 0.05), abs=1e-5)


def test_the_loss_is_a_sum_over_pairs() -> None:
    chosen, rejected = torch.tensor([-12.0, -9.0]), torch.tensor([-23.0, -23.0])
    loss, margins = dpo_positive_loss(chosen, rejected, torch.tensor(-10.0), torch.tensor(-20.0), 0.1, 50.0)
    assert margins.tolist() == pytest.approx([-9.9, 0.4])
    assert loss.item() == pytest.approx(9.90005 + math.log(1 + math.exp(-0.4)), abs=1e-4)
