"""Estimate the values of states by sampling new continuations of every state (VinePPO, arXiv 2410.01679).

A state consists of a prompt and the first tokens of a response, which are called the response prefix. The value of a
state is the expected reward of responses that start with this prefix. To evaluate a state means to estimate its value:
K continuations are sampled from the state, and each is graded together with the prefix as one response. The mean of the
K rewards is an unbiased estimate of the value. A continuation ends at the latest when prefix and continuation together
have the maximum length of a response.

If no reward function applies to a continuation, it has no reward and is left out of the mean. If none of the K
continuations has a reward, the state has no value (None).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vineppo.sampling.graded import sampled_and_graded
from vineppo.seeds import derive_seed
from vineppo.statistics import mean_of
from vineppo.types import Completion, MCRollout, Problem, Rollout, Sampler, SampleRequest, Task

Key = tuple[str, tuple[int, ...]]
"""Key of a state: (problem id, token ids of the prompt followed by the response prefix)."""


@dataclass(frozen=True)
class State:
    """The prompt and the first tokens of a response to a problem. States with equal keys are the same state."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Token ids of the response prefix; empty for the state before the first step."""
    rollout: Rollout | None = None
    """A rollout whose response starts with these tokens. `ReusingMonteCarlo` also uses the later tokens of the rollout.
    The rollout is not part of the key."""
    keep: bool = field(default=False, compare=False, repr=False)
    """Whether the estimator returns the continuations that were sampled from this state (`Value.mc_rollouts`)."""
    ids_seed: int | None = field(default=None, compare=False, repr=False)
    """`derive_seed(*response_ids)` if it is known already; None: it is computed when it is needed."""

    @property
    def key(self) -> Key:
        """(problem id, token ids of the prompt followed by the response prefix)."""
        return self.problem.id, self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class Value:
    """Estimate of the value of a state, which is the expected reward of its continuations."""

    mean: float
    """The estimate in reward units: the mean reward of the continuations."""
    num_mc_rollouts: int
    """Number of continuations in the mean, which are those with a reward; 0 if the value is known without sampling."""
    mc_rollouts: tuple[MCRollout, ...] = field(default=(), compare=False, repr=False)
    """The continuations that were sampled from this state, if one of its `State` objects has `keep`; otherwise empty.
    A reused continuation of an earlier state is returned with that state only."""


@dataclass(frozen=True)
class Node:
    """The continuations that pass through the state before one token of a response.

    These continuations have the same tokens as the response before this token. Their next token is the response's token
    or another one. Continuations without a reward are left out.
    """

    followed: tuple[float, ...]
    """Reward of each continuation whose next token is the response's token."""
    diverged: tuple[tuple[int, float], ...]
    """(id of the next token, reward) of each of the other continuations."""


@dataclass(frozen=True)
class ValueCost:
    """Cost of estimating the values of a batch of states."""

    states: int
    """Number of states in the batch; equal states are counted separately."""
    distinct_states: int
    """Number of different states in the batch."""
    mc_rollouts: int
    """Number of continuations that the sampler sampled."""
    tokens: int
    """Number of tokens that the sampler sampled."""


class ValueEstimator(Protocol):
    """Estimates the values of states."""

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[Sequence[Value | None], ValueCost]:
        """Estimate the values of states.

        Args:
            iteration: number of the iteration, from which the seeds are derived.
        Returns:
            (value of each state in the order of `states`, cost of the estimates). The value is None if none of the
            continuations of the state has a reward.
        """
        ...


class NodeEstimator(ValueEstimator, Protocol):
    """A value estimator that can also return the continuations that pass through each state of a rollout."""

    def evaluate_nodes(
        self, states: Sequence[State], rollouts: Sequence[tuple[Problem, Rollout]], iteration: int
    ) -> tuple[Sequence[Value | None], list[list[Node]], ValueCost]:
        """Estimate the values of states, and return the nodes of rollouts.

        Args:
            states: the states to evaluate.
            rollouts: (problem, rollout) pairs. Each rollout must be the `State.rollout` of at least one of the states.
            iteration: number of the iteration, from which the seeds are derived.
        Returns:
            (values, nodes, cost): the value of each state in the order of `states` (None if none of its continuations
            has a reward), one list of nodes per rollout with a node for each response token, and the cost of the
            estimates.
        """
        ...


@dataclass(frozen=True)
class MonteCarlo:
    """Estimates the value of each state from K new continuations.

    Attributes:
        sampler: samples continuations from the current policy.
        task: grades responses.
        decode: converts token ids to text without special tokens.
        num_mc_rollouts: K, the number of continuations per state.
        max_new_tokens: maximum number of tokens of a response, that is, of prefix and continuation together.
        run_seed: seed of the run. The seed of every request is derived from it.
        temperature: sampling temperature, the same as for rollouts.
        stop: strings that end a response, the same as for rollouts.
    """

    sampler: Sampler
    task: Task
    decode: Callable[[Sequence[int]], str]
    num_mc_rollouts: int
    max_new_tokens: int
    run_seed: int
    temperature: float
    stop: tuple[str, ...] = ()

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value | None], ValueCost]:
        """Estimate the values of states.

        Equal states share the same K continuations. If a state has `max_new_tokens` response tokens, it has no
        continuation, because the response was truncated by the length limit. The value of such a state is 0.

        Args:
            iteration: number of the iteration, from which the seeds are derived.
        Returns:
            (value of each state in the order of `states`, cost of the estimates). The value is None if none of the
            continuations of the state has a reward.
        """
        distinct = {state.key: state for state in states}
        known: dict[Key, Value | None] = {
            key: Value(0.0, 0) for key, s in distinct.items() if len(s.response_ids) >= self.max_new_tokens
        }
        open_states, kept = [state for key, state in distinct.items() if key not in known], kept_keys(states)
        K = self.num_mc_rollouts
        rewards, completions = self.graded(open_states, [self.request(s, iteration, K) for s in open_states])
        for state, group, sampled in zip(open_states, rewards, completions, strict=True):
            known[state.key] = _mean_value(group, _mc_rollouts(state, sampled, group) if state.key in kept else ())
        cost = ValueCost(len(states), len(distinct), K * len(open_states), total_tokens(completions))
        return [known[state.key] for state in states], cost

    def request(
        self, state: State, iteration: int, num_samples: int, excluded_first: tuple[int, ...] = ()
    ) -> SampleRequest:
        """Return a request for `num_samples` continuations of a state.

        The response prefix and a continuation together have at most as many tokens as a response may have.

        Args:
            excluded_first: token ids that a continuation must not start with.
        """
        return SampleRequest(
            prompt_ids=state.prompt_ids + state.response_ids,
            num_samples=num_samples,
            max_new_tokens=self.max_new_tokens - len(state.response_ids),
            seed=self.seed(state, iteration, "mc"),
            response_tokens=len(state.response_ids),
            excluded_first=excluded_first,
            temperature=self.temperature,
            stop=self.stop,
        )

    def seed(self, state: State, iteration: int, purpose: str) -> int:
        """Return the seed for sampling continuations of a state.

        The seed is derived from the run seed, the iteration, and the problem and tokens of the state. It does not
        depend on other states or on their order.

        Args:
            purpose: text that makes the seed different from the seeds of the same state for other purposes.
        """
        ids_seed = derive_seed(*state.response_ids) if state.ids_seed is None else state.ids_seed
        return derive_seed(self.run_seed, iteration, state.problem.id, purpose, ids_seed)

    def graded(
        self, states: Sequence[State], requests: Sequence[SampleRequest]
    ) -> tuple[list[list[float | None]], list[list[Completion]]]:
        """Sample and grade continuations of states.

        Args:
            states: the states from which continuations are sampled.
            requests: the request for each state (see `request`).
        Returns:
            (rewards, completions): for each request, the list of rewards (None for a continuation without a reward) and
            the list of continuations.
        """
        owners = [(state.problem, state.response_ids) for state in states]
        graded = sampled_and_graded(self.sampler, self.task, self.decode, requests, owners)
        rewards = [[reward for _, _, reward in group] for group in graded]
        return rewards, [[completion for completion, _, _ in group] for group in graded]


def kept_keys(states: Sequence[State]) -> set[Key]:
    """Return the keys of the states whose continuations are returned."""
    return {state.key for state in states if state.keep}


def _mean_value(rewards: Sequence[float | None], mc_rollouts: tuple[MCRollout, ...]) -> Value | None:
    """Return the mean of the rewards that are not None as a value, or None if there are none."""
    known = [reward for reward in rewards if reward is not None]
    return Value(mean_of(known), len(known), mc_rollouts) if known else None


def _mc_rollouts(
    state: State, completions: Sequence[Completion], rewards: Sequence[float | None]
) -> tuple[MCRollout, ...]:
    """Return the continuations of a state with their rewards, for the records of the run."""
    return tuple(
        MCRollout(len(state.response_ids), completion.token_ids, reward, completion.finish_reason)
        for completion, reward in zip(completions, rewards, strict=True)
    )


def total_tokens(completions: Sequence[Sequence[Completion]]) -> int:
    """Return the total number of tokens of all completions, which are given as one list per request."""
    return sum(len(completion.token_ids) for group in completions for completion in group)
