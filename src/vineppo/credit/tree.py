"""Tree: rollouts are sampled as a tree, every generated token is trained once, and leaves give the values of nodes.

Sources: SPO-tree (arXiv 2505.23564), TreeRPO (arXiv 2506.05183) and TreeRL (arXiv 2506.11902). They differ in where the
tree branches and in how the values of its nodes become advantages, which are settings here.

The leaves of a tree are whole responses. A tree grows by levels. At each level, every response is continued anew from
the state at its next branching point, so that several responses share the tokens before it. An *edge* is a stretch of
tokens between two branching points. Its *leaves* are the responses that contain it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vineppo.config.schema import Config
from vineppo.config.settings import Settings, require
from vineppo.credit.algorithm import Algorithm, CreditParts, SampleFn
from vineppo.credit.sample import training_sample
from vineppo.sampling.graded import sampled_and_graded
from vineppo.seeds import derive_seed
from vineppo.statistics import mean_of
from vineppo.steps import Splitter, build_splitter
from vineppo.types import (
    Completion,
    CreditFn,
    Metrics,
    Problem,
    Rollout,
    RolloutGroup,
    SampleRequest,
    TrainingSample,
    UserError,
)

BranchingPoints = Callable[[Rollout], list[int]]
"""Function (rollout) -> its branching points: numbers of response tokens, strictly increasing, less than the length of
the response, at most one per level."""


class TreeSettings(Settings):
    """Tree: the responses to a problem share their first tokens; the mean rewards of leaves are the values of nodes."""

    branches: tuple[int, ...] = (2,)
    """Number of continuations at each branching point behind the prompt, one number of at least 2 per level. The number
    of branches at the prompt is `rollouts.group_size` divided by the product of these numbers. With a group size of 4
    and the default there are 2 at the prompt and 2 in the middle."""
    branch_at: str = "budget"
    """Where the responses branch. `budget`: at equal distances in `rollouts.max_new_tokens`, with one level after half
    of it. `tokens:N`: after N, 2 N, ... tokens. `steps:N`: after N, 2 N, ... steps. A response that ends before a
    branching point does not branch there and counts as all the leaves that it would have had."""
    splitter: str = "newline"
    """For `branch_at: steps:N`: how a response is cut into steps, as in `vineppo.splitter`."""
    values: Literal["siblings", "parent", "parent_and_root"] = "siblings"
    """How the value of an edge, the mean reward of its leaves, becomes an advantage. `siblings`: minus the mean value
    of the other edges at the same branching point (unbiased). `parent`: minus the mean value of all edges there, as in
    SPO-tree and TreeRPO; with B branches (B - 1) / B of the former. `parent_and_root`: the sum of the differences from
    the means of all edges there and of all leaves of the problem, divided by the square root of the number of leaves,
    as in TreeRL (biased)."""

    def check(self) -> None:
        """Raise UserError if `branches` or `branch_at` is not valid."""
        require(
            bool(self.branches) and min(self.branches) >= 2,
            f"tree.branches is {list(self.branches)}; it must have at least one number, and each must be at least 2",
        )
        _points_every(self.branch_at)
        build_splitter(self.splitter)


def _points_every(branch_at: str) -> tuple[str, int]:
    """Return (unit, N) of a value of `branch_at`; N is 0 for `budget`.

    Raises:
        UserError: if the value is not valid.
    """
    unit, _, number = branch_at.partition(":")
    if branch_at == "budget":
        return unit, 0
    if unit in ("tokens", "steps") and number.isascii() and number.isdigit() and 0 < int(number) < 10**9:
        return unit, int(number)
    raise UserError(
        f"tree.branch_at is {branch_at!r}; allowed: budget, tokens:N or steps:N with a whole number N of at least 1"
    )


def _check(settings: TreeSettings, config: Config) -> None:
    """Raise UserError if the settings do not fit the configuration (`Algorithm.check`)."""
    leaves, size = math.prod(settings.branches), config.rollouts.group_size
    require(
        size % leaves == 0,
        f"rollouts.group_size is {size}, but with tree.branches {list(settings.branches)} each response at the prompt "
        f"becomes {leaves} responses; set rollouts.group_size to a multiple of {leaves}, or change tree.branches",
    )
    require(
        config.rollouts.max_new_tokens > len(settings.branches),
        f"rollouts.max_new_tokens is {config.rollouts.max_new_tokens}, too few for {len(settings.branches)} branching "
        "points; raise it, or shorten tree.branches",
    )
    require(
        not config.learner.mask_truncated,
        "learner.mask_truncated is true, but a truncated response of a tree shares tokens with others that are trained "
        "in its place; set learner.mask_truncated false",
    )


def branching_points(settings: TreeSettings, parts: CreditParts) -> BranchingPoints:
    """Return the function that finds the branching points of a response.

    Whether a response branches after b tokens depends only on these tokens and on whether the response ends with them.
    """
    levels = len(settings.branches)
    unit, every = _points_every(settings.branch_at)
    splitter: Splitter = build_splitter(settings.splitter)

    def points(rollout: Rollout) -> list[int]:
        if unit == "steps":
            ends = splitter(parts.codec.token_texts(rollout.response_ids), rollout.sampler_logprobs)
            places = list(ends[every - 1 :: every])
        elif unit == "tokens":
            places = [every * level for level in range(1, levels + 1)]
        else:
            places = [parts.max_new_tokens * level // (levels + 1) for level in range(1, levels + 1)]
        return [place for place in places[:levels] if place < len(rollout.response_ids)]

    return points


# --- sampling ---


@dataclass(frozen=True)
class _State:
    """A state from which responses are sampled."""

    tree: int
    """Index of the tree in the iteration."""
    level: int
    """0 for the prompt, 1 for the first branching points, and so on."""
    leaf: int = 0
    """Index of the response in its tree before the level was sampled."""
    rollout: Rollout | None = None
    """The response that passes through the state; None for the prompt."""
    start: int = 0
    """Number of response tokens before the state."""


@dataclass(frozen=True)
class _Grower:
    """Samples the levels of the trees of an iteration.

    Attributes:
        parts: the objects of the run.
        iteration: number of the iteration, counted from 1.
        owners: (problem, token ids of its prompt, number of earlier groups of the same problem) of each tree.
    """

    parts: CreditParts
    iteration: int
    owners: Sequence[tuple[Problem, tuple[int, ...], int]]

    def sample(self, states: Sequence[_State], count: int) -> list[list[Rollout]]:
        """Sample `count` responses from each state, and return them as whole responses."""
        requests, prefixes = [], []
        for state in states:
            problem, prompt_ids, seen = self.owners[state.tree]
            prefix = state.rollout.response_ids[: state.start] if state.rollout else ()
            address = (self.parts.run_seed, self.iteration, problem.id, "tree", seen, state.level, state.leaf)
            requests.append(
                SampleRequest(
                    prompt_ids=prompt_ids + prefix,
                    num_samples=count,
                    max_new_tokens=self.parts.max_new_tokens - state.start,
                    seed=derive_seed(*address),
                    response_tokens=state.start,
                    temperature=self.parts.temperature,
                    stop=self.parts.stop,
                )
            )
            prefixes.append((problem, prefix))
        graded = sampled_and_graded(self.parts.sampler, self.parts.task, self.parts.codec.decode, requests, prefixes)
        return [
            [self._rollout(state, *sample) for sample in group] for state, group in zip(states, graded, strict=True)
        ]

    def _rollout(self, state: _State, completion: Completion, text: str, reward: float | None) -> Rollout:
        """Return the response that continues a state with a completion."""
        begun = state.rollout
        return Rollout(
            prompt_ids=self.owners[state.tree][1],
            response_ids=(begun.response_ids[: state.start] if begun else ()) + completion.token_ids,
            sampler_logprobs=(begun.sampler_logprobs[: state.start] if begun else ()) + completion.logprobs,
            finish_reason=completion.finish_reason,
            text=text,
            reward=reward,
        )


def sample_trees(settings: TreeSettings, parts: CreditParts) -> SampleFn:
    """Return the function that samples one tree of `parts.group_size` leaves per problem (`Algorithm.sample`).

    The leaves are in depth-first order: leaves below the same edge are neighbours. A response that ended before a
    branching point is in the group as often as the number of leaves that it stands for.
    """
    points_of = branching_points(settings, parts)
    at_prompt = parts.group_size // math.prod(settings.branches)

    def sample(problems: Sequence[Problem], iteration: int) -> list[RolloutGroup]:
        seen: Counter[str] = Counter()
        owners = []
        for problem in problems:
            owners.append((problem, parts.codec.prompt_ids(problem), seen[problem.id]))
            seen[problem.id] += 1
        grower = _Grower(parts, iteration, owners)
        trees = grower.sample([_State(tree, 0) for tree in range(len(problems))], at_prompt)
        for level, branches in enumerate(settings.branches):
            places = [[_point(points_of, leaf, level) for leaf in leaves] for leaves in trees]
            states = [
                _State(tree, level + 1, number, leaf, place)
                for tree, leaves in enumerate(trees)
                for number, (leaf, place) in enumerate(zip(leaves, places[tree], strict=True))
                if place is not None
            ]
            grown = iter(grower.sample(states, branches - 1) if states else ())
            for tree, leaves in enumerate(trees):
                trees[tree] = []
                for leaf, place in zip(leaves, places[tree], strict=True):
                    copies = [replace(leaf) for _ in range(branches - 1)]
                    trees[tree] += [leaf, *(copies if place is None else next(grown))]
        return [RolloutGroup(problem, tuple(leaves)) for problem, leaves in zip(problems, trees, strict=True)]

    return sample


def _point(points_of: BranchingPoints, leaf: Rollout, level: int) -> int | None:
    """Return the branching point of a response at a level, counted from 0, or None if it has ended before."""
    points = points_of(leaf)
    return points[level] if level < len(points) else None


# --- credit ---


@dataclass(frozen=True)
class _Edge:
    """An edge with its advantage."""

    leaves: range
    """Indices of its leaves in the group."""
    trained_in: int
    """Index of the leaf whose sample trains the tokens of the edge: its first leaf that has a reward, or its first leaf
    if none has. The learner leaves samples without a reward out of the statistics of `learner.advantage_scaling`."""
    start: int
    """Number of response tokens before the edge."""
    end: int
    """Number of response tokens up to its end."""
    advantage: float
    """Advantage of its tokens in reward units."""
    is_last: bool
    """Whether it ends with the end of a response."""


def tree_credit(settings: TreeSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function.

    The value of an edge is the mean reward of its leaves that have one. Its advantage is this value minus a baseline
    (`TreeSettings.values`), and 0 if no leaf has a reward or there is nothing to compare with. With `siblings`, an edge
    at the prompt without a sibling that has a value is compared with the mean value of the other trees of the
    iteration.

    There is one training sample per leaf. The tokens of an edge are trained in the sample of its first leaf that has a
    reward, with the number of its leaves as their weight, and are context in the samples of the others. A response that
    is in the group several times, because it ended before a branching point, is trained once.
    """
    points_of = branching_points(settings, parts)

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        means = [_value(group.rollouts) for group in groups]
        samples: list[TrainingSample] = []
        edges: list[_Edge] = []
        for number, group in enumerate(groups):
            others = [mean for i, mean in enumerate(means) if i != number and mean is not None]
            tree = _edges(settings, points_of, group.rollouts, mean_of(others) if others else None)
            samples += _samples(group.rollouts, tree)
            edges += tree
        rollouts = sum(len(group.rollouts) for group in groups)
        tokens = sum(edge.end - edge.start for edge in edges)
        return samples, {
            "credit/edges": len(edges) / max(1, len(groups)),
            "credit/distinct_leaf_share": sum(edge.is_last for edge in edges) / max(1, rollouts),
            "credit/leaves_per_token": sum(len(e.leaves) * (e.end - e.start) for e in edges) / max(1, tokens),
            "credit/zero_edge_share": sum(edge.advantage == 0 for edge in edges) / max(1, len(edges)),
        }

    return credit


def _edges(
    settings: TreeSettings, points_of: BranchingPoints, rollouts: Sequence[Rollout], others: float | None
) -> list[_Edge]:
    """Return all edges of a tree, in depth-first order, with their advantages.

    Args:
        rollouts: the leaves in depth-first order.
        others: baseline of an edge at the prompt that has no sibling with a value (form `siblings`); None for none.
    Raises:
        UserError: if leaves that should share an edge have different tokens there, or an edge has no tokens, because of
            `tree.splitter`.
        ValueError: if they have for another reason.
    """
    size_at = [math.prod(settings.branches[level:]) for level in range(len(settings.branches) + 1)]
    root, points = _value(rollouts), [points_of(rollout) for rollout in rollouts]
    edges: list[_Edge] = []

    def grow(leaves: range, level: int, start: int) -> None:
        """Add the edges that begin after `start` tokens, and those that follow them."""
        families = [leaves[i : i + size_at[level]] for i in range(0, len(leaves), size_at[level])]
        values = [_value([rollouts[i] for i in family]) for family in families]
        single = others if level == 0 else None
        advantages = _advantages(settings.values, values, [len(family) for family in families], root, single)
        for family, advantage in zip(families, advantages, strict=True):
            first = rollouts[family[0]]
            branching = points[family[0]]
            is_last = level >= len(branching)
            end = len(first.response_ids) if is_last else branching[level]
            parted = (rollouts[i].response_ids[: None if is_last else end] != first.response_ids[:end] for i in family)
            if end <= start or any(parted):
                raise _not_a_tree(settings)
            trained_in = next((i for i in family if rollouts[i].reward is not None), family[0])
            edges.append(_Edge(family, trained_in, start, end, advantage, is_last))
            if not is_last:
                grow(family, level + 1, end)

    grow(range(len(rollouts)), 0, 0)
    return edges


def _not_a_tree(settings: TreeSettings) -> Exception:
    """Return the error for leaves that should share an edge and have different tokens there."""
    if _points_every(settings.branch_at)[0] != "steps":
        return ValueError("the rollouts of the group are not the leaves of a tree in depth-first order")
    return UserError(
        f"tree.splitter {settings.splitter!r} cuts responses with the same first tokens at different places: it uses "
        "the tokens after a cut; choose a splitter that uses only the tokens before it, or tree.branch_at tokens:N"
    )


def _value(rollouts: Sequence[Rollout]) -> float | None:
    """Return the mean reward of the rollouts that have one, or None if there are none."""
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return mean_of(rewards) if rewards else None


def _advantages(
    form: str, values: Sequence[float | None], sizes: Sequence[int], root: float | None, single: float | None
) -> list[float]:
    """Return the advantages of the edges at one branching point.

    Args:
        form: the setting `tree.values`.
        values: value of each edge.
        sizes: number of leaves of each edge.
        root: mean reward of all leaves of the tree.
        single: baseline for the form `siblings` of an edge that has no sibling with a value; None for none.
    """
    known = [value for value in values if value is not None]
    advantages = []
    for number, (value, size) in enumerate(zip(values, sizes, strict=True)):
        siblings = [other for i, other in enumerate(values) if i != number and other is not None]
        if value is None or root is None:
            advantages.append(0.0)
        elif form == "siblings":
            baseline = mean_of(siblings) if siblings else single
            advantages.append(0.0 if baseline is None else value - baseline)
        elif form == "parent":
            advantages.append(value - mean_of(known))
        else:
            advantages.append((value - mean_of(known) + value - root) / math.sqrt(size))
    return advantages


def _samples(rollouts: Sequence[Rollout], edges: Sequence[_Edge]) -> list[TrainingSample]:
    """Return one training sample per rollout; its trained tokens are those of the edges with its `trained_in`."""
    samples = []
    for number, rollout in enumerate(rollouts):
        own = [edge for edge in edges if edge.trained_in == number]
        T, prompt = len(rollout.response_ids), len(rollout.prompt_ids)
        start = own[0].start if own else T  # the edges of a leaf follow each other up to its end
        advantages = [0.0] * start + [edge.advantage for edge in own for _ in range(edge.end - edge.start)]
        weights = [0.0] * start + [float(len(edge.leaves)) for edge in own for _ in range(edge.end - edge.start)]
        sample = training_sample(rollout, advantages, weights_T=weights)
        mask = (0,) * (prompt + start) + (1,) * (T - start)
        # Tokens that are trained in another sample are context here.
        logprobs = (0.0,) * (prompt + start) + rollout.sampler_logprobs[start:]
        samples.append(replace(sample, loss_mask=mask, sampler_logprobs=logprobs))
    return samples


TREE = Algorithm(
    name="tree",
    label="Tree",
    build=tree_credit,
    settings=TreeSettings,
    min_group_size=2,
    check=_check,
    sample=sample_trees,
    colour="#882255",
)
