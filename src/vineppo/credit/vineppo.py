"""VinePPO: the advantage of a reasoning step is the change of the state's value (arXiv 2410.01679)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import Field

from vineppo.config.schema import Config
from vineppo.config.settings import Settings, require
from vineppo.credit.advantages import node_advantages, spread_over_tokens, step_advantages
from vineppo.credit.algorithm import Algorithm, CreditParts, PlanHints
from vineppo.credit.bisection import bisected_vine_credit
from vineppo.credit.sample import training_sample
from vineppo.credit.value_metrics import value_metrics
from vineppo.model.codec import Codec
from vineppo.steps import Splitter, build_splitter, step_ends
from vineppo.types import Alternative, CreditFn, Metrics, Problem, Rollout, RolloutGroup, StepCredit, TrainingSample
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


class VinePPOSettings(Settings):
    """VinePPO: values of intermediate states by Monte-Carlo continuation."""

    num_mc_rollouts: int = Field(9, ge=1)
    """K: continuations sampled from each state."""
    splitter: str = "newline"
    """How a response is cut into steps: `newline` (a line), `math` (a sentence or line; formulas stay whole, long
    pieces are halved), `tokens:N` (every N tokens), `cutpoints` (after every fifth token with a probability below 0.9;
    `cutpoints:N:P` for other numbers), `regex:PATTERN` (after every match), or `module:function` for your own."""
    reuse: bool = True
    """A continuation that follows a response to its next state counts as one of that state's K too: unbiased, fewer
    tokens, less noise (docs/algorithms.md). `false`: K new ones at every state, as in the paper."""
    alternatives: bool = False
    """Also train the tokens that continuations chose instead of the response's own: no further sampling or forward
    pass, and credit for every token instead of every step (docs/algorithms.md). Needs `reuse`."""
    bisection: bool = False
    """Evaluate only the states where the outcome was decided: start with both ends of the response and halve the
    stretches whose ends differ by more than their noise (docs/algorithms.md). For long chains."""
    bisection_level: float = Field(0.7, gt=0, lt=1)
    """Confidence with which the values at the ends of a stretch must differ for bisection to halve it."""
    max_states: int = Field(0, ge=0)
    """At most this many states of a response are evaluated (0: all). Steps between evaluated states are merged, evenly
    along the response, so that their advantages still telescope. The cuts then depend on the response's whole length,
    which makes the expected gradient a little smaller (docs/algorithms.md)."""

    def check(self) -> None:
        """Forms of VinePPO that cannot be combined."""
        require(
            self.reuse or not self.alternatives,
            "vineppo.alternatives is true, but vineppo.reuse is false: only continuations that follow the response are "
            "known token by token; set vineppo.reuse true, or vineppo.alternatives false",
        )
        require(
            not (self.bisection and self.alternatives),
            "vineppo.bisection and vineppo.alternatives exclude each other: bisection leaves states without "
            "continuations; set one of them false",
        )


def _check(settings: VinePPOSettings, config: Config) -> None:
    require(
        not settings.alternatives or config.learner.advantage_scaling != "whiten",
        "learner.advantage_scaling is whiten, which gives credit to alternatives that earned none "
        "(vineppo.alternatives); allowed with it: none, std",
    )


def _build(settings: VinePPOSettings, parts: CreditParts) -> CreditFn:
    plain = MonteCarlo(
        sampler=parts.sampler,
        task=parts.task,
        decode=parts.codec.decode,
        num_mc_rollouts=settings.num_mc_rollouts,
        max_new_tokens=parts.max_new_tokens,
        run_seed=parts.run_seed,
        temperature=parts.temperature,
        stop=parts.stop,
    )
    return build_vine_credit(settings, plain, parts.codec)


def build_vine_credit(settings: VinePPOSettings, plain: MonteCarlo, codec: Codec) -> CreditFn:
    """The form of VinePPO that the settings ask for; the number of continuations is that of `plain`."""
    steps = (build_splitter(settings.splitter), codec.token_texts, settings.max_states)
    if settings.alternatives:
        require(
            plain.sampler.capabilities.excluded_first,
            "vineppo.alternatives is true, but this sampler cannot exclude first tokens, which reusing continuations "
            "needs; set vineppo.alternatives false, or sample with the native engine",
        )
        return vine_node_credit(ReusingMonteCarlo(plain), *steps)
    estimator: ValueEstimator = reusing_or_fresh(plain) if settings.reuse else plain
    if settings.bisection:
        return bisected_vine_credit(estimator, *steps, settings.bisection_level)
    return vine_credit(estimator, *steps)


def vine_node_credit(
    estimator: NodeEstimator, splitter: Splitter, token_texts: Callable[[Sequence[int]], list[str]], max_states: int
) -> CreditFn:
    """VinePPO's credit function with credit per token, also for the tokens that continuations chose instead.

    The states, values and cost are those of `vine_credit`, which gives all tokens of a step the step's advantage. Here
    every token has its own advantage, estimated from the continuations that pass it, and every continuation that
    chooses another token at that position trains that token (`node_advantages`; derivation in docs/algorithms.md). The
    step advantages are kept for the record.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        owners = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
        cuts = [step_ends(rollout, splitter, token_texts, max_states) for _, rollout in owners]
        values, nodes, cost = estimator.evaluate_nodes(_states(owners, cuts), owners, iteration)
        records = _records(owners, cuts, values)
        samples = [
            _node_sample(rollout, record, nodes_T)
            for (_, rollout), record, nodes_T in zip(owners, records, nodes, strict=True)
        ]
        alternatives = sum(len(sample.alternatives) for sample in samples)
        return samples, {**value_metrics(samples, cost), "credit/alternatives": alternatives / max(1, len(samples))}

    return credit


def vine_credit(
    estimator: ValueEstimator, splitter: Splitter, token_texts: Callable[[Sequence[int]], list[str]], max_states: int
) -> CreditFn:
    """VinePPO's credit function as in the paper: all tokens of a step get the step's advantage.

    For every rollout:
      1. cut the response into steps 0 = b_0 < b_1 < ... < b_S = T;
      2. s_i = prompt + response[:b_i]; V(s_i) = mean reward of K continuations of s_i, for 0 <= i < S;
      3. A_i = V(s_{i+1}) - V(s_i), and reward - V(s_{S-1}) for the last step;
      4. every token of step i gets A_i.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        owners = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
        cuts = [step_ends(rollout, splitter, token_texts, max_states) for _, rollout in owners]
        values, cost = estimator.evaluate(_states(owners, cuts), iteration)
        samples = [
            training_sample(rollout, spread_over_tokens(record.step_advantages, record.boundaries), credit=record)
            for (_, rollout), record in zip(owners, _records(owners, cuts, values), strict=True)
        ]
        return samples, value_metrics(samples, cost)

    return credit


def _states(owners: Sequence[tuple[Problem, Rollout]], cuts: Sequence[Sequence[int]]) -> list[State]:
    return [
        State(problem, rollout.prompt_ids, rollout.response_ids[:start], rollout)
        for (problem, rollout), ends in zip(owners, cuts, strict=True)
        for start in (0, *ends[:-1])
    ]


def _records(
    owners: Sequence[tuple[Problem, Rollout]], cuts: Sequence[Sequence[int]], values: Sequence[Value]
) -> list[StepCredit]:
    remaining = iter(values)
    return [
        _record(rollout, ends, [next(remaining) for _ in ends]) for (_, rollout), ends in zip(owners, cuts, strict=True)
    ]


def _record(rollout: Rollout, ends_S: Sequence[int], values_S: Sequence[Value]) -> StepCredit:
    return StepCredit(
        boundaries=tuple(ends_S),
        values=tuple(value.mean for value in values_S),
        num_mc_rollouts=tuple(value.num_mc_rollouts for value in values_S),
        step_advantages=tuple(step_advantages([value.mean for value in values_S], rollout.reward)),
    )


def _node_sample(rollout: Rollout, record: StepCredit, nodes_T: Sequence[Node]) -> TrainingSample:
    before_T = spread_over_tokens(record.values, record.boundaries)
    behind_T = spread_over_tokens((*record.values[1:], rollout.reward), record.boundaries)
    advantages_T: list[float] = []
    alternatives: list[Alternative] = []
    for t, (node, before, behind) in enumerate(zip(nodes_T, before_T, behind_T, strict=True)):
        own, others = node_advantages(behind, before, node.followed, [reward for _, reward in node.left])
        advantages_T.append(own)
        alternatives += [Alternative(t, token, a) for (token, _), a in zip(node.left, others, strict=True) if a != 0]
    return training_sample(rollout, advantages_T, credit=record, alternatives=alternatives)


_REUSE_SHARE = 0.3
"""Share of the tokens of K new continuations that `reuse` needs, as measured on the embedded task."""


def _expected_mc_tokens(settings: VinePPOSettings, rollouts: int, steps: int, length: float) -> float:
    """K continuations of every state, each of half a response."""
    states = min(steps, settings.max_states or steps)
    share = _REUSE_SHARE if settings.reuse else 1.0
    return rollouts * settings.num_mc_rollouts * states * length / 2 * share


def _variants(settings: VinePPOSettings, codec: Codec, rollouts: Sequence[Rollout]) -> list[tuple[str, float]]:
    """Other K, and other splitters where every state has continuations of its own."""
    K = settings.num_mc_rollouts
    rows = [(f"vineppo.num_mc_rollouts {k}", k / K) for k in (1, 3, 9, 18) if k != K]
    if settings.reuse or settings.bisection:
        return rows
    remaining = {
        spec: _remaining_tokens(spec, settings.max_states, codec, rollouts)
        for spec in (settings.splitter, "newline", "math", "cutpoints", "tokens:16", "tokens:64")
    }
    own = remaining.pop(settings.splitter)
    return rows + [(f"vineppo.splitter {spec}", tokens / own) for spec, tokens in remaining.items() if own]


def _remaining_tokens(spec: str, max_states: int, codec: Codec, rollouts: Sequence[Rollout]) -> int:
    """Tokens after each state, summed over all states: one continuation of each, if it is as long as the response."""
    cut, total = build_splitter(spec), 0
    for rollout in rollouts:
        starts = (0, *step_ends(rollout, cut, codec.token_texts, max_states)[:-1])
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
