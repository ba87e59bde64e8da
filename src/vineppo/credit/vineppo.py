"""VinePPO (arXiv 2410.01679): the advantage of a reasoning step is the value after the step minus the value before it.

A state consists of the prompt and the first tokens of a response. The value of a state is estimated by the mean reward
of K continuations that are sampled from the state. This estimate is made in `vineppo.values`; it needs no value
network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from vineppo.config.schema import Config
from vineppo.config.settings import Settings, require
from vineppo.credit.advantages import (
    from_first_drop,
    node_advantages,
    smallest_to_come,
    spread_over_tokens,
    step_advantages,
)
from vineppo.credit.algorithm import Algorithm, CreditParts, PlanHints
from vineppo.credit.bisection import bisected_vine_credit
from vineppo.credit.sample import one_per_rollout, reward_of, training_sample, with_reward
from vineppo.credit.value_metrics import value_metrics
from vineppo.model.codec import Codec
from vineppo.steps import Splitter, build_splitter, merge_steps, step_ends
from vineppo.types import (
    Alternative,
    CreditFn,
    MCRollout,
    Metrics,
    Problem,
    Rollout,
    RolloutGroup,
    StepCredit,
    TrainingSample,
)
from vineppo.values import (
    MonteCarlo,
    Node,
    NodeEstimator,
    ReusingMonteCarlo,
    State,
    Value,
    ValueEstimator,
    reusing_or_fresh,
)

Transform = Callable[[Sequence[float]], list[float]]
"""Function (step advantages, shape (S,)) -> the step advantages that are trained, shape (S,)."""


class VinePPOSettings(Settings):
    """VinePPO: advantages are differences between the Monte-Carlo values of neighbouring states."""

    num_mc_rollouts: int = Field(9, ge=1)
    """K: number of continuations sampled from each state."""
    splitter: str = "newline"
    """How a response is cut into reasoning steps: `newline` (one step per line), `math` (one step per sentence or line;
    a sentence does not end inside a formula, and a step of more than 100 characters also ends at a comma or an equals
    sign), `tokens:N` (every N tokens), `cutpoints` (after every fifth token that had a probability below 0.9),
    `cutpoints:N:P` (after every N-th token that had a probability below P), `regex:PATTERN` (after every match of a
    regular expression), or `module:function` (a user-defined function)."""
    reuse: bool = True
    """Let a continuation count for several states: if its first tokens are those of the response up to the next state,
    it is also one of the K continuations of that state. The values remain unbiased, fewer tokens are sampled, and the
    advantages are less noisy (docs/algorithms.md). `false` samples K new continuations of every state, as in the
    paper."""
    alternatives: bool = False
    """Also train the tokens that continuations sampled in place of the response's tokens. Every token then gets an
    advantage of its own instead of the advantage of its step, without additional sampling or forward passes
    (docs/algorithms.md). Requires `reuse`."""
    bisection: bool = False
    """Estimate the values only of the states around steps that change the expected reward. This is intended for long
    responses. The search starts with all steps of the response, and halves a range of steps if the values at its two
    ends differ by more than their noise (docs/algorithms.md)."""
    bisection_level: float = Field(0.7, gt=0, lt=1)
    """For `bisection`: confidence level at which the values at the two ends of a range of steps must differ for the
    range to be halved."""
    max_states: int = Field(0, ge=0)
    """Maximum number of states per response whose values are estimated; 0 means no limit. The first half of them are
    the states before single steps. Later steps are merged, two at first, then four and so on, because the number of
    steps is not yet known where a step ends (docs/algorithms.md)."""

    transform: Literal["none", "min", "first_drop"] = "none"
    """Change the step advantages before they are trained. `min`: a step gets the smallest advantage of this and all
    later steps, the min-form of PURE (arXiv 2504.15275). `first_drop`: after the first step whose advantage is at most
    -`drop`, all steps get the advantage of this step, and earlier steps no negative one (arXiv 2601.18984). Both are
    biased (docs/algorithms.md). The records of the run contain the step advantages before the change."""
    drop: float = Field(0.5, gt=0)
    """For `transform: first_drop`: fall of the value within a step, in reward units, that counts as an error."""

    def check(self) -> None:
        """Raise UserError if two of the settings exclude each other."""
        require(
            self.transform == "none" or not (self.alternatives or self.bisection),
            f"vineppo.transform is {self.transform}, which changes the advantages of steps: with vineppo.alternatives "
            "the advantages of tokens are trained, and with vineppo.bisection not all steps have one; set both to "
            "false, or vineppo.transform to none",
        )
        require(
            self.reuse or not self.alternatives,
            "vineppo.alternatives is true, but vineppo.reuse is false: alternatives are computed from the reused "
            "continuations; set vineppo.reuse true, or vineppo.alternatives false",
        )
        require(
            not (self.bisection and self.alternatives),
            "vineppo.bisection and vineppo.alternatives exclude each other: alternatives need continuations of every "
            "state, and bisection does not evaluate every state; set one of them false",
        )


def _check(settings: VinePPOSettings, config: Config) -> None:
    """Raise UserError for a wrong splitter, or if the settings do not fit the configuration (`Algorithm.check`)."""
    build_splitter(settings.splitter)
    require(
        not settings.alternatives or config.learner.advantage_scaling != "whiten",
        "learner.advantage_scaling is whiten, which subtracts the mean, so that alternatives with an advantage of 0 "
        "would get another advantage; allowed if vineppo.alternatives is true: none, std",
    )


def _build(settings: VinePPOSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function of VinePPO for a run (`Algorithm.build`)."""
    monte_carlo = MonteCarlo(
        sampler=parts.sampler,
        task=parts.task,
        decode=parts.codec.decode,
        num_mc_rollouts=settings.num_mc_rollouts,
        max_new_tokens=parts.max_new_tokens,
        run_seed=parts.run_seed,
        temperature=parts.temperature,
        stop=parts.stop,
    )
    return build_vine_credit(settings, monte_carlo, parts.codec, parts.save_continuations)


def build_vine_credit(settings: VinePPOSettings, monte_carlo: MonteCarlo, codec: Codec, keep: int = 0) -> CreditFn:
    """Build the credit function of VinePPO that the settings select.

    Args:
        settings: all settings except `num_mc_rollouts` are used.
        monte_carlo: samples and grades continuations. Its `num_mc_rollouts` is K.
        codec: returns the texts of the tokens, which splitters need.
        keep: number of rollouts whose continuations are returned (`CreditParts.save_continuations`).
    Raises:
        UserError: if `settings.alternatives` is true and the sampler cannot exclude first tokens.
    """
    steps = (build_splitter(settings.splitter), codec.token_texts, settings.max_states)
    if settings.alternatives:
        require(
            monte_carlo.sampler.capabilities.excluded_first,
            "vineppo.alternatives is true, but this sampler cannot exclude first tokens, which is needed to reuse "
            "continuations; set vineppo.alternatives false, or use the sampler of this package",
        )
        return vine_node_credit(ReusingMonteCarlo(monte_carlo), *steps, keep)
    estimator: ValueEstimator = reusing_or_fresh(monte_carlo) if settings.reuse else monte_carlo
    if settings.bisection:
        return bisected_vine_credit(estimator, *steps, settings.bisection_level, keep)
    return vine_credit(estimator, *steps, _transform(settings), keep)


def _transform(settings: VinePPOSettings) -> Transform:
    """Return the function that changes step advantages as the settings say."""
    if settings.transform == "min":
        return smallest_to_come
    if settings.transform == "first_drop":
        return functools.partial(from_first_drop, drop=settings.drop)
    return list


def vine_node_credit(
    estimator: NodeEstimator,
    splitter: Splitter,
    token_texts: Callable[[Sequence[int]], list[str]],
    max_states: int,
    keep: int = 0,
) -> CreditFn:
    """Build the credit function of VinePPO with alternatives, which computes one advantage per token.

    The arguments, the states and their values are the same as for `vine_credit`. The advantage of a token is computed
    by `node_advantages` from the continuations that pass through the state before the token (derivation in
    docs/algorithms.md). If such a continuation sampled another token there, that token is trained as an alternative.
    The step advantages are written to `StepCredit` for the records, but they are not trained. Continuations without a
    reward are left out.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts = with_reward(groups)
        ends = [step_ends(rollout, splitter, token_texts, max_states) for _, rollout in rollouts]
        values, nodes, cost = estimator.evaluate_nodes(_states(rollouts, ends, keep), rollouts, iteration)
        records, kept = _records(rollouts, ends, values), _kept(ends, values, keep)
        samples = [
            replace(_node_sample(rollout, record, nodes_T), mc_rollouts=mc_rollouts)
            for (_, rollout), record, nodes_T, mc_rollouts in zip(rollouts, records, nodes, kept, strict=True)
        ]
        alternatives = sum(len(sample.alternatives) for sample in samples)
        metrics = {**value_metrics(samples, cost), "credit/alternatives": alternatives / max(1, len(samples))}
        return one_per_rollout(groups, samples), metrics

    return credit


def vine_credit(
    estimator: ValueEstimator,
    splitter: Splitter,
    token_texts: Callable[[Sequence[int]], list[str]],
    max_states: int,
    transform: Transform = list,
    keep: int = 0,
) -> CreditFn:
    """Build the credit function of VinePPO as in the paper, where every token gets the advantage of its step.

    For every rollout:
      1. The response of T tokens is cut into S steps. Step i consists of the tokens response[b_i:b_{i+1}], where
         0 = b_0 < b_1 < ... < b_S = T.
      2. The value V(s_i) of each state s_i = prompt + response[:b_i], 0 <= i < S, is estimated by the mean reward of K
         continuations sampled from s_i.
      3. The advantage of step i is A_i = V(s_{i+1}) - V(s_i). For the last step it is reward - V(s_{S-1}).
      4. Every token of step i gets the advantage A_i.

    If no reward function applies to a response or to a continuation, it has no reward. A rollout without a reward has
    advantages of 0, and its states are not evaluated. Continuations without a reward are left out of the mean. A state
    whose K continuations all have no reward gets the value of the next state that has one, or the reward of the
    response if there is none. So its step has the advantage 0, because there is nothing to compare it with, and the
    step before it has the change up to the next known value. The sum of the advantages is still reward - V(s_0).

    Args:
        estimator: estimates the values of states.
        splitter: cuts a response into steps.
        token_texts: maps token ids to the text of each token.
        max_states: maximum number of steps per response; 0 means no limit. See `merge_steps`.
        transform: function (step advantages) -> the step advantages that are trained.
        keep: number of rollouts whose continuations are returned (`CreditParts.save_continuations`).
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts = with_reward(groups)
        ends = [step_ends(rollout, splitter, token_texts, max_states) for _, rollout in rollouts]
        values, cost = estimator.evaluate(_states(rollouts, ends, keep), iteration)
        records, kept = _records(rollouts, ends, values), _kept(ends, values, keep)
        samples = [
            training_sample(
                rollout,
                spread_over_tokens(transform(record.step_advantages), record.boundaries),
                credit=record,
                mc_rollouts=mc_rollouts,
            )
            for (_, rollout), record, mc_rollouts in zip(rollouts, records, kept, strict=True)
        ]
        return one_per_rollout(groups, samples), value_metrics(samples, cost)

    return credit


def _states(rollouts: Sequence[tuple[Problem, Rollout]], ends: Sequence[Sequence[int]], keep: int) -> list[State]:
    """Return the states before all steps of all rollouts, ordered by rollout and then by step.

    Args:
        ends: for each rollout, the end of each step as a number of response tokens, shape (S,).
        keep: number of rollouts whose continuations are returned.
    """
    return [
        State(problem, rollout.prompt_ids, rollout.response_ids[:start], rollout, keep=index < keep)
        for index, ((problem, rollout), ends_S) in enumerate(zip(rollouts, ends, strict=True))
        for start in (0, *ends_S[:-1])
    ]


def _kept(ends: Sequence[Sequence[int]], values: Sequence[Value | None], keep: int) -> list[tuple[MCRollout, ...]]:
    """Return the continuations of the states of each rollout. They are empty for all but the first `keep` rollouts.

    Args:
        ends: for each rollout, the end of each step as a number of response tokens, shape (S,).
        values: value of each state, in the order in which `_states` returns the states.
    """
    remaining = iter(values)
    kept = []
    for index, ends_S in enumerate(ends):
        values_S = [next(remaining) for _ in ends_S]
        kept.append(tuple(mc for value in values_S if value and index < keep for mc in value.mc_rollouts))
    return kept


def _records(
    rollouts: Sequence[tuple[Problem, Rollout]], ends: Sequence[Sequence[int]], values: Sequence[Value | None]
) -> list[StepCredit]:
    """Return the `StepCredit` of each rollout.

    Args:
        ends: for each rollout, the end of each step as a number of response tokens, shape (S,).
        values: value of each state, in the order in which `_states` returns the states. It is None if none of the
            continuations of the state has a reward.
    """
    remaining = iter(values)
    return [
        _record(rollout, ends_S, [next(remaining) for _ in ends_S])
        for (_, rollout), ends_S in zip(rollouts, ends, strict=True)
    ]


def _record(rollout: Rollout, ends_S: Sequence[int], values_S: Sequence[Value | None]) -> StepCredit:
    """Return the `StepCredit` of one rollout from the end of each step and the value of the state before each step."""
    reward = reward_of(rollout)
    known_S = _with_next_known(values_S, reward)
    return StepCredit(
        boundaries=tuple(ends_S),
        values=tuple(value.mean for value in known_S),
        num_mc_rollouts=tuple(value.num_mc_rollouts for value in known_S),
        step_advantages=tuple(step_advantages([value.mean for value in known_S], reward)),
    )


def _with_next_known(values_S: Sequence[Value | None], reward: float) -> list[Value]:
    """Return the values with each None replaced by the next value that is not None, or by the reward if there is none.

    The earlier value would not do: the step after the state would then be compared with the value of another state,
    which biases its advantage if the step changes the probability that the reward functions apply.
    """
    known: list[Value] = []
    following = Value(reward, 0)
    for value in reversed(values_S):
        following = value or following
        known.append(following)
    return known[::-1]


def _node_sample(rollout: Rollout, record: StepCredit, nodes_T: Sequence[Node]) -> TrainingSample:
    """Build the training sample of a rollout with one advantage per token, and with alternatives.

    Args:
        nodes_T: for each response token, the continuations that pass through the state before the token, shape (T,).
    """
    # For each token, the value of the state before and after the step that contains the token.
    before_T = spread_over_tokens(record.values, record.boundaries)
    after_T = spread_over_tokens((*record.values[1:], reward_of(rollout)), record.boundaries)
    advantages_T: list[float] = []
    alternatives: list[Alternative] = []
    for t, (node, before, after) in enumerate(zip(nodes_T, before_T, after_T, strict=True)):
        diverged = [reward for _, reward in node.diverged]
        advantage, diverged_advantages = node_advantages(after, before, node.followed, diverged)
        advantages_T.append(advantage)
        # An alternative with an advantage of 0 would not contribute to the loss.
        pairs = zip(node.diverged, diverged_advantages, strict=True)
        alternatives += [Alternative(t, token, a) for (token, _), a in pairs if a != 0]
    return training_sample(rollout, advantages_T, credit=record, alternatives=alternatives)


_REUSE_SHARE = 0.3
"""Tokens in the MC rollouts with `reuse`, divided by the tokens without `reuse`. Measured on the built-in task
`chain`."""


def _expected_mc_tokens(settings: VinePPOSettings, rollouts: int, steps: int, length: float) -> float:
    """Return the expected number of tokens in all MC rollouts of an iteration (`PlanHints.mc_tokens`).

    An MC rollout is one of the K continuations of a state. The estimate without `reuse` is K continuations of every
    state, each half as long as a response. With `reuse`, this number is multiplied by `_REUSE_SHARE`.

    Args:
        rollouts: number of rollouts.
        steps: number of steps per response.
        length: number of tokens per response.
    """
    states = len(merge_steps(range(1, steps + 1), settings.max_states))
    share = _REUSE_SHARE if settings.reuse else 1.0
    return rollouts * settings.num_mc_rollouts * states * length / 2 * share


def _variants(settings: VinePPOSettings, codec: Codec, rollouts: Sequence[Rollout]) -> list[tuple[str, float]]:
    """Return a list of (changed setting, relative cost), see `PlanHints.variants`.

    The list contains other values of K. It also contains other splitters, unless `reuse` or `bisection` is true: the
    cost then depends on more than the lengths of the responses and the ends of their steps.
    """
    K = settings.num_mc_rollouts
    rows = [(f"vineppo.num_mc_rollouts {k}", k / K) for k in (1, 3, 9, 18) if k != K]
    if settings.reuse or settings.bisection:
        return rows
    remaining = {
        spec: _remaining_tokens(spec, settings.max_states, codec, rollouts)
        for spec in (settings.splitter, "newline", "math", "cutpoints", "tokens:16", "tokens:64")
    }
    current = remaining.pop(settings.splitter)
    return rows + [(f"vineppo.splitter {spec}", tokens / current) for spec, tokens in remaining.items() if current]


def _remaining_tokens(spec: str, max_states: int, codec: Codec, rollouts: Sequence[Rollout]) -> int:
    """Return the number of response tokens after a state, summed over all states of all rollouts.

    This is the number of tokens in the MC rollouts for K = 1, if each continuation is as long as the rest of the
    response.

    Args:
        spec: name of the splitter that cuts the responses into steps.
    """
    splitter, total = build_splitter(spec), 0
    for rollout in rollouts:
        starts = (0, *step_ends(rollout, splitter, codec.token_texts, max_states)[:-1])
        total += sum(len(rollout.response_ids) - start for start in starts)
    return total


VINEPPO = Algorithm(
    name="vineppo",
    label="VinePPO",
    build=_build,
    settings=VinePPOSettings,
    check=_check,
    plan=PlanHints(_expected_mc_tokens, _variants),
    colour="#D55E00",
)
