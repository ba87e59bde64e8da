"""Load a model and a task, sample responses, and sample continuations of their states, for all measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vineppo.config.measure import MeasureSpec
from vineppo.model.codec import Codec
from vineppo.model.policy import Policy
from vineppo.sampling.build import build_sampler
from vineppo.seeds import derive_seed
from vineppo.steps import Splitter, build_splitter, step_ends
from vineppo.tasks import build_task
from vineppo.training.overlong import fit_prompts
from vineppo.training.rollouts import generated_tokens, problem_range, sample_groups
from vineppo.types import Problem, Rollout, RolloutGroup, Sampler, Task, UserError
from vineppo.values import MonteCarlo, State
from vineppo.values.monte_carlo import total_tokens

Say = Callable[[str], None]
"""Function that prints one line of progress."""
_BATCH = 4096
"""Number of continuations after which a line of progress is due at the earliest."""


@dataclass(frozen=True)
class Response:
    """A sampled response, cut into steps."""

    problem_index: int
    """Index of its problem in the session."""
    problem: Problem
    rollout: Rollout
    ends: tuple[int, ...]
    """End of each of the S steps as a number of response tokens, shape (S,)."""

    @property
    def reward(self) -> float:
        """The reward; 0 if there is none."""
        return self.rollout.reward or 0.0

    def state(self, step: int) -> State:
        """Return the state before a step, counted from 0."""
        start = (0, *self.ends)[step]
        return State(self.problem, self.rollout.prompt_ids, self.rollout.response_ids[:start], self.rollout)


@dataclass
class Session:
    """A model with its task, and the counts of what was sampled."""

    spec: MeasureSpec
    policy: Policy
    task: Task
    sampler: Sampler
    splitter: Splitter
    problems: list[Problem]
    say: Say
    tokens: int = 0
    """Number of tokens that were generated so far."""
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(cls, spec: MeasureSpec, say: Say) -> Session:
        """Load what the settings name.

        Raises:
            UserError: if the model, the task or the splitter cannot be used.
        """
        splitter = build_splitter(spec.splitter)
        policy = Policy.load(spec.model)
        task = build_task(spec.task, policy.codec.chat_prompt)
        fit_prompts(task, policy.codec, spec.max_new_tokens, spec.task.overlong, {spec.split: spec.num_problems})
        problems = problem_range(task, spec.split, spec.num_problems)
        return cls(spec, policy, task, build_sampler(policy), splitter, problems, say)

    @property
    def codec(self) -> Codec:
        """Converts token ids to text and back."""
        return self.policy.codec

    @property
    def seconds(self) -> float:
        """Seconds since the session was opened."""
        return time.perf_counter() - self.began

    def seed(self, purpose: str) -> int:
        """Return a seed of the session for a purpose. Different purposes have unrelated random numbers."""
        return derive_seed(self.spec.seed, "measure", purpose)

    def groups(self) -> list[RolloutGroup]:
        """Sample and grade the group of every problem."""
        groups = sample_groups(
            self.problems,
            self.codec,
            self.sampler,
            self.task,
            group_size=self.spec.group_size,
            max_new_tokens=self.spec.max_new_tokens,
            temperature=self.spec.temperature,
            stop=self.spec.stop,
            address=(self.spec.seed, "measure", "responses"),
        )
        self.tokens += generated_tokens(groups)
        rewards = [r.reward for g in groups for r in g.rollouts if r.reward is not None]
        if not rewards:
            raise UserError("no response has a reward, because no reward function applies; check task.rewards")
        self.say(
            f"{len(groups)} problems x {self.spec.group_size} responses, {self.tokens:,} tokens, mean reward "
            f"{np.mean(rewards):.3f}"
        )
        return groups

    def cut(self, problem_index: int, problem: Problem, rollout: Rollout) -> Response:
        """Cut a response into steps."""
        ends = step_ends(rollout, self.splitter, self.codec.token_texts, 0)
        return Response(problem_index, problem, rollout, tuple(ends))

    def monte_carlo(self, k: int, purpose: str) -> MonteCarlo:
        """Return an estimator with K continuations per state whose random numbers are those of a purpose."""
        return MonteCarlo(
            sampler=self.sampler,
            task=self.task,
            decode=self.codec.decode,
            num_mc_rollouts=k,
            max_new_tokens=self.spec.max_new_tokens,
            run_seed=self.seed(purpose),
            temperature=self.spec.temperature,
            stop=self.spec.stop,
        )

    def rewards(self, states: Sequence[State], count: int, purpose: str) -> np.ndarray:
        """Sample and grade continuations of states.

        Equal states share their continuations. A state at the length limit has none, and its reward is 0.

        Args:
            states: the n states.
            count: N, the number of continuations per state.
            purpose: address of the random numbers; other purposes have independent continuations.
        Returns:
            Reward of each continuation, shape (n, N); NaN for a continuation without a reward.
        """
        distinct = {state.key: state for state in states}
        open_states = [s for s in distinct.values() if len(s.response_ids) < self.spec.max_new_tokens]
        found: dict[Any, np.ndarray] = {key: np.zeros(count) for key in distinct}
        estimator, at_once, shown = self.monte_carlo(count, purpose), max(1, _BATCH // count), time.perf_counter()
        for start in range(0, len(open_states), at_once):
            batch = open_states[start : start + at_once]
            rewards, completions = estimator.graded(batch, [estimator.request(s, 0, count) for s in batch])
            self.tokens += total_tokens(completions)
            for state, row in zip(batch, rewards, strict=True):
                found[state.key] = np.array([np.nan if reward is None else reward for reward in row])
            if time.perf_counter() - shown > 5:
                shown = time.perf_counter()
                self.say(f"{purpose}: {start + len(batch)} of {len(open_states)} states, {self.tokens:,} tokens so far")
        return np.array([found[state.key] for state in states]).reshape(len(states), count)

    def affordable(self, costs: Sequence[float], what: str) -> int:
        """Return how many problems fit into the token limit, at least 2 (or all), and say so if it is not all.

        Args:
            costs: expected tokens of each problem.
            what: what is measured, for the message.
        """
        limit, used, count = self.spec.max_tokens, float(self.tokens), 0
        if not limit:
            return len(costs)
        for cost in costs:
            if used + cost > limit and count >= 2:
                break
            used, count = used + cost, count + 1
        if count < len(costs):
            self.say(
                f"{what}: {count} of {len(costs)} problems, so that about {limit:,} tokens are generated (--max_tokens)"
            )
        return count


def mean_tokens_left(response: Response, steps: Sequence[int]) -> float:
    """Return the sum of the tokens of one continuation from the state before each step, if all end as the response."""
    starts = (0, *response.ends)
    return float(sum(len(response.rollout.response_ids) - starts[step] for step in steps))
