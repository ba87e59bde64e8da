"""RLOO: the advantage of a response is its reward minus the mean reward of the other responses to the same problem.

Source: arXiv 2402.14740.
"""

from __future__ import annotations

from vineppo.credit.advantages import leave_one_out_advantages
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.group import group_credit
from vineppo.types import CreditFn


def rloo_credit() -> CreditFn:
    """Build the credit function of RLOO.

    The advantage of a response is its reward minus the mean reward of the other responses to the same problem. All
    tokens of a response get the advantage of the response.
    """
    return group_credit(leave_one_out_advantages)


RLOO = Algorithm(
    name="rloo", label="RLOO", build=lambda settings, parts: rloo_credit(), min_group_size=2, colour="#CC79A7"
)
