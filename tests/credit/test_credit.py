"""Credit functions: from groups of rollouts to training samples, compared with numbers worked by hand.

The problem is a chain of three steps with the embedded tokenizer. The sampler returns prepared continuations of known
token prefixes and fails for all other prefixes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers import known
from tests.learning.test_learner import NONE
from tests.world import build_world
from vineppo.config.schema import LearnerConfig, TaskConfig
from vineppo.credit import find_algorithm
from vineppo.credit.algorithm import CreditParts, PredictValues
from vineppo.credit.grpo import grpo_credit
from vineppo.credit.ppo import explained_variance
from vineppo.credit.reinforce import reinforce_credit
from vineppo.credit.rloo import rloo_credit
from vineppo.credit.sample import reward_of
from vineppo.learning.learner import TorchLearner
from vineppo.learning.losses import clipped_policy_loss
from vineppo.model.batch import collate
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.model.tiny import build_model, build_tokenizer
from vineppo.tasks import build_task
from vineppo.tasks.chain import ChainTask, grade_chain
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.judge import InProcess
from vineppo.training.rollouts import draw_problems, generated_tokens, sample_groups
from vineppo.types import (
    Capabilities,
    Completion,
    CreditFn,
    FinishReason,
    Problem,
    Rollout,
    RolloutGroup,
    Sampler,
    SampleRequest,
    Split,
    Task,
    TrainingSample,
    UserError,
    Weights,
)
from vineppo.values import MonteCarlo, State

BUDGET = 40
K = 4
PROBLEM = Problem(id="train/0", prompt="a=7;b=a*3;c=b+5;d=c-2;d?\n", answer="4")

# A line is a step, with its newline; the answer line is the last step. Numbers of tokens: 9 per line, 4 of the answer.
FIRST = "b=7*3 by rote = 1\n"
SECOND, SECOND_SLIPS = "c=1+5 by rule is 6\n", "c=1+5 by rote is 7\n"
THIRD, THIRD_OF_7 = "d=6-2 by rule -> 4\n", "d=7-2 by rule -> 5\n"
FOUR, FIVE = "#### 4</s>", "#### 5</s>"
RIGHT, WRONG = FIRST + SECOND + THIRD + FOUR, FIRST + SECOND_SLIPS + THIRD_OF_7 + FIVE
CUT_OFF = FIRST + 31 * "1"  # 40 tokens, without EOS
# These are truncated too, but a grader would accept them.
CUT_OFF_AT_THE_ANSWER = FIRST + SECOND + THIRD + 9 * "1" + "\n#### 4"  # 40 tokens
CUT_OFF_AFTER_THE_SLIP = 18 * "1" + "\n#### 4"  # 22 tokens

CONTINUATIONS: dict[str, list[str]] = {
    "": [RIGHT, WRONG, RIGHT, CUT_OFF_AT_THE_ANSWER],
    FIRST: [SECOND + THIRD + FOUR, SECOND + THIRD + FOUR, SECOND_SLIPS + THIRD_OF_7 + FIVE, SECOND + THIRD + FOUR],
    FIRST + SECOND: [THIRD + FOUR] * 4,
    FIRST + SECOND_SLIPS: [FOUR, THIRD_OF_7 + FIVE, CUT_OFF_AFTER_THE_SLIP, THIRD_OF_7 + FIVE],
    FIRST + SECOND + THIRD: [FOUR] * 4,
    FIRST + SECOND_SLIPS + THIRD_OF_7: [FIVE, FOUR, FIVE, FOUR],
}


@cache
def policy() -> Policy:
    return fresh_policy()


def fresh_policy() -> Policy:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    return Policy(model, Codec.for_model(model, tokenizer))


def ids(text: str) -> tuple[int, ...]:
    return tuple(policy().codec.tokenizer(text, add_special_tokens=False).input_ids)


def completion(text: str, finish_reason: FinishReason | None = None) -> Completion:
    """Completion with this text. Its finish reason is "stop" if the text ends with EOS, unless one is given."""
    token_ids = ids(text)
    finish: FinishReason = finish_reason or ("stop" if text.endswith("</s>") else "length")
    return Completion(token_ids, (-0.5,) * len(token_ids), finish)


@dataclass
class ScriptedSampler:
    """A sampler that returns the prepared completions of each token prefix (`script`) and records its requests."""

    script: Mapping[tuple[int, ...], Sequence[Completion]]
    requests: list[SampleRequest] = field(default_factory=list)
    version: int = 0
    capabilities: ClassVar[Capabilities] = Capabilities(excluded_first=False, reproducible=True)

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        self.requests.extend(requests)
        return [self._completions(request) for request in requests]

    def _completions(self, request: SampleRequest) -> list[Completion]:
        completions = self.script[request.prompt_ids]
        assert len(completions) == request.num_samples
        for c in completions:  # the finish reason is "length" if and only if the budget is used up
            assert len(c.token_ids) <= request.max_new_tokens
            assert c.finish_reason == "stop" or len(c.token_ids) == request.max_new_tokens
        return list(completions)

    def update_weights(self, version: int, weights: Weights) -> None:
        pass


def chain(num_steps: int = 3) -> Task:
    return build_task(TaskConfig(num_steps=num_steps))


def recording_task() -> tuple[Task, list[str]]:
    """The chain task, and a list of all texts that it grades."""
    graded: list[str] = []

    def grade(completions: Sequence[str], **columns: Any) -> list[float]:
        graded.extend(completions)
        assert set(columns["answer"]) == {PROBLEM.answer}
        return grade_chain(completions, **columns)

    return Graded(chain(), InProcess((grade,)), ("grade",), (1.0,)), graded


def scripted(continuations: Mapping[str, Sequence[str]], problem: Problem = PROBLEM) -> ScriptedSampler:
    prompt = policy().codec.encode_prompt(problem.prompt)
    return ScriptedSampler({prompt + ids(p): [completion(c) for c in cs] for p, cs in continuations.items()})


def group_of(completions: Sequence[Completion], task: Task | None = None) -> RolloutGroup:
    """A group with these completions as rollouts, from `sample_groups`."""
    sampler = ScriptedSampler({policy().codec.encode_prompt(PROBLEM.prompt): completions})
    (group,) = sample_groups(
        [PROBLEM],
        policy().codec,
        sampler,
        task or chain(),
        group_size=len(completions),
        max_new_tokens=BUDGET,
        temperature=1.0,
        address=(0, 1, "rollouts"),
    )
    return group


def group_of_four() -> RolloutGroup:
    """A right, a wrong, a right and a truncated response: rewards 1, 0, 1, 0."""
    return group_of([completion(text) for text in (RIGHT, WRONG, RIGHT, CUT_OFF)])


def vine_samples(
    groups: list[RolloutGroup], sampler: Sampler, *, task: Task | None = None, max_states: int = 0
) -> tuple[list[TrainingSample], dict[str, float]]:
    """Training samples and metrics of VinePPO."""
    settings = {"reuse": False, "num_mc_rollouts": K, "splitter": "newline", "max_states": max_states}
    return credit_of("vineppo", settings, sampler, task or chain())(groups, 1)


def credit_of(
    algorithm: str,
    settings: Mapping[str, Any],
    sampler: Sampler,
    task: Task,
    predict_values: PredictValues | None = None,
) -> CreditFn:
    """Build the credit function of an algorithm from its settings."""
    definition = find_algorithm(algorithm)
    parts = CreditParts(
        sampler=sampler,
        task=task,
        codec=policy().codec,
        predict_values=predict_values or no_values,
        run_seed=0,
        group_size=4,
        max_new_tokens=BUDGET,
        temperature=1.0,
        stop=(),
    )
    return definition.build(definition.settings(**settings), parts)


def response_part(sample: TrainingSample) -> list[float]:
    return [a for a, trained in zip(sample.advantages, sample.loss_mask, strict=True) if trained]


# --- VinePPO, worked by hand ---


def test_lengths_and_rewards_of_the_prepared_texts() -> None:
    lengths = [len(ids(text)) for text in (FIRST, SECOND, SECOND_SLIPS, THIRD, THIRD_OF_7, FOUR, FIVE, CUT_OFF)]
    assert lengths == [9, 9, 9, 9, 9, 4, 4, BUDGET]
    assert len(ids(CUT_OFF_AT_THE_ANSWER)) == BUDGET and len(ids(CUT_OFF_AFTER_THE_SLIP)) == BUDGET - 18
    right = [RIGHT, CUT_OFF_AT_THE_ANSWER, FIRST + SECOND_SLIPS + CUT_OFF_AFTER_THE_SLIP]
    texts = [policy().codec.decode(ids(text)) for text in [*right, WRONG, CUT_OFF]]
    assert chain().grade([PROBLEM] * 5, texts) == [1, 1, 1, 0, 0]
    assert [rollout.reward for rollout in group_of_four().rollouts] == [1, 0, 1, 0]


def test_vine_credit_by_hand() -> None:
    """Values .5, .75, then 1 and 1 after the right second step, .25 and .5 after the wrong one, and the reward."""
    samples, _ = vine_samples([group_of_four()], scripted(CONTINUATIONS))
    right, wrong, duplicate, cut_off = samples
    assert response_part(right) == [0.25] * 9 + [0.25] * 9 + [0.0] * 9 + [0.0] * 4
    assert response_part(wrong) == [0.25] * 9 + [-0.5] * 9 + [0.25] * 9 + [-0.5] * 4
    assert response_part(cut_off) == [0.25] * 9 + [-0.75] * 31
    assert duplicate == right
    for sample, rollout in zip(samples, group_of_four().rollouts, strict=True):
        assert sample.credit is not None
        assert sample.credit.values[0] + sum(sample.credit.step_advantages) == rollout.reward
        assert sample.returns is None and sample.values is None


def test_step_credit_contains_boundaries_values_and_step_advantages() -> None:
    samples, _ = vine_samples([group_of_four()], scripted(CONTINUATIONS))
    step_credit = samples[1].credit
    assert step_credit is not None
    assert step_credit.boundaries == (9, 18, 27, 31)
    assert step_credit.values == (0.5, 0.75, 0.25, 0.5)
    assert step_credit.num_mc_rollouts == (K, K, K, K)
    assert step_credit.step_advantages == (0.25, -0.5, 0.25, -0.5)
    assert samples[3].credit is not None and samples[3].credit.boundaries == (9, 40)


def test_equal_states_are_sampled_once_and_cost_is_counted() -> None:
    """4 + 4 + 4 + 2 states, of which 6 are distinct. Tokens: 3 * 31 + 40, 4 * 22, 4 * 13, 4 + 22 + 2 * 13, 2 * 16."""
    sampler = scripted(CONTINUATIONS)
    _, metrics = vine_samples([group_of_four()], sampler)
    assert len(sampler.requests) == 6
    assert len({request.prompt_ids for request in sampler.requests}) == 6
    assert {request.num_samples for request in sampler.requests} == {K}
    assert metrics == {
        "tokens/mc": 133 + 88 + 52 + 52 + 32,
        "credit/mc_rollouts": 24,
        "credit/states": 14,
        "credit/distinct_states": 6,
        "credit/steps_per_response": 3.5,
        "credit/zero_step_share": 4 / 14,
    }


def test_states_are_shared_across_groups_of_a_problem_but_not_across_problems() -> None:
    """States with equal tokens but different problems are different, because the reference answers differ."""
    sampler = scripted(CONTINUATIONS)
    vine_samples([group_of_four(), group_of_four()], sampler)
    assert len(sampler.requests) == 6
    other = replace(PROBLEM, id="train/1", answer="5")
    group = RolloutGroup(other, group_of_four().rollouts)
    sampler = scripted(CONTINUATIONS)
    samples, _ = vine_samples([group_of_four(), group], sampler)
    assert len(sampler.requests) == 12
    credit = samples[4].credit
    assert credit is not None and credit.values == (0.25, 0.25, 0.0, 0.0)


def test_the_budget_of_a_continuation_is_reduced_by_its_prefix() -> None:
    sampler = scripted(CONTINUATIONS)
    vine_samples([group_of_four()], sampler)
    prompt = len(policy().codec.encode_prompt(PROBLEM.prompt))
    budgets = {len(request.prompt_ids) - prompt: request.max_new_tokens for request in sampler.requests}
    assert budgets == {0: BUDGET, 9: BUDGET - 9, 18: BUDGET - 18, 27: BUDGET - 27}


def test_a_state_at_the_length_limit_has_value_0_and_is_not_sampled() -> None:
    """One token before the limit one token is sampled; at the limit the value is known."""
    prompt, cut_off = policy().codec.encode_prompt(PROBLEM.prompt), ids(CUT_OFF)
    last_chance = [completion("</s>"), completion("1"), completion("</s>"), completion("\n")]
    sampler = ScriptedSampler({prompt + cut_off[:39]: last_chance})
    task, graded = recording_task()
    monte_carlo = MonteCarlo(sampler, task, policy().codec.decode, K, BUDGET, run_seed=0, temperature=1.0)
    states = [State(PROBLEM, prompt, cut_off[:length]) for length in (40, 39, 40)]
    values, cost = monte_carlo.evaluate([*states, State(PROBLEM, prompt, (*cut_off, 1))], 1)
    assert [request.max_new_tokens for request in sampler.requests] == [1]
    assert [(value.mean, value.num_mc_rollouts) for value in known(values)] == [(0, 0), (0, K), (0, 0), (0, 0)]
    assert (cost.states, cost.distinct_states, cost.mc_rollouts, cost.tokens) == (4, 3, K, 4)
    assert len(graded) == 2


def test_the_sampler_is_not_called_if_all_values_are_known() -> None:
    monte_carlo = MonteCarlo(
        ScriptedSampler({}), chain(), policy().codec.decode, K, BUDGET, run_seed=0, temperature=1.0
    )
    state = State(PROBLEM, policy().codec.encode_prompt(PROBLEM.prompt), ids(CUT_OFF))
    assert [value.mean for value in known(monte_carlo.evaluate([state], 1)[0])] == [0.0]
    assert monte_carlo.evaluate([], 1)[0] == []


def test_the_ids_of_a_state_are_the_ids_of_the_rollout() -> None:
    """The ids of this response differ from the tokenization of its text: " = " is one token, but here three."""
    unusual = (*ids("b=7*3 by rote"), *ids(" "), *ids("="), *ids(" "), *ids("1\n#### 4</s>"))
    text = policy().codec.decode(unusual)
    assert ids(text) != unusual and len(ids(text)) < len(unusual)
    prompt = policy().codec.encode_prompt(PROBLEM.prompt)
    group = group_of([Completion(unusual, (-0.5,) * len(unusual), "stop")])
    cut = 11  # after the newline
    assert policy().codec.decode(unusual[:cut]) == FIRST
    sampler = ScriptedSampler(
        {
            prompt: [completion(text) for text in CONTINUATIONS[""]],
            prompt + unusual[:cut]: [completion(text) for text in CONTINUATIONS[FIRST]],
        }
    )
    (sample,), _ = vine_samples([group], sampler)
    assert [request.prompt_ids for request in sampler.requests] == [prompt, prompt + unusual[:cut]]
    assert sample.token_ids == prompt + unusual
    assert sample.credit is not None and sample.credit.boundaries == (cut, len(unusual))


def test_continuations_are_graded_with_their_prefix_and_not_if_truncated() -> None:
    task, graded = recording_task()
    vine_samples([group_of_four()], scripted(CONTINUATIONS), task=task)
    finished = [
        policy().codec.decode(ids(prefix + text))
        for prefix, texts in CONTINUATIONS.items()
        for text in texts
        if text.endswith("</s>")
    ]
    assert len(finished) == 22
    assert Counter(graded) == Counter(finished)
    assert all(text.startswith(FIRST) for text in graded)


def test_a_truncated_rollout_is_not_graded() -> None:
    task, graded = recording_task()
    group = group_of([completion(CUT_OFF_AT_THE_ANSWER), completion(RIGHT)], task)
    assert [rollout.reward for rollout in group.rollouts] == [0, 1]
    assert [rollout.finish_reason for rollout in group.rollouts] == ["length", "stop"]
    assert graded == [policy().codec.decode(ids(RIGHT))]
    assert generated_tokens([group]) == 71


@pytest.mark.parametrize(
    ("max_states", "boundaries", "advantages"),
    [
        (0, (9, 18, 27, 31), (0.25, -0.5, 0.25, -0.5)),
        (5, (9, 18, 31), (0.25, -0.5, -0.25)),
        (3, (9, 27, 31), (0.25, -0.25, -0.5)),
        (2, (9, 31), (0.25, -0.75)),
        (1, (31,), (-0.5,)),
    ],
)
def test_max_states_merges_steps_and_their_advantages(
    max_states: int, boundaries: tuple[int, ...], advantages: tuple[float, ...]
) -> None:
    sampler = scripted(CONTINUATIONS)
    samples, _ = vine_samples([group_of_four()], sampler, max_states=max_states)
    credit = samples[1].credit
    assert credit is not None and (credit.boundaries, credit.step_advantages) == (boundaries, advantages)
    assert len(sampler.requests) == {0: 6, 5: 4, 3: 4, 2: 2, 1: 1}[max_states]
    assert response_part(samples[1])[-1] == advantages[-1]


# --- addressed randomness ---


def test_every_state_has_a_different_seed() -> None:
    """The seed depends on run, iteration, problem and prefix, and differs from the seeds of the rollouts.

    With equal seeds a rollout would be one of the continuations that evaluate its own states.
    """
    prompt = policy().codec.encode_prompt(PROBLEM.prompt)
    states = [State(PROBLEM, prompt, ids(prefix)) for prefix in CONTINUATIONS]
    seeds: list[int] = []
    for run_seed, iteration, problem_id in ((0, 1, "train/0"), (0, 2, "train/0"), (1, 1, "train/0"), (0, 1, "train/1")):
        sampler = scripted(CONTINUATIONS)
        monte_carlo = MonteCarlo(sampler, chain(), policy().codec.decode, K, BUDGET, run_seed, 1.0)
        monte_carlo.evaluate([replace(s, problem=replace(PROBLEM, id=problem_id)) for s in states], iteration)
        seeds += [request.seed for request in sampler.requests]
    rollouts = ScriptedSampler({prompt: [completion(RIGHT)] * 2})
    task = chain()
    shape: dict[str, Any] = {"group_size": 2, "max_new_tokens": 40, "temperature": 1.0}
    for iteration in (1, 2):
        sample_groups([PROBLEM, PROBLEM], policy().codec, rollouts, task, **shape, address=(0, iteration))
    seeds += [request.seed for request in rollouts.requests]
    assert len(seeds) == 4 * 6 + 2 * 2 == len(set(seeds))


def test_values_do_not_depend_on_the_order_of_states_or_on_other_states() -> None:
    w = build_world(4)
    monte_carlo = w.monte_carlo(3)
    states = [State(w.problem, w.prompt_ids, state) for state in w.states]
    together, _ = monte_carlo.evaluate(states, 7)
    assert len({value.mean for value in known(together)}) > 20
    reversed_values, _ = monte_carlo.evaluate(states[::-1], 7)
    assert reversed_values[::-1] == together
    for state, value in list(zip(states, together, strict=True))[::9]:
        assert monte_carlo.evaluate([state], 7)[0] == [value]
    assert monte_carlo.evaluate(states, 8)[0] != together


# --- trained tokens ---


def test_eos_is_trained_if_and_only_if_it_was_sampled() -> None:
    """Responses that end with EOS, with a stop string (no EOS) and at the length limit (no EOS)."""
    eos = policy().codec.eos_ids[0]
    completions = [completion(RIGHT), completion(FIRST, "stop"), completion(CUT_OFF)]
    group = group_of(completions)
    samples, _ = rloo_credit()([group], 1)
    prompt = policy().codec.encode_prompt(PROBLEM.prompt)
    for sample, sampled in zip(samples, completions, strict=True):
        T = len(sampled.token_ids)
        assert sample.token_ids == prompt + sampled.token_ids
        assert sample.loss_mask == (0,) * len(prompt) + (1,) * T
        assert sample.sampler_logprobs == (0.0,) * len(prompt) + (-0.5,) * T
        assert sample.advantages[: len(prompt)] == (0.0,) * len(prompt)
    assert [sample.token_ids.count(eos) for sample in samples] == [1, 0, 0]
    assert samples[0].token_ids[-1] == eos and samples[0].loss_mask[-1] == 1


def recorded_minibatches(learner: TorchLearner, samples: Sequence[TrainingSample]) -> list[list[tuple[int, ...]]]:
    """The token rows of every forward pass with gradients, without padding."""
    passes: list[list[tuple[int, ...]]] = []

    def record(_module: torch.nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            passes.append([tuple(t for t in row if t) for row in kwargs["input_ids"].tolist()])  # 0 is the padding

    handle = learner.policy.model.register_forward_pre_hook(record, with_kwargs=True)
    learner.update(samples, 1, len(samples))
    handle.remove()
    return passes


def no_values(rollouts: Sequence[Rollout]) -> list[list[float]]:
    raise AssertionError("this algorithm has no value network")


def build_learner(critic: ValueNetwork | None = None, **options: Any) -> TorchLearner:
    """A learner with a new policy and learning rate 0. Each row of a forward pass is one sequence."""
    config = LearnerConfig(lr=0.0, **options)
    return TorchLearner(
        fresh_policy(), None, critic, config, None, temperature=1.0, total_updates=10, seed=0, savings=NONE
    )


def test_an_incomplete_minibatch_is_trained() -> None:
    """Five rollouts in minibatches of two: three updates per epoch, in which every rollout is trained once."""
    texts = [RIGHT, WRONG, CUT_OFF, FIRST + "</s>", FIRST + SECOND + "</s>"]
    samples, _ = rloo_credit()([group_of([completion(text) for text in texts])], 1)
    learner = build_learner(minibatch_size=2, epochs=2)
    passes = recorded_minibatches(learner, samples)
    assert learner.updates == 6
    assert [len(rows) for rows in passes] == [2, 2, 1, 2, 2, 1]
    expected = sorted(sample.token_ids for sample in samples)
    for epoch in (passes[:3], passes[3:]):
        assert sorted(row for rows in epoch for row in rows) == expected


@pytest.mark.parametrize("micro_batch_tokens", [1, 150, 100_000])
def test_the_denominator_is_the_number_of_response_tokens(micro_batch_tokens: int) -> None:
    """At a ratio of 1 the loss is minus the mean token advantage: 2 * 4.5 - 2 - 21 over 3 * 31 + 40 tokens.

    Several epochs are tested too, so the test fails if training modifies the mask.
    """
    samples, _ = vine_samples([group_of_four()], scripted(CONTINUATIONS))
    for epochs in (1, 3):
        learner = build_learner(minibatch_size=4, epochs=epochs, micro_batch_tokens=micro_batch_tokens)
        assert learner.update(samples, 1, len(samples))["policy/loss"] == pytest.approx(14 / 133, abs=1e-6)


def test_extra_padding_changes_neither_the_loss_nor_its_gradient() -> None:
    samples, _ = vine_samples([group_of_four()], scripted(CONTINUATIONS))
    batch = collate(samples)
    results = []
    for extra in (0, 37):
        token_ids, mask, advantages = (
            torch.nn.functional.pad(row, (0, extra)) for row in (batch.token_ids, batch.loss_mask, batch.advantages)
        )
        logprobs, _ = token_logprobs(policy().model, token_ids, mask, temperature=1.0)
        assert len(logprobs) == 133
        loss, _ = clipped_policy_loss(logprobs, logprobs.detach() + 0.1, advantages[mask], 0.2, 0.2)
        gradients = torch.autograd.grad(loss, list(policy().model.parameters()))
        results.append((loss.item(), torch.cat([gradient.reshape(-1) for gradient in gradients])))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


# --- credit relative to other responses ---


def group_with(rewards: Sequence[float | None]) -> RolloutGroup:
    """Rollouts of 2, 3, 4 ... tokens with these rewards."""
    return RolloutGroup(
        PROBLEM,
        tuple(
            Rollout((5, 6, 7), (8,) * length, (-1.0,) * length, "stop", "", reward)
            for length, reward in enumerate(rewards, start=2)
        ),
    )


def test_group_credit_by_hand() -> None:
    """All tokens of a response have the same advantage; groups are independent; equal rewards give advantages of 0."""
    groups = [group_with([1, 0, 0]), group_with([1, 1, 1])]
    by_rloo, metrics = rloo_credit()(groups, 1)
    assert [response_part(s) for s in by_rloo[:3]] == [[1.0] * 2, [-0.5] * 3, [-0.5] * 4]
    assert [set(response_part(s)) for s in by_rloo[3:]] == [{0.0}] * 3
    assert metrics == {"credit/zero_group_share": 0.5}
    by_grpo, _ = grpo_credit(scale_by_std=False)(groups, 1)
    assert [s.advantages[-1] for s in by_grpo] == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    scaled, _ = grpo_credit(scale_by_std=True)(groups, 1)
    std = math.sqrt((4 + 1 + 1) / 9 / 2)
    assert scaled[0].advantages[-1] == pytest.approx(2 / 3 / (std + 1e-4))
    assert [s.advantages[-1] for s in scaled[3:]] == [0, 0, 0]


def test_reinforce_by_hand() -> None:
    """The baseline is the mean of all other rollouts of the iteration, for any problem: 1 - 1/3 and 0 - 2/3."""
    samples, _ = reinforce_credit()([group_with([1, 0]), group_with([1, 0])], 1)
    assert [response_part(s) for s in samples] == [
        pytest.approx([2 / 3] * 2),
        pytest.approx([-2 / 3] * 3),
        pytest.approx([2 / 3] * 2),
        pytest.approx([-2 / 3] * 3),
    ]


@pytest.mark.parametrize("algorithm", ["vineppo", "ppo", "grpo", "rloo", "reinforce"])
def test_every_algorithm_gives_one_sample_per_rollout_in_order(algorithm: str) -> None:
    settings_by_algorithm: dict[str, dict[str, Any]] = {
        "vineppo": {"reuse": False, "num_mc_rollouts": K},
        "grpo": {"scale_by_std": False},
    }
    settings = settings_by_algorithm.get(algorithm, {})
    values = build_learner(ValueNetwork(policy(), seed=0)).predict_values if algorithm == "ppo" else no_values
    credit = credit_of(algorithm, settings, scripted(CONTINUATIONS), chain(), values)
    group = group_of_four()
    samples, _ = credit([group], 1)
    assert [s.token_ids for s in samples] == [r.prompt_ids + r.response_ids for r in group.rollouts]
    for sample in samples:
        assert len({len(sample.token_ids), len(sample.loss_mask), len(sample.advantages)}) == 1
        assert (sample.returns is None) == (sample.values is None) == (algorithm != "ppo")
    ends = [sample.advantages[-1] for sample in samples]
    if algorithm != "ppo":
        assert ends == pytest.approx(
            {
                "vineppo": [0, -0.5, 0, -0.75],
                "grpo": [0.5, -0.5, 0.5, -0.5],
                "rloo": [2 / 3, -2 / 3, 2 / 3, -2 / 3],
                "reinforce": [2 / 3, -2 / 3, 2 / 3, -2 / 3],
            }[algorithm]
        )


# --- PPO ---


def test_ppo_credit_is_reward_minus_value_at_lambda_1() -> None:
    predict_values = build_learner(ValueNetwork(policy(), seed=0)).predict_values
    group = group_of_four()
    samples, metrics = credit_of("ppo", {"gae_lambda": 1.0}, scripted({}), chain(), predict_values)([group], 1)
    predicted = predict_values(group.rollouts)
    prompt = len(policy().codec.encode_prompt(PROBLEM.prompt))
    for sample, rollout, values in zip(samples, group.rollouts, predicted, strict=True):
        assert sample.values is not None and sample.returns is not None
        assert sample.values == (0.0,) * prompt + tuple(pytest.approx(v, abs=1e-6) for v in values)
        assert response_part(sample) == pytest.approx([reward_of(rollout) - v for v in values], abs=1e-6)
        assert sample.returns[prompt:] == pytest.approx([rollout.reward] * len(values), abs=1e-6)
        assert sample.returns[:prompt] == (0.0,) * prompt
    flat = [value for values in predicted for value in values]
    assert metrics["value/mean"] == pytest.approx(sum(flat) / 133, abs=1e-6)


def test_a_value_is_of_the_state_before_its_token() -> None:
    """Changing token t changes the values before later tokens, but not the value before token t or earlier values."""
    learner = build_learner(ValueNetwork(policy(), seed=0))
    rollout = group_of_four().rollouts[0]
    for t in (0, 5, 29):
        changed = (*rollout.response_ids[:t], ids("9")[0], *rollout.response_ids[t + 1 :])
        original_values, changed_values = learner.predict_values([rollout, replace(rollout, response_ids=changed)])
        differ = [abs(a - b) > 1e-6 for a, b in zip(original_values, changed_values, strict=True)]
        assert differ == [False] * (t + 1) + [True] * (31 - t - 1)


def test_predicted_values_do_not_depend_on_micro_batches() -> None:
    critic = ValueNetwork(policy(), seed=0)
    rollouts = group_of_four().rollouts
    whole = build_learner(critic, micro_batch_tokens=100_000).predict_values(rollouts)
    assert [len(row) for row in whole] == [31, 31, 31, 40]
    for tokens in (1, 130):
        for a, b in zip(build_learner(critic, micro_batch_tokens=tokens).predict_values(rollouts), whole, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_values_without_a_value_network_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="has no value network; set needs_critic=True") as error:
        build_learner().predict_values(group_of_four().rollouts)
    assert "\n" not in str(error.value)


def test_explained_variance_by_hand() -> None:
    assert explained_variance([0.0, 1.0], [0, 1]) == 1
    assert explained_variance([0.3, 0.3], [0, 1]) == 0
    assert explained_variance([0.25, 0.75], [0, 1]) == 0.75  # errors -.25 and .25 against a variance of .25
    assert explained_variance([5.0, 6.0], [0, 1]) == 1  # a constant offset does not count
    assert explained_variance([1.0, 0.0], [0, 1]) == -3
    assert math.isnan(explained_variance([0.1, 0.2], [1, 1]))
    assert math.isnan(explained_variance([0.1, 0.2] * 12, [0.1] * 24))  # their variance would be 2e-34


# --- problems and groups ---


class Finite(ChainTask):
    """Seven training problems."""

    def size(self, split: Split) -> int | None:
        return 7


def test_a_finite_task_is_drawn_in_shuffled_passes() -> None:
    """Draws 1 to 7, 8 to 14, ... contain each problem once, in a different order in each pass."""
    task = Finite("judgement", 3)
    drawn = [p.id for iteration in range(1, 8) for p in draw_problems(task, seed=3, iteration=iteration, count=4)]
    passes = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(one) == [f"train/{i}" for i in range(7)] for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    fifth = draw_problems(task, seed=3, iteration=5, count=4)  # independent of earlier iterations
    assert [p.id for p in fifth] == drawn[16:20]
    assert [p.id for p in draw_problems(task, seed=4, iteration=1, count=7)] != passes[0]


def test_an_infinite_task_gives_new_problems_in_every_iteration() -> None:
    task = ChainTask("judgement", 6)
    drawn = [p.prompt for iteration in range(1, 9) for p in draw_problems(task, seed=0, iteration=iteration, count=8)]
    assert len(set(drawn)) == 64


def test_a_prompt_that_leaves_too_few_tokens_for_the_response_is_refused() -> None:
    with pytest.raises(UserError, match=r"train/0 has 25 tokens; with rollouts.max_new_tokens 490 .* context of 512"):
        sample_groups(
            [PROBLEM],
            policy().codec,
            scripted({}),
            chain(),
            group_size=1,
            max_new_tokens=490,
            temperature=1.0,
            address=(0,),
        )
