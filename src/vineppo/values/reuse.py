"""Estimate the values of states from continuations that count for several states.

To evaluate a state means to estimate its value. `MonteCarlo` (in `vineppo.values.monte_carlo`) evaluates each state of
a response with K new continuations. Some of these continuations begin with the same tokens as the rest of the response.
If a continuation follows the response up to the next state, its remaining tokens are a sample from that state, too.
`ReusingMonteCarlo` therefore counts it as one of the K continuations of the next state. At every state it starts only
as many new continuations as are needed to have K in total.

The tokens that a continuation shares with the response are not decoded. The probability of every response token is
known, because the response was sampled from the same policy. At each position, a random number decides whether the
continuation has the same token as the response; the probability of this is the probability of the response's token. The
sampler decodes only the rest of the continuation. The rest begins with the first token that differs from the response,
so the sampler must exclude the response's token at this position.

This has three consequences:

- The values are unbiased, because each of the K continuations of a state is distributed like a new one.
- Fewer tokens are decoded.
- Advantages are less noisy. The advantage of a step is the difference between the values of two neighbouring states. If
  a continuation follows the response from one of these states to the other, it contributes the same reward to both
  values, and the contributions cancel. If a fraction q of the continuations leaves the response within the step, the
  variance of the advantage is about q times the variance for two independently estimated values. If q is 0, the
  advantage is exactly 0.

Responses to the same problem can share continuations, too. This module uses the following terms:

- The *tree* of a problem consists of all its responses. Responses share a path from the start as long as their tokens
  are equal. The state at which their next tokens differ is a *fork*.
- The *depth* of a state is the number of its response tokens.
- A *place* is a state that is evaluated, a fork, or the end of a response.
- A *walker* is a continuation. It starts at a state that is evaluated. At each token, it takes one of the tokens that
  come next in the tree, each with its probability, or it *leaves the tree*.
- If a walker reaches the end of a response, it gets the reward of that response.
- A walker has no reward if no reward function applies to its response. It is then left out of the means.
- If a walker leaves the tree, the sampler decodes its remaining tokens. The first of them must differ from all tokens
  that come next in the tree.

In comments on shapes, n is a number of walkers and T a number of tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vineppo.seeds import seeds_of_prefixes, stream_keys, uniforms
from vineppo.types import Completion, MCRollout, Problem, Rollout, SampleRequest
from vineppo.values.monte_carlo import Key, MonteCarlo, Node, State, Value, ValueCost, kept_keys, total_tokens


@dataclass(frozen=True)
class ReusingMonteCarlo:
    """Estimates the value of each state from K continuations, and reuses continuations of earlier states.

    Every state must have a rollout (`State.rollout`) that was sampled from the current policy at the temperature of
    `monte_carlo`. The sampler must support `SampleRequest.excluded_first`.

    Attributes:
        monte_carlo: samples and grades continuations. Its `num_mc_rollouts` is K.
    """

    monte_carlo: MonteCarlo

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value | None], ValueCost]:
        """Return (value of each state in the order of `states`, cost), as described for `ValueEstimator.evaluate`."""
        values, _, cost = self.evaluate_nodes(states, (), iteration)
        return values, cost

    def evaluate_nodes(
        self, states: Sequence[State], rollouts: Sequence[tuple[Problem, Rollout]], iteration: int
    ) -> tuple[list[Value | None], list[list[Node]], ValueCost]:
        """Return (values, nodes, cost), as described for `NodeEstimator.evaluate_nodes`."""
        states_by_problem: dict[tuple[str, tuple[int, ...]], list[State]] = {}
        for state in states:
            states_by_problem.setdefault((state.problem.id, state.prompt_ids), []).append(state)
        walks = [
            _TreeWalk(self.monte_carlo, problem_states, iteration) for problem_states in states_by_problem.values()
        ]
        exits = [exit for walk in walks for exit in walk.exits]
        rewards, completions = self.monte_carlo.graded([exit.state for exit in exits], [exit.request for exit in exits])
        for exit, exit_rewards, exit_completions in zip(exits, rewards, completions, strict=True):
            exit.walkers.rewards[exit.indices] = [_number(reward) for reward in exit_rewards]
            exit.walkers.exit_tokens[exit.indices] = [completion.token_ids[0] for completion in exit_completions]
            exit.walkers.keep_completions(exit.indices, exit_completions)
        known = {key: value for walk in walks for key, value in walk.values()}
        walkers = {(walk.problem.id, walk.prompt_ids): walk.walkers for walk in walks}
        nodes = [walkers[problem.id, rollout.prompt_ids].nodes(rollout) for problem, rollout in rollouts]
        mc_rollouts = sum(len(exit.indices) for exit in exits)
        cost = ValueCost(len(states), len(known), mc_rollouts, total_tokens(completions))
        return [known[state.key] for state in states], nodes, cost


def reusing_or_fresh(monte_carlo: MonteCarlo) -> ReusingMonteCarlo | MonteCarlo:
    """Return an estimator that reuses continuations if the sampler supports this.

    Reuse needs a sampler that can exclude first tokens. With another sampler, the function warns and returns
    `monte_carlo`, which samples new continuations of every state.
    """
    if monte_carlo.sampler.capabilities.excluded_first:
        return ReusingMonteCarlo(monte_carlo)
    warnings.warn(
        "continuations are not reused: this sampler cannot exclude first tokens, so every state gets "
        f"{monte_carlo.num_mc_rollouts} new continuations; the values are still unbiased, but about 2 to 3 times as "
        "many tokens are sampled",
        stacklevel=2,
    )
    return monte_carlo


@dataclass(frozen=True)
class _Exit:
    """The walkers that leave the tree at the same state, and the request that samples their remaining tokens."""

    state: State
    """The state at which the walkers leave the tree."""
    request: SampleRequest
    """Request for the remaining tokens, with one sample for each of these walkers."""
    indices: np.ndarray
    """Indices in `walkers` of the walkers that leave here, shape (n,)."""
    walkers: _Walkers
    """All walkers of the problem."""


class _Walkers:
    """The walkers of one problem, stored as arrays with one entry per walker, shape (size,)."""

    def __init__(self, size: int):
        self.rewards = np.zeros(size)
        """Reward of the walker; 0 until it is known, and NaN if the walker has no reward."""
        self.starts = np.full(size, -1, dtype=np.int64)
        """Depth of the state at which the walker starts; -1 if no walker has this index."""
        self.ends = np.zeros(size, dtype=np.int64)
        """Depth of the state at which the walker leaves the tree or reaches the end of a response."""
        self.followed = np.zeros(size, dtype=np.int64)
        """Index (see `responses`) of a response whose tokens before depth `ends` are those of the walker."""
        self.exit_tokens = np.full(size, -1, dtype=np.int64)
        """Id of the walker's first token outside the tree; -1 if the walker reaches the end of a response."""
        self.responses: dict[tuple[int, ...], int] = {}
        """Dictionary from the token ids of each response that walkers follow to the index of the response."""
        self.keep = np.zeros(size, dtype=bool)
        """Whether the tokens of the walker are returned (`State.keep`)."""
        self.completions: dict[int, Completion] = {}
        """Dictionary from the index of each walker with `keep` that leaves the tree to its tokens outside the tree."""

    def keep_completions(self, indices: np.ndarray, completions: Sequence[Completion]) -> None:
        """Keep the completions of those walkers that have `keep`.

        Args:
            indices: indices of the walkers, shape (n,).
            completions: the tokens of each of these walkers outside the tree.
        """
        if self.keep[indices].any():
            pairs = zip(indices.tolist(), completions, strict=True)
            self.completions.update((walker, completion) for walker, completion in pairs if self.keep[walker])

    def finish(self, indices: np.ndarray, response: tuple[int, ...], depth: int) -> None:
        """Record that walkers follow a response up to `depth`, where they leave the tree or the response ends.

        Args:
            indices: indices of the walkers, shape (n,).
        """
        self.followed[indices] = self.responses.setdefault(response, len(self.responses))
        self.ends[indices] = depth

    def nodes(self, rollout: Rollout) -> list[Node]:
        """Return one node per token of a rollout, with the walkers that pass through the state before the token.

        Walkers without a reward are left out.
        """
        response, responses = rollout.response_ids, list(self.responses)
        # For each response, the number of first tokens that are equal to those of the rollout.
        shared = np.array([_shared_length(other, response) for other in responses])
        # For each walker, the depth up to which it has the tokens of the rollout.
        last_shared = np.minimum(self.ends, shared[self.followed])  # (n,)
        passing = np.flatnonzero((self.starts <= last_shared) & (self.starts >= 0) & ~np.isnan(self.rewards))
        followed: list[list[float]] = [[] for _ in response]
        diverged: list[list[tuple[int, float]]] = [[] for _ in response]
        rewards, starts, depths = self.rewards.tolist(), self.starts.tolist(), last_shared.tolist()
        for walker in passing.tolist():
            reward, depth = rewards[walker], depths[walker]
            for position in range(starts[walker], depth):
                followed[position].append(reward)
            if depth < len(response):
                # The walker's next token is a token of another response, or its first token outside the tree.
                follows_another = self.ends[walker] > depth
                token = responses[self.followed[walker]][depth] if follows_another else self.exit_tokens[walker]
                diverged[depth].append((int(token), reward))
        return [Node(tuple(f), tuple(d)) for f, d in zip(followed, diverged, strict=True)]


@dataclass
class _TreeWalk:
    """Moves all walkers of one problem through the tree of its responses.

    The walkers move when the object is created. Each walker moves until it leaves the tree or reaches the end of a
    response.
    """

    monte_carlo: MonteCarlo
    states: Sequence[State]
    """The states of the problem that are evaluated."""
    iteration: int
    """Number of the iteration, from which the seeds are derived."""
    exits: list[_Exit] = field(default_factory=list)
    """One entry for each state at which walkers leave the tree."""
    pools: dict[Key, np.ndarray] = field(default_factory=dict)
    """Dictionary from the key of each evaluated state to the indices of the K walkers that pass through the state,
    shape (K,). The array is empty if the state is at the length limit."""

    def __post_init__(self) -> None:
        self.problem, self.prompt_ids = self.states[0].problem, self.states[0].prompt_ids
        depths_by_response: dict[tuple[int, ...], tuple[Rollout, set[int]]] = {}
        for state in self.states:
            assert state.rollout is not None, "ReusingMonteCarlo needs the rollout of every state"
            response = state.rollout.response_ids
            depths_by_response.setdefault(response, (state.rollout, set()))[1].add(len(state.response_ids))
        self.rollouts = {response: rollout for response, (rollout, _) in depths_by_response.items()}
        self.kept = kept_keys(self.states)
        # The order is that of the token ids, which `_next_place` needs.
        branches = [_Branch(rollout, sorted(depths)) for _, (rollout, depths) in sorted(depths_by_response.items())]
        # At most K walkers start at each state.
        size = self.monte_carlo.num_mc_rollouts * len({state.key for state in self.states})
        # For each response, the part of the seed of every state on it that depends on the token ids, (T + 1,).
        self.ids_seeds = {response: seeds_of_prefixes(response) for response in depths_by_response}
        self.start_keys = self._start_keys(branches)
        # Keys of the walkers' random numbers (see `uniforms`), (size,).
        self.keys = np.zeros(size, dtype=np.uint64)
        self.walkers = _Walkers(size)
        self.num_started = 0
        # Each entry has the arguments of `_advance` for one place. The first place is the prompt, which has depth 0 and
        # which no walkers have reached yet.
        stack = [(branches, 0, np.zeros(0, dtype=np.int64))]
        while stack:
            stack.extend(self._advance(*stack.pop()))

    def values(self) -> Iterator[tuple[Key, Value | None]]:
        """Yield (key, value) of every evaluated state. The rewards of all walkers must be known.

        The value is None if none of the walkers at the state has a reward.
        """
        for key, pool in self.pools.items():
            if not len(pool):  # the state is at the length limit
                yield key, Value(0.0, 0)
                continue
            rewards = self.walkers.rewards[pool]
            rewards = rewards[~np.isnan(rewards)]
            if not len(rewards):
                yield key, None
                continue
            # The rounded mean of equal rewards may differ from them.
            mean = rewards[0] if rewards.min() == rewards.max() else rewards.mean()
            yield key, Value(float(mean), len(rewards), self._started_at(key) if key in self.kept else ())

    def _started_at(self, key: Key) -> tuple[MCRollout, ...]:
        """Return the continuations that start at a state with `keep`. The rewards of all walkers must be known."""
        depth, walkers, responses = len(key[1]) - len(self.prompt_ids), self.walkers, list(self.walkers.responses)
        started = []
        for walker in self.pools[key].tolist():
            if walkers.starts[walker] != depth:
                continue
            response, end = responses[walkers.followed[walker]], int(walkers.ends[walker])
            completion, reward = walkers.completions.get(walker), float(walkers.rewards[walker])
            ids = response[depth:end] + (() if completion is None else completion.token_ids)
            reason = (self.rollouts[response] if completion is None else completion).finish_reason
            started.append(MCRollout(depth, ids, None if math.isnan(reward) else reward, reason))
        return tuple(started)

    def _advance(
        self, branches: list[_Branch], depth: int, walkers: np.ndarray
    ) -> Iterator[tuple[list[_Branch], int, np.ndarray]]:
        """Move walkers from one place of the tree to the next places.

        If the place is a state that is evaluated, new walkers start there.

        Args:
            branches: the responses that pass through this place. Their first `depth` tokens are equal.
            depth: depth of this place.
            walkers: indices of the walkers that arrive at this place, shape (n,).
        Yields:
            The arguments of this method for each of the next places.
        """
        response = branches[0].rollout.response_ids
        if any(depth in branch.depths for branch in branches):
            walkers = self._start_missing(walkers, response, depth)
        if len(response) == depth:  # the response ends here, and the walkers get its reward
            self.walkers.rewards[walkers] = _number(branches[0].rollout.reward)
            self.walkers.finish(walkers, response, depth)
            return
        children: dict[int, list[_Branch]] = {}
        for branch in branches:
            children.setdefault(branch.rollout.response_ids[depth], []).append(branch)
        if len(children) == 1:  # no fork
            end = _next_place(branches, depth)
            yield branches, end, self._follow(branches[0].rollout, depth, end, walkers)
            return
        # Each next token of the tree has an interval within [0, 1) whose length is the probability of the token. A
        # walker takes the token whose interval contains its random number. In the remaining interval it leaves the
        # tree.
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
        """Move walkers along a path without forks. Some of them leave the tree on the way.

        Args:
            rollout: a rollout whose response contains the path.
            start: depth at which the path starts.
            end: depth at which the path ends.
            walkers: indices of the walkers at the start of the path, shape (n,).
        Returns:
            Indices of the walkers that reach the end of the path.
        """
        if start == end or not len(walkers):
            return walkers
        probabilities = np.exp(np.array(rollout.sampler_logprobs[start:end]))  # (T,)
        leaves = uniforms(self.keys[walkers][:, None], np.arange(start, end)) >= probabilities  # (n, T)
        # For each walker, the number of tokens of the path before the first token at which it leaves the tree.
        num_followed = np.where(leaves.any(1), leaves.argmax(1), end - start)  # (n,)
        for offset in sorted(set(num_followed.tolist()) - {end - start}):
            position = start + offset
            token = rollout.response_ids[position]
            self._leave(rollout.response_ids, position, (token,), walkers[num_followed == offset])
        return walkers[num_followed == end - start]

    def _state(self, response: tuple[int, ...], depth: int) -> State:
        """Return the state before the token at a depth of a response of the tree."""
        return State(self.problem, self.prompt_ids, response[:depth], ids_seed=self.ids_seeds[response][depth])

    def _start_keys(self, branches: Sequence[_Branch]) -> dict[Key, np.ndarray]:
        """Return the keys of the random numbers of the walkers that may start at each evaluated state, (K,)."""
        states = [self._state(branch.rollout.response_ids, depth) for branch in branches for depth in branch.depths]
        seeds = {state.key: self.monte_carlo.seed(state, self.iteration, "walk") for state in states}
        walkers = np.arange(self.monte_carlo.num_mc_rollouts)
        keys = stream_keys(np.array(list(seeds.values()), dtype=np.uint64)[:, None], walkers)  # (states, K)
        return dict(zip(seeds, keys, strict=True))

    def _start_missing(self, walkers: np.ndarray, response: tuple[int, ...], depth: int) -> np.ndarray:
        """Start new walkers at a state that is evaluated, so that K walkers pass through the state.

        Args:
            walkers: indices of the walkers that arrive at the state, at most K.
            response: a response of the tree that passes through the state.
            depth: depth of the state.
        Returns:
            Indices of all walkers at the state, shape (K,). At the length limit no walkers start, and the result is
            `walkers`.
        """
        state = self._state(response, depth)
        if depth >= self.monte_carlo.max_new_tokens:
            # A response cannot continue at the length limit. An empty pool gives the state the value 0.
            self.pools[state.key] = np.zeros(0, dtype=np.int64)
            return walkers
        num_missing = self.monte_carlo.num_mc_rollouts - len(walkers)
        new = np.arange(self.num_started, self.num_started + num_missing)
        self.keys[new] = self.start_keys[state.key][:num_missing]
        self.walkers.starts[new] = depth
        self.walkers.keep[new] = state.key in self.kept
        self.num_started += num_missing
        pool = np.concatenate([walkers, new])
        self.pools[state.key] = pool
        return pool

    def _leave(self, response: tuple[int, ...], depth: int, excluded: tuple[int, ...], walkers: np.ndarray) -> None:
        """Record that walkers leave the tree, and build the request that samples their remaining tokens.

        Args:
            response: a response that the walkers follow up to the state at which they leave the tree.
            depth: depth of this state.
            excluded: ids of the tokens that come next in the tree.
            walkers: indices of the walkers, shape (n,).
        """
        if not len(walkers):
            return
        self.walkers.finish(walkers, response, depth)
        state = self._state(response, depth)
        request = self.monte_carlo.request(state, self.iteration, len(walkers), excluded)
        self.exits.append(_Exit(state, request, walkers, self.walkers))


@dataclass(frozen=True)
class _Branch:
    """One response of the tree, and its states that are evaluated."""

    rollout: Rollout
    depths: list[int]
    """Depths of the evaluated states of the response, in ascending order."""


def _next_place(branches: list[_Branch], depth: int) -> int:
    """Return the depth of the first place in the tree after `depth`.

    Args:
        branches: branches whose first `depth` + 1 tokens are equal, in the lexicographic order of their token ids.
    """
    # Because of the order, a token that the first and the last branch share is a token of all branches.
    first, last = branches[0].rollout.response_ids, branches[-1].rollout.response_ids
    state_depths = [d for branch in branches for d in branch.depths if d > depth]
    limit = min([len(first), len(last), *state_depths])
    end = depth + 1
    while end < limit and first[end] == last[end]:
        end += 1
    return end


def _number(reward: float | None) -> float:
    """Return a reward as an entry of an array, in which NaN means that there is no reward."""
    return math.nan if reward is None else reward


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens at the start of two responses."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
