"""A sampler with other weights than the learner's refuses to sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.helpers import WrappedSampler
from tests.world import build_world
from vineppo.sampling.version import CurrentSampler, StaleWeights
from vineppo.types import Completion, SampleRequest

W = build_world(3)
REQUEST = SampleRequest(W.prompt_ids, 4, 3, seed=0)


@dataclass
class Learner:
    """Counts updates, as the learner does."""

    updates: int = 0

    def weights(self) -> Iterable[tuple[str, Any]]:
        return W.policy.model.named_parameters()


@dataclass(frozen=True)
class Behind(WrappedSampler):
    """Returns what it sampled with the weights before the last update, as an engine might that samples ahead."""

    late: list[int] = field(default_factory=list)

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        groups = self.sampler.sample(requests)
        for place in self.late:
            groups[-1][place] = replace(groups[-1][place], version=self.version - 1)
        return groups


def test_a_sampler_that_was_not_told_of_an_update_refuses() -> None:
    learner = Learner()
    sampler = CurrentSampler(W.sampler(), lambda: learner.updates)
    assert [c.version for c in sampler.sample([REQUEST])[0]] == [0] * 4
    learner.updates = 2
    with pytest.raises(StaleWeights, match="has the weights of update 0 and the learner those of update 2; call"):
        sampler.sample([REQUEST])
    sampler.update_weights(learner.updates, learner.weights)
    assert sampler.version == 2
    assert [c.version for c in sampler.sample([REQUEST])[0]] == [2] * 4
    learner.updates = 1  # a resume from an older checkpoint: too new is as wrong as too old
    with pytest.raises(StaleWeights, match="of update 2 and the learner those of update 1"):
        sampler.sample([REQUEST])


def test_one_completion_of_another_version_is_refused() -> None:
    learner = Learner(5)
    behind = Behind(W.sampler())
    sampler = CurrentSampler(behind, lambda: learner.updates)
    sampler.update_weights(5, learner.weights)
    assert len(sampler.sample([REQUEST, REQUEST])) == 2
    behind.late.append(3)
    with pytest.raises(StaleWeights, match=r"a completion was sampled with the weights of update 4 .* update 5"):
        sampler.sample([REQUEST, REQUEST])


def test_what_it_can_do_is_what_the_inner_sampler_can_do() -> None:
    inner = W.sampler()
    sampler = CurrentSampler(inner, lambda: 0)
    assert sampler.capabilities == inner.capabilities
    assert sampler.sample([REQUEST]) == inner.sample([REQUEST])
