"""The learner on every device: the same update as on a CPU, one wait per minibatch, and few float32 copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.learning.test_learner import RAGGED, build_learner, build_policy, build_samples, weights
from vineppo.config.schema import KLConfig
from vineppo.learning import optim
from vineppo.learning.optim import GradientError, Optimizer
from vineppo.learning.sums import Sums
from vineppo.model.critic import ValueNetwork


def test_sums_are_those_of_python(device: torch.device) -> None:
    sums = Sums()
    assert sums.totals() == {}
    for k in (1, 2, 3):
        number = torch.tensor(0.1 * k, device=device, requires_grad=True)
        sums.add({"a": (number, 3.0), "b": (number.detach() * 0 + k, 1.0)})
    sums.add({"b": (torch.tensor(1 / 3, dtype=torch.float64, device=device), 1.0)})
    parts = [float(torch.tensor(0.1 * k)) / 3.0 for k in (1, 2, 3)]
    assert sums.totals() == {"a": parts[0] + parts[1] + parts[2], "b": 1.0 + 2.0 + 3.0 + 1 / 3}


def test_an_update_on_a_device_is_that_of_a_cpu(device: torch.device) -> None:
    found = []
    for kind in (torch.device("cpu"), device):
        policy = build_policy()
        policy.model.to(kind)
        critic = ValueNetwork(policy, seed=0)
        learner = build_learner(policy, policy.frozen_copy(), critic, kl=KLConfig(coefficient=0.01), epochs=2)
        metrics = learner.update(build_samples(RAGGED), 1, len(RAGGED))
        found.append((metrics, weights(policy.model).cpu(), weights(critic).cpu(), learner.entropies))
    (metrics, of_policy, of_critic, entropies), other = found
    assert metrics == pytest.approx(other[0], rel=1e-4, abs=1e-5)
    # AdamW moves a weight whose gradient is about 0 by the learning rate, in either direction.
    for one, two in ((of_policy, other[1]), (of_critic, other[2])):
        assert ((one - two).abs() > 1e-5).float().mean() < 0.01
    for expected, of_sample in zip(entropies, other[3], strict=True):
        assert of_sample == pytest.approx(expected, abs=1e-5)


def test_an_update_waits_for_the_device_equally_often_for_any_number_of_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every conversion of a tensor to a number of Python is a wait on a GPU, except for scores of samples."""
    samples = build_samples(RAGGED)
    counts = []
    for tokens in (10_000, 25):
        policy = build_policy()
        learner = build_learner(policy, None, ValueNetwork(policy, seed=0), micro_batch_tokens=tokens, epochs=3)
        learner.update(samples, 1, len(samples))  # the packing has been tried out
        batches, count = len(learner._micro_batches(samples, True, learner.ranks)), 0
        with monkeypatch.context() as patch:

            def counting(original: Callable[..., Any]) -> Callable[..., Any]:
                def convert(self: torch.Tensor, *arguments: Any) -> Any:
                    nonlocal count
                    count += 1
                    return original(self, *arguments)

                return convert

            for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
                patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
            experience, _, gradient = learner._prepare(samples, len(samples), 2, ())
            count = 0  # the scores
            learner._update(experience, True, len(samples), 2, *(() if gradient is None else (gradient,)))
        counts.append((batches, count))
    assert counts[0][0] == 1 and counts[1][0] >= 4
    assert counts[0][1] == counts[1][1]


def parameters(device: torch.device) -> list[nn.Parameter]:
    """16-bit weights, one float32 weight, and one that gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (11,), (3, 4), (2,), (6, 6)]
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return [torch.randn(shape, generator=generator) for shape in [(7, 5), (11,), (3, 4), (2,), (6, 6)]]


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("part", [1, 40, 1 << 28])
def test_updates_in_parts_are_those_of_whole_float32_copies(
    part: int, limit: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "PART", part)
    mine = parameters(device)
    optimizer = Optimizer(mine, (0.9, 0.99), 0.01)
    masters = [nn.Parameter(p.detach().float().clone()) for p in mine]
    adamw = torch.optim.AdamW(masters, lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(3):
        for i, (p, m, grad) in enumerate(zip(mine, masters, gradients(step), strict=True)):
            p.grad = None if i == 3 else grad.to(device, p.dtype)
            m.grad = None if p.grad is None else p.grad.float().clone()
        sizes = [sum(mine[i].numel() for i in indices) for indices in optimizer._parts()]
        assert sizes == {1: [35, 11, 12, 2, 36], 40: [35, 25, 36], 1 << 28: [96]}[part]
        norm = optimizer.step(0.1, limit)
        expected = torch.nn.utils.clip_grad_norm_(masters, limit or float("inf"))
        adamw.step()
        assert norm == pytest.approx(float(expected), rel=1e-6)
        for p, m, master in zip(mine, masters, optimizer.masters, strict=True):
            assert p.grad is None and master.grad is None
            tolerance = 0.0 if device.type == "cpu" else 1e-6
            assert (master - m).abs().max() <= tolerance
            assert torch.equal(p, master.to(p.dtype))


def test_a_gradient_that_is_not_finite_changes_no_weight(device: torch.device) -> None:
    mine = parameters(device)
    before = copy.deepcopy(mine)
    optimizer = Optimizer(mine, (0.9, 0.99), 0.01)
    mine[0].grad, mine[2].grad = torch.full_like(mine[0], float("inf")), torch.ones_like(mine[2])
    with pytest.raises(GradientError, match="norm is inf"):
        optimizer.step(0.1, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
    optimizer.clear_gradients()
    mine[0].grad = torch.ones_like(mine[0])
    assert optimizer.step(0.1, 0.0) == pytest.approx(35**0.5)
    assert not torch.equal(mine[0], before[0]) and torch.equal(mine[2], before[2])
