"""benchmarks/gradient.py: gradients of samples token by token, and the signal-to-noise ratio by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.gradient import (
    BLOCKS,
    FLOOR,
    MINIBATCH,
    Arm,
    Gradients,
    check_blocks,
    cross,
    figures,
    markdown,
    needed,
    parsed,
    samples_by_group,
    scale_of,
)
from tests.credit.test_counterfactual import credit_of
from tests.credit.test_tree_credit import parts_of
from tests.world import World, build_world

from vineppo.credit.tree import TreeSettings, sample_trees, tree_credit
from vineppo.types import TrainingSample, UserError


def one_by_one(w: World, samples: list[TrainingSample]) -> np.ndarray:
    """The same gradient from one forward pass per trained token and per alternative, without padding."""
    model, prompt = w.policy.model, len(w.prompt_ids)
    total = torch.zeros(())
    for sample in samples:
        ids, weights = sample.token_ids, sample.weights or sample.loss_mask
        terms = [(i, ids[i], sample.advantages[i] * weights[i] * sample.loss_mask[i]) for i in range(prompt, len(ids))]
        terms += [(prompt + other.position, other.token_id, other.advantage) for other in sample.alternatives]
        for at, token, credit in terms:
            logits = model(input_ids=torch.tensor([ids[:at]]), use_cache=False).logits[0, -1] / w.temperature
            total = total + credit * logits.log_softmax(-1)[token]
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = torch.autograd.grad(total, parameters)
    return torch.cat([part.reshape(-1) for part in parts]).numpy()


def test_the_gradient_of_samples_with_alternatives_and_weights() -> None:
    w = build_world(4)
    with_alternatives, _ = credit_of(w, 12, 0.5, True)
    assert sum(len(sample.alternatives) for sample in with_alternatives) > 5
    settings, parts = TreeSettings(branch_at="tokens:1"), parts_of(w, 4)
    groups = sample_trees(settings, parts)([w.problem] * 3, 1)
    weighted, _ = tree_credit(settings, parts)(groups, 1)
    assert {weight for sample in weighted for weight in sample.weights or ()} == {0, 1, 2}
    gradients = Gradients(w.policy, w.temperature)
    for samples in (with_alternatives, weighted):
        expected = one_by_one(w, list(samples))
        assert np.abs(expected).max() > 0.01
        assert gradients.of_samples(list(samples)) == pytest.approx(expected, abs=1e-4 * np.abs(expected).max())
    assert [len(own) for own in samples_by_group(groups, list(weighted))] == [4, 4, 4]


def test_the_problems_to_a_ratio_of_1_by_hand() -> None:
    """mu is (3, 4), so its square is 25. An arm with half of it and a mean square of 56.25 has the variance 50."""
    mu = np.tile([3.0, 4.0], (BLOCKS, 1))
    assert cross(mu, mu) == pytest.approx(25)
    assert needed(mu, mu, np.full(BLOCKS, 75.0)) == pytest.approx((2.0, 1.0))
    assert needed(mu / 2, mu, np.full(BLOCKS, 56.25)) == pytest.approx((8.0, 0.5))
    # Products within a block are left out, because noise is correlated with itself.
    noise = np.zeros((BLOCKS, 2))
    noise[0] = [0.0, 8.0]
    assert cross(mu + noise, mu + noise) == pytest.approx(25 + 2 * 4 * 8 / BLOCKS)


def arm_with(name: str, means: np.ndarray, square: float, tokens: float) -> Arm:
    """An arm with two problems in each block."""
    count = np.full(BLOCKS, 2.0)
    return Arm(
        name, {}, 2 * means, np.full((2, BLOCKS), 2 * square), count, False, False, 2 * BLOCKS * tokens, 32.0, 8.0
    )


def test_figures_by_hand_and_a_signal_that_is_hidden_by_noise() -> None:
    mu = np.tile([3.0, 4.0], (BLOCKS, 1))
    result = figures([arm_with("a", mu, 75.0, 100), arm_with("b", mu, 125.0, 50)], np.ones(2))
    assert [result[name]["tokens_to_snr_1"]["raw"]["mean"] for name in "ab"] == pytest.approx([200, 200])
    assert [result[name]["trained_to_snr_1"]["adam"]["mean"] for name in "ab"] == pytest.approx([4, 8])
    assert [result[name]["tokens_times_square"]["raw"] for name in "ab"] == pytest.approx([7500, 6250])
    signs = np.array([1.0, -1.0] * (BLOCKS // 2))[:, None]
    hidden = figures([arm_with("a", mu * signs, 75.0, 100)], np.ones(2))
    table = markdown({"command": "x", "torch": "2", "reward": 0.5, "methods": hidden})
    assert "| a | 100 | 2 | - | - | - | - | 1.00 | 1.00 |" in table


def test_a_biased_arm_does_not_change_the_estimate_of_the_policy_gradient() -> None:
    """The biased arm's mean is (4, 0): along (3, 4) it has 12 of 25, and 16 - 0.48^2 * 25 = 10.24 is noise."""
    mu = np.tile([3.0, 4.0], (BLOCKS, 1))
    other = arm_with("b", np.tile([4.0, 0.0], (BLOCKS, 1)), 16.0, 100)
    other.biased = True
    result = figures([arm_with("a", mu, 75.0, 100), other], np.ones(2))
    assert result["a"]["tokens_to_snr_1"]["raw"]["mean"] == pytest.approx(200)
    assert result["b"]["scale"]["raw"]["mean"] == pytest.approx(0.48)
    assert result["b"]["tokens_to_snr_1"]["raw"]["mean"] == pytest.approx(100 * 10.24 / 5.76)


def test_gradients_that_are_0_end_in_one_line() -> None:
    """The variances are 0.5, 2 and 0, and no mean is significant. The last coordinate gets the floor."""
    first, second = np.array([1.0, 2.0, 0.0]), np.array([1.0, 4.0, 0.0])
    assert scale_of(first, second, 2) == pytest.approx(
        [1 / (0.5 / MINIBATCH) ** 0.5, 1 / (2 / MINIBATCH) ** 0.5, 1 / (FLOOR * 0.75 * (2 / MINIBATCH) ** 0.5)]
    )
    with pytest.raises(UserError, match=r"^the REINFORCE gradients of 512 problems are 0, because all rewards are eq"):
        scale_of(np.zeros(3), np.zeros(3), 512)
    arm = arm_with("a", np.tile([3.0, 4.0], (BLOCKS, 1)), 75.0, 100)
    arm.squares[:, 3:] = 0
    check_blocks(arm)
    arm.squares[:, 2:] = 0
    with pytest.raises(UserError, match=f"^arm a: 2 of {BLOCKS} blocks of problems .* raise --problems$"):
        check_blocks(arm)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--batch", "0"], "--batch is 0 and --problems is 1024; --batch must be a multiple of 8 that divides 512"),
        (["--batch", "-8"], "--batch is -8"),
        (["--problems", "100"], "--problems a multiple of --batch"),
        (["--arm", "a=algorithm=rloo,rollouts.group_size=4"], "two arms have the same name"),
        (["--free", "b"], "--free b: no arm has this name; allowed: a"),
        (["--biased", "a"], "every arm is --biased"),
        (["--arm", "b=algorithm=grpo,rollouts.group_size=1"], "arm b: "),
    ],
)
def test_mistakes_are_found_before_the_first_arm_is_measured(
    more: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["judgement", "--arm", "a=algorithm=reinforce"]
    with pytest.raises(SystemExit):
        parsed([*given, *more])
    assert named in " ".join(capsys.readouterr().err.split())
    _, [arm] = parsed([*given, "--free", "a"])
    assert arm.free and arm.overrides == {"algorithm": "reinforce"}
