"""RLOO: the advantage is the reward relative to the mean of the other responses of the group (arXiv 2402.14740)."""

from __future__ import annotations

from vineppo.credit.advantages import leave_one_out_advantages
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.group import group_credit
from vineppo.types import CreditFn


def rloo_credit() -> CreditFn:
    """Build the credit function of RLOO. The baseline is the mean reward of the other rollouts of the group."""
    return group_credit(leave_one_out_advantages)


RLOO = Algorithm(
    name="rloo", label="RLOO", build=lambda settings, parts: rloo_credit(), min_group_size=2, colour="#CC79A7"
)
