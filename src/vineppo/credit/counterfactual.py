"""Counterfactual credit: what would the reward be if one token were another one?

At some places of a response, another token is drawn in place of the response's token, and the response is continued
from there. The difference between the two rewards is the credit of the other token. The continuation is coupled with
the response: the tokens of the response after the place are its draft (`types.Draft`), so it differs from them only as
far as the other token changes the probabilities of later tokens. Most places change nothing later; their continuations
cost one or two tokens, and their credit is 0.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from vineppo.config.schema import Config
from vineppo.config.settings import Settings, require
from vineppo.credit.algorithm import Algorithm, CreditParts
from vineppo.credit.sample import one_per_rollout, reward_of, training_sample, with_reward
from vineppo.sampling.graded import sampled_and_graded
from vineppo.seeds import derive_seed, stream_keys, uniforms
from vineppo.types import (
    Alternative,
    Completion,
    CreditFn,
    Draft,
    MCRollout,
    Metrics,
    Problem,
    Rollout,
    RolloutGroup,
    SampleRequest,
    TrainingSample,
)


class CounterfactualSettings(Settings):
    """Counterfactual credit: the credit of another token is the change of the reward that it causes."""

    openness: float = Field(0.1, gt=0, le=1)
    """A place whose token had the probability p is branched with the probability (1 - p) / openness, or always if 1 - p
    is larger than `openness`. The credit is divided by this probability, so it is unbiased for every value. A smaller
    value branches more places that are nearly certain."""
    coupled: bool = True
    """Use the rest of the response as the draft of the continuation. `false` samples every continuation anew, which
    costs about as many tokens as the rest of the response, and is noisier."""
    lowest_reward: float = 0.0
    """The lowest reward that a response can have. Responses with this reward are never the better one of a pair. They
    are not branched, so they cost nothing."""


@dataclass(frozen=True)
class _Branch:
    """A place of a response at which another token is drawn."""

    rollout: int
    """Index of the rollout."""
    number: int
    """Number of the rollout among the rollouts of its problem in this iteration, counted from 0."""
    position: int
    """Index of the response's token that is replaced."""
    others: float
    """1 - p, the probability of all other tokens together."""
    chance: float
    """Probability of branching the place."""


_Graded = Sequence[tuple[Completion, str, float | None]]
"""The completion of a branch, the text of its response and the reward, as a list with one entry."""


def _check(settings: CounterfactualSettings, config: Config) -> None:
    """Raise UserError if the settings do not fit the configuration (`Algorithm.check`)."""
    penalty = config.learner.kl
    require(
        penalty.place == "loss" or penalty.coefficient == 0,
        "learner.kl.place is reward, which subtracts the KL penalty from the credit of the response's tokens, and "
        "counterfactual credit trains other tokens; set learner.kl.place to loss",
    )
    require(
        config.learner.advantage_scaling != "whiten",
        "learner.advantage_scaling is whiten, which subtracts the mean, so that alternatives with an advantage of 0 "
        "would get another advantage; allowed with algorithm counterfactual: none, std",
    )


def _build(settings: CounterfactualSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function for a run (`Algorithm.build`)."""
    capabilities = parts.sampler.capabilities
    if settings.coupled and not (capabilities.excluded_first and capabilities.drafts):
        warnings.warn(
            "counterfactual.coupled is off: this sampler takes no drafts, so every continuation is sampled anew; the "
            "credit is still unbiased, but noisier and more expensive",
            stacklevel=2,
        )
        settings = settings.model_copy(update={"coupled": False})
    return counterfactual_credit(settings, parts)


def counterfactual_credit(settings: CounterfactualSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function.

    Let a be the token of a response at some place, s the state before it, p(a) its probability, and R the reward of the
    response. Another token b is drawn with the probability p(b) / (1 - p(a)), and continued to a response with the
    reward R'. Let w(a, R) be (1 - p(a)) / (probability of branching the place). The credit of a is

        (R - R') h,  h = w(a, R) w(b, R') / (w(a, R) + w(b, R')),

    and b is trained as an alternative at s with the negative of it. If R' is the lowest reward, the continuation would
    not be branched, so w(b, R') is infinite and h = w(a, R).

    The expected gradient of this credit is the policy gradient at s, if the joint distribution of R and R' stays the
    same when the response and the continuation change places, as it does with drafts. A pair (a, R), (b, R') is then
    drawn in both orders, with probabilities in proportion to 1 / w(a, R) and 1 / w(b, R'). Multiplied by h, they add up
    to p(a) p(b). If R and R' are coupled, their difference is 0 wherever the token does not matter.

    `learner.advantage_scaling` measures only the deviation of the response's own tokens.

    With a sampler that cannot exclude the token a, b is drawn from pi(b | s), and the factor (1 - p) is left out; if b
    is a, there is no credit. Rollouts and continuations without a reward have no credit.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts, numbers = with_reward(groups), _numbers(groups)
        branches = [
            branch
            for index, owner in enumerate(rollouts)
            for branch in _branches(settings, parts.run_seed, iteration, index, numbers[index], owner)
        ]
        requests = [_request(settings, parts, iteration, rollouts[b.rollout], b) for b in branches]
        prefixes = [(rollouts[b.rollout][0], rollouts[b.rollout][1].response_ids[: b.position]) for b in branches]
        graded = sampled_and_graded(parts.sampler, parts.task, parts.codec.decode, requests, prefixes)
        advantages = [[0.0] * len(rollout.response_ids) for _, rollout in rollouts]
        alternatives: list[list[Alternative]] = [[] for _ in rollouts]
        for branch, [(completion, _, reward)] in zip(branches, graded, strict=True):
            other = _credit_of_other(settings, parts, rollouts[branch.rollout][1], branch, completion, reward)
            if other is not None:
                alternatives[branch.rollout].append(other)
                advantages[branch.rollout][branch.position] -= other.advantage
        kept = _kept(branches, graded, len(rollouts), parts.save_continuations)
        samples = [
            training_sample(rollout, of_tokens, alternatives=others, mc_rollouts=mc_rollouts)
            for (_, rollout), of_tokens, others, mc_rollouts in zip(
                rollouts, advantages, alternatives, kept, strict=True
            )
        ]
        return one_per_rollout(groups, samples), _metrics(graded, alternatives, max(1, len(rollouts)))

    return credit


def _metrics(graded: Sequence[_Graded], alternatives: Sequence[Sequence[Alternative]], num_rollouts: int) -> Metrics:
    """Return the metrics of an iteration: the cost of the branches, and their number per rollout."""
    completions = [completion for [(completion, _, _)] in graded]
    taken = sum(completion.accepted for completion in completions)
    return {
        "tokens/mc": float(sum(len(completion.token_ids) for completion in completions) - taken),
        "tokens/scored": float(taken),
        "credit/branches": len(completions) / num_rollouts,
        "credit/alternatives": sum(map(len, alternatives)) / num_rollouts,
    }


def _credit_of_other(
    settings: CounterfactualSettings,
    parts: CreditParts,
    rollout: Rollout,
    branch: _Branch,
    completion: Completion,
    reward: float | None,
) -> Alternative | None:
    """Return the other token of a branch with its credit, or None if the credit is 0.

    Args:
        completion: the other token and its continuation.
        reward: the reward of the response with the completion; None if no reward function applies to it.
    """
    token = completion.token_ids[0]
    own_reward = reward_of(rollout)
    if reward is None or reward == own_reward or token == rollout.response_ids[branch.position]:
        return None
    if parts.sampler.capabilities.excluded_first:
        others = 1 - math.exp(completion.logprobs[0]) * branch.others
        weight, reverse = branch.others / branch.chance, 1 / max(others, settings.openness)
    else:
        weight, reverse = 1 / branch.chance, _chance(settings, -math.expm1(completion.logprobs[0]))
    if _is_lowest(settings, reward):
        reverse = 0.0
    # `reverse` is 1 / w(b, R').
    return Alternative(branch.position, token, (reward - own_reward) * weight / (1 + weight * reverse))


def _is_lowest(settings: CounterfactualSettings, reward: float) -> bool:
    """Return whether a reward is the lowest one, or raise UserError if it is below that."""
    require(
        reward >= settings.lowest_reward,
        f"a response has the reward {reward:g}, which is below counterfactual.lowest_reward "
        f"{settings.lowest_reward:g}; set counterfactual.lowest_reward to the lowest reward that a response can have",
    )
    return reward == settings.lowest_reward


def _chance(settings: CounterfactualSettings, others: float) -> float:
    """Return the probability of branching a place of a response.

    Args:
        others: 1 - p, where p is the probability of the response's token at this place.
    """
    return min(1.0, others / settings.openness)


def _kept(
    branches: Sequence[_Branch],
    graded: Sequence[_Graded],
    num_rollouts: int,
    keep: int,
) -> list[list[MCRollout]]:
    """Return the continuations of each rollout's branches: those of the first `keep` rollouts that are branched.

    Args:
        graded: for each branch, its completion, the text of its response, and the reward.
    """
    kept: list[list[MCRollout]] = [[] for _ in range(num_rollouts)]
    chosen = set(sorted({branch.rollout for branch in branches})[:keep])
    for branch, [(completion, _, reward)] in zip(branches, graded, strict=True):
        if branch.rollout in chosen:
            ids, reason = completion.token_ids, completion.finish_reason
            kept[branch.rollout].append(MCRollout(branch.position, ids, reward, reason, completion.accepted))
    return kept


def _numbers(groups: Sequence[RolloutGroup]) -> list[int]:
    """Return the number of each rollout that has a reward among all rollouts of its problem.

    Random numbers depend on it, not on the place of the rollout in the iteration, so that the order of the problems
    changes nothing.
    """
    counts: Counter[str] = Counter()
    numbers = []
    for group in groups:
        for rollout in group.rollouts:
            if rollout.reward is not None:
                numbers.append(counts[group.problem.id])
            counts[group.problem.id] += 1
    return numbers


def _branches(
    settings: CounterfactualSettings,
    run_seed: int,
    iteration: int,
    index: int,
    number: int,
    owner: tuple[Problem, Rollout],
) -> list[_Branch]:
    """Return the places of a rollout that are branched, drawn at random.

    Args:
        index: index of the rollout.
        number: its number among the rollouts of its problem.
    """
    problem, rollout = owner
    if _is_lowest(settings, reward_of(rollout)):
        return []
    seed = derive_seed(run_seed, iteration, problem.id, "branches", number)
    keys = stream_keys(np.array([seed], np.uint64), np.array([0]))
    drawn = uniforms(keys[:, None], np.arange(len(rollout.response_ids)))[0].tolist()
    branches = []
    for position, (logprob, uniform) in enumerate(zip(rollout.sampler_logprobs, drawn, strict=True)):
        others = -math.expm1(logprob)  # 1 - p
        chance = _chance(settings, others)
        if uniform < chance:
            branches.append(_Branch(index, number, position, others, chance))
    return branches


def _request(
    settings: CounterfactualSettings,
    parts: CreditParts,
    iteration: int,
    owner: tuple[Problem, Rollout],
    branch: _Branch,
) -> SampleRequest:
    """Return the request for another token and its continuation."""
    problem, rollout = owner
    ids, at = rollout.response_ids, branch.position
    behind = ids[at + 1 :]
    draft = None
    if settings.coupled and behind:
        draft = Draft(rollout.prompt_ids + ids[: at + 1], behind, rollout.sampler_logprobs[at + 1 :], start=1)
    return SampleRequest(
        prompt_ids=rollout.prompt_ids + ids[:at],
        num_samples=1,
        max_new_tokens=parts.max_new_tokens - at,
        seed=derive_seed(parts.run_seed, iteration, problem.id, "counterfactual", branch.number, at),
        response_tokens=at,
        excluded_first=(ids[at],) if parts.sampler.capabilities.excluded_first else (),
        temperature=parts.temperature,
        stop=parts.stop,
        draft=draft,
    )


COUNTERFACTUAL = Algorithm(
    name="counterfactual",
    label="Counterfactual",
    build=_build,
    settings=CounterfactualSettings,
    check=_check,
    colour="#7F3C8D",
)
