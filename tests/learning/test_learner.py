"""The learner: its updates follow the equations for any batch layout. Also tests of seeds and random numbers."""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vineppo.config.schema import CriticConfig, KLConfig, LearnerConfig
from vineppo.learning.learner import TorchLearner
from vineppo.learning.losses import kl_estimate
from vineppo.learning.optim import lr_factor
from vineppo.learning.scaling import penalty_to_go
from vineppo.learning.scores import Savings
from vineppo.model.batch import collate, micro_batches
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy, Reference
from vineppo.model.tiny import build_tokenizer
from vineppo.seeds import derive_seed, seeds_of_prefixes, stream_keys, uniforms
from vineppo.types import Alternative, Metrics, TrainingSample, UserError

TOKENIZER = build_tokenizer()
TEMPERATURE = 0.7
NONE = Savings(packed=False, first_forward=False, chunked=False)


def build_policy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    """Build a random two-layer Llama of width 32."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    return Policy(model, Codec.for_model(model, TOKENIZER))


def build_samples(
    lengths: list[tuple[int, int]], seed: int = 0, advantage: float | None = None
) -> list[TrainingSample]:
    """Build random samples of (prompt, response) tokens, with random advantages, returns and old values per token."""
    rng = np.random.default_rng(seed)
    samples = []
    for prompt, response in lengths:
        zeros = (0.0,) * prompt
        advantages = rng.normal(size=response) if advantage is None else np.full(response, advantage)
        samples.append(
            TrainingSample(
                token_ids=tuple(rng.integers(3, len(TOKENIZER), prompt + response).tolist()),
                loss_mask=(0,) * prompt + (1,) * response,
                sampler_logprobs=zeros + (-1.0,) * response,
                advantages=(*zeros, *advantages.tolist()),
                returns=(*zeros, *rng.random(response).tolist()),
                values=(*zeros, *rng.random(response).tolist()),
            )
        )
    return samples


RAGGED = [(3, 5), (7, 12), (2, 1), (5, 20), (4, 9), (6, 3), (3, 17), (2, 8)]
TWO = [(3, 2), (4, 5)]


def build_learner(
    policy: Policy, reference: Policy | None = None, critic: ValueNetwork | None = None, **options: Any
) -> TorchLearner:
    """Build a learner; by default one epoch with a single minibatch."""
    ppo = options.pop("ppo", CriticConfig(value_lr=1e-3))
    total_updates, savings = options.pop("total_updates", 100), options.pop("savings", Savings())
    config = LearnerConfig(**{"lr": 1e-3, "epochs": 1, "minibatch_size": 100, **options})
    return TorchLearner(
        policy,
        Reference(reference) if reference else None,
        critic,
        config,
        ppo,
        temperature=TEMPERATURE,
        total_updates=total_updates,
        seed=0,
        savings=savings,
    )


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()]).clone()


def logprobs_of(policy: Policy, samples: list[TrainingSample]) -> list[torch.Tensor]:
    """Compute the log-probabilities of each sample's response tokens with gradient, one sequence at a time."""
    out = []
    for sample in samples:
        logits = policy.model(torch.tensor([sample.token_ids])).logits[0].float() / TEMPERATURE
        begin = sample.loss_mask.index(1)
        distribution = logits.log_softmax(-1)[begin - 1 : -1]
        out.append(distribution.gather(1, torch.tensor(sample.token_ids[begin:])[:, None]).squeeze(1))
    return out


def after_prompt(prompt: int, row: torch.Tensor) -> tuple[float, ...]:
    return (0.0,) * prompt + tuple(row.tolist())


def response(row: tuple[float, ...] | None, sample: TrainingSample) -> torch.Tensor:
    assert row is not None
    return torch.tensor(row[sample.loss_mask.index(1) :])


def gradient_norm(loss: torch.Tensor, module: torch.nn.Module) -> float:
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return float(torch.cat([g.reshape(-1) for g in gradients]).norm())


def train(
    samples: list[TrainingSample], iterations: int = 1, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Train with all terms of the objective; returns the final weights of policy and critic, and the last metrics.

    The training is in float64, because Adam divides by the size of the gradient: if a gradient is nearly 0, rounding
    errors determine the direction of a whole step, and in float32 this would look like a mistake.
    """
    policy = build_policy(dtype=torch.float64)
    reference, critic = build_policy(seed=1, dtype=torch.float64), ValueNetwork(policy, seed=0)
    options = {"kl": KLConfig(coefficient=0.01), "entropy_coefficient": 0.01, "advantage_scaling": "whiten", **options}
    learner = build_learner(policy, reference, critic, **options)
    for iteration in range(1, 1 + iterations):
        metrics = learner.update(samples, iteration, len(samples))
    return weights(policy.model), weights(critic), metrics


def assert_same(a: tuple[torch.Tensor, torch.Tensor, Metrics], b: tuple[torch.Tensor, torch.Tensor, Metrics]) -> None:
    assert torch.allclose(a[0], b[0], rtol=0, atol=1e-6)
    assert torch.allclose(a[1], b[1], rtol=0, atol=1e-6)
    assert a[2] == pytest.approx(b[2], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("minibatch_size", [3, 100])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_truth_3_and_trap_7_micro_batches_change_nothing(minibatch_size: int, place: str) -> None:
    kl = KLConfig(coefficient=0.01, place=place)
    options: dict[str, Any] = {"epochs": 2, "minibatch_size": minibatch_size, "kl": kl}
    whole = train(build_samples(RAGGED), micro_batch_tokens=100_000, **options)
    for micro_batch_tokens in (1, 60, 300):
        assert_same(train(build_samples(RAGGED), micro_batch_tokens=micro_batch_tokens, **options), whole)
    # The updates changed the weights by much more than the tolerance.
    assert (whole[0] - weights(build_policy().model)).abs().max() > 1e-4


def test_truth_3_the_order_of_samples_changes_nothing() -> None:
    samples = build_samples(RAGGED)
    whole = train(samples, epochs=2)
    assert_same(train(samples[::-1], epochs=2), whole)
    assert_same(train(samples[3:] + samples[:3], epochs=2, micro_batch_tokens=60), whole)


def test_truth_3_padding_changes_nothing() -> None:
    # A long sample with an empty mask trains no token. It only adds padding to the others.
    samples = build_samples(RAGGED)
    zeros = (0.0,) * 60
    padding = TrainingSample((5,) * 60, (0,) * 60, zeros, zeros, returns=zeros, values=zeros)
    kl = KLConfig(coefficient=0.01, reduction="token_mean")
    plain = train(samples, kl=kl)
    padded = train([*samples, padding], kl=kl)
    # kl/ref is a mean over one more rollout. All other metrics are the same.
    padded[2]["kl/ref"] *= (len(samples) + 1) / len(samples)
    assert_same(padded, plain)


def test_micro_batches_contain_every_index_once_and_respect_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    for budget in (1, 60, 300, 10**6):
        groups = micro_batches(lengths, budget)
        assert sorted(itertools.chain(*groups)) == list(range(200))
        for group in groups:
            assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    assert len(micro_batches(lengths, 10**6)) == 1


def test_loss_is_the_mean_over_the_tokens_of_the_minibatch() -> None:
    samples = build_samples(TWO)
    samples[0] = replace(samples[0], advantages=(0.0,) * 3 + (1.0, 3.0))
    samples[1] = replace(samples[1], advantages=(0.0,) * 4 + (-1.0, -1.0, 0.0, 0.5, -2.0))
    for micro_batch_tokens in (1, 100):
        policy = build_policy(dtype=torch.float64)
        by_hand = copy.deepcopy(policy.model)
        metrics = build_learner(policy, micro_batch_tokens=micro_batch_tokens).update(samples, 1, len(samples))
        # The ratio is 1 before the first update, so the loss is minus the mean advantage of 2 + 5 tokens, 0.5 / 7. The
        # mean of the means of the two sequences would be (2 - 0.7) / 2.
        assert metrics["policy/loss"] == pytest.approx(-0.5 / 7, abs=1e-6)
        assert metrics["credit/advantage_abs_mean"] == pytest.approx(8.5 / 7)

        optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0)
        rows = logprobs_of(Policy(by_hand, policy.codec), samples)
        loss = -sum((response(s.advantages, s) * row).sum() for s, row in zip(samples, rows, strict=True)) / 7
        loss.backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        assert metrics["policy/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert torch.allclose(weights(policy.model), weights(by_hand), rtol=0, atol=1e-6)


def test_trap_7_advantages_are_scaled_over_the_iteration() -> None:
    samples = build_samples(TWO)
    rows = [response(s.advantages, s).double() for s in samples]
    flat = torch.cat(rows)
    for scaling, shift in (("whiten", flat.mean()), ("std", 0.0)):
        # With minibatches of one response and learning rate 0, each loss is minus the mean of the scaled advantages.
        policy = build_policy()
        learner = build_learner(policy, minibatch_size=1, advantage_scaling=scaling, lr=0.0)
        expected = -sum(float(((row - shift) / flat.std(correction=0)).mean()) for row in rows) / 2
        assert learner.update(samples, 1, len(samples))["policy/loss"] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 0.01


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize(("reduction", "count"), [("sequence_sum", 2), ("token_mean", 7)])
def test_kl_in_the_loss(estimator: str, reduction: str, count: int) -> None:
    samples = build_samples(TWO, advantage=0.0)
    policy, reference = build_policy(), build_policy(seed=1)
    rows = zip(logprobs_of(policy, samples), logprobs_of(reference, samples), strict=True)
    d = torch.cat([a - b.detach() for a, b in rows])  # (7,)
    penalty = (d**2 / 2 if estimator == "k2" else torch.exp(-d) - 1 + d).clamp(max=2.0)
    assert (penalty == 2.0).any()
    norm = gradient_norm(0.3 * penalty.sum() / count, policy.model)
    kl = KLConfig(coefficient=0.3, estimator=estimator, reduction=reduction, clamp=2.0)
    metrics = build_learner(policy, reference, kl=kl, micro_batch_tokens=1).update(samples, 1, len(samples))
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["kl/ref"] == pytest.approx(penalty.sum().item() / 2, rel=1e-4)
    assert metrics["policy/loss"] == 0


def test_importance_weighted_kl_in_the_loss() -> None:
    """On-policy the ratios are 1 and change only the gradient: that of k3 becomes d times the gradient of logprob."""
    samples = build_samples(TWO, advantage=0.0)
    policy, reference = build_policy(), build_policy(seed=1)
    new, ref = torch.cat(logprobs_of(policy, samples)), torch.cat(logprobs_of(reference, samples)).detach()
    norm = gradient_norm(0.3 * ((new - ref).detach() * new).sum() / 7, policy.model)
    value = 0.3 * (torch.exp(ref - new) - 1 + new - ref).sum().item() / 7
    kl = KLConfig(coefficient=0.3, reduction="token_mean", clamp=100.0, importance_weighted=True)
    metrics = build_learner(policy, reference, kl=kl, micro_batch_tokens=1).update(samples, 1, len(samples))
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["policy/objective"] == pytest.approx(value, rel=1e-4) and metrics["policy/loss"] == 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_reward_is_a_penalty_to_go(estimator: str) -> None:
    samples = build_samples(TWO)
    policy, reference = build_policy(), build_policy(seed=1)
    logprobs, ref_logprobs = logprobs_of(policy, samples), logprobs_of(reference, samples)
    credited = []
    for sample, row, ref in zip(samples, logprobs, ref_logprobs, strict=True):
        penalties = kl_estimate(row.detach(), ref.detach(), estimator, 10.0)
        # The credit of a token contains its own penalty and all later ones.
        to_go = torch.stack([penalties[t:].sum() for t in range(len(penalties))])
        credited.append(response(sample.advantages, sample) - 0.3 * to_go)
    loss = -sum((a * row).sum() for a, row in zip(credited, logprobs, strict=True)) / 7
    assert isinstance(loss, torch.Tensor)
    norm = gradient_norm(loss, policy.model)
    kl = KLConfig(coefficient=0.3, estimator=estimator, place="reward")
    metrics = build_learner(policy, reference, kl=kl).update(samples, 1, len(samples))
    assert metrics["policy/loss"] == pytest.approx(-float(torch.cat(credited).mean()), rel=1e-4)
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert penalty_to_go([1.0, -2.0, 4.0]) == [3.0, 2.0, 4.0]


def test_entropy_bonus_raises_the_entropy() -> None:
    samples = build_samples(RAGGED, advantage=0.0)
    policy = build_policy()
    learner = build_learner(policy, entropy_coefficient=0.1)
    entropies = [learner.update(samples, i, len(samples))["policy/entropy"] for i in range(1, 7)]
    assert all(after > before for before, after in itertools.pairwise(entropies))
    assert entropies[-1] > entropies[0] + 0.01
    assert entropies[-1] < math.log(len(TOKENIZER))


def test_entropy_is_computed_at_the_sampling_temperature() -> None:
    samples = build_samples(TWO)
    policy = build_policy()
    sums, count = 0.0, 0
    for sample in samples:
        logits = policy.model(torch.tensor([sample.token_ids])).logits[0, sample.loss_mask.index(1) - 1 : -1]
        entropies = torch.distributions.Categorical(logits=logits / TEMPERATURE).entropy()
        sums, count = sums + entropies.sum().item(), count + len(entropies)
    assert build_learner(policy).update(samples, 1, len(samples))["policy/entropy"] == pytest.approx(
        sums / count, rel=1e-5
    )


def test_advantages_of_zero_change_no_weights() -> None:
    policy = build_policy()
    before = weights(policy.model)
    metrics = build_learner(policy, epochs=3).update(build_samples(RAGGED, advantage=0.0), 1, len(RAGGED))
    assert torch.equal(weights(policy.model), before)
    assert metrics["policy/grad_norm"] == 0
    assert metrics["updates"] == 3


def test_at_the_first_update_the_ratio_is_one() -> None:
    # The sampler's log-probabilities of these samples are wrong; the ratio uses those of the trainer.
    policy = build_policy()
    metrics = build_learner(policy, micro_batch_tokens=60).update(build_samples(RAGGED), 1, len(RAGGED))
    assert metrics["policy/clip_share"] == 0
    assert metrics["policy/kl_old"] == pytest.approx(0, abs=1e-9)
    later = build_learner(policy, epochs=4, lr=1e-2).update(build_samples(RAGGED), 1, len(RAGGED))
    assert later["policy/clip_share"] > 0.01
    assert later["policy/kl_old"] > 1e-4


def test_advantages_change_probabilities_in_their_direction() -> None:
    samples = build_samples(TWO)
    signs = [torch.ones(2), -torch.ones(5)]
    samples = [
        replace(s, advantages=after_prompt(s.loss_mask.index(1), sign)) for s, sign in zip(samples, signs, strict=True)
    ]
    policy = build_policy()
    before = [row.sum().item() for row in logprobs_of(policy, samples)]
    build_learner(policy, epochs=3).update(samples, 1, len(samples))
    after = [row.sum().item() for row in logprobs_of(policy, samples)]
    assert after[0] > before[0] + 0.01
    assert after[1] < before[1] - 0.01


def test_sampler_logprob_gap_is_the_largest_difference_of_a_token() -> None:
    policy = build_policy()
    samples = build_samples(RAGGED)
    exact = [
        replace(s, sampler_logprobs=after_prompt(s.loss_mask.index(1), row))
        for s, row in zip(samples, logprobs_of(policy, samples), strict=True)
    ]
    assert build_learner(policy, lr=0.0).update(exact, 1, len(exact))["policy/sampler_logprob_gap"] < 1e-5
    off = list(exact[3].sampler_logprobs)
    off[-2] += 0.25
    exact[3] = replace(exact[3], sampler_logprobs=tuple(off))
    gap = build_learner(policy, lr=0.0).update(exact, 1, len(exact))["policy/sampler_logprob_gap"]
    assert gap == pytest.approx(0.25, abs=1e-5)


def test_the_critic_learns_the_returns() -> None:
    samples = build_samples(RAGGED)
    policy = build_policy()
    critic = ValueNetwork(policy, seed=0)
    ppo = CriticConfig(value_lr=3e-3, value_clip=0)
    learner = build_learner(policy, critic=critic, lr=0.0, epochs=4, ppo=ppo)
    losses = [learner.update(samples, i, len(samples))["value/loss"] for i in range(1, 11)]
    assert losses[-1] < 0.25 * losses[0]


def test_value_loss_is_the_clipped_mean_over_tokens() -> None:
    policy = build_policy()
    critic = ValueNetwork(policy, seed=0)
    samples = build_samples(TWO)
    batch = collate(samples)
    values = critic(batch.token_ids, batch.loss_mask)
    # The first response's values were 1 lower and are now 0.1 below their returns: the clipped error is the larger one.
    # The second's were equal to their returns and are now 1 above them: the unclipped error is the larger one.
    first, second = values.detach()[:2], values.detach()[2:]
    samples = [
        replace(samples[0], values=after_prompt(3, first - 1), returns=after_prompt(3, first + 0.1)),
        replace(samples[1], values=after_prompt(4, second - 1), returns=after_prompt(4, second - 1)),
    ]
    norm = gradient_norm(0.5 * (values[2:] - (second - 1)).square().sum() / 7, critic)
    metrics = build_learner(policy, critic=critic, micro_batch_tokens=1).update(samples, 1, len(samples))
    assert metrics["value/loss"] == pytest.approx(0.5 * (2 * 0.9**2 + 5 * 1**2) / 7, rel=1e-5)
    assert metrics["value/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_value_only_iterations_do_not_change_the_policy() -> None:
    samples = build_samples(RAGGED)
    policy = build_policy()
    critic = ValueNetwork(policy, seed=0)
    learner = build_learner(policy, critic=critic, epochs=2, ppo=CriticConfig(value_only_iterations=2))
    for iteration in (1, 2):
        before, before_critic = weights(policy.model), weights(critic)
        metrics = learner.update(samples, iteration, len(samples))
        assert torch.equal(weights(policy.model), before)
        assert not torch.equal(weights(critic), before_critic)
        assert "policy/loss" not in metrics
        assert metrics["updates"] == 2 * iteration
    assert learner.update(samples, 3, len(samples))["policy/grad_norm"] > 0
    assert not torch.equal(weights(policy.model), before)


def test_gradients_are_cleared_after_each_update() -> None:
    samples = build_samples(RAGGED)
    policy, reference = build_policy(), build_policy(seed=1)
    critic = ValueNetwork(policy, seed=0)
    learner = build_learner(
        policy, reference, critic, lr=0.0, kl=KLConfig(coefficient=0.1), ppo=CriticConfig(value_lr=1e-12)
    )
    first, second = (learner.update(samples, i, len(samples)) for i in (1, 2))
    for model in (policy.model, reference.model, critic):
        assert all(p.grad is None for p in model.parameters())
    # The weights are unchanged, so a gradient that was not cleared would make the second norm larger.
    assert second["policy/grad_norm"] == pytest.approx(first["policy/grad_norm"], rel=1e-5)
    assert second["value/grad_norm"] == pytest.approx(first["value/grad_norm"], rel=1e-5)


def test_every_epoch_contains_every_sample_once_in_a_different_order() -> None:
    samples = build_samples([(3, 4)] * 7)
    seen: list[tuple[int, ...]] = []
    learner = build_learner(build_policy(), epochs=3, minibatch_size=3)
    original = learner._update

    def recording_update(minibatch: Any, train_policy: bool, num_rollouts: float, iteration: int) -> Metrics:
        seen.append(tuple(samples.index(replace(e.sample)) for e in minibatch))
        assert num_rollouts == len(minibatch)
        return original(minibatch, train_policy, num_rollouts, iteration)

    learner._update = recording_update  # type: ignore[method-assign, assignment]
    assert learner.update(samples, 1, len(samples))["updates"] == 9
    # The short last minibatch is used without filling it up.
    assert [len(m) for m in seen] == [3, 3, 1] * 3
    epochs = [[i for m in seen[3 * e : 3 * e + 3] for i in m] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("bad", [3e38, -3e38])  # finite, but the norm of the gradient overflows
def test_a_gradient_that_is_not_finite_is_an_error_and_changes_no_weights(bad: float) -> None:
    samples = build_samples(TWO)
    samples[0] = replace(samples[0], advantages=(0.0,) * 3 + (bad, 1.0))
    policy = build_policy()
    before = weights(policy.model)
    with pytest.raises(UserError) as error:
        build_learner(policy).update(samples, 7, len(samples))
    assert re.fullmatch(
        r"iteration 7: the gradient's norm is (inf|nan) \(policy\); lower learner\.lr, which is \S+, and continue "
        r"from the last checkpoint with --resume RUN --learner\.lr \S+, or start a new run with model\.dtype float32",
        str(error.value),
    )
    assert torch.equal(weights(policy.model), before)


def test_bfloat16_trains_with_float32_masters() -> None:
    samples = build_samples(RAGGED)
    policy = build_policy(dtype=torch.bfloat16)
    reference, critic = policy.frozen_copy(), ValueNetwork(policy, seed=0)
    # Steps of 1e-6 are below the resolution of bfloat16 for nearly all weights. The masters accumulate them.
    learner = build_learner(policy, reference, critic, lr=1e-6, epochs=8, kl=KLConfig(coefficient=0.01))
    before = [p.detach().float().clone() for p in policy.model.parameters()]
    metrics = learner.update(samples, 1, len(samples))
    assert all(math.isfinite(value) for value in metrics.values())
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    moved = torch.cat([(m - b).reshape(-1) for m, b in zip(learner.optimizer.masters, before, strict=True)]).abs()
    assert moved.max() == pytest.approx(8e-6, rel=0.2)
    assert (moved > 1e-6).float().mean() > 0.5
    for parameter, master in zip(policy.model.parameters(), learner.optimizer.masters, strict=True):
        assert torch.equal(parameter, master.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truth_7_four_iterations_equal_two_and_two_after_loading(tmp_path: Path, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"epochs": 2, "minibatch_size": 3, "kl": KLConfig(coefficient=0.01)}
    options |= {"warmup_updates": 4, "decay": "linear", "total_updates": 24, "ppo": CriticConfig(value_lr=1e-3)}

    def fresh() -> TorchLearner:
        policy = build_policy(dtype=dtype)
        return build_learner(policy, policy.frozen_copy(), ValueNetwork(policy, seed=0), **options)

    def run(learner: TorchLearner, iterations: range) -> list[Metrics]:
        return [learner.update(build_samples(RAGGED, seed=i), i, len(RAGGED)) for i in iterations]

    whole = fresh()
    expected = run(whole, range(1, 5))
    first = fresh()
    run(first, range(1, 3))
    first.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["learner.pt"]
    second = fresh()
    second.load(tmp_path)
    assert run(second, range(3, 5)) == expected[2:]
    assert torch.equal(weights(second.policy.model), weights(whole.policy.model))
    assert whole.critic is not None
    assert second.critic is not None
    assert torch.equal(weights(second.critic), weights(whole.critic))
    # The optimizer's state matters: a new optimizer with the same weights gives another result.
    weights_only = fresh()
    weights_only.policy.model.load_state_dict(first.policy.model.state_dict())
    run(weights_only, range(3, 5))
    assert not torch.equal(weights(weights_only.policy.model), weights(whole.policy.model))


def test_the_reference_never_changes() -> None:
    policy = build_policy()
    reference = policy.frozen_copy()
    before = weights(reference.model)
    learner = build_learner(policy, reference, kl=KLConfig(coefficient=0.1), epochs=3)
    first = learner.update(build_samples(RAGGED), 1, len(RAGGED))
    second = learner.update(build_samples(RAGGED), 2, len(RAGGED))
    assert torch.equal(weights(reference.model), before)
    assert first["kl/ref"] == 0
    assert second["kl/ref"] > 1e-3


def test_learning_rates_rise_and_fall() -> None:
    assert [lr_factor(u, 4, 100, "constant") for u in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    assert [lr_factor(u, 2, 10, "linear") for u in (0, 1, 2, 6, 9, 10, 11)] == [0.5, 1, 1, 0.5, 0.125, 0, 0]
    policy = build_policy()
    learner = build_learner(policy, lr=1e-4, warmup_updates=2, decay="linear", total_updates=10)
    rates = [learner.update(build_samples(TWO), i, len(TWO))["policy/lr"] for i in range(1, 5)]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 0.875e-4])


def test_token_logprobs_are_of_the_masked_tokens_in_row_major_order() -> None:
    samples = build_samples(RAGGED)
    policy = build_policy()
    batch = collate(samples)
    logprobs, entropies = token_logprobs(policy.model, batch.token_ids, batch.loss_mask, TEMPERATURE)
    assert entropies is None
    assert torch.allclose(logprobs, torch.cat(logprobs_of(policy, samples)), rtol=0, atol=1e-5)


def test_truth_6_seeds_do_not_change_between_versions() -> None:
    # A change of any of these numbers changes the result of every run with the same seed.
    assert derive_seed() == 6510301506637419378
    address = (7, 12, "mc", "1", 1, 300)
    assert seeds_of_prefixes(address) == [derive_seed(*address[:n]) for n in range(len(address) + 1)]
    assert derive_seed(0) == 3581690635855307741
    assert derive_seed(0, 1, "train/17", "rollouts") == 1690424261999679735
    keys = stream_keys(np.array([0, 0, 2**63 - 1], dtype=np.uint64), np.array([0, 1, 2]))
    assert keys.tolist() == [0, 16294208416658607535, 12347443176507962814]
    assert uniforms(keys, 0).tolist() == [0.8833108082136426, 0.6524484863740322, 0.4155721553979935]
    assert uniforms(keys, 1000).tolist() == [0.17569250689332405, 0.6186972209020031, 0.7051667993008943]


def test_truth_6_different_addresses_have_different_seeds() -> None:
    addresses = [(seed, i, purpose) for seed in range(10) for i in range(100) for purpose in ("rollouts", "mc")]
    seeds = {derive_seed(*address) for address in addresses}
    assert len(seeds) == len(addresses)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Parts of an address are separated, and a number differs from its text.
    assert (
        len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed("123"), derive_seed("1", "23")}) == 5
    )


def test_uniforms_are_uniform_within_and_between_streams() -> None:
    keys = stream_keys(np.arange(400, dtype=np.uint64).repeat(5), np.tile(np.arange(5), 400))
    numbers = np.stack([uniforms(keys, position) for position in range(100)], axis=1)  # (2000, 100)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for sample in (numbers.ravel(), numbers[:, 0], numbers[:, 99], numbers[0], numbers[:5].ravel()):
        assert kolmogorov_smirnov(sample) < 1.95  # exceeded with probability 0.001
    assert len(np.unique(numbers)) == numbers.size


def kolmogorov_smirnov(sample: np.ndarray) -> float:
    """Return the largest distance of the empirical distribution from the uniform one, times sqrt(n)."""
    ordered, n = np.sort(sample), len(sample)
    above = np.arange(1, n + 1) / n - ordered
    below = ordered - np.arange(n) / n
    return float(max(above.max(), below.max()) * n**0.5)


def test_uniforms_are_independent_across_positions_samples_and_seeds() -> None:
    keys = stream_keys(np.arange(400, dtype=np.uint64).repeat(5), np.tile(np.arange(5), 400))
    numbers = np.stack([uniforms(keys, position) for position in range(60)], axis=1)  # (2000, 60)
    between_positions = np.corrcoef(numbers.T)
    between_streams = np.corrcoef(numbers[:60])
    for correlations, n in ((between_positions, 2000), (between_streams, 60)):
        scaled = correlations[np.triu_indices(60, 1)] * n**0.5  # about standard normal, 1770 of them
        assert abs(scaled.mean()) < 0.15
        assert scaled.std() == pytest.approx(1, abs=0.1)
        assert abs(scaled).max() < 5
    # Neighbouring positions, samples and seeds, as pairs on a grid of 10 x 10 cells: chi-square with 99 degrees.
    grids = {
        "positions": (numbers[:, :-1], numbers[:, 1:]),
        "samples": (numbers.reshape(400, 5, 60)[:, :-1], numbers.reshape(400, 5, 60)[:, 1:]),
        "seeds": (numbers.reshape(400, 5, 60)[:-1], numbers.reshape(400, 5, 60)[1:]),
    }
    for name, (a, b) in grids.items():
        counts = np.histogram2d(a.ravel(), b.ravel(), bins=10, range=[[0, 1], [0, 1]])[0]
        expected = a.size / 100
        assert 50 < ((counts - expected) ** 2 / expected).sum() < 165, name


# --- alternatives ---


def with_alternatives(samples: list[TrainingSample], seed: int = 5) -> list[TrainingSample]:
    """Add up to four alternatives at random positions to every sample."""
    rng = np.random.default_rng(seed)
    changed = []
    for sample in samples:
        T = sum(sample.loss_mask)
        alternatives = tuple(
            Alternative(int(rng.integers(T)), int(rng.integers(3, len(TOKENIZER))), float(rng.normal()))
            for _ in range(rng.integers(5))
        )
        changed.append(replace(sample, alternatives=alternatives))
    return changed


def trained(samples: list[TrainingSample], **options: Any) -> torch.Tensor:
    policy = build_policy()
    build_learner(policy, **options).update(samples, 1, len(samples))
    return weights(policy.model)


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 300])
def test_alternatives_do_not_depend_on_the_batch_layout(micro_batch_tokens: int) -> None:
    samples = with_alternatives(build_samples(RAGGED))
    options: dict[str, Any] = {"minibatch_size": 4, "epochs": 2, "advantage_scaling": "std"}
    whole = trained(samples, micro_batch_tokens=100_000, **options)
    assert torch.allclose(trained(samples, micro_batch_tokens=micro_batch_tokens, **options), whole, atol=1e-6)
    assert not torch.allclose(trained(build_samples(RAGGED), **options), whole, atol=1e-4)


def test_an_alternative_trains_like_a_sequence_that_ends_with_it() -> None:
    """A sample that trains only the other token after the same prefix has the same gradient."""
    (sample,) = build_samples([(4, 9)])
    position, token, advantage = 5, 7, -1.3
    place = 4 + position
    other = TrainingSample(
        token_ids=(*sample.token_ids[:place], token),
        loss_mask=(0,) * place + (1,),
        sampler_logprobs=(0.0,) * place + (-1.0,),
        advantages=(0.0,) * place + (advantage,),
    )
    joined = replace(sample, alternatives=(Alternative(position, token, advantage),))
    options: dict[str, Any] = {"max_grad_norm": 0.0, "micro_batch_tokens": 1}
    # Both sum over the same ten terms, but divide by nine and by ten tokens. Adam's first step depends only on the sign
    # of the gradient, so the weights are equal.
    together, separate = trained([joined], **options), trained([sample, other], **options)
    start = weights(build_policy().model)
    moved = (together - start).abs() > 1e-4
    assert moved.float().mean() > 0.9
    assert torch.allclose(together, separate, atol=1e-5)
    assert not torch.allclose(trained([sample], **options), together, atol=1e-4)


def test_alternatives_are_scaled_with_the_advantages() -> None:
    """If all advantages, also those of alternatives, are ten times as large, `std` gives the same update."""
    samples = with_alternatives(build_samples(RAGGED))
    larger = [
        replace(
            s,
            advantages=tuple(10 * a for a in s.advantages),
            alternatives=tuple(replace(a, advantage=10 * a.advantage) for a in s.alternatives),
        )
        for s in samples
    ]
    assert torch.allclose(
        trained(larger, advantage_scaling="std"), trained(samples, advantage_scaling="std"), atol=1e-5
    )


# --- tokens without an advantage ---


def sparse(samples: list[TrainingSample], share: float = 0.7, seed: int = 6) -> list[TrainingSample]:
    """Set most advantages of tokens and alternatives to 0, and all of them in two samples."""
    rng = np.random.default_rng(seed)
    changed = []
    for i, sample in enumerate(samples):
        is_zero = rng.random(len(sample.token_ids)) < (1.0 if i in (1, 4) else share)
        advantages = tuple(0.0 if zero else a for a, zero in zip(sample.advantages, is_zero, strict=True))
        alternatives = tuple(
            replace(a, advantage=0.0) if i in (1, 4) or rng.random() < share else a for a in sample.alternatives
        )
        changed.append(replace(sample, advantages=advantages, alternatives=alternatives))
    return changed


@pytest.mark.parametrize("minibatch_size", [8, 3])
def test_dropping_tokens_without_an_advantage_does_not_change_the_update(
    monkeypatch: pytest.MonkeyPatch, minibatch_size: int
) -> None:
    samples = sparse(with_alternatives(build_samples(RAGGED)))
    seen: list[int] = []

    def outcome() -> tuple[torch.Tensor, Metrics]:
        policy = build_policy(dtype=torch.float64)  # as in `train`
        handle = policy.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        # The padded form, and one pass for the old log-probabilities, so that only the removal of tokens saves tokens.
        learner = build_learner(policy, minibatch_size=minibatch_size, epochs=2, micro_batch_tokens=1, savings=NONE)
        metrics = learner.update(samples, 1, len(samples))
        handle.remove()
        return weights(policy.model), metrics

    short, short_metrics = outcome()
    tokens = sum(seen)
    monkeypatch.setattr("vineppo.learning.learner.all_tokens_stay", lambda *_: True)
    seen.clear()
    whole, whole_metrics = outcome()
    assert tokens < 0.85 * sum(seen)
    for metric in ("policy/loss", "policy/clip_share", "policy/grad_norm", "policy/entropy"):
        assert short_metrics[metric] == pytest.approx(whole_metrics[metric], rel=1e-6, abs=1e-9), metric
    assert whole_metrics["policy/clip_share"] > 0 and torch.allclose(short, whole, rtol=0, atol=1e-6)


def test_a_minibatch_without_any_advantage_is_a_step_of_gradient_zero() -> None:
    """Adam's moments decay as in any other update, so the weights still change."""
    policy = build_policy()
    learner = build_learner(policy, minibatch_size=8, lr=1e-2)
    learner.update(build_samples(RAGGED), 1, len(RAGGED))
    before = weights(policy.model)
    metrics = learner.update(build_samples(RAGGED, advantage=0.0), 2, len(RAGGED))
    assert metrics["policy/grad_norm"] == 0.0 and metrics["policy/kl_old"] == pytest.approx(0.0, abs=1e-6)
    assert not torch.equal(weights(policy.model), before)
