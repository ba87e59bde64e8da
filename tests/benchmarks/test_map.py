"""benchmarks/map.py: its tasks are allowed, and its table and picture of results that are incomplete."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.map import POINTS, _entry, _over_tasks, _picture, _table, parsed

from vineppo.cli.common import training_config
from vineppo.model.policy import Policy
from vineppo.tasks import build_task
from vineppo.training.rollouts import check_length


def test_every_task_is_allowed_and_fits_the_model() -> None:
    for point in POINTS:
        config = training_config("wording", point.settings, "reinforce")
        codec = Policy.load(config.model).codec
        task = build_task(config.task, codec.chat_prompt)
        assert task.size("train") == (None if config.task.train_problems is None else config.task.train_problems)
        for index in range(20):
            problem, limit = task.problem("train", index), config.rollouts.max_new_tokens
            check_length(problem.id, len(codec.prompt_ids(problem)), limit, codec.max_length)
            demonstration = codec.response_ids(problem, task.demonstration("train", index)[1])
            assert len(demonstration) <= limit  # a right response is not cut off


NO_DIFFERENCE = {"tokens": None, "mean": None, "low": None, "high": None}


def result(ratio: float | None, reason: str | None, difference: dict[str, Any]) -> dict[str, Any]:
    """What `vineppo compare` measured on a task, as far as the map uses it."""
    interval = {"low": None if ratio is None else ratio / 2, "high": None if ratio is None else ratio * 2}
    arm = {
        "accuracy_before": {"mean": 0.2},
        "accuracy_after": None,
        "final_accuracy": {"mean": 0.8, "low": 0.7, "high": 0.9},
    }
    best = {"baseline": "reinforce", "baseline_best_accuracy": 0.7, "reason": reason}
    best |= {f"{axis}_ratio": ratio for axis in ("tokens", "seconds")}
    best |= {f"{axis}_ratio_interval": interval for axis in ("tokens", "seconds")}
    best["difference_at_equal_tokens"] = difference
    return {"arms": {"counterfactual": arm, "reinforce": arm, "rloo": arm}, "best_vs_baseline": best}


@pytest.mark.usefixtures("drawn_figures")
def test_a_task_without_a_ratio_has_a_row_that_says_why(tmp_path: Path) -> None:
    options = Namespace(arm="counterfactual", baselines=["reinforce"], out=tmp_path, seeds="1", budget=100, command="x")
    options.few_baselines = ["rloo"]
    points = (*POINTS[:2], POINTS[-1])  # The last task has 256 training problems, and therefore one more arm.
    for point in points:
        for run, rewards in (
            ("counterfactual-seed0", [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
            ("reinforce-seed0", [0.6]),
            ("reinforce-seed1", [0.0]),  # from an earlier call with more seeds
            ("rloo-seed0", [1.0]),
        ):
            folder = tmp_path / point.name / "runs" / run
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(
                '{"iteration": 0}\n' + "".join(f'{{"reward/mean": {r}}}\n' for r in rewards)
            )
    starts = "Counterfactual starts at or above the best accuracy of REINFORCE"
    measured = (
        result(2.0, None, {"tokens": 90, "mean": 0.05, "low": 0.01, "high": 0.09}),
        result(None, "Counterfactual never reached the best accuracy of REINFORCE", NO_DIFFERENCE),
        result(None, starts, NO_DIFFERENCE),
    )
    entries = {point.name: _entry(point, options, found) for point, found in zip(points, measured, strict=True)}
    arms = entries["base"]["arms"]
    # The mean of the last five iterations, of which the second arm has one.
    assert arms["counterfactual"]["accuracy_on_training_problems"] == pytest.approx(0.3)
    assert arms["reinforce"]["accuracy_on_training_problems"] == 0.6
    rows = [line.split(" | ") for line in _table(entries, options).splitlines() if line.startswith("| ")][1:]
    assert [row[-4:] for row in rows] == [
        ["reinforce", "2.00 [1.00, 4.00]", "2.00 [1.00, 4.00]", "+5.0 [1.0, 9.0] |"],
        *[["reinforce", "-", "-", "- |"]] * 2,
    ]
    cells = ["20%", "80.0% [70.0, 90.0] (30%)", "80.0% [70.0, 90.0] (60%)"]
    assert rows[0][2:6] == [*cells, ""]
    assert rows[2][2:6] == [*cells, "80.0% [70.0, 90.0] (100%)"]
    assert "\n1 seed(s), 100 generated tokens per run" in _table(entries, options)
    # One ratio, 2, and one difference, 5 points: there is no interval over tasks.
    assert _over_tasks(entries)["tokens_ratio"] == {"mean": pytest.approx(2), "low": None, "high": None}
    assert "Over the 3 tasks, `counterfactual` is +5.0 points from" in _table(entries, options)
    other = {"tokens_ratio": 8.0, "difference_at_equal_tokens": {"mean": 0.01}}
    overall = _over_tasks({"a": entries["base"], "b": other})
    # The mean of log 2 and log 8 is log 4, their standard error log 2, and Student's t for one degree 12.706.
    assert overall["tokens_ratio"]["mean"] == pytest.approx(4)
    assert overall["tokens_ratio"]["high"] == pytest.approx(4 * 2**12.7062, rel=1e-3)
    assert overall["difference"]["mean"] == pytest.approx(0.03)
    _picture(entries, options, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--points", "steps99"], "--points: unknown steps99; allowed: base, "),
        (["--baselines", "b,grpo"], "--baselines: unknown grpo; allowed: a, b"),
        (["--arm", "c"], "--arm: unknown c; allowed: a, b"),
        (["--set", "eval.every"], "--set must be KEY=VALUE"),
        (["--set", "task.trap_share=0.4"], "--set task.trap_share: the tasks of the map choose it"),
        (["--arms", "absent.yaml"], "absent.yaml is not a file"),
        (["--baselines", "a"], "name a twice"),
        (["--few_baselines", "b"], "--arm, --baselines and --few_baselines name b twice"),
        (["--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["--budget", "0"], "budget is tokens=0; it must be a finite number above 0"),
        (["--jobs", "0"], "--jobs is 0; it must be at least 1"),
    ],
)
def test_wrong_names_are_found_before_the_first_run(
    tmp_path: Path, more: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "arms.yaml").write_text("a: {algorithm: grpo}\nb: {algorithm: rloo}\n")
    given = ["--arms", str(tmp_path / "arms.yaml"), "--arm", "a", "--baselines", "b", "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        parsed([*given, *more])
    assert named in capsys.readouterr().err and not (tmp_path / "o").exists()
    options = parsed([*given, "--set", "eval.every=1", "--points", "base,habit"])
    assert (options.set, options.points, options.baselines) == ({"eval.every": "1"}, ["base", "habit"], ["b"])
    # A setting that only other tasks set themselves is free.
    assert parsed([*given, "--set", "task.trap_share=0.4", "--points", "base"]).set == {"task.trap_share": "0.4"}
