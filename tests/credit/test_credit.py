"""Credit through the seam: groups of rollouts in, training samples out, with every number worked out by hand.

The problem is a chain of three steps, the tokenizer is the embedded one, and the sampler is scripted: it gives written
continuations to exactly the token prefixes that it knows, and refuses all others.
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

from tests.world import build_world
from vineppo.config.schema import LearnerConfig, TaskConfig
from vineppo.credit import BUILT_IN, find_algorithm
from vineppo.credit.algorithm import CreditParts, PredictValues
from vineppo.credit.grpo import grpo_credit
from vineppo.credit.ppo import explained_variance
from vineppo.credit.reinforce import reinforce_credit
from vineppo.credit.rloo import rloo_credit
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

# The newline leads its line; the answer line belongs to the last step. In tokens: 8, 9, 9, 14, 14.
FIRST = "b=7*3 by rote = 1"
SECOND, SECOND_SLIPS = "\nc=1+5 by rule is 6", "\nc=1+5 by rote is 7"
THIRD, THIRD_OF_7 = "\nd=6-2 by rule -> 4\n#### 4</s>", "\nd=7-2 by rule -> 5\n#### 5</s>"
RIGHT, WRONG = FIRST + SECOND + THIRD, FIRST + SECOND_SLIPS + THIRD_OF_7
CUT_OFF = FIRST + "\n" + 31 * "1"  # 40 tokens, no end
# Cut off as well, and a grader that saw them would call them right.
CUT_OFF_AT_THE_ANSWER = FIRST + SECOND + "\nd=6-2 by rule -> 4\n" + 9 * "1" + "\n#### 4"  # 40 tokens
CUT_OFF_AFTER_THE_SLIP = "\n" + 18 * "1" + "\n#### 4"  # 23 tokens

CONTINUATIONS: dict[str, list[str]] = {
    "": [RIGHT, WRONG, RIGHT, CUT_OFF_AT_THE_ANSWER],
    FIRST: [SECOND + THIRD, SECOND + THIRD, SECOND_SLIPS + THIRD_OF_7, SECOND + THIRD],
    FIRST + SECOND: [THIRD] * 4,
    FIRST + SECOND_SLIPS: ["\n#### 4</s>", THIRD_OF_7, CUT_OFF_AFTER_THE_SLIP, THIRD_OF_7],
}
VALUES = {"": 0.5, FIRST: 0.75, FIRST + SECOND: 1.0, FIRST + SECOND_SLIPS: 0.25}


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
    """A written completion; it ended by itself if it says so, or if its last token is the end of sequence."""
    token_ids = ids(text)
    finish: FinishReason = finish_reason or ("stop" if text.endswith("</s>") else "length")
    return Completion(token_ids, (-0.5,) * len(token_ids), finish)


@dataclass
class ScriptedSampler:
    """Sampler protocol over a script: token prefix -> its completions. Notes what it was asked."""

    script: Mapping[tuple[int, ...], Sequence[Completion]]
    requests: list[SampleRequest] = field(default_factory=list)
    version: int = 0
    capabilities: ClassVar[Capabilities] = Capabilities(excluded_first=False, reproducible=True)

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        self.requests.extend(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: SampleRequest) -> list[Completion]:
        written = self.script[request.prompt_ids]
        assert len(written) == request.num_samples
        for c in written:  # a real sampler ends by length exactly when the budget is spent
            assert len(c.token_ids) <= request.max_new_tokens
            assert c.finish_reason == "stop" or len(c.token_ids) == request.max_new_tokens
        return list(written)

    def update_weights(self, version: int, weights: Weights) -> None:
        pass


def chain(num_steps: int = 3) -> Task:
    return build_task(TaskConfig(num_steps=num_steps))


def noting_task() -> tuple[Task, list[str]]:
    """The chain task, and every text that it grades."""
    graded: list[str] = []

    def note(completions: Sequence[str], **columns: Any) -> list[float]:
        graded.extend(completions)
        assert set(columns["answer"]) == {PROBLEM.answer}
        return grade_chain(completions, **columns)

    return Graded(chain(), InProcess((note,)), ("note",), (1.0,)), graded


def scripted(continuations: Mapping[str, Sequence[str]], problem: Problem = PROBLEM) -> ScriptedSampler:
    prompt = policy().codec.encode_prompt(problem.prompt)
    return ScriptedSampler({prompt + ids(p): [completion(c) for c in cs] for p, cs in continuations.items()})


def group_of(completions: Sequence[Completion], task: Task | None = None) -> RolloutGroup:
    """The completions as the rollouts of the problem, through the package's own sampling stage."""
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


def four() -> RolloutGroup:
    """Right, wrong, right again, cut off: rewards 1, 0, 1, 0."""
    return group_of([completion(text) for text in (RIGHT, WRONG, RIGHT, CUT_OFF)])


def vine_samples(
    groups: list[RolloutGroup], sampler: Sampler, *, task: Task | None = None, max_states: int = 0
) -> tuple[list[TrainingSample], dict[str, float]]:
    """VinePPO's credit as a run binds it."""
    settings = {"reuse": False, "num_mc_rollouts": K, "splitter": "newline", "max_states": max_states}
    return credit_of("vineppo", settings, sampler, task or chain())(groups, 1)


def credit_of(
    algorithm: str,
    settings: Mapping[str, Any],
    sampler: Sampler,
    task: Task,
    predict_values: PredictValues | None = None,
) -> CreditFn:
    """The credit function of an algorithm as a run builds it."""
    found = find_algorithm(algorithm)
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
    return found.build(found.settings(**settings), parts)


def response_part(sample: TrainingSample) -> list[float]:
    return [a for a, trained in zip(sample.advantages, sample.loss_mask, strict=True) if trained]


# --- VinePPO, worked by hand ---


def test_the_script_is_what_it_says() -> None:
    lengths = [len(ids(text)) for text in (FIRST, SECOND, SECOND_SLIPS, THIRD, THIRD_OF_7, CUT_OFF)]
    assert lengths == [8, 9, 9, 14, 14, BUDGET]
    assert len(ids(CUT_OFF_AT_THE_ANSWER)) == BUDGET and len(ids(CUT_OFF_AFTER_THE_SLIP)) == BUDGET - 17
    right = [RIGHT, CUT_OFF_AT_THE_ANSWER, FIRST + SECOND_SLIPS + CUT_OFF_AFTER_THE_SLIP]
    texts = [policy().codec.decode(ids(text)) for text in [*right, WRONG, CUT_OFF]]
    assert chain().grade([PROBLEM] * 5, texts) == [1, 1, 1, 0, 0]
    assert [rollout.reward for rollout in four().rollouts] == [1, 0, 1, 0]


def test_vine_credit_by_hand() -> None:
    """Values .5, .75, then 1 on the right way and .25 after the slip; the last step ends in the reward itself."""
    samples, _ = vine_samples([four()], scripted(CONTINUATIONS))
    right, wrong, again, cut_off = samples
    assert response_part(right) == [0.25] * 8 + [0.25] * 9 + [0.0] * 14
    assert response_part(wrong) == [0.25] * 8 + [-0.5] * 9 + [-0.25] * 14
    assert response_part(cut_off) == [0.25] * 8 + [-0.75] * 32
    assert again == right
    for sample, rollout in zip(samples, four().rollouts, strict=True):
        assert sample.credit is not None
        assert sample.credit.values[0] + sum(sample.credit.step_advantages) == rollout.reward
        assert sample.returns is None and sample.values is None


def test_the_record_says_what_the_credit_came_from() -> None:
    samples, _ = vine_samples([four()], scripted(CONTINUATIONS))
    record = samples[1].credit
    assert record is not None
    assert record.boundaries == (8, 17, 31)
    assert record.values == (0.5, 0.75, 0.25)
    assert record.num_mc_rollouts == (K, K, K)
    assert record.step_advantages == (0.25, -0.5, -0.25)
    assert samples[3].credit is not None and samples[3].credit.boundaries == (8, 40)


def test_equal_states_are_sampled_once_and_cost_is_counted() -> None:
    """3 + 3 + 3 + 2 states, of which 4 are distinct. Tokens: 3 * 31 + 40, 4 * 23, 4 * 14, 5 + 23 + 2 * 14."""
    sampler = scripted(CONTINUATIONS)
    _, metrics = vine_samples([four()], sampler)
    assert len(sampler.requests) == 4
    assert len({request.prompt_ids for request in sampler.requests}) == 4
    assert {request.num_samples for request in sampler.requests} == {K}
    assert metrics == {
        "tokens/mc": 133 + 92 + 56 + 56,
        "credit/mc_rollouts": 16,
        "credit/states": 11,
        "credit/distinct_states": 4,
        "credit/steps_per_response": 2.75,
        "credit/zero_step_share": 2 / 11,
    }


def test_states_are_shared_across_groups_of_a_problem_but_not_across_problems() -> None:
    """The same tokens under another reference answer are another state: its continuations are graded differently."""
    sampler = scripted(CONTINUATIONS)
    vine_samples([four(), four()], sampler)
    assert len(sampler.requests) == 4
    other = replace(PROBLEM, id="train/1", answer="5")
    group = RolloutGroup(other, four().rollouts)
    sampler = scripted(CONTINUATIONS)
    samples, _ = vine_samples([four(), group], sampler)
    assert len(sampler.requests) == 8
    credit = samples[4].credit
    assert credit is not None and credit.values == (0.25, 0.25, 0.0)


def test_trap_2_the_budget_of_a_continuation_is_what_the_prefix_left() -> None:
    sampler = scripted(CONTINUATIONS)
    vine_samples([four()], sampler)
    prompt = len(policy().codec.encode_prompt(PROBLEM.prompt))
    budgets = {len(request.prompt_ids) - prompt: request.max_new_tokens for request in sampler.requests}
    assert budgets == {0: BUDGET, 8: BUDGET - 8, 17: BUDGET - 17}


def test_trap_3_a_prefix_at_the_limit_is_worth_0_and_is_not_sampled() -> None:
    """One token before the limit there is one token to sample; at the limit the outcome is known."""
    prompt, cut_off = policy().codec.encode_prompt(PROBLEM.prompt), ids(CUT_OFF)
    last_chance = [completion("</s>"), completion("1"), completion("</s>"), completion("\n")]
    sampler = ScriptedSampler({prompt + cut_off[:39]: last_chance})
    task, graded = noting_task()
    monte_carlo = MonteCarlo(sampler, task, policy().codec.decode, K, BUDGET, run_seed=0, temperature=1.0)
    states = [State(PROBLEM, prompt, cut_off[:length]) for length in (40, 39, 40)]
    values, cost = monte_carlo.evaluate([*states, State(PROBLEM, prompt, (*cut_off, 1))], 1)
    assert [request.max_new_tokens for request in sampler.requests] == [1]
    assert [(value.mean, value.num_mc_rollouts) for value in values] == [(0, 0), (0, K), (0, 0), (0, 0)]
    assert (cost.states, cost.distinct_states, cost.mc_rollouts, cost.tokens) == (4, 3, K, 4)
    assert len(graded) == 2


def test_only_known_outcomes_need_no_sampler_at_all() -> None:
    monte_carlo = MonteCarlo(
        ScriptedSampler({}), chain(), policy().codec.decode, K, BUDGET, run_seed=0, temperature=1.0
    )
    state = State(PROBLEM, policy().codec.encode_prompt(PROBLEM.prompt), ids(CUT_OFF))
    assert [value.mean for value in monte_carlo.evaluate([state], 1)[0]] == [0.0]
    assert monte_carlo.evaluate([], 1)[0] == []


def test_trap_1_and_truth_4_a_state_is_the_rollouts_own_tokens() -> None:
    """A response of tokens that its text would not give: " = " is one token, this policy wrote it with three."""
    apart = (*ids("b=7*3 by rote"), *ids(" "), *ids("="), *ids(" "), *ids("1\nc=1"), *ids("\n#### 4</s>"))
    text = policy().codec.decode(apart)
    assert ids(text) != apart and len(ids(text)) < len(apart)
    prompt = policy().codec.encode_prompt(PROBLEM.prompt)
    group = group_of([Completion(apart, (-0.5,) * len(apart), "stop")])
    cut = 10  # before the first newline
    assert policy().codec.decode(apart[:cut]) == FIRST
    sampler = ScriptedSampler(
        {
            prompt: [completion(text) for text in CONTINUATIONS[""]],
            prompt + apart[:cut]: [completion(text) for text in CONTINUATIONS[FIRST]],
        }
    )
    (sample,), _ = vine_samples([group], sampler)
    assert [request.prompt_ids for request in sampler.requests] == [prompt, prompt + apart[:cut]]
    assert sample.token_ids == prompt + apart
    assert sample.credit is not None and sample.credit.boundaries == (cut, len(apart))


def test_continuations_are_graded_together_with_their_prefix_and_never_when_cut_off() -> None:
    task, graded = noting_task()
    vine_samples([four()], scripted(CONTINUATIONS), task=task)
    finished = [
        policy().codec.decode(ids(prefix + text))
        for prefix, texts in CONTINUATIONS.items()
        for text in texts
        if text.endswith("</s>")
    ]
    assert len(finished) == 14
    assert Counter(graded) == Counter(finished)
    assert all(text.startswith(FIRST) for text in graded)


def test_a_rollout_that_was_cut_off_is_never_graded() -> None:
    task, graded = noting_task()
    group = group_of([completion(CUT_OFF_AT_THE_ANSWER), completion(RIGHT)], task)
    assert [rollout.reward for rollout in group.rollouts] == [0, 1]
    assert [rollout.finish_reason for rollout in group.rollouts] == ["length", "stop"]
    assert graded == [policy().codec.decode(ids(RIGHT))]
    assert generated_tokens([group]) == 71


@pytest.mark.parametrize(
    ("max_states", "boundaries", "advantages"),
    [
        (0, (8, 17, 31), (0.25, -0.5, -0.25)),
        (3, (8, 17, 31), (0.25, -0.5, -0.25)),
        (2, (8, 31), (0.25, -0.75)),
        (1, (31,), (-0.5,)),
    ],
)
def test_max_states_merges_steps_and_their_advantages(
    max_states: int, boundaries: tuple[int, ...], advantages: tuple[float, ...]
) -> None:
    sampler = scripted(CONTINUATIONS)
    samples, _ = vine_samples([four()], sampler, max_states=max_states)
    credit = samples[1].credit
    assert credit is not None and (credit.boundaries, credit.step_advantages) == (boundaries, advantages)
    assert len(sampler.requests) == {0: 4, 3: 4, 2: 2, 1: 1}[max_states]
    assert response_part(samples[1])[-1] == advantages[-1]


# --- randomness by address ---


def test_trap_6_every_state_has_a_seed_of_its_own() -> None:
    """By run, iteration, problem and prefix; and none is a rollout's, whose outcome would then be in its own value."""
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
    assert len(seeds) == 4 * 4 + 2 * 2 == len(set(seeds))


def test_truth_6_values_do_not_depend_on_the_order_or_the_company_of_states() -> None:
    w = build_world(4)
    monte_carlo = w.monte_carlo(3)
    states = [State(w.problem, w.prompt_ids, state) for state in w.states]
    together, _ = monte_carlo.evaluate(states, 7)
    assert len({value.mean for value in together}) > 20
    backwards, _ = monte_carlo.evaluate(states[::-1], 7)
    assert backwards[::-1] == together
    for state, value in list(zip(states, together, strict=True))[::9]:
        assert monte_carlo.evaluate([state], 7)[0] == [value]
    assert monte_carlo.evaluate(states, 8)[0] != together


# --- what is trained ---


def test_trap_4_eos_is_trained_if_and_only_if_it_was_sampled() -> None:
    """Ended by EOS, by a stop string (no EOS), by the limit (no EOS): the tokens are those of the sampler, no more."""
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
    """The token rows of every training pass, unpadded, as the model itself sees them."""
    passes: list[list[tuple[int, ...]]] = []

    def note(_module: torch.nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            passes.append([tuple(t for t in row if t) for row in kwargs["input_ids"].tolist()])  # 0 is the padding

    handle = learner.policy.model.register_forward_pre_hook(note, with_kwargs=True)
    learner.update(samples, 1, len(samples))
    handle.remove()
    return passes


def no_values(rollouts: Sequence[Rollout]) -> list[list[float]]:
    raise AssertionError("this algorithm has no value network")


def build_learner(critic: ValueNetwork | None = None, **options: Any) -> TorchLearner:
    """A learner with a policy of its own that never moves."""
    config = LearnerConfig(lr=0.0, **options)
    return TorchLearner(fresh_policy(), None, critic, config, None, temperature=1.0, total_updates=10, seed=0)


def test_trap_8_a_short_batch_is_trained_as_it_is() -> None:
    """Five rollouts, two a minibatch: three updates an epoch, each rollout once, nothing dropped, nothing twice."""
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
def test_trap_12_the_denominator_is_the_number_of_response_tokens(micro_batch_tokens: int) -> None:
    """At a ratio of 1 the loss is minus the mean token advantage: 2 * 4.25 - 6 - 22 over 3 * 31 + 40 tokens.

    In every epoch again: a mask that some step writes into would count differently the second time.
    """
    samples, _ = vine_samples([four()], scripted(CONTINUATIONS))
    for epochs in (1, 3):
        learner = build_learner(minibatch_size=4, epochs=epochs, micro_batch_tokens=micro_batch_tokens)
        assert learner.update(samples, 1, len(samples))["policy/loss"] == pytest.approx(19.5 / 133, abs=1e-6)


def test_trap_12_extra_padding_changes_neither_the_loss_nor_its_gradient() -> None:
    samples, _ = vine_samples([four()], scripted(CONTINUATIONS))
    batch = collate(samples)
    found = []
    for extra in (0, 37):
        token_ids, mask, advantages = (
            torch.nn.functional.pad(row, (0, extra)) for row in (batch.token_ids, batch.loss_mask, batch.advantages)
        )
        logprobs, _ = token_logprobs(policy().model, token_ids, mask, temperature=1.0)
        assert len(logprobs) == 133
        loss, _ = clipped_policy_loss(logprobs, logprobs.detach() + 0.1, advantages[mask], 0.2, 0.2)
        gradients = torch.autograd.grad(loss, list(policy().model.parameters()))
        found.append((loss.item(), torch.cat([gradient.reshape(-1) for gradient in gradients])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


# --- credit from other responses ---


def group_with(rewards: Sequence[float]) -> RolloutGroup:
    """Rollouts of 2, 3, 4 ... tokens with these rewards."""
    return RolloutGroup(
        PROBLEM,
        tuple(
            Rollout((5, 6, 7), (8,) * length, (-1.0,) * length, "stop", "", reward)
            for length, reward in enumerate(rewards, start=2)
        ),
    )


def test_group_credit_by_hand() -> None:
    """Every token of a response has the response's number; groups are apart; a group of equals counts as undecided."""
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
    """Against all others of the iteration, whichever problem they answer: 1 - 1/3 and 0 - 2/3."""
    samples, _ = reinforce_credit()([group_with([1, 0]), group_with([1, 0])], 1)
    assert [response_part(s) for s in samples] == [
        pytest.approx([2 / 3] * 2),
        pytest.approx([-2 / 3] * 3),
        pytest.approx([2 / 3] * 2),
        pytest.approx([-2 / 3] * 3),
    ]


@pytest.mark.parametrize("algorithm", BUILT_IN)
def test_every_algorithm_gives_one_sample_per_rollout_in_order(algorithm: str) -> None:
    forms: dict[str, dict[str, Any]] = {
        "vineppo": {"reuse": False, "num_mc_rollouts": K},
        "grpo": {"scale_by_std": False},
    }
    settings = forms.get(algorithm, {})
    values = build_learner(ValueNetwork(policy(), seed=0)).predict_values if algorithm == "ppo" else no_values
    credit = credit_of(algorithm, settings, scripted(CONTINUATIONS), chain(), values)
    group = four()
    samples, _ = credit([group], 1)
    assert [s.token_ids for s in samples] == [r.prompt_ids + r.response_ids for r in group.rollouts]
    for sample in samples:
        assert len({len(sample.token_ids), len(sample.loss_mask), len(sample.advantages)}) == 1
        assert (sample.returns is None) == (sample.values is None) == (algorithm != "ppo")
    ends = [sample.advantages[-1] for sample in samples]
    if algorithm != "ppo":
        assert ends == pytest.approx(
            {
                "vineppo": [0, -0.25, 0, -0.75],
                "grpo": [0.5, -0.5, 0.5, -0.5],
                "rloo": [2 / 3, -2 / 3, 2 / 3, -2 / 3],
                "reinforce": [2 / 3, -2 / 3, 2 / 3, -2 / 3],
            }[algorithm]
        )


# --- PPO ---


def test_ppo_credit_is_reward_minus_value_at_lambda_1() -> None:
    predict_values = build_learner(ValueNetwork(policy(), seed=0)).predict_values
    group = four()
    samples, metrics = credit_of("ppo", {"gae_lambda": 1.0}, scripted({}), chain(), predict_values)([group], 1)
    predicted = predict_values(group.rollouts)
    prompt = len(policy().codec.encode_prompt(PROBLEM.prompt))
    for sample, rollout, values in zip(samples, group.rollouts, predicted, strict=True):
        assert sample.values is not None and sample.returns is not None
        assert sample.values == (0.0,) * prompt + tuple(pytest.approx(v, abs=1e-6) for v in values)
        assert response_part(sample) == pytest.approx([rollout.reward - v for v in values], abs=1e-6)
        assert sample.returns[prompt:] == pytest.approx([rollout.reward] * len(values), abs=1e-6)
        assert sample.returns[:prompt] == (0.0,) * prompt
    flat = [value for values in predicted for value in values]
    assert metrics["value/mean"] == pytest.approx(sum(flat) / 133, abs=1e-6)


def test_a_value_is_of_the_state_before_its_token() -> None:
    """Another t-th token changes the values behind it, and neither its own nor any before it."""
    learner = build_learner(ValueNetwork(policy(), seed=0))
    rollout = four().rollouts[0]
    for t in (0, 5, 29):
        changed = (*rollout.response_ids[:t], ids("9")[0], *rollout.response_ids[t + 1 :])
        one, other = learner.predict_values([rollout, replace(rollout, response_ids=changed)])
        differ = [abs(a - b) > 1e-6 for a, b in zip(one, other, strict=True)]
        assert differ == [False] * (t + 1) + [True] * (31 - t - 1)


def test_predicted_values_do_not_depend_on_micro_batches() -> None:
    critic = ValueNetwork(policy(), seed=0)
    rollouts = four().rollouts
    whole = build_learner(critic, micro_batch_tokens=100_000).predict_values(rollouts)
    assert [len(row) for row in whole] == [31, 31, 31, 40]
    for tokens in (1, 130):
        for a, b in zip(build_learner(critic, micro_batch_tokens=tokens).predict_values(rollouts), whole, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_values_without_a_value_network_are_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match="asks for values of a value network and has none; set needs_critic=True"
    ) as error:
        build_learner().predict_values(four().rollouts)
    assert "\n" not in str(error.value)


def test_explained_variance_by_hand() -> None:
    assert explained_variance([0.0, 1.0], [0, 1]) == 1
    assert explained_variance([0.3, 0.3], [0, 1]) == 0
    assert explained_variance([0.25, 0.75], [0, 1]) == 0.75  # errors -.25 and .25 against a variance of .25
    assert explained_variance([5.0, 6.0], [0, 1]) == 1  # about the mean: a constant offset is not its matter
    assert explained_variance([1.0, 0.0], [0, 1]) == -3
    assert math.isnan(explained_variance([0.1, 0.2], [1, 1]))


# --- problems and groups ---


class Finite(ChainTask):
    """Seven training problems."""

    def size(self, split: Split) -> int | None:
        return 7


def test_a_finite_task_is_drawn_in_shuffled_passes() -> None:
    """Every seven draws in a row, from the first, hold each problem once; the order differs from pass to pass."""
    task = Finite("judgement", 3)
    drawn = [p.id for iteration in range(1, 8) for p in draw_problems(task, seed=3, iteration=iteration, count=4)]
    passes = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(one) == [f"train/{i}" for i in range(7)] for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    again = draw_problems(task, seed=3, iteration=5, count=4)  # an iteration needs no history
    assert [p.id for p in again] == drawn[16:20]
    assert [p.id for p in draw_problems(task, seed=4, iteration=1, count=7)] != passes[0]


def test_an_endless_task_is_drawn_fresh() -> None:
    task = ChainTask("judgement", 6)
    drawn = [p.prompt for iteration in range(1, 9) for p in draw_problems(task, seed=0, iteration=iteration, count=8)]
    assert len(set(drawn)) == 64


def test_a_prompt_without_room_for_its_response_is_refused_with_the_numbers() -> None:
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
