"""The model, the workload and the fits of benchmarks/length.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.length import (
    build_policy,
    build_scene,
    exponents_of,
    fitted,
    fixed_tokens,
    generate_work,
    markdown,
    measure,
    predictions,
)


@pytest.mark.parametrize("width", [144, 288])
def test_one_token_is_likely_and_the_others_depend_on_the_prefix(width: int) -> None:
    policy = build_policy(120, width)
    scene = build_scene(policy, 40, (16, 1, 3), 3)
    assert 0.1 < scene.entropy < 0.3
    assert scene.mean_reward == 0.75  # chosen in this way
    with torch.no_grad():
        logits = policy.model(torch.tensor([[1, 2, 1, 1], [1, 3, 1, 1]])).logits  # (2, 4, V)
    assert (logits[0, 3] - logits[1, 3]).abs().max() > 1e-4


def test_the_tokens_of_every_method_and_of_generate() -> None:
    scene = build_scene(build_policy(60), 20, (4, 1, 2), 3)
    fixed, reuse, bisection = (measure(scene, name, Path()) for name in ("fixed_k", "reuse", "bisection"))
    # K continuations of 20 states, which need 60, 57, ..., 3 tokens.
    assert fixed["tokens"] == fixed_tokens(20, 3, 2) == 2 * sum(range(3, 61, 3)) == 1260
    assert fixed["states"] == reuse["states"] == 20
    assert reuse["tokens"] < 0.6 * fixed["tokens"]
    assert bisection["states"] < 10
    assert bisection["tokens"] < 0.6 * fixed["tokens"]


def test_generate_samples_the_tokens_of_fixed_k(tmp_path: Path) -> None:
    scene = build_scene(build_policy(60), 20, (2, 1, 2), 3)
    work = generate_work(scene, tmp_path)
    assert sum(map(sum, work["lengths"])) == 2 * fixed_tokens(20, 3, 2)
    assert [len(prefix) - len(work["prefixes"][0]) for prefix in work["prefixes"][:20]] == list(range(0, 60, 3))


def test_a_group_has_all_responses_of_a_problem() -> None:
    scene = build_scene(build_policy(30), 10, (2, 3, 1), 3)
    assert [len(group.rollouts) for group in scene.groups] == [3, 3]
    assert all(len(rollout.response_ids) == 30 for group in scene.groups for rollout in group.rollouts)


def test_exponents_are_slopes_of_logarithms() -> None:
    rows = [{"method": "reuse", "steps": n, "seconds": 3 * n**1.5, "tokens": 7 * n**2} for n in (50, 100, 400)]
    noise = {"method": "reuse", "steps": 10, "seconds": 1e9, "tokens": 1}
    assert fitted([noise, *rows], "seconds") == pytest.approx(1.5)
    assert fitted([noise, rows[0]], "seconds") is None
    # Reuse may need no token at all.
    assert fitted([{"steps": 75, "tokens": 0}, *rows], "tokens") == pytest.approx(2)
    other = [{**row, "method": "fixed_k", "seconds": row["steps"]} for row in rows]
    exponents = exponents_of([noise, *rows, *other], "steps", 50)
    assert exponents == {
        "reuse": {"tokens": pytest.approx(2), "seconds": pytest.approx(1.5)},
        "fixed_k": {"tokens": pytest.approx(2), "seconds": pytest.approx(1)},
    }
    widths = [{"method": "reuse", "parameters": p, "tokens": 5, "seconds": p**0.5} for p in (100, 400)]
    assert exponents_of(widths, "parameters", 0)["reuse"] == {"tokens": pytest.approx(0), "seconds": pytest.approx(0.5)}


def test_the_published_report_is_that_of_its_measurements() -> None:
    folder = Path(__file__).parents[2] / "docs/results/length"
    assert markdown(json.loads((folder / "length.json").read_text())) == (folder / "length.md").read_text()


def test_costs_with_larger_models_by_hand() -> None:
    """Decoding has 6% and training 12% of the speed, so a token of a continuation costs twice as much as one forward.

    10 steps of 30 tokens with K = 9: 9 * 30 * 55 tokens of continuations. The value network: 7 forward passes (one
    prediction, and two epochs of three) over 420 tokens.
    """
    tokens = {"fixed_k": 1485, "reuse": 297}  # 9 * 3 * 55, and a fifth of it
    rows = [{"method": method, "steps": 10, "tokens": number} for method, number in tokens.items()]
    found = predictions({"rows": [*rows, {"method": "generate", "steps": 10}], "k": 9, "step_tokens": 3})
    assert [row["method"] for row in found[:2]] == ["fixed_k", "reuse"] and len(found) == 3 * 2 * 2
    ratios = [row["lengths"][0]["continuations"] / row["lengths"][0]["value_network"] for row in found[:2]]
    whole = 2 * 9 * 30 * 55 / (7 * 420)
    assert ratios == pytest.approx([whole, whole / 5])
    assert found[0]["lengths"][0]["steps"] == 10 and found[0]["gpus"] == "1x a100"
