"""Case 3: training runs in which no reward function applies to some or all responses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.helpers import small_config
from tests.training.test_train import read_lines
from vineppo.config.schema import EvalConfig, RolloutConfig, RunConfig
from vineppo.credit.vineppo import VinePPOSettings
from vineppo.training.loop import train
from vineppo.types import TrainingWarning, UserError


def for_some(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float | None]:
    """None for problems with the answers 0 to 2 and for a third of the texts; otherwise a number that varies."""
    return [
        None if int(right) < 3 or sum(map(ord, text)) % 3 == 0 else sum(map(ord, text)) % 7 / 7
        for text, right in zip(completions, answer, strict=True)
    ]


def for_none(completions: Sequence[str], **_: Any) -> list[float | None]:
    return [None for _ in completions]


@pytest.mark.parametrize("algorithm", ["vineppo", "ppo", "grpo"])
def test_a_run_leaves_out_responses_without_a_reward(tmp_path: Path, algorithm: str) -> None:
    sections: dict[str, Any] = {"run": RunConfig(dir=str(tmp_path / "run"), iterations=1)}
    if algorithm == "vineppo":
        sections["vineppo"] = VinePPOSettings(num_mc_rollouts=2, alternatives=True)
    summary = train(small_config(tmp_path / "run", algorithm, **sections), reward_fn=for_some)
    _, *lines = read_lines(tmp_path / "run")
    for line in lines:
        rows = pq.read_table(tmp_path / f"run/rollouts/{line['iteration']:06d}.parquet").to_pylist()
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        assert 0 < len(rewards) < len(rows) == 16
        assert line["reward/mean"] == pytest.approx(fmean(rewards))
        assert 0 < line["grader/not_applicable_share"] < 1
        for row in rows:
            assert len(row["token_advantages"]) == row["num_tokens"]
            if row["reward"] is None:
                assert set(row["token_advantages"]) == {0.0} and row["values"] == row["step_texts"] == []
            elif algorithm == "vineppo":
                assert row["values"][0] + sum(row["step_advantages"]) == pytest.approx(row["reward"])
        assert any(any(row["token_advantages"]) for row in rows)
    assert 0 < lines[-1]["eval/not_applicable_share"] < 1
    assert 0 <= summary["accuracy_after"]["mean"] <= 1


def test_rewards_that_apply_to_no_response_stop_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", "grpo")
    with pytest.raises(UserError) as caught:
        train(config, reward_fn=for_none)
    (start,) = read_lines(tmp_path / "run")
    assert start["eval/accuracy"] is None and start["eval/not_applicable_share"] > 0.5
    words = str(caught.value).split()
    assert int(words.pop(7)) >= 20
    assert " ".join(words) == (
        "every reward function returned None for all responses that were graded so far, so there is nothing to learn; "
        "return a number for each response to which a reward function applies"
    )


@pytest.mark.usefixtures("drawn_figures")  # a curve with a gap
def test_an_iteration_without_any_reward_warns_and_goes_on(tmp_path: Path) -> None:
    """The reward function is called once per iteration. In the second one it applies to nothing."""
    calls: list[int] = []

    def reward(completions: Sequence[str], **_: Any) -> list[float | None]:
        calls.append(len(completions))
        return [None if len(calls) == 2 else float(len(text) % 2) for text in completions]

    config = small_config(
        tmp_path / "run",
        "grpo",
        run=RunConfig(dir=str(tmp_path / "run"), iterations=3),
        eval=EvalConfig(every=0, final_num_problems=0),
        # No response is truncated, because a truncated one would have the reward 0.
        rollouts=RolloutConfig(num_problems=4, group_size=4, max_new_tokens=100),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrainingWarning)
        summary = train(config, reward_fn=reward)
    assert [str(w.message) for w in caught if w.category is TrainingWarning] == [
        "iteration 2: every reward function returned None for all rollouts, so their advantages are 0; if this happens "
        "often, raise rollouts.num_problems, or remove the problems without a reward from the data"
    ]
    assert calls == [16, 16, 16] and summary["iterations"] == 3
    first, second, third = read_lines(tmp_path / "run")[1:]
    assert second["reward/mean"] is None and second["reward/std"] is None
    assert second["grader/not_applicable_share"] == second["credit/zero_group_share"] == 1
    assert second["credit/advantage_abs_mean"] == second["policy/grad_norm"] == 0
    assert first["policy/grad_norm"] > 0 and math.isfinite(third["reward/mean"])
    assert (tmp_path / "run/plots/accuracy.png").exists()
