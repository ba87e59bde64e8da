"""GRPO: the advantage of a response is its reward relative to the mean reward of its group (arXiv 2402.03300).

A group consists of the responses to the same problem.
"""

from __future__ import annotations

from vineppo.config.settings import Settings
from vineppo.credit.advantages import grpo_advantages
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.group import group_credit
from vineppo.types import CreditFn


class GRPOSettings(Settings):
    """GRPO: the advantage of a response is its reward relative to the mean reward of its group."""

    scale_by_std: bool = True
    """Divide the advantages of a group by the standard deviation of its rewards (plus 1e-4). `false` gives the
    advantages of Dr. GRPO, which are not divided."""


def grpo_credit(scale_by_std: bool) -> CreditFn:
    """Build the credit function of GRPO, or of Dr. GRPO (arXiv 2503.20783) if `scale_by_std` is false."""
    return group_credit(lambda rewards: grpo_advantages(rewards, scale_by_std))


GRPO = Algorithm(
    name="grpo",
    label="GRPO",
    build=lambda settings, parts: grpo_credit(settings.scale_by_std),
    settings=GRPOSettings,
    min_group_size=2,
    colour="#009E73",
)
