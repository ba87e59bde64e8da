"""Monte-Carlo values from continuations that count for several states.

To evaluate the states of a response, `MonteCarlo` samples K new continuations of every state. Some of these
continuations begin with the same tokens as the rest of the response. If a continuation does so up to the next state of
the response, its remaining tokens are a sample from that next state, too. `ReusingMonteCarlo` therefore counts such a
continuation as one of the K continuations of the next state, and starts only as many new ones as are missing there.

The tokens that a continuation shares with the response are not decoded. The probability of every response token is
known, because the response was sampled from the same policy. One random number per token decides whether a continuation
samples the response's token, with that token's probability. The sampler decodes a continuation only from its first
token that differs from the response, and excludes the response's token at this position.

This has three consequences:

- The values are unbiased, because each of the K continuations of a state is distributed like a new one.
- Fewer tokens are decoded.
- Advantages are less noisy. The advantage of a step is the difference between the values of two neighbouring states.
  A continuation that follows the response from the first of these states to the second contributes the same reward to
  both values, so its contribution cancels. If a fraction q of the continuations leaves the response within the step,
  the variance of the advantage is about q times the variance for two independently estimated values. If q is 0, the
  advantage is exactly 0.

Responses to the same problem can share continuations, too. This module uses the following terms:

- The *tree* of a problem consists of all responses to the problem. Responses share a path as long as their tokens are
  equal. They separate at a *fork*.
- The *depth* of a place in the tree is the number of response tokens before that place.
- A *walker* is a continuation. It starts at a state in the tree. At each token it either follows the tree, choosing a
  next token of the tree with the probability of that token, or it leaves the tree.
- A walker that follows a response to the response's end gets the reward of that response.
- For a walker that leaves the tree, the sampler decodes the remaining tokens. The first of them must differ from all
  tokens that follow this place in the tree.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vineppo.seeds import stream_keys, uniforms
from vineppo.types import Problem, Rollout, SampleRequest
from vineppo.values.monte_carlo import Key, MonteCarlo, Node, State, Value, ValueCost, total_tokens


@dataclass(frozen=True)
class ReusingMonteCarlo:
    """Evaluates each state with K continuations. Continuations of earlier states are reused.

    Every state must have a rollout (`State.rollout`) that was sampled from the current policy at the temperature of
    `monte_carlo`. The sampler must support `excluded_first`.

    Attributes:
        monte_carlo: holds the sampler, the task, K and the maximum length of a response.
    """

    monte_carlo: MonteCarlo

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        """Return the value of each state, in order, and the cost."""
        values, _, cost = self.evaluate_nodes(states, (), iteration)
        return values, cost

    def evaluate_nodes(
        self, states: Sequence[State], rollouts: Sequence[tuple[Problem, Rollout]], iteration: int
    ) -> tuple[list[Value], list[list[Node]], ValueCost]:
        """Return the value of each state, one list of T nodes per rollout (see `NodeEstimator`), and the cost."""
        states_by_problem: dict[tuple[str, tuple[int, ...]], list[State]] = {}
        for state in states:
            states_by_problem.setdefault((state.problem.id, state.prompt_ids), []).append(state)
        walks = [
            _TreeWalk(self.monte_carlo, problem_states, iteration) for problem_states in states_by_problem.values()
        ]
        exits = [exit for walk in walks for exit in walk.exits]
        rewards, completions = self.monte_carlo.graded([exit.state for exit in exits], [exit.request for exit in exits])
        for exit, exit_rewards, exit_completions in zip(exits, rewards, completions, strict=True):
            exit.walkers.rewards[exit.indices] = exit_rewards
            exit.walkers.exit_tokens[exit.indices] = [completion.token_ids[0] for completion in exit_completions]
        known = {key: value for walk in walks for key, value in walk.values()}
        walkers = {(walk.problem.id, walk.prompt_ids): walk.walkers for walk in walks}
        nodes = [walkers[problem.id, rollout.prompt_ids].nodes(rollout) for problem, rollout in rollouts]
        mc_rollouts = sum(len(exit.indices) for exit in exits)
        cost = ValueCost(len(states), len(known), mc_rollouts, total_tokens(completions))
        return [known[state.key] for state in states], nodes, cost


def reusing_or_fresh(monte_carlo: MonteCarlo) -> ReusingMonteCarlo | MonteCarlo:
    """Return `ReusingMonteCarlo` if the sampler can exclude first tokens; otherwise warn and return `monte_carlo`."""
    if monte_carlo.sampler.capabilities.excluded_first:
        return ReusingMonteCarlo(monte_carlo)
    warnings.warn(
        "vineppo.reuse is off: this sampler cannot exclude first tokens, so every state gets "
        f"{monte_carlo.num_mc_rollouts} new continuations; the values are still unbiased, but about 2 to 3 times as "
        "many tokens are sampled",
        stacklevel=2,
    )
    return monte_carlo


@dataclass(frozen=True)
class _Exit:
    """The walkers that leave the tree at the same place, and the request that samples their remaining tokens."""

    state: State
    """Prompt and response tokens before the place at which the walkers leave the tree."""
    request: SampleRequest
    indices: np.ndarray
    """Indices in `walkers` of the walkers that leave here, shape (n,)."""
    walkers: _Walkers
    """All walkers of the problem."""


class _Walkers:
    """The walkers of one problem, stored as arrays with one entry per walker."""

    def __init__(self, size: int):
        self.rewards = np.zeros(size)
        self.starts = np.full(size, -1, dtype=np.int64)
        """Depth of the state at which the walker starts; -1 for unused entries."""
        self.ends = np.zeros(size, dtype=np.int64)
        """Depth at which the walker leaves the tree, or the length of the response that it follows to the end."""
        self.followed = np.zeros(size, dtype=np.int64)
        """Index in `responses` of a response that the walker follows up to depth `ends`."""
        self.exit_tokens = np.full(size, -1, dtype=np.int64)
        """First token of the walker outside the tree; -1 if the walker follows a response to the end."""
        self.responses: dict[tuple[int, ...], int] = {}
        """Token ids of the responses that walkers follow, with the index of each response."""

    def finish(self, indices: np.ndarray, response: tuple[int, ...], depth: int) -> None:
        """Record that these walkers follow a response up to a depth and end or leave the tree there."""
        self.followed[indices] = self.responses.setdefault(response, len(self.responses))
        self.ends[indices] = depth

    def nodes(self, rollout: Rollout) -> list[Node]:
        """Return one node per token of a rollout, with the walkers that pass through the state before the token."""
        response, responses = rollout.response_ids, list(self.responses)
        shared = np.array([_shared_length(other, response) for other in responses])
        last_shared = np.minimum(self.ends, shared[self.followed])  # (n,): depth to which walker and rollout are equal
        passing = np.flatnonzero((self.starts <= last_shared) & (self.starts >= 0))
        followed: list[list[float]] = [[] for _ in response]
        diverged: list[list[tuple[int, float]]] = [[] for _ in response]
        for walker in passing.tolist():
            reward = float(self.rewards[walker])
            for position in range(self.starts[walker], last_shared[walker]):
                followed[position].append(reward)
            depth = int(last_shared[walker])
            if depth < len(response):
                follows_another = self.ends[walker] > depth
                token = responses[self.followed[walker]][depth] if follows_another else self.exit_tokens[walker]
                diverged[depth].append((int(token), reward))
        return [Node(tuple(f), tuple(d)) for f, d in zip(followed, diverged, strict=True)]


@dataclass
class _TreeWalk:
    """Moves all walkers of one problem through the tree of its responses.

    This happens when the object is created. Each walker moves until it leaves the tree or a response ends.
    """

    monte_carlo: MonteCarlo
    states: Sequence[State]
    iteration: int
    exits: list[_Exit] = field(default_factory=list)
    """The places at which walkers leave the tree."""
    pools: dict[Key, np.ndarray] = field(default_factory=dict)
    """Indices of the K walkers that pass through each state; empty for a state at the length limit."""

    def __post_init__(self) -> None:
        self.problem, self.prompt_ids = self.states[0].problem, self.states[0].prompt_ids
        depths_by_response: dict[tuple[int, ...], tuple[Rollout, set[int]]] = {}
        for state in self.states:
            assert state.rollout is not None, "ReusingMonteCarlo needs the rollout of every state"
            response = state.rollout.response_ids
            depths_by_response.setdefault(response, (state.rollout, set()))[1].add(len(state.response_ids))
        branches = [_Branch(rollout, sorted(depths)) for _, (rollout, depths) in sorted(depths_by_response.items())]
        # At most K walkers start at each state.
        size = self.monte_carlo.num_mc_rollouts * len({state.key for state in self.states})
        self.keys = np.zeros(size, dtype=np.uint64)
        self.walkers = _Walkers(size)
        self.num_started = 0
        stack = [(branches, 0, np.zeros(0, dtype=np.int64))]
        while stack:
            stack.extend(self._advance(*stack.pop()))

    def values(self) -> Iterator[tuple[Key, Value]]:
        """Yield the key and the value of every state. The rewards of all walkers must be known."""
        for key, pool in self.pools.items():
            yield key, Value(float(self.walkers.rewards[pool].mean()) if len(pool) else 0.0, len(pool))

    def _advance(
        self, branches: list[_Branch], depth: int, walkers: np.ndarray
    ) -> Iterator[tuple[list[_Branch], int, np.ndarray]]:
        """Move walkers from one place of the tree to the next places.

        A place is a state that is evaluated, a fork, or the end of a response.

        Args:
            branches: the responses that pass through this place. Their first `depth` tokens are equal.
            depth: depth of this place.
            walkers: indices of the walkers that arrive at this place.
        Yields:
            The arguments of this method for each of the next places.
        """
        response = branches[0].rollout.response_ids
        if any(depth in branch.depths for branch in branches):
            walkers = self._start_missing(walkers, response[:depth])
        if len(response) == depth:  # the response ends here, and the walkers get its reward
            self.walkers.rewards[walkers] = branches[0].rollout.reward
            self.walkers.finish(walkers, response, depth)
            return
        children: dict[int, list[_Branch]] = {}
        for branch in branches:
            children.setdefault(branch.rollout.response_ids[depth], []).append(branch)
        uniform = uniforms(self.keys[walkers], depth)  # (n,)
        total = 0.0
        for token in sorted(children):
            probability = float(np.exp(children[token][0].rollout.sampler_logprobs[depth]))
            follows = (uniform >= total) & (uniform < total + probability)
            total += probability
            end = _next_place(children[token], depth)
            yield children[token], end, self._follow(children[token][0].rollout, depth + 1, end, walkers[follows])
        self._leave(response, depth, tuple(sorted(children)), walkers[uniform >= total])

    def _follow(self, rollout: Rollout, start: int, end: int, walkers: np.ndarray) -> np.ndarray:
        """Move walkers along the tokens [start, end) of a path without forks, and return those that reach `end`.

        The other walkers leave the tree.
        """
        if start == end or not len(walkers):
            return walkers
        probabilities = np.exp(np.array(rollout.sampler_logprobs[start:end]))  # (T,)
        leaves = uniforms(self.keys[walkers][:, None], np.arange(start, end)) >= probabilities  # (n, T)
        num_followed = np.where(leaves.any(1), leaves.argmax(1), end - start)  # (n,)
        for offset in np.unique(num_followed[num_followed < end - start]).tolist():
            position = start + offset
            token = rollout.response_ids[position]
            self._leave(rollout.response_ids, position, (token,), walkers[num_followed == offset])
        return walkers[num_followed == end - start]

    def _start_missing(self, walkers: np.ndarray, response_ids: tuple[int, ...]) -> np.ndarray:
        """Start as many new walkers at a state as are missing to K, and return all walkers at the state."""
        state = State(self.problem, self.prompt_ids, response_ids)
        if len(response_ids) >= self.monte_carlo.max_new_tokens:  # truncated by the length limit: the value is 0
            self.pools[state.key] = np.zeros(0, dtype=np.int64)
            return walkers
        num_missing = self.monte_carlo.num_mc_rollouts - len(walkers)
        new = np.arange(self.num_started, self.num_started + num_missing)
        seed = self.monte_carlo.seed(state, self.iteration, "walk")
        self.keys[new] = stream_keys(np.full(num_missing, seed, dtype=np.uint64), np.arange(num_missing))
        self.walkers.starts[new] = len(response_ids)
        self.num_started += num_missing
        pool = np.concatenate([walkers, new])
        self.pools[state.key] = pool
        return pool

    def _leave(self, response: tuple[int, ...], depth: int, excluded: tuple[int, ...], walkers: np.ndarray) -> None:
        """Record that walkers leave the tree at a depth, and the request that samples their remaining tokens.

        Args:
            response: a response that the walkers follow up to this depth.
            excluded: the tokens that follow this place in the tree.
        """
        if not len(walkers):
            return
        self.walkers.finish(walkers, response, depth)
        state = State(self.problem, self.prompt_ids, response[:depth])
        request = self.monte_carlo.request(state, self.iteration, len(walkers), excluded)
        self.exits.append(_Exit(state, request, walkers, self.walkers))


@dataclass(frozen=True)
class _Branch:
    """One response of the tree, and the depths of those states of the response that are evaluated."""

    rollout: Rollout
    depths: list[int]


def _next_place(branches: list[_Branch], depth: int) -> int:
    """Return the depth of the first place after `depth`, on branches that share the token at `depth`."""
    first, last = branches[0].rollout.response_ids, branches[-1].rollout.response_ids  # in lexicographic order
    state_depths = [d for branch in branches for d in branch.depths if d > depth]
    limit = min([len(first), len(last), *state_depths])
    end = depth + 1
    while end < limit and first[end] == last[end]:
        end += 1
    return end


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens at the start of two responses."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
