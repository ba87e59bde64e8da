"""Define a world so small that all its responses can be enumerated, with their probabilities and rewards.

The vocabulary has five tokens: end of sequence (id 0) and the letters a, b, c and d (ids 1 to 4). The policy is a
table: it has a distribution of the next token for every state. The exact value of every state, and the exact gradient
of the expected reward with respect to the logits of the table, follow from the enumeration.

A state is represented by its response tokens, because all responses have the same prompt. In shapes, N is the number of
possible responses.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from vineppo.seeds import derive_seed
from vineppo.types import (
    Capabilities,
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutGroup,
    SampleRequest,
    Split,
    Tally,
    Task,
    TrainingSample,
    Weights,
)

EOS = 0
"""Id of the end-of-sequence token."""
LETTERS = "abcd"
"""Texts of the tokens with the ids 1 to 4."""
NUM_TOKENS = 1 + len(LETTERS)
"""Size of the vocabulary."""
State = tuple[int, ...]
"""The response tokens of a state."""


class RandomRewards:
    """A task whose reward is a pseudo-random number in [0, 1) that depends on the problem and the response text.

    Implements `types.Task`. `grade` gives truncated responses a reward too, although callers must give them 0 without
    grading them. Therefore a mistake is noticed if code grades a truncated response.
    """

    grades_early = False
    grade_truncated = False

    def __init__(self) -> None:
        self.total, self.tally = Tally(), Tally()

    def size(self, split: Split) -> int | None:
        """Return None, because the number of problems is unlimited."""
        return None

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem whose prompt has two letters."""
        return Problem(id=f"{split}/{index}", prompt=LETTERS[index % 4] + LETTERS[(index + 1) % 4])

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Raise NotImplementedError, because there are no demonstrations."""
        raise NotImplementedError

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()
    ) -> Sequence[float | None]:
        """Return the reward of each response text."""
        rewards = [derive_seed("reward", p.id, text) / 2**63 for p, text in zip(problems, texts, strict=True)]
        for tally in (self.total, self.tally):
            for reward in rewards:
                tally.add(("random",), (reward,))
        return rewards

    def expect(self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()) -> None:
        """Fail, because this task does not grade early and must not be asked to."""
        raise AssertionError("expect was called although grades_early is False")

    def count_anew(self) -> Tally:
        """Create and return an empty tally."""
        self.tally = Tally()
        return self.tally


@dataclass(frozen=True)
class Outcome:
    """A possible response to a problem, as a rollout, and its probability."""

    rollout: Rollout
    probability: float
    """Probability that the policy samples this response."""


class Table(Protocol):
    """The policy: state -> probability of each next token, shape (5,), float64."""

    def __getitem__(self, state: State, /) -> np.ndarray:
        """Return the distribution of the token after a state."""
        ...


@dataclass(frozen=True, eq=False)
class World:
    """All responses of at most `max_new_tokens` tokens to one problem, with probabilities and rewards."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    """Temperature that is already part of the table. Samplers are asked for completions at this temperature."""
    task: Task
    """Grades the texts of responses. The reward of a truncated response is 0, unless the task grades it."""
    table: Table

    @cached_property
    def responses(self) -> list[State]:
        """Token ids of the N possible responses. They end with EOS, or have `max_new_tokens` tokens without EOS."""
        letters = range(1, NUM_TOKENS)
        ended = [
            (*body, EOS) for length in range(self.max_new_tokens) for body in itertools.product(letters, repeat=length)
        ]
        return ended + list(itertools.product(letters, repeat=self.max_new_tokens))

    @cached_property
    def states(self) -> list[State]:
        """The response tokens of all states: every prefix of a response that is shorter than the response."""
        return sorted({response[:end] for response in self.responses for end in range(len(response))})

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """All N responses with their rewards and probabilities. The probabilities sum to 1."""
        probabilities = [[float(self.table[r[:t]][token]) for t, token in enumerate(r)] for r in self.responses]
        always = self.task.grade_truncated
        texts = [text_of(response) for response in self.responses]
        graded = self.task.grade([self.problem] * len(texts), texts)
        outcomes = []
        for response, text, row, grade in zip(self.responses, texts, probabilities, graded, strict=True):
            finish: FinishReason = "stop" if response[-1] == EOS else "length"
            rollout = Rollout(
                prompt_ids=self.prompt_ids,
                response_ids=response,
                sampler_logprobs=tuple(map(math.log, row)),
                finish_reason=finish,
                text=text,
                reward=grade if finish == "stop" or always else 0.0,
            )
            outcomes.append(Outcome(rollout, math.prod(row)))
        return outcomes

    @property
    def probabilities(self) -> list[float]:
        """The probability of each response, in the order of `responses`."""
        return [outcome.probability for outcome in self.outcomes]

    @cached_property
    def moments(self) -> dict[State, tuple[float, float]]:
        """State -> (exact mean, exact variance) of the reward of the responses that start with the state."""
        # For each state, the sums of P, P * reward and P * reward^2 over these responses with probability P.
        sums: dict[State, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for outcome in self.outcomes:
            response, reward = outcome.rollout.response_ids, outcome.rollout.reward
            assert reward is not None, "a response without a reward has no part in the moments"
            for end in range(len(response)):
                for power in range(3):
                    sums[response[:end]][power] += outcome.probability * reward**power
        return {state: (r / p, rr / p - (r / p) ** 2) for state, (p, r, rr) in sums.items()}

    def value(self, response_ids: State) -> float:
        """Return the exact value of the state with these response tokens.

        The value is 0 at the length limit, where the response is truncated.
        """
        return self.moments[response_ids][0] if len(response_ids) < self.max_new_tokens else 0.0

    @cached_property
    def table_gradient(self) -> np.ndarray:
        """Gradient of the expected reward with respect to the logits of each state, P(s) p(a|s) (Q(s, a) - V(s)).

        Shape (states, 5), float64.
        """
        rewards = {outcome.rollout.response_ids: outcome.rollout.reward for outcome in self.outcomes}
        rows = []
        for state in self.states:
            reached = math.prod(self.table[state[:t]][token] for t, token in enumerate(state))
            nexts = [(*state, token) for token in range(NUM_TOKENS)]
            action_values = np.array([rewards[s] if s in rewards else self.value(s) for s in nexts])
            rows.append(reached * self.table[state] * (action_values - self.value(state)))
        return np.array(rows)

    def table_gradient_of(self, weighted: Iterable[tuple[float, TrainingSample]]) -> np.ndarray:
        """Return the gradient that follows from credit, shape (states, 5).

        It is the sum of weight * A_t * (one-hot(a_t) - p(.|s_t)). Alternatives contribute terms of the same form for
        their tokens.
        """
        credit = np.zeros((len(self.states), NUM_TOKENS))  # summed by state and token
        prompt = len(self.prompt_ids)
        for weight, sample in weighted:
            response = sample.token_ids[prompt:]
            rows = [self._row_of_state[response[:t]] for t in range(len(response))]
            for row, token, advantage in zip(rows, response, sample.advantages[prompt:], strict=True):
                credit[row, token] += weight * advantage
            for alternative in sample.alternatives:
                credit[rows[alternative.position], alternative.token_id] += weight * alternative.advantage
        return self._without_mean(credit)

    def gradient_of_advantages(self, rollouts: Sequence[Rollout], advantages: Sequence[Sequence[float]]) -> np.ndarray:
        """Return the policy gradient of a group, divided by its number of responses, shape (states, 5).

        Args:
            rollouts: the G responses.
            advantages: advantage of each token, one row of T numbers per response.
        """
        credit = np.zeros((len(self.states), NUM_TOKENS))
        for rollout, row in zip(rollouts, advantages, strict=True):
            for t, (token, advantage) in enumerate(zip(rollout.response_ids, row, strict=True)):
                credit[self._row_of_state[rollout.response_ids[:t]], token] += advantage / len(rollouts)
        return self._without_mean(credit)

    def _without_mean(self, credit: np.ndarray) -> np.ndarray:
        """Turn credit per state and token, (states, 5), into the gradient with respect to the logits."""
        return credit - credit.sum(1, keepdims=True) * self._policy_rows

    @cached_property
    def _policy_rows(self) -> np.ndarray:
        return np.array([self.table[state] for state in self.states])  # (states, 5)

    @cached_property
    def _limits(self) -> np.ndarray:
        return np.cumsum(self.probabilities)[:-1]

    @cached_property
    def _row_of_state(self) -> dict[State, int]:
        return {state: row for row, state in enumerate(self.states)}

    def sampled_group(self, group_size: int, iteration: int) -> RolloutGroup:
        """Return a group of responses that are drawn from the table. `iteration` is the seed."""
        uniforms = np.random.default_rng([iteration, 7]).random(group_size)
        drawn = np.searchsorted(self._limits, uniforms, side="right")
        return RolloutGroup(self.problem, tuple(self.outcomes[i].rollout for i in drawn.tolist()))

    def group(self) -> RolloutGroup:
        """Return a group that contains every response once.

        Responses sampled by the policy would occur in proportion to their probabilities. So the training samples of
        this group must be weighted with `probabilities`.
        """
        return RolloutGroup(self.problem, tuple(outcome.rollout for outcome in self.outcomes))

    def continuations(self, state: State, count: int, seed: int) -> list[Rollout]:
        """Return `count` responses that start with a state and continue as the policy does.

        Args:
            state: response tokens of the state, fewer than `max_new_tokens`.
            count: number of responses.
            seed: seed of the random numbers; the same seed gives the same responses.
        """
        request = SampleRequest(
            self.prompt_ids + state, count, self.max_new_tokens - len(state), seed, temperature=self.temperature
        )
        whole = {outcome.rollout.response_ids: outcome.rollout for outcome in self.outcomes}
        return [whole[state + completion.token_ids] for completion in self._sampler.sample([request])[0]]

    @cached_property
    def _sampler(self) -> TableSampler:
        return TableSampler(self)


@dataclass
class TableSampler:
    """A sampler (types.Sampler) that draws responses from the table of a world, without a model.

    It is about 20 times faster than a model, so that tests of estimators can have a standard error of 2%.
    """

    world: World
    version: int = 0
    capabilities: ClassVar[Capabilities] = Capabilities(excluded_first=True, reproducible=True)
    _known: dict[tuple[State, tuple[int, ...]], tuple[list[Completion], np.ndarray]] = field(default_factory=dict)

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        """Return one list of completions per request, as described in `types.Sampler.sample`."""
        return [self._draw(request) for request in requests]

    def update_weights(self, version: int, weights: Weights) -> None:
        """Set the version; the table stays as it is."""
        self.version = version

    def _draw(self, request: SampleRequest) -> list[Completion]:
        state = request.prompt_ids[len(self.world.prompt_ids) :]
        assert request.prompt_ids[: len(self.world.prompt_ids)] == self.world.prompt_ids
        assert request.max_new_tokens == self.world.max_new_tokens - len(state)
        assert request.temperature == self.world.temperature and not request.first_sample and not request.stop
        key = (state, request.excluded_first)
        if key not in self._known:
            self._known[key] = self._completions(*key)
        completions, limits = self._known[key]
        uniforms = np.random.default_rng(request.seed).random(request.num_samples)
        return [completions[i] for i in np.searchsorted(limits, uniforms, side="right").tolist()]

    def _completions(self, state: State, excluded: tuple[int, ...]) -> tuple[list[Completion], np.ndarray]:
        """Return all completions of a state, and the upper limits of their parts of [0, 1) except the last one."""
        start, table = len(state), self.world.table
        allowed = 1 - sum(table[state][token] for token in excluded)
        completions, probabilities = [], []
        for rollout in (outcome.rollout for outcome in self.world.outcomes):
            response = rollout.response_ids
            if len(response) > start and response[:start] == state and response[start] not in excluded:
                logprobs = list(rollout.sampler_logprobs[start:])
                logprobs[0] -= math.log(allowed)
                completions.append(Completion(response[start:], tuple(logprobs), rollout.finish_reason))
                probabilities.append(math.exp(math.fsum(logprobs)))
        assert abs(math.fsum(probabilities) - 1) < 1e-12
        return completions, np.cumsum(probabilities)[:-1]


def text_of(token_ids: Sequence[int]) -> str:
    """Return the text of token ids: a letter per token, nothing for EOS."""
    return "".join(LETTERS[token - 1] for token in token_ids if token != EOS)


def build_world(max_new_tokens: int = 3, *, problem: int = 0) -> World:
    """Build a world whose policy is a fixed pseudo-random table.

    The table depends only on hashes, so it is the same on every machine and with every version of NumPy.

    Args:
        max_new_tokens: maximum length of a response; the number of responses is 21, 85, 341, ... for 2, 3, 4, ...
        problem: index of the problem, which determines the rewards.
    """
    task = RandomRewards()
    item = task.problem("train", problem)
    prompt_ids = tuple(1 + LETTERS.index(letter) for letter in item.prompt)
    letters = range(1, NUM_TOKENS)
    states = [state for length in range(max_new_tokens) for state in itertools.product(letters, repeat=length)]
    table: Mapping[State, np.ndarray] = {state: _distribution(state) for state in states}
    return World(item, prompt_ids, max_new_tokens, 1.0, task, table)


def _distribution(state: State) -> np.ndarray:
    """Return pseudo-random probabilities of the five tokens after a state, shape (5,)."""
    # The logits are uniform in [0, 3), so no token is negligible.
    logits = np.array([3 * derive_seed("table", *state, -1 - token) / 2**63 for token in range(NUM_TOKENS)])
    return np.exp(logits) / np.exp(logits).sum()
