"""Changed step advantages: by hand, and their bias in the enumerable world with exact values."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest

from tests.credit.enumerated import cosine, error, length, of_single_responses
from tests.credit.test_ground_truth import ExactValues, policy, world
from vineppo.credit.advantages import from_first_drop, smallest_to_come
from vineppo.credit.spo_chain import SPOChainSettings, as_vineppo, only_uncertain
from vineppo.credit.vineppo import Transform, VinePPOSettings, vine_credit
from vineppo.steps import build_splitter
from vineppo.types import CreditFn, UserError
from vineppo.values import MonteCarlo


def test_the_smallest_to_come_by_hand() -> None:
    assert smallest_to_come([0.2, -0.5, 0.1, 0.3, 0.2]) == [-0.5, -0.5, 0.1, 0.2, 0.2]
    assert smallest_to_come([0.0]) == [0.0]


def test_the_first_drop_by_hand() -> None:
    steps = [0.2, -0.1, -0.5, 0.3, -0.7]
    assert from_first_drop(steps, 0.5) == [0.2, 0.0, -0.5, -0.5, -0.5]
    assert from_first_drop(steps, 0.6) == [0.2, 0.0, 0.0, 0.3, -0.7]
    assert from_first_drop(steps, 0.8) == steps


def exact_vine(splitter: str, transform: Transform = list) -> CreditFn:
    values = cast(MonteCarlo, ExactValues(world(4)))
    return vine_credit(values, build_splitter(splitter), policy().codec.token_texts, 0, transform)


@pytest.mark.parametrize(
    ("transform", "splitter", "expected_length", "expected_cosine"),
    [
        (list, "tokens:1", 1, 1),
        (smallest_to_come, "tokens:1", 0.2563, 0.43781),
        (smallest_to_come, "tokens:2", 0.6825, 0.88766),
        (partial(from_first_drop, drop=0.5), "tokens:1", 1, 1),
        (partial(from_first_drop, drop=0.2), "tokens:1", 0.9900, 0.99857),
        (partial(from_first_drop, drop=0.1), "tokens:2", 0.9902, 0.98664),
    ],
)
def test_transforms_are_biased(
    transform: Transform, splitter: str, expected_length: float, expected_cosine: float
) -> None:
    """Length along the exact gradient, and cosine with it. No exact step advantage of this world is below -0.5."""
    gradient, exact = of_single_responses(world(4), exact_vine(splitter, transform)), world(4).table_gradient
    assert length(gradient, exact) == pytest.approx(expected_length, abs=1e-3)
    assert cosine(gradient, exact) == pytest.approx(expected_cosine, abs=1e-4)


@pytest.mark.parametrize("other", ["alternatives", "bisection"])
def test_a_transform_needs_the_advantages_of_all_steps(other: str) -> None:
    settings: dict[str, Any] = {"transform": "min", other: True}
    with pytest.raises(UserError, match=r"vineppo.transform is min, which changes the advantages of steps"):
        VinePPOSettings(**settings)


# --- SPO-chain ---


@pytest.mark.parametrize(
    ("below", "expected_length", "expected_cosine"),
    [(1.0, 1, 1), (0.9, 0.9999, 0.99999), (0.5, 0.9997, 0.99995), (0.3, 0.7210, 0.89692)],
)
def test_a_mask_of_certain_tokens_is_biased(below: float, expected_length: float, expected_cosine: float) -> None:
    """The mask depends on the sampled token, so the gradient is exact only if it keeps all tokens."""
    w = world(4)
    gradient = of_single_responses(w, only_uncertain(exact_vine("cutpoints:1:0.9"), below))
    assert (error(gradient, w.table_gradient) < 1e-9) == (below == 1)
    assert length(gradient, w.table_gradient) == pytest.approx(expected_length, abs=1e-3)
    assert cosine(gradient, w.table_gradient) == pytest.approx(expected_cosine, abs=1e-4)


def test_the_mask_keeps_exactly_the_uncertain_tokens() -> None:
    w = world(3)
    plain, _ = exact_vine("tokens:1")([w.group()], 0)
    masked, metrics = only_uncertain(exact_vine("tokens:1"), 0.5)([w.group()], 0)
    kept = tokens = 0
    for before, after in zip(plain, masked, strict=True):
        for i in range(len(w.prompt_ids), len(before.token_ids)):
            uncertain = before.sampler_logprobs[i] < -0.6931471805599453
            assert after.advantages[i] == (before.advantages[i] if uncertain else 0.0)
            kept, tokens = kept + uncertain, tokens + 1
    assert 0 < kept < tokens and metrics["credit/uncertain_share"] == kept / tokens


def test_segments_end_after_uncertain_tokens() -> None:
    settings = as_vineppo(SPOChainSettings(every=3, uncertain_below=0.25, num_mc_rollouts=4, max_states=7))
    assert (settings.num_mc_rollouts, settings.max_states, settings.reuse) == (4, 7, True)
    logprobs = [-3.0, -0.1, -2.0, -1.0, -3.0, -3.0, -0.1]
    assert build_splitter(settings.splitter)(["x"] * 7, logprobs) == (5, 7)
