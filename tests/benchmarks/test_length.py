"""The model, the workload and the fits of benchmarks/length.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.length import build_policy, build_scene, exponents_of, fitted, fixed_tokens, generate_work, measure


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
