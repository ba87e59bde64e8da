"""Values of many states from fewer continuations: one that follows a response to its next state counts there too.

Plain VinePPO samples K fresh continuations at every state of a response. Many of them begin as the response itself goes
on: they pass through its next state, and from there they are fair samples of that state as well. So a state takes over
the continuations that arrive and samples only what is missing to K:

- exactly unbiased for every state, since each of its K continuations is a sample from it, whichever state it began at;
- cheaper: a continuation is decoded from where it leaves the response, not from where it began. How long it follows
  needs no decoding at all: the log-probabilities of the response's tokens are known from its sampling;
- less noise in the credit: neighbouring values share the continuations that do not leave between them, so these cancel
  in the difference. If a share q leaves within a step, the variance of its advantage is about q times that of two
  values sampled apart; a step that was certain (q = 0) gets exactly 0.

The responses of a group form a tree, and continuations walk down it: at a fork they may follow any of its responses.
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
    """K continuations of each state, those that arrive from earlier states included.

    Every state must lie on a rollout (`State.rollout`), sampled by the same policy at the same temperature. The sampler
    must be capable of `excluded_first`.

    Attributes:
        plain: sampler, grader, K and budget.
    """

    plain: MonteCarlo

    def evaluate(self, states: Sequence[State], iteration: int) -> tuple[list[Value], ValueCost]:
        """Value of each state, in order; the rollouts of one problem are walked together."""
        values, _, cost = self.evaluate_nodes(states, (), iteration)
        return values, cost

    def evaluate_nodes(
        self, states: Sequence[State], rollouts: Sequence[tuple[Problem, Rollout]], iteration: int
    ) -> tuple[list[Value], list[list[Node]], ValueCost]:
        """Value of each state, and the nodes of each rollout: what became of everyone who came by."""
        problems: dict[tuple[str, tuple[int, ...]], list[State]] = {}
        for state in states:
            problems.setdefault((state.problem.id, state.prompt_ids), []).append(state)
        walks = [_Walk(self.plain, own, iteration) for own in problems.values()]
        exits = [exit for walk in walks for exit in walk.exits]
        rewards, completions = self.plain.graded([exit.state for exit in exits], [exit.request for exit in exits])
        for exit, group, sampled in zip(exits, rewards, completions, strict=True):
            exit.paths.outcomes[exit.walkers] = group
            exit.paths.exit_tokens[exit.walkers] = [completion.token_ids[0] for completion in sampled]
        known = {key: value for walk in walks for key, value in walk.values()}
        by_problem = {(walk.problem.id, walk.prompt_ids): walk.paths for walk in walks}
        nodes = [by_problem[problem.id, rollout.prompt_ids].nodes(rollout) for problem, rollout in rollouts]
        mc_rollouts = sum(len(exit.walkers) for exit in exits)
        cost = ValueCost(len(states), len(known), mc_rollouts, total_tokens(completions))
        return [known[state.key] for state in states], nodes, cost


def reusing_or_fresh(plain: MonteCarlo) -> ReusingMonteCarlo | MonteCarlo:
    """Continuations that serve several states where the sampler can exclude first tokens; else fresh ones.

    Warns where they are fresh.
    """
    if plain.sampler.capabilities.excluded_first:
        return ReusingMonteCarlo(plain)
    warnings.warn(
        f"vineppo.reuse is off: this sampler cannot exclude first tokens, so every state gets {plain.num_mc_rollouts} "
        "fresh continuations: unbiased as well, for about 2 to 3 times the sampled tokens",
        stacklevel=2,
    )
    return plain


@dataclass(frozen=True)
class _Exit:
    """Where walkers leave the tree of rollouts: they are decoded from here, beginning with another token."""

    state: State
    request: SampleRequest
    walkers: np.ndarray
    """Indices into `paths`, shape (n,)."""
    paths: _Paths


class _Paths:
    """Where each walker of a problem began, whom it followed how far, and what it earned."""

    def __init__(self, size: int):
        self.outcomes = np.zeros(size)
        self.begins = np.full(size, -1, dtype=np.int64)
        self.ends = np.zeros(size, dtype=np.int64)
        """Response tokens that the walker has when it leaves, or all of them."""
        self.followed = np.zeros(size, dtype=np.int64)
        """Number of a response in `responses`."""
        self.exit_tokens = np.full(size, -1, dtype=np.int64)
        """The token it left with; -1 for a walker that followed a response to its end."""
        self.responses: dict[tuple[int, ...], int] = {}

    def stop(self, walkers: np.ndarray, response: tuple[int, ...], depth: int) -> None:
        """These walkers have followed a response for `depth` tokens and no longer."""
        self.followed[walkers] = self.responses.setdefault(response, len(self.responses))
        self.ends[walkers] = depth

    def nodes(self, rollout: Rollout) -> list[Node]:
        """What everyone who came by did at each token of a rollout, shape (T,)."""
        response, others = rollout.response_ids, list(self.responses)
        shared = np.array([_shared_length(other, response) for other in others])
        agreed = np.minimum(self.ends, shared[self.followed])  # (n,): where a walker and the rollout part
        # Unused places at the end of the arrays have begun nowhere.
        here = np.flatnonzero((self.begins <= agreed) & (self.begins >= 0))
        followed: list[list[float]] = [[] for _ in response]
        left: list[list[tuple[int, float]]] = [[] for _ in response]
        for walker in here.tolist():
            reward = float(self.outcomes[walker])
            for position in range(self.begins[walker], agreed[walker]):
                followed[position].append(reward)
            parting = int(agreed[walker])
            if parting < len(response):
                went_on = self.ends[walker] > parting  # with another response
                token = others[self.followed[walker]][parting] if went_on else self.exit_tokens[walker]
                left[parting].append((int(token), reward))
        return [Node(tuple(f), tuple(b)) for f, b in zip(followed, left, strict=True)]


@dataclass
class _Walk:
    """All continuations of one problem's states, walked down the tree of its rollouts as far as they follow it."""

    settings: MonteCarlo
    states: Sequence[State]
    iteration: int
    exits: list[_Exit] = field(default_factory=list)
    pools: dict[Key, np.ndarray] = field(default_factory=dict)
    """Walkers that pass each state, K of them."""

    def __post_init__(self) -> None:
        first = self.states[0]
        self.problem, self.prompt_ids = first.problem, first.prompt_ids
        wanted: dict[tuple[int, ...], tuple[Rollout, set[int]]] = {}
        for state in self.states:
            assert state.rollout is not None, "a state without its rollout has nothing to follow"
            response = state.rollout.response_ids
            wanted.setdefault(response, (state.rollout, set()))[1].add(len(state.response_ids))
        self.branches = [_Branch(rollout, sorted(depths)) for _, (rollout, depths) in sorted(wanted.items())]
        # At most K walkers begin at each state.
        size = self.settings.num_mc_rollouts * len({state.key for state in self.states})
        self.keys = np.zeros(size, dtype=np.uint64)
        self.paths = _Paths(size)
        self.begun = 0
        nobody = np.zeros(0, dtype=np.int64)
        waiting = [(self.branches, 0, nobody)]
        while waiting:
            waiting.extend(self._advance(*waiting.pop()))

    def values(self) -> Iterator[tuple[Key, Value]]:
        """The value of every state, once the outcomes are known."""
        for key, pool in self.pools.items():
            yield key, Value(float(self.paths.outcomes[pool].mean()) if len(pool) else 0.0, len(pool))

    def _advance(
        self, branches: list[_Branch], depth: int, walkers: np.ndarray
    ) -> Iterator[tuple[list[_Branch], int, np.ndarray]]:
        """From a node, where `branches` share `depth` tokens, to its next nodes, with the walkers that get there."""
        response = branches[0].rollout.response_ids
        if any(depth in branch.depths for branch in branches):
            walkers = self._filled_up(walkers, response[:depth])
        if len(response) == depth:  # the response ends here, and so does who has followed it so far
            self.paths.outcomes[walkers] = branches[0].rollout.reward
            self.paths.stop(walkers, response, depth)
            return
        children: dict[int, list[_Branch]] = {}
        for branch in branches:
            children.setdefault(branch.rollout.response_ids[depth], []).append(branch)
        level = uniforms(self.keys[walkers], depth)  # (n,)
        total = 0.0
        for token in sorted(children):
            probability = float(np.exp(children[token][0].rollout.sampler_logprobs[depth]))
            follows = (level >= total) & (level < total + probability)
            total += probability
            end = _next_node(children[token], depth)
            yield children[token], end, self._follow(children[token][0].rollout, depth + 1, end, walkers[follows])
        self._leave(response, depth, tuple(sorted(children)), walkers[level >= total])

    def _follow(self, rollout: Rollout, start: int, end: int, walkers: np.ndarray) -> np.ndarray:
        """Walk along a stretch without forks, tokens [start, end); returns who is still there at its end."""
        if start == end or not len(walkers):
            return walkers
        stay = np.exp(np.array(rollout.sampler_logprobs[start:end]))  # (T,)
        leaves = uniforms(self.keys[walkers][:, None], np.arange(start, end)) >= stay  # (n, T)
        place = np.where(leaves.any(1), leaves.argmax(1), end - start)  # (n,)
        for offset in np.unique(place[place < end - start]).tolist():
            position = start + offset
            token = rollout.response_ids[position]
            self._leave(rollout.response_ids, position, (token,), walkers[place == offset])
        return walkers[place == end - start]

    def _filled_up(self, walkers: np.ndarray, response_ids: tuple[int, ...]) -> np.ndarray:
        """The K continuations of a state: those that arrived, and new ones."""
        state = State(self.problem, self.prompt_ids, response_ids)
        if len(response_ids) >= self.settings.max_new_tokens:  # cut off by the limit: worth 0, nothing to sample
            self.pools[state.key] = np.zeros(0, dtype=np.int64)
            return walkers
        missing = self.settings.num_mc_rollouts - len(walkers)
        fresh = np.arange(self.begun, self.begun + missing)
        seed = self.settings.seed(state, self.iteration, "walk")
        self.keys[fresh] = stream_keys(np.full(missing, seed, dtype=np.uint64), np.arange(missing))
        self.paths.begins[fresh] = len(response_ids)
        self.begun += missing
        pool = np.concatenate([walkers, fresh])
        self.pools[state.key] = pool
        return pool

    def _leave(self, response: tuple[int, ...], depth: int, excluded: tuple[int, ...], walkers: np.ndarray) -> None:
        if not len(walkers):
            return
        self.paths.stop(walkers, response, depth)
        state = State(self.problem, self.prompt_ids, response[:depth])
        request = self.settings.request(state, self.iteration, len(walkers), excluded)
        self.exits.append(_Exit(state, request, walkers, self.paths))


@dataclass(frozen=True)
class _Branch:
    """One rollout of the tree and how many of its tokens each wanted state has."""

    rollout: Rollout
    depths: list[int]


def _next_node(branches: list[_Branch], depth: int) -> int:
    """Where the next state, fork or end lies on branches that share the token at `depth`."""
    first, last = branches[0].rollout.response_ids, branches[-1].rollout.response_ids  # in lexicographic order
    nexts = [d for branch in branches for d in branch.depths if d > depth]
    limit = min([len(first), len(last), *nexts])
    end = depth + 1
    while end < limit and first[end] == last[end]:
        end += 1
    return end


def _shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two responses have in common at their beginnings."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
