"""The default of `rollouts.kv_memory`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.sampling.test_sampler import build_policy
from vineppo.config.schema import RolloutConfig, SamplerConfig
from vineppo.model.hardware import kv_memory_in
from vineppo.sampling.build import bytes_for_training, default_kv_memory, sampler_of

GIB = 1 << 30


@pytest.mark.parametrize(
    ("room", "expected"),
    [(70, 32), (64, 32), (63.9, 16), (16, 8), (5, 2), (3.9, 1), (2, 1), (0.1, 1), (0, 1), (-20, 1)],
)
def test_keys_and_values_get_a_power_of_two_of_at_most_half_the_room(room: float, expected: int) -> None:
    assert kv_memory_in(room * GIB) == expected * GIB


def test_the_bytes_that_training_needs() -> None:
    narrow = nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))  # 2 bytes, a copy of 4, two moments of 4
    wide = nn.Parameter(torch.zeros(5))  # 4 bytes, two moments of 4
    frozen = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16), requires_grad=False)
    assert bytes_for_training([narrow], 1) == 10 * 14
    assert bytes_for_training([narrow, wide, frozen], 1) == 10 * 14 + 5 * 12 + 7 * 2
    # Two processes: a whole copy each, and half of the weights and of the states.
    assert bytes_for_training([narrow, frozen], 2) == 10 * (2 + 14 / 2) + 7 * (2 + 2 / 2)


def test_a_cpu_keeps_the_default_of_four_gibibytes() -> None:
    policy = build_policy()
    assert default_kv_memory(policy) == 4 * GIB
    settings = SamplerConfig(engine="torch")
    for given, expected in ((None, 4.0), (0.5, 0.5), (7.0, 7.0)):
        sampler = sampler_of(policy, settings, RolloutConfig(kv_memory=given))
        assert getattr(sampler, "kv_memory") == expected * GIB  # noqa: B009


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_default_on_a_gpu_does_not_depend_on_what_this_process_has_allocated() -> None:
    policy = build_policy()
    policy.model.to("cuda")
    before = default_kv_memory(policy)
    held = torch.zeros(GIB // 4, device="cuda")
    assert default_kv_memory(policy) == before >= GIB
    assert before <= torch.cuda.mem_get_info()[1] / 2 and before & (before - 1) == 0
    del held
