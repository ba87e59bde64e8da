"""The guards stop a run whose sampler and trainer disagree, and the watch warns about signs of other faults."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dev import faults
from tests.helpers import small_config, weights_hash
from vineppo.config.schema import (
    GuardConfig,
    KLConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    SamplerConfig,
)
from vineppo.config.settings import replace as changed
from vineppo.model.logits import entropies_of, logprob_variances
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.sampling.version import CurrentSampler, RepeatedSeeds
from vineppo.training.guards import Guards, SamplerFault
from vineppo.training.loop import resume, train
from vineppo.training.parts import Parts, build_parts
from vineppo.training.probe import agreement, repeated
from vineppo.training.progress import Progress, metrics_line
from vineppo.training.rollouts import draw_problems
from vineppo.training.watch import Watch
from vineppo.types import (
    Completion,
    Problem,
    Rollout,
    RolloutGroup,
    SampleRequest,
    StepCredit,
    TrainingSample,
    TrainingWarning,
)

QUIET: dict[str, Any] = {
    "reward/mean": 0.5,
    "reward/std": 0.5,
    "response/truncated_share": 0.0,
    "response/length_mean": 20.0,
    "credit/advantage_abs_mean": 0.3,
    "policy/entropy": 0.4,
    "policy/kl_old": 0.01,
    "policy/lr": 1e-4,
    "policy/grad_norm": 1.0,
    "kl/ref": 0.2,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return build_parts(small_config(tmp_path_factory.mktemp("parts"), "grpo"))


def guards_of(parts: Parts, **settings: Any) -> Guards:
    return Guards(parts, GuardConfig(**settings), run_seed=0, temperature=1.0, max_new_tokens=40)


def groups_of(parts: Parts, iteration: int = 1) -> list[RolloutGroup]:
    return parts.sample(draw_problems(parts.task, 0, iteration, 4), iteration)[0]


def with_first(groups: Sequence[RolloutGroup], rollout: Rollout) -> list[RolloutGroup]:
    """Return the groups with another first rollout."""
    first = replace(groups[0], rollouts=(rollout, *groups[0].rollouts[1:]))
    return [first, *groups[1:]]


# --- the distribution of the sampled tokens


def test_entropy_and_variance_of_a_known_distribution() -> None:
    # Log-probabilities of 1/2, 1/4 and 1/4: entropy 1.5 bits, and a variance of 1/4 bit^2.
    distribution = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]]).log()
    entropies = entropies_of(distribution)
    assert entropies.tolist() == pytest.approx([1.5 * math.log(2), 0.0])
    assert logprob_variances(distribution, entropies).tolist() == pytest.approx([0.25 * math.log(2) ** 2, 0.0])


def requests_of(parts: Parts, temperature: float = 1.0, samples: int = 64) -> list[SampleRequest]:
    problems = draw_problems(parts.task, 3, 1, 4)
    ids = [parts.codec.prompt_ids(problem) for problem in problems]
    return [SampleRequest(row, samples, 40, seed=i, temperature=temperature) for i, row in enumerate(ids)]


def test_the_excess_is_0_for_the_policy_and_not_for_another_temperature(parts: Parts) -> None:
    def excess(temperature: float) -> tuple[float, float, float]:
        requests = requests_of(parts, temperature)
        pairs = [
            (r, c) for r, group in zip(requests, parts.sampler.sampler.sample(requests), strict=True) for c in group
        ]
        found = agreement(parts, pairs)
        assert found.tokens == sum(len(c.token_ids) for _, c in pairs)
        return found.excess / found.tokens, math.sqrt(found.variance) / found.tokens, found.gap

    mean, error, gap = excess(1.0)
    assert abs(mean) < 3 * error and error < 0.01 and gap < 1e-4
    mean, error, gap = excess(0.7)
    assert mean > 6 * error and mean > 0.02 and gap > 0.1


def test_the_excess_is_computed_from_all_tokens(parts: Parts) -> None:
    """Compare with sums over the vocabulary, one token at a time, in float64."""
    request = requests_of(parts, samples=1)[0]
    (completion,) = parts.sampler.sampler.sample([request])[0]
    found = agreement(parts, [(request, completion)])
    ids = torch.tensor([request.prompt_ids + completion.token_ids])
    with torch.no_grad():
        rows = parts.policy.model(ids).logits[0].double().log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
    entropy = -(rows.exp() * rows).sum(-1)
    logprobs = torch.stack([row[token] for row, token in zip(rows, completion.token_ids, strict=True)])
    assert found.excess == pytest.approx(float((logprobs + entropy).sum()), abs=1e-4)
    variance = (rows.exp() * rows**2).sum(-1) - entropy**2
    assert found.variance == pytest.approx(float(variance.sum()), rel=1e-4)


def test_excluded_tokens_are_renormalized(parts: Parts) -> None:
    request = replace(requests_of(parts, samples=16)[0], max_new_tokens=3)
    (first,) = parts.sampler.sampler.sample([replace(request, num_samples=1)])[0]
    excluding = replace(request, excluded_first=first.token_ids[:1])
    completions = parts.sampler.sampler.sample([excluding])[0]
    assert all(c.token_ids[0] != first.token_ids[0] for c in completions)
    found = agreement(parts, [(excluding, c) for c in completions])
    assert found.gap < 1e-4 and found.tokens == 0
    # Without the renormalization the probabilities would be far off.
    assert agreement(parts, [(request, c) for c in completions]).gap > 1


def test_repeated_completions_are_counted_against_their_probability() -> None:
    a, b = Completion((1, 2), (-0.5, -0.5), "stop"), Completion((1,), (-3.0,), "stop")
    count, expected = repeated([[a, a, b, b], [b], [a, b]])
    assert count == 2
    assert expected == pytest.approx(2 * math.exp(-1) + math.exp(-3) + math.exp(-1))


# --- the bounds


@pytest.mark.parametrize(
    ("dtype", "temperature", "setting", "bound"),
    [
        ("float32", 1.0, None, 0.01),
        ("float32", 0.5, None, 0.02),
        ("float32", 2.0, None, 0.01),
        ("bfloat16", 1.0, None, 5.0),
        ("bfloat16", 0.5, 3.0, 3.0),
    ],
)
def test_the_bound_of_the_gap(
    tmp_path: Path, dtype: Any, temperature: float, setting: float | None, bound: float
) -> None:
    model = ModelConfig(path="embedded:judgement", dtype=dtype)
    parts = build_parts(small_config(tmp_path, "grpo", model=model))
    guards = Guards(parts, GuardConfig(max_logprob_gap=setting), 0, temperature, 40)
    assert guards.max_gap == bound


def test_a_gap_stops_before_the_first_update(parts: Parts) -> None:
    check = guards_of(parts).before_update([], [], 7)
    check({"policy/sampler_logprob_gap": 0.01})
    with pytest.raises(
        SamplerFault, match=r"^iteration 7: the sampler's .* log-probability of a token differ by 0.0101; allowed: 0.01"
    ):
        check({"policy/sampler_logprob_gap": 0.0101})
    with pytest.raises(SamplerFault, match="differ by nan"):
        check({"policy/sampler_logprob_gap": math.nan})


def test_an_excess_must_be_large_and_significant(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = groups_of(parts)
    samples = parts.credit(groups, 1)[0]
    tokens = sum(len(r.response_ids) for group in groups for r in group.rollouts)

    def check(excess: float, error: float, chosen: Sequence[TrainingSample] = samples) -> None:
        check = guards_of(parts).before_update(groups, chosen, 1)
        check({"policy/logprob_excess": excess, "policy/logprob_excess_error": error})

    assert sum(sum(sample.loss_mask) for sample in samples) == tokens
    check(0.019, 0.001)  # significant, but it can be rounding
    check(0.5, 0.1)  # large, but it can be chance
    check(0.5, 0.01, samples[1:])  # an algorithm that chooses among its rollouts changes the distribution
    with pytest.raises(SamplerFault, match=r"too likely under the policy: .* is \+0.500 nats .*, 50 standard errors"):
        check(0.5, 0.01)
    with pytest.raises(SamplerFault, match="too unlikely"):
        check(-0.5, 0.01)
    large = guards_of(parts, max_logprob_excess=0.6).before_update(groups, samples, 1)
    large({"policy/logprob_excess": 0.5, "policy/logprob_excess_error": 0.01})
    # The learner leaves truncated responses out of the excess, so it is that of a choice of the responses.
    monkeypatch.setattr(parts.learner, "config", changed(parts.learner.config, mask_truncated=True))
    check(0.5, 0.01)


def test_the_excess_accumulates_over_iterations(parts: Parts) -> None:
    groups = groups_of(parts)
    samples = parts.credit(groups, 1)[0]
    guards = guards_of(parts)
    metrics = {"policy/logprob_excess": 0.1, "policy/logprob_excess_error": 0.03}
    for iteration in range(1, 4):  # 3.3, 4.7 and 5.8 standard errors
        guards.before_update(groups, samples, iteration)(metrics)
    with pytest.raises(SamplerFault, match=r"iteration 4.* 7 standard errors"):
        guards.before_update(groups, samples, 4)(metrics)


def test_an_error_of_the_check_leaves_the_weights(parts: Parts) -> None:
    before = [p.detach().clone() for p in parts.policy.model.parameters()]
    samples = parts.credit(groups_of(parts), 1)[0]

    def refuse(metrics: Any) -> None:
        assert metrics["policy/sampler_logprob_gap"] < 1e-4
        raise SamplerFault("no")

    with pytest.raises(SamplerFault):
        parts.learner.update(samples, 1, 16, refuse)
    assert all(torch.equal(a, b) for a, b in zip(before, parts.policy.model.parameters(), strict=True))
    assert parts.learner.updates == 0


# --- rollouts


def test_incomplete_rollouts_are_refused(parts: Parts) -> None:
    groups = groups_of(parts)
    guards = guards_of(parts)
    guards.check_rollouts(groups, 1)
    rollout = next(r for group in groups for r in group.rollouts if r.finish_reason == "stop")
    ids, logprobs = rollout.response_ids, rollout.sampler_logprobs
    for wrong, message in [
        (replace(rollout, sampler_logprobs=logprobs[1:]), f"has {len(ids)} tokens and {len(ids) - 1} log-prob"),
        (replace(rollout, response_ids=(), sampler_logprobs=()), "has 0 tokens"),
        (replace(rollout, response_ids=(10**6, *ids[1:])), "has token id 1000000; the model's vocabulary has"),
        (
            replace(rollout, sampler_logprobs=(math.nan, *logprobs[1:])),
            "has a log-probability of nan; allowed: finite numbers up to 0",
        ),
        (replace(rollout, sampler_logprobs=(0.5, *logprobs[1:])), "has a log-probability of 0.5"),
        (replace(rollout, response_ids=ids[:-1], sampler_logprobs=logprobs[:-1]), "finish reason stop, but it ends"),
    ]:
        with pytest.raises(SamplerFault, match=message):
            guards.check_rollouts(with_first(groups, wrong), 1)


def test_a_stop_string_may_end_a_response(parts: Parts) -> None:
    groups = groups_of(parts)
    rollout = next(r for group in groups for r in group.rollouts if r.finish_reason == "stop")
    cut = replace(rollout, response_ids=rollout.response_ids[:-1], sampler_logprobs=rollout.sampler_logprobs[:-1])
    guards = Guards(replace(parts, stop=(rollout.text[-4:],)), GuardConfig(), 0, 1.0, 40)
    guards.check_rollouts(with_first(groups, cut), 1)


# --- seeds


def test_seeds_are_used_once(parts: Parts) -> None:
    updates = 0
    engine = TorchSampler(parts.policy)
    sampler = CurrentSampler(engine, lambda: updates)
    request = SampleRequest(parts.codec.encode_prompt("a=1+1"), 2, 1, seed=5)
    sampler.sample([request, replace(request, first_sample=2)])
    sampler.sample([request])  # the same weights give the same completions again
    with pytest.raises(RepeatedSeeds, match="two requests of one call have the same seed"):
        sampler.sample([request, request])
    greedy = replace(request, temperature=0.0)
    sampler.sample([greedy, greedy])
    updates = 3
    sampler.update_weights(3, lambda: [])
    with pytest.raises(RepeatedSeeds, match="the same seed as a request before update 1"):
        sampler.sample([request])
    sampler.sample([replace(request, seed=6)])
    updates = 100  # seeds of so long ago are forgotten
    sampler.update_weights(100, lambda: [])
    sampler.sample([replace(request, seed=7)])
    sampler.sample([request])


# --- whole runs with faults


def run_with(fault: str, tmp_path: Path, **sections: Any) -> list[str]:
    """Train with a fault of dev/faults.py, and return the warnings."""
    # The faults replace functions of the PyTorch sampler.
    config = small_config(tmp_path / "run", "grpo", sampler=SamplerConfig(engine="torch"), **sections)
    with faults.FAULTS[fault].patches(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = train(config)
    found: list[str] = summary["warnings"]
    return found


FAST = LearnerConfig(lr=3e-3, minibatch_size=8, epochs=1, advantage_scaling="std")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stale weights", "iteration 2: the sampler's and the trainer's log-probability of a token differ by"),
        ("temperature", "the probe before iteration 1: the sampler's and the trainer's log-probability"),
        ("same random numbers", "iteration 1: .* responses repeat another response"),
        ("last token missing", "finish reason stop, but it ends neither with an end-of-sequence token"),
        ("shifted mask", "iteration 1: the sampler's and the trainer's log-probability"),
        ("seeds without iteration", "the same seed as a request before update 1"),
    ],
)
def test_faults_that_stop_the_run(tmp_path: Path, fault: str, message: str) -> None:
    with pytest.raises((SamplerFault, RepeatedSeeds), match=message):
        run_with(fault, tmp_path, learner=FAST)


def test_missing_adapters_stop_the_run(tmp_path: Path) -> None:
    model = ModelConfig(path="embedded:judgement", lora=LoraConfig(r=4))
    with pytest.raises(SamplerFault, match="iteration 2: the sampler's and the trainer's log-probability"):
        run_with("adapters missing", tmp_path, model=model, learner=changed(FAST, lr=3e-2))


@pytest.mark.parametrize(("dtype", "lr"), [("float32", 3e-3), ("bfloat16", 1e-3)])
def test_a_reference_that_is_trained_stops_the_run(
    tmp_path: Path, dtype: Literal["float32", "bfloat16"], lr: float
) -> None:
    """The change in bfloat16 is 0.23 nats, above the bound of 0.1 and below a tenth of the bound of the gap."""
    learner = changed(FAST, lr=lr, kl=KLConfig(coefficient=0.01))
    model = ModelConfig(path="embedded:judgement", dtype=dtype)
    with pytest.raises(SamplerFault, match="the probe before iteration 3 found that the reference model has changed"):
        run_with("shared reference", tmp_path, learner=learner, guards=GuardConfig(probe_every=2), model=model)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("optimizer without effect", "iteration 2: the updates do not change the policy"),
        ("advantages negated", "iteration 1: the update made tokens with positive advantages less likely"),
        ("reward always 0", "iteration 3: all rewards of the last 3 iterations are 0"),
    ],
)
def test_faults_that_give_a_warning(tmp_path: Path, fault: str, message: str) -> None:
    found = run_with(fault, tmp_path, learner=changed(FAST, lr=3e-4), guards=GuardConfig(probe_every=1))
    assert [text for text in found if message in text], found


def test_warnings_are_given_once_and_are_in_the_summary(tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run", "grpo", rollouts=RolloutConfig(num_problems=4, group_size=4, max_new_tokens=4)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = train(config)
    texts = [str(w.message) for w in caught if issubclass(w.category, TrainingWarning)]
    assert texts[0].startswith("iteration 1: all responses reached rollouts.max_new_tokens (4) without an end; raise")
    assert texts == summary["warnings"] and len(set(texts)) == len(texts)
    assert json.loads((tmp_path / "run/summary.json").read_text())["warnings"] == texts


def test_the_probe_changes_no_result_and_has_no_false_alarm(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, every in (("with", 1), ("without", 0)):
            train(small_config(tmp_path / name, "vineppo", guards=GuardConfig(probe_every=every)))
    assert weights_hash(tmp_path / "with/final") == weights_hash(tmp_path / "without/final")
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("with", "without")]
    tokens = [json.loads(line)["tokens/generated"] for line in lines]
    assert tokens[0] == tokens[1]


@pytest.mark.filterwarnings("ignore::vineppo.types.TrainingWarning")
def test_a_run_that_was_stopped_by_a_guard_can_be_resumed(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", "grpo", learner=FAST, sampler=SamplerConfig(engine="torch"))
    with faults.FAULTS["stale weights"].patches(), pytest.raises(SamplerFault):
        train(config)
    train(changed(config, run=changed(config.run, dir=str(tmp_path / "whole"))))
    assert resume(config)["iterations"] == 4
    assert weights_hash(tmp_path / "run/final") == weights_hash(tmp_path / "whole/final")


# --- signs in the metrics


def watched(
    parts: Parts, lines: Sequence[dict[str, Any]], groups: Sequence[RolloutGroup] = (), **facts: Any
) -> dict[str, str]:
    """Return the warnings about lines of metrics, by name."""
    watch = Watch(guards_of(parts), 40)
    for name, value in facts.items():
        setattr(watch.guards, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, line in enumerate(lines, start=1):
            watch.after_iteration({**QUIET, "iteration": i, **line}, groups, [])
    return watch.given


def test_a_quiet_run_has_no_sign(parts: Parts) -> None:
    rewards = np.linspace(0.2, 0.9, 40)
    assert watched(parts, [{"reward/mean": reward, "policy/entropy": 0.5 - reward / 2} for reward in rewards]) == {}


@pytest.mark.parametrize(
    ("name", "first", "lines"),
    [
        ("truncated", 1, [{"response/truncated_share": 1.0}]),
        ("no reward", 1, [{"reward/mean": None, "reward/std": None}]),
        ("equal rewards", 3, [{"reward/std": 0.0}] * 3),
        ("no signal", 3, [{"credit/advantage_abs_mean": 0.0}] * 3),
        ("entropy", 4, [{}] + [{"policy/entropy": 1.31}] * 3),
        ("step", 1, [{"policy/kl_old": 0.51}]),
        ("reference", 1, [{"kl/ref": 20.1}]),
        ("critic", 11, [{"value/explained_variance": -0.06}] * 11),
    ],
)
def test_signs_of_metrics(parts: Parts, name: str, first: int, lines: list[dict[str, Any]]) -> None:
    found = watched(parts, lines)
    assert list(found) == [name]
    assert found[name].startswith(f"iteration {first}: ")
    assert watched(parts, lines[:-1]) == {}


def test_values_at_the_bounds_are_no_signs(parts: Parts) -> None:
    at_bounds = {"policy/entropy": 1.3, "policy/kl_old": 0.5, "kl/ref": 20.0, "response/truncated_share": 0.99}
    assert watched(parts, [{}] + [at_bounds] * 12) == {}
    assert watched(parts, [{"value/explained_variance": -0.04 if i % 5 == 0 else -1.0} for i in range(20)]) == {}
    assert watched(parts, [{"value/explained_variance": None}] * 12) == {}
    # The first iterations of a correct run of PPO, whose value network then predicts about a constant.
    first = [-10.6, -1.1, -0.34, -0.1, -0.1, -0.11, -0.02, -0.04, -0.02, *[-0.01] * 11]
    assert watched(parts, [{"value/explained_variance": value} for value in first]) == {}


@pytest.mark.parametrize(("reward", "std"), [((0.1, 0.1), 0.0), ((0.7, 0.7), 0.0), ((0.0, 1.0), 0.5)])
def test_the_deviation_of_equal_rewards_is_exactly_0(reward: tuple[float, float], std: float) -> None:
    rollouts = tuple(Rollout((1,), (2,), (-1.0,), "stop", "", reward[i % 2]) for i in range(24))
    line = metrics_line(Progress(), [RolloutGroup(Problem("", ""), rollouts)], {}, {})
    assert line["reward/std"] == std and line["reward/mean"] == pytest.approx(sum(reward) / 2)


def test_iterations_without_a_reward_have_one_sign(parts: Parts) -> None:
    """Case 3."""
    line = {"reward/mean": None, "reward/std": None, "credit/advantage_abs_mean": 0.0}
    found = watched(parts, [line] * 12)
    assert found == {
        "no reward": "iteration 1: every reward function returned None for all rollouts, so their advantages are 0; if "
        "this happens often, raise rollouts.num_problems, or remove the problems without a reward from the data"
    }


def test_a_falling_reward_is_compared_with_its_noise(parts: Parts) -> None:
    groups = [RolloutGroup(Problem(str(i), ""), ()) for i in range(32)]
    # Five iterations of 32 problems with a standard deviation of 0.5: the error of a difference is 0.5 * sqrt(2 / 160).
    error = 0.5 * math.sqrt(2 / 160)
    falling = [0.6] * 5 + [0.6 - 5.1 * error] * 5
    lines = [{"reward/mean": reward} for reward in falling]
    assert list(watched(parts, lines, groups)) == ["reward"]
    assert watched(parts, [{"reward/mean": 0.6}] * 5 + [{"reward/mean": 0.6 - 4.9 * error}] * 5, groups) == {}


def test_other_temperatures_are_a_sign(parts: Parts) -> None:
    found = watched(parts, [{}], other_temperatures={0.3})
    assert "continuations were sampled at temperature 0.3, but the rollouts at 1" in found["temperature"]


def test_the_direction_of_the_update(parts: Parts) -> None:
    assert watched(parts, [{}], direction=-0.04) == {}
    assert list(watched(parts, [{}], direction=-0.06)) == ["direction"]


def test_values_that_differ_from_the_rewards_are_a_sign(parts: Parts) -> None:
    def after(shift: float) -> dict[str, str]:
        watch, rng = Watch(guards_of(parts), 40), np.random.default_rng(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in range(1, 21):
                groups, samples = [], []
                for j in range(16):
                    reward = float(rng.random() < 0.5)
                    rollout = Rollout((1,), (2,), (-1.0,), "stop", "", reward)
                    credit = StepCredit((1,), (0.5 + shift,), (9,), (0.0,))
                    groups.append(RolloutGroup(Problem(str(j), ""), (rollout,)))
                    samples.append(
                        TrainingSample((1, 2), (0, 1), (0.0, -1.0), (0.0, 0.0), credit=credit, rollout=rollout)
                    )
                watch.after_iteration({**QUIET, "iteration": i}, groups, samples)
        return watch.given

    assert after(0.0) == {}
    assert "differ from the mean reward by +0.2" in after(0.2)["values"]


def test_values_that_are_wrong_by_a_constant_are_a_sign(parts: Parts) -> None:
    """By rounding, the variance of 30 errors of 0.1 is below 0."""
    watch = Watch(guards_of(parts), 40)
    assert sum([0.1**2] * 30) - 30 * (sum([0.1] * 30) / 30) ** 2 < 0
    watch.value_errors.add(sum([0.1] * 30), sum([0.1**2] * 30), 30)
    assert "differ from the mean reward by +0.100 on average over 30 groups" in watch._values()
