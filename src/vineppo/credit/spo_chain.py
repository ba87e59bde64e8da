"""SPO-chain: Monte-Carlo values at cutpoints, and advantages only for the uncertain tokens (arXiv 2505.23564).

A token is uncertain if the policy sampled it with a low probability. A segment ends after a number of uncertain tokens.
Its advantage is the value after it minus the value before it, estimated as in VinePPO. Only its uncertain tokens get
this advantage, because at the other tokens another choice was unlikely.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pydantic import Field

from vineppo.config.settings import Settings
from vineppo.credit.algorithm import Algorithm, CreditParts, PlanHints
from vineppo.credit.vineppo import VINEPPO, VinePPOSettings
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


class SPOChainSettings(Settings):
    """SPO-chain: Monte-Carlo values after every few uncertain tokens, and advantages only for uncertain tokens."""

    num_mc_rollouts: int = Field(9, ge=1)
    """Number of continuations sampled from each state, K."""
    every: int = Field(5, ge=1)
    """Number of uncertain tokens after which a segment ends."""
    uncertain_below: float = Field(0.9, ge=1e-6, le=1)
    """A token is uncertain if it was sampled with a probability below this number. With 1, practically all tokens are
    uncertain."""
    only_uncertain: bool = True
    """Give the advantage of a segment only to its uncertain tokens, as in the paper. This is biased
    (docs/algorithms.md). `false` gives it to all tokens, which is VinePPO with the splitter `cutpoints`."""
    reuse: bool = True
    """Let a continuation count for several states, as in `vineppo.reuse`."""
    max_states: int = Field(0, ge=0)
    """Maximum number of states per response whose values are estimated, as in `vineppo.max_states`; 0 means no
    limit."""


def as_vineppo(settings: SPOChainSettings) -> VinePPOSettings:
    """Return the settings of VinePPO that give the same segments and values."""
    return VinePPOSettings(
        num_mc_rollouts=settings.num_mc_rollouts,
        splitter=f"cutpoints:{settings.every}:{settings.uncertain_below:.12f}",
        reuse=settings.reuse,
        max_states=settings.max_states,
    )


def only_uncertain(credit: CreditFn, below: float) -> CreditFn:
    """Return a credit function that sets the advantages of tokens with a probability of at least `below` to 0.

    Its additional metric `credit/uncertain_share` is the share of the trained tokens that are below.

    Args:
        credit: the credit function.
        below: probability at which the policy sampled a token. With 1, all advantages remain.
    """

    def masked(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples, metrics = credit(groups, iteration)
        limit = math.log(below) if below < 1 else math.inf
        kept = tokens = 0
        changed = []
        for sample in samples:
            uncertain = [logprob < limit for logprob in sample.sampler_logprobs]
            kept += sum(u and m for u, m in zip(uncertain, sample.loss_mask, strict=True))
            tokens += sum(sample.loss_mask)
            advantages = tuple(a if u else 0.0 for a, u in zip(sample.advantages, uncertain, strict=True))
            changed.append(replace(sample, advantages=advantages))
        return changed, {**metrics, "credit/uncertain_share": kept / max(1, tokens)}

    return masked


def _build(settings: SPOChainSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function of SPO-chain for a run (`Algorithm.build`)."""
    credit = VINEPPO.build(as_vineppo(settings), parts)
    return only_uncertain(credit, settings.uncertain_below) if settings.only_uncertain else credit


def _plan() -> PlanHints:
    """Return the cost of VinePPO with the same segments and values."""
    hints = VINEPPO.plan
    assert hints is not None
    return PlanHints(
        mc_tokens=lambda settings, rollouts, steps, length: hints.mc_tokens(
            as_vineppo(settings), rollouts, steps, length
        ),
        variants=lambda settings, codec, rollouts: [
            (f"spo_chain.num_mc_rollouts {k}", k / settings.num_mc_rollouts)
            for k in (1, 3, 9, 18)
            if k != settings.num_mc_rollouts
        ],
    )


SPO_CHAIN = Algorithm(
    name="spo_chain",
    label="SPO-chain",
    build=_build,
    settings=SPOChainSettings,
    plan=_plan(),
    colour="#999933",
)
