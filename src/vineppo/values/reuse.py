"""Monte-Carlo values from continuations that count for several states.

`MonteCarlo` samples K new continuations of every state of a response. Many of them start with the same tokens as the
response, so they pass through its next state, and from there on they are also samples of the policy from that next
state. `ReusingMonteCarlo` counts them there too and starts only as many new continuations as are missing to K:

- The value of every state is unbiased, because each of its K continuations is distributed like a new one.
- Fewer tokens are decoded. Whether a continuation has the same next token as the response is decided by a random number
  and the probability of that token, which is known from the sampling of the response. Only the tokens from the first
  different one are decoded.
- Advantages are less noisy. The values of neighbouring states share the continuations that follow the response from one
  state to the other, and these cancel in the difference. If a fraction q of the continuations leaves the response
  within a step, the variance of the step's advantage is about q times that of two independent values. If q is 0, the
  advantage is exactly 0.

Terms used in this module: The responses to one problem form a tree, in which responses share a path as long as their
tokens are equal. A *walker* is a continuation that follows this tree. It starts at a state, and at every token it
either follows a response on its path, with the probability of that response's next token, or leaves the tree. A walker
that follows a response to its end has the reward of that response. For a walker that leaves, the sampler decodes the
remaining tokens, the first of which must differ from all tokens that follow in the tree. The *depth* of a place in the
tree is the number of response tokens before it.
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
    """Evaluates each state with K continuations, including those that arrive from earlier states.

    Every state must have a rollout (`State.rollout`) that was sampled by the current policy at the temperature of
    `monte_carlo`. The sampler must support `excluded_first`.

    Attributes:
        monte_carlo: sampler, task, K and response budget.
    """

    monte_carlo: MonteCarlo

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        """Return the value of each state, in order, and the cost. The rollouts of each problem form one tree."""
        values, _, cost = self.evaluate_nodes(states, (), iteration)
        return values, cost

    def evaluate_nodes(
        self, states: Sequence[State], rollouts: Sequence[tuple[Problem, Rollout]], iteration: int
    ) -> tuple[list[Value], list[list[Node]], ValueCost]:
        """Return the value of each state, the T nodes of each rollout (see `NodeEstimator`), and the cost."""
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
        f"{monte_carlo.num_mc_rollouts} new continuations; the values are unbiased too, but about 2 to 3 times as many "
        "tokens are sampled",
        stacklevel=2,
    )
    return monte_carlo


@dataclass(frozen=True)
class _Exit:
    """Walkers that leave the tree at the same state, and the request for their remaining tokens."""

    state: State
    request: SampleRequest
    indices: np.ndarray
    """Indices of the walkers, shape (n,)."""
    walkers: _Walkers


class _Walkers:
    """Arrays with one entry per walker of a problem: where it starts, which response it follows, and its reward."""

    def __init__(self, size: int):
        self.rewards = np.zeros(size)
        self.starts = np.full(size, -1, dtype=np.int64)
        """Depth of the state at which the walker starts; -1 for unused entries."""
        self.ends = np.zeros(size, dtype=np.int64)
        """Depth at which the walker leaves the tree, or the length of the response that it follows to its end."""
        self.followed = np.zeros(size, dtype=np.int64)
        """Index in `responses` of a response that the walker follows up to depth `ends`."""
        self.exit_tokens = np.full(size, -1, dtype=np.int64)
        """Next token of a walker that leaves the tree; -1 if it follows a response to its end."""
        self.responses: dict[tuple[int, ...], int] = {}

    def finish(self, indices: np.ndarray, response: tuple[int, ...], depth: int) -> None:
        """Record that these walkers follow a response up to a depth and no further."""
        self.followed[indices] = self.responses.setdefault(response, len(self.responses))
        self.ends[indices] = depth

    def nodes(self, rollout: Rollout) -> list[Node]:
        """The walkers that pass through the state before each token of a rollout, shape (T,)."""
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
    """All walkers of one problem. Creating the object moves them through the tree until they leave it or it ends."""

    monte_carlo: MonteCarlo
    states: Sequence[State]
    iteration: int
    exits: list[_Exit] = field(default_factory=list)
    pools: dict[Key, np.ndarray] = field(default_factory=dict)
    """Indices of the K walkers that pass through each state; none for a state at the length limit."""

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
        """The value of every state. The rewards of all walkers must be known."""
        for key, pool in self.pools.items():
            yield key, Value(float(self.walkers.rewards[pool].mean()) if len(pool) else 0.0, len(pool))

    def _advance(
        self, branches: list[_Branch], depth: int, walkers: np.ndarray
    ) -> Iterator[tuple[list[_Branch], int, np.ndarray]]:
        """Move walkers from one place of the tree to the next ones.

        Args:
            branches: the responses that pass through this place; their first `depth` tokens are equal.
            walkers: indices of the walkers that arrive at this place.
        Yields:
            The arguments for each next place: the next state, fork or end of a response on every path.
        """
        response = branches[0].rollout.response_ids
        if any(depth in branch.depths for branch in branches):
            walkers = self._start_missing(walkers, response[:depth])
        if len(response) == depth:  # the end of the response: its reward is the reward of the walkers
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
        """Move walkers along the tokens [start, end) of a path without forks; return those that reach its end."""
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
        """The K walkers of a state: those that arrive, and as many new ones as are missing."""
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
        """Record walkers that leave the tree at a depth, and the request that samples their remaining tokens."""
        if not len(walkers):
            return
        self.walkers.finish(walkers, response, depth)
        state = State(self.problem, self.prompt_ids, response[:depth])
        request = self.monte_carlo.request(state, self.iteration, len(walkers), excluded)
        self.exits.append(_Exit(state, request, walkers, self.walkers))


@dataclass(frozen=True)
class _Branch:
    """One response of the tree, and the depths of the states on it that are evaluated."""

    rollout: Rollout
    depths: list[int]


def _next_place(branches: list[_Branch], depth: int) -> int:
    """Depth of the next state, fork or end of a response on branches that share the token at `depth`."""
    first, last = branches[0].rollout.response_ids, branches[-1].rollout.response_ids  # in lexicographic order
    state_depths = [d for branch in branches for d in branch.depths if d > depth]
    limit = min([len(first), len(last), *state_depths])
    end = depth + 1
    while end < limit and first[end] == last[end]:
        end += 1
    return end


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal tokens at the start of two responses."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
