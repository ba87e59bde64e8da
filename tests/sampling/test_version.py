"""`CurrentSampler` refuses to sample with weights that are not the learner's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.world import build_world
from vineppo.sampling.version import CurrentSampler, StaleWeights
from vineppo.sampling.wrapped import WrappedSampler
from vineppo.types import Completion, SampleRequest

W = build_world(3)
REQUEST = SampleRequest(W.prompt_ids, 4, 3, seed=0)
OTHER = replace(REQUEST, seed=1)


@dataclass
class Learner:
    """A learner with a settable number of updates."""

    updates: int = 0

    def weights(self) -> Iterable[tuple[str, Any]]:
        return W.policy.model.named_parameters()


@dataclass
class Behind(WrappedSampler):
    """A sampler that returns some completions with the previous version, like an engine that samples in advance."""

    stale: list[int] = field(default_factory=list)

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        groups = self.sampler.sample(requests)
        for index in self.stale:
            groups[-1][index] = replace(groups[-1][index], version=self.version - 1)
        return groups


def test_a_sampler_without_the_last_update_refuses() -> None:
    learner = Learner()
    sampler = CurrentSampler(W.sampler(), lambda: learner.updates)
    assert [c.version for c in sampler.sample([REQUEST])[0]] == [0] * 4
    learner.updates = 2
    with pytest.raises(StaleWeights, match="has the weights of update 0 and the learner those of update 2; call"):
        sampler.sample([REQUEST])
    sampler.update_weights(learner.updates, learner.weights)
    assert sampler.version == 2
    assert [c.version for c in sampler.sample([OTHER])[0]] == [2] * 4
    learner.updates = 1  # after a resume from an older checkpoint the sampler's weights are too new
    with pytest.raises(StaleWeights, match="of update 2 and the learner those of update 1"):
        sampler.sample([REQUEST])


def test_one_completion_of_another_version_is_refused() -> None:
    learner = Learner(5)
    behind = Behind(W.sampler())
    sampler = CurrentSampler(behind, lambda: learner.updates)
    sampler.update_weights(5, learner.weights)
    assert len(sampler.sample([REQUEST, OTHER])) == 2
    behind.stale.append(3)
    with pytest.raises(StaleWeights, match=r"a completion was sampled with the weights of update 4 .* update 5"):
        sampler.sample([REQUEST, OTHER])


def test_capabilities_and_completions_are_those_of_the_wrapped_sampler() -> None:
    inner = W.sampler()
    sampler = CurrentSampler(inner, lambda: 0)
    assert sampler.capabilities == inner.capabilities
    assert sampler.sample([REQUEST]) == inner.sample([REQUEST])
