"""`vineppo compare` without training: planned runs, and the analysis of synthetic runs with known results."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vineppo.compare.comparison import compare
from vineppo.compare.curves import Curves, align, first_reach, versus
from vineppo.compare.directory import exclusive_lock, open_directory
from vineppo.compare.figures import analyse
from vineppo.compare.records import evaluations_of, load_run
from vineppo.compare.report import missing_entry
from vineppo.compare.runs import PlannedRun, _Child, _report, plan_runs, run_all, run_state
from vineppo.compare.spec import Arm, Budget, CompareSpec, arms_of, parse_budget
from vineppo.compare.tables import missing_lines, table_rows
from vineppo.run.plots import plot_run
from vineppo.types import UserError

pytestmark = pytest.mark.usefixtures("drawn_figures")

compare_module = importlib.import_module("vineppo.compare.comparison")

Point = tuple[float, float, float, float]
"""(updates, generated tokens, seconds of training, accuracy)."""

PPO = [[0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.7, 0.6]]  # mean .2 .3 .4 .6 .6: the best is .6, first at 30 updates
VINE = [[0.2, 0.4, 0.7, 0.8, 0.8], [0.2, 0.6, 0.7, 0.8, 0.9]]  # mean .2 .5 .7 .8 .85: .6 is half-way between 10 and 20


def opened(spec: CompareSpec, out: Path) -> None:
    """Open the directory of a comparison."""
    open_directory(out, "compare-spec.json", spec.identity(), "comparison")


def points(accuracies: Sequence[float], tokens: float, seconds: float, every: int = 10) -> list[Point]:
    """Evaluations after every `every` updates; each update uses `tokens` and `seconds`."""
    return [(i * every, i * every * tokens, i * every * seconds, value) for i, value in enumerate(accuracies)]


def write_run(
    out: Path, algorithm: str, seed: int, evaluations: Sequence[Point], *, finish: str = "updates", kl: bool = False
) -> Path:
    """Write the directory of a finished run, with one line of metrics per evaluation."""
    run = out / "runs" / f"{algorithm}-seed{seed}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("task:\n  name: chain\n  level: judgement\n")
    lines = []
    for iteration, (updates, tokens, seconds, accuracy) in enumerate(evaluations):
        line = {
            "iteration": iteration,
            "updates": updates,
            "tokens/generated": tokens,
            "tokens/trained": tokens / 4,
            "seconds/train": seconds,
            "eval/accuracy": accuracy,
        }
        if kl and iteration > 0:  # measured before the updates of the iteration
            line["kl/ref"] = evaluations[iteration - 1][0] / 1000
        lines.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    updates, tokens, seconds, accuracy = evaluations[-1]
    summary = {
        "algorithm": algorithm,
        "seed": seed,
        "recipe": "default",
        "accuracy_before": {"mean": evaluations[0][3], "low": 0.1, "high": 0.3},
        "accuracy_after": {"mean": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05},
        "updates": updates,
        "iterations": len(evaluations) - 1,
        "seconds": seconds,
        "seconds_eval": 1.0,
        "seconds_total": seconds + 1,
        "tokens": {"rollouts": tokens / 4, "mc": 3 * tokens / 4, "generated": tokens, "trained": tokens / 4},
        "finish_reason": finish,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def write_ppo_and_vine(out: Path, kl: bool = False) -> None:
    for seed in (0, 1):
        write_run(out, "ppo", seed, points(PPO[seed], 100, 1.0 + seed), kl=kl)  # 1.5 seconds per update on average
        write_run(out, "vineppo", seed, points(VINE[seed], 400, 5.0), kl=kl)


def load_all(out: Path) -> list:
    return [load_run(run) for run in sorted((out / "runs").iterdir())]


def make_spec(directory: Path, **changes: object) -> CompareSpec:
    spec = CompareSpec("default", arms_of(("vineppo", "ppo")), (0, 1), Budget("updates", 40), str(directory))
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def arms(*names: str) -> tuple[Arm, ...]:
    return arms_of(names)


def buffer_console() -> Console:
    """A console that writes to a buffer."""
    return Console(file=io.StringIO(), width=200)


# --- analysis ---------------------------------------------------------------------------------------------------------


def test_ratios_by_hand(tmp_path: Path) -> None:
    write_ppo_and_vine(tmp_path)
    pair = analyse(load_all(tmp_path), arms("vineppo", "ppo"))["vs_reference"]
    assert pair["baseline_best_accuracy"] == pytest.approx(0.6)
    assert pair["baseline_reach"] == pytest.approx({"updates": 30, "tokens": 3000, "trained": 750, "seconds": 45})
    assert pair["reach"] == pytest.approx({"updates": 15, "tokens": 6000, "trained": 1500, "seconds": 75})
    assert pair["updates_ratio"] == pytest.approx(2.0)
    assert pair["tokens_ratio"] == pytest.approx(0.5)
    assert pair["trained_ratio"] == pytest.approx(0.5)
    assert pair["seconds_ratio"] == pytest.approx(0.6)
    assert pair["reason"] is None


def test_accuracy_at_equal_amounts_by_hand(tmp_path: Path) -> None:
    write_ppo_and_vine(tmp_path)
    equal = analyse(load_all(tmp_path), arms("vineppo", "ppo", "grpo"))["equal"]
    means = {axis: {name: interval["mean"] for name, interval in at["accuracy"].items()} for axis, at in equal.items()}
    assert {axis: at["amount"] for axis, at in equal.items()} == {
        "updates": 40,
        "tokens": 4000,
        "trained": 1000,
        "seconds": 40,
    }
    assert means["updates"] == pytest.approx({"vineppo": 0.85, "ppo": 0.6})
    assert means["tokens"] == pytest.approx({"vineppo": 0.5, "ppo": 0.6})  # VinePPO has used them after 10 updates
    # After 40 seconds VinePPO has done 8 updates (.36 and .52), PPO 40 with seed 0 (.6) and 20 with seed 1 (.4).
    assert means["seconds"] == pytest.approx({"vineppo": 0.44, "ppo": 0.5})
    assert analyse(load_all(tmp_path), arms("vineppo"))["equal"] == {}


def test_final_accuracy_has_the_student_interval(tmp_path: Path) -> None:
    write_ppo_and_vine(tmp_path)
    figures = analyse(load_all(tmp_path), arms("vineppo", "ppo"))
    final = figures["arms"]["vineppo"]["final_accuracy"]  # .8 and .9: t_{.975,1} * sd / sqrt 2 = 12.706 * .05
    assert final == pytest.approx({"mean": 0.85, "low": 0.85 - 0.635310, "high": 0.85 + 0.635310}, abs=1e-5)
    ppo = figures["arms"]["ppo"]
    assert ppo["final_accuracy"] == {"mean": pytest.approx(0.6), "low": None, "high": None}
    assert ppo["accuracy_before"]["mean"] == pytest.approx(0.2)
    assert ppo["seconds"]["mean"] == pytest.approx(60)
    assert ppo["tokens"] == pytest.approx({"rollouts": 1000, "mc": 3000, "generated": 4000, "trained": 1000})
    assert ppo["reach_reference_best"]["updates"] == pytest.approx(30)
    difference = figures["vs_reference"]["final_accuracy_difference"]  # .2 and .3
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["low"] == pytest.approx(0.25 - 0.635310, abs=1e-5)


def test_curves_use_the_union_of_points_and_are_not_extrapolated(tmp_path: Path) -> None:
    first = load_run(write_run(tmp_path, "ppo", 0, [(0, 0, 0, 0.0), (10, 10, 1, 0.2), (40, 40, 4, 0.5)]))
    second = load_run(write_run(tmp_path, "ppo", 1, [(0, 0, 0, 0.2), (20, 40, 6, 0.6), (30, 60, 9, 0.6)]))
    curves = align([first, second])
    assert curves is not None
    assert curves.updates.tolist() == [0, 10, 20, 30]
    assert curves.accuracy == pytest.approx(np.array([[0.0, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.6]]))
    assert curves.tokens.mean(axis=0) == pytest.approx(np.array([0, 15, 30, 45]))
    assert curves.kl is None


def test_the_kl_of_an_evaluation_is_that_of_the_evaluated_policy() -> None:
    """`kl/ref` of an iteration belongs to the policy before its updates, `eval/accuracy` to the one after them."""
    lines = [
        {"iteration": 0, "updates": 0, "eval/accuracy": 0.1},
        {"iteration": 1, "updates": 4, "kl/ref": 0.0, "eval/accuracy": 0.2},
        {"iteration": 2, "updates": 8, "kl/ref": 0.3},
        {"iteration": 3, "updates": 12, "kl/ref": 0.5, "eval/accuracy": 0.4},
    ]
    found = [(e.updates, e.accuracy, e.kl) for e in evaluations_of(lines)]
    assert found == [(0, 0.1, 0.0), (4, 0.2, 0.3), (12, 0.4, None)]


def make_curves(*accuracies: Sequence[float]) -> Curves:
    """One run per sequence of accuracies: a point every 10 updates, 100 tokens and 2 seconds per update."""
    accuracy = np.array(accuracies, dtype=float)
    updates = np.arange(accuracy.shape[1]) * 10.0
    costs = np.tile(updates, (len(accuracy), 1))
    return Curves(updates, accuracy, costs * 100, costs * 25, costs * 2, None)


def test_first_reach_at_the_start_between_points_and_not_at_all() -> None:
    curves = make_curves([0.2, 0.4, 0.3, 0.8])
    at_start = first_reach(curves, 0.1)
    assert at_start is not None and at_start.updates == 0
    between = first_reach(curves, 0.35)  # the first time, not the last
    assert between is not None and (between.updates, between.tokens, between.seconds) == pytest.approx((7.5, 750, 15))
    assert first_reach(curves, 0.81) is None


def test_equal_runs_give_a_ratio_without_interval() -> None:
    result = versus(make_curves(*[[0.2, 0.6, 0.8]] * 3), make_curves(*[[0.2, 0.4, 0.6]] * 3))
    assert result["updates_ratio"] == pytest.approx(2.0)
    assert result["updates_ratio_interval"] == {"low": None, "high": None}
    assert result["share_reached_without_one_run"] == 1


def test_the_interval_of_a_ratio_by_hand() -> None:
    """The baseline always needs 20 updates to reach 0.6; the algorithm's runs reach it after 10 and after 5.

    Without the second run the ratio is 2 and without the first it is 4: v = 1/2 * 2 * (log(2) / 2)^2, 1 degree.
    """
    curves, baseline = make_curves([0.2, 0.6, 0.6], [0.2, 1.0, 1.0]), make_curves(*[[0.2, 0.4, 0.6]] * 2)
    result = versus(curves, baseline)
    assert result["updates_ratio"] == pytest.approx(3.0)  # the mean curve reaches 0.6 after 20/3 updates
    factor = math.exp(12.706205 * math.log(2) / 2)
    assert result["updates_ratio_interval"] == pytest.approx({"low": 3 / factor, "high": 3 * factor}, rel=1e-6)


def test_no_interval_if_the_level_is_not_reached_without_one_run() -> None:
    curves, baseline = make_curves([0.2, 0.6, 0.9], [0.2, 0.4, 0.5]), make_curves([0.2, 0.4, 0.6], [0.2, 0.4, 0.6])
    result = versus(curves, baseline)
    assert result["updates_ratio"] is not None
    assert result["share_reached_without_one_run"] == pytest.approx(0.75)
    assert result["updates_ratio_interval"] == {"low": None, "high": None}


def test_no_interval_if_the_algorithm_starts_at_the_level_without_one_run() -> None:
    curves, baseline = make_curves([0.6, 0.6, 0.6], [0.2, 0.6, 0.6]), make_curves([0.2, 0.4, 0.6], [0.2, 0.4, 0.6])
    result = versus(curves, baseline)
    assert result["updates_ratio"] == pytest.approx(2.0)
    assert result["updates_ratio_interval"] == {"low": None, "high": None}


@pytest.mark.parametrize(("num_runs", "bootstrap"), [(3, 0.8), (5, 0.91), (10, 0.94)])
def test_the_intervals_of_ratios_cover_the_true_ratio(num_runs: int, bootstrap: float) -> None:
    """Simulated learning curves with skewed speeds and ends, and accuracies from 256 problems.

    `bootstrap` is the coverage of the percentile bootstrap in the same simulation, which is too low.
    """
    grid, draw = np.arange(0.0, 193.0, 16.0), np.random.default_rng(num_runs)

    def simulated(count: int, speed: float, end: float, problems: int) -> Curves:
        speeds = speed * np.exp(0.2 * draw.standard_normal(count))
        ends = end - 0.02 * draw.exponential(size=count)
        accuracy = 0.18 + (ends - 0.18)[:, None] * (1 - np.exp(-grid / speeds[:, None]))
        if problems:
            accuracy = draw.binomial(problems, accuracy) / problems
        used = np.tile(grid, (count, 1))
        return Curves(grid, accuracy, used, used, used, None)

    expected = versus_ratio(simulated(20_000, 25, 0.95, 0), simulated(20_000, 80, 0.9, 0))
    covered = []
    for _ in range(400):
        result = versus(simulated(num_runs, 25, 0.95, 256), simulated(num_runs, 80, 0.9, 256))
        bounds = result["updates_ratio_interval"]
        covered.append(bounds["low"] is None or bounds["low"] <= expected <= bounds["high"])
    assert 0.93 <= np.mean(covered) <= 0.995
    assert np.mean(covered) > bootstrap


def versus_ratio(curves: Curves, baseline: Curves) -> float:
    """Return the ratio of updates, without its interval."""
    level = float(baseline.accuracy.mean(axis=0).max())
    reach, baseline_reach = first_reach(curves, level), first_reach(baseline, level)
    assert reach is not None and baseline_reach is not None
    return baseline_reach.updates / reach.updates


def test_runs_without_final_evaluation_are_compared_by_their_curves(tmp_path: Path) -> None:
    for name in ("vineppo", "ppo", "grpo"):
        run = write_run(tmp_path, name, 0, points([0.2, 0.4, 0.6], 100, 1))
        summary = json.loads((run / "summary.json").read_text())
        nothing = {"mean": None, "low": None, "high": None}
        summary.update(accuracy_before=nothing, accuracy_after=nothing)
        (run / "summary.json").write_text(json.dumps(summary))
    result = analyse(load_all(tmp_path), arms("vineppo", "ppo", "grpo"))
    assert result["arms"]["ppo"]["final_accuracy"]["mean"] is None
    assert result["vs_best"]["baseline"] is None and result["vs_reference"]["updates_ratio"] == 1


def test_one_seed_gives_a_ratio_without_interval() -> None:
    result = versus(make_curves([0.2, 0.6, 0.8]), make_curves([0.2, 0.4, 0.6]))
    assert result["updates_ratio"] == pytest.approx(2.0)
    assert result["updates_ratio_interval"] == {"low": None, "high": None}
    assert result["share_reached_without_one_run"] is None


def test_a_baseline_that_never_improved_gives_no_ratio(tmp_path: Path) -> None:
    write_run(tmp_path, "ppo", 0, points([0.3, 0.2, 0.1], 100, 1))
    write_run(tmp_path, "vineppo", 0, points([0.3, 0.4, 0.5], 100, 1))
    pair = analyse(load_all(tmp_path), arms("vineppo", "ppo"))["vs_reference"]
    assert pair["updates_ratio"] is None
    assert pair["reason"] == "VinePPO starts at or above the best accuracy of PPO"


def test_any_subset_of_algorithms_can_be_analysed(tmp_path: Path) -> None:
    write_run(tmp_path, "vineppo", 0, points([0.2, 0.6, 0.8], 100, 1))
    write_run(tmp_path, "grpo", 0, points([0.2, 0.3, 0.3], 100, 1))
    write_run(tmp_path, "rloo", 0, points([0.2, 0.3, 0.4], 100, 1))
    figures = analyse(load_all(tmp_path), arms("vineppo", "grpo", "rloo"))
    assert (figures["first"], figures["reference"]) == ("vineppo", "grpo")
    assert figures["vs_reference"]["updates_ratio"] == pytest.approx(10 / 2.5)
    assert figures["arms"]["rloo"]["reach_reference_best"]["updates"] == pytest.approx(10)
    alone = analyse(load_all(tmp_path), arms("rloo"))
    assert alone["reference"] is None and alone["arms"]["rloo"]["reach_reference_best"] is None
    assert alone["vs_reference"]["reason"] == "no finished run of a second arm was evaluated during training"
    absent = analyse(load_all(tmp_path), arms("vineppo", "ppo"))["vs_reference"]
    assert (
        absent["updates_ratio"] is None and absent["reason"] == "no finished run of PPO was evaluated during training"
    )
    best = figures["vs_best"]
    assert best["baseline"] == "rloo"
    assert best["updates_ratio"] == pytest.approx(20 / 5)


# --- planned runs -----------------------------------------------------------------------------------------------------


def test_a_fresh_comparison_interleaves_algorithms_within_seeds(tmp_path: Path) -> None:
    plans = plan_runs(make_spec(tmp_path / "cmp", overrides={"learner.lr": "1e-4"}))
    assert [plan.name for plan in plans] == ["vineppo seed 0", "ppo seed 0", "vineppo seed 1", "ppo seed 1"]
    assert {plan.action for plan in plans} == {"start"}
    command = list(plans[3].command)
    assert command[:5] == [sys.executable, "-m", "vineppo", "train", "default"]
    value = {flag: command[command.index(flag) + 1] for flag in command if flag.startswith("--") and "=" not in flag}
    assert value["--algorithm"] == "ppo"
    assert value["--run.seed"] == "1"
    assert value["--run.dir"] == str(tmp_path / "cmp" / "runs" / "ppo-seed1")
    assert (value["--run.max_updates"], value["--run.max_tokens"], value["--run.max_seconds"]) == ("40", "0", "0")
    assert int(value["--run.iterations"]) > 100_000
    assert command[-2:] == ["--eval.greedy=true", "--learner.lr=1e-4"]


def test_only_missing_runs_are_run_again(tmp_path: Path) -> None:
    write_run(tmp_path, "vineppo", 0, points(VINE[0], 400, 5))
    interrupted = write_run(tmp_path, "ppo", 0, points(PPO[0], 100, 1), finish="interrupted")
    (interrupted / "checkpoints" / "000020").mkdir(parents=True)
    (interrupted / "checkpoints" / "000020" / "manifest.json").write_text("{}")
    killed = tmp_path / "runs" / "vineppo-seed1"
    (killed / "checkpoints" / ".000020.tmp").mkdir(parents=True)  # killed while writing its first checkpoint
    (killed / "checkpoints" / ".000020.tmp" / "manifest.json").write_text("{}")
    plans = {plan.name: plan for plan in plan_runs(make_spec(tmp_path))}
    assert {name: plan.action for name, plan in plans.items()} == {
        "vineppo seed 0": "keep",
        "ppo seed 0": "resume",
        "vineppo seed 1": "restart",
        "ppo seed 1": "start",
    }
    assert plans["vineppo seed 0"].command == ()
    assert plans["ppo seed 0"].command[3:] == ("train", "--resume", str(interrupted))
    assert "--algorithm" in plans["vineppo seed 1"].command


def test_an_interrupted_run_without_checkpoint_or_with_truncated_summary_is_broken(tmp_path: Path) -> None:
    run = write_run(tmp_path, "ppo", 0, points(PPO[0], 100, 1), finish="interrupted")
    assert run_state(run) == "broken"
    (run / "summary.json").write_text('{"finish_reason": "upd')
    assert run_state(run) == "broken"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": "habit"}, "recipe default, not habit"),
        ({"budget": Budget("updates", 96)}, "budget updates=40, not updates=96"),
        ({"overrides": {"learner.lr": "1e-3"}}, "overrides (none), not --learner.lr=1e-3"),
    ],
)
def test_comparison_with_other_settings_is_refused(tmp_path: Path, changes: dict, named: str) -> None:
    write_ppo_and_vine(tmp_path / "a")
    out = tmp_path / "b"
    opened(make_spec(out), out)
    with pytest.raises(UserError) as caught:
        compare(make_spec(out, **changes), buffer_console())
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_edited_recipe_is_detected(tmp_path: Path) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text("learner:\n  lr: 1.0e-4\n")
    spec = make_spec(out, recipe=str(recipe))
    opened(spec, out)
    opened(spec, out)  # the same text: no error
    recipe.write_text("learner:\n  lr: 2.0e-4\n")
    with pytest.raises(UserError, match="another version of recipe"):
        opened(spec, out)


def test_directory_without_comparison_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="contains no comparison"):
        compare(make_spec(tmp_path), buffer_console())
    with pytest.raises(UserError, match="is a file"):
        compare(make_spec(tmp_path / "thesis.tex"), buffer_console())


def test_two_comparisons_do_not_share_a_directory(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    opened(make_spec(out), out)
    with exclusive_lock(out), pytest.raises(UserError, match="in use by another process"):
        compare(make_spec(out), buffer_console())


# --- budgets and specifications ---------------------------------------------------------------------------------------


def test_budgets_are_parsed() -> None:
    assert parse_budget("updates=96") == ("updates", 96)
    assert parse_budget("tokens=2e6") == ("tokens", 2_000_000)
    assert parse_budget("seconds=90.5") == ("seconds", 90.5)
    assert str(parse_budget("tokens=2e6")) == "tokens=2000000"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("96", "updates=N"),
        ("steps=5", "updates=N"),
        ("updates=", "'' is not a number"),
        ("updates=many", "'many'"),
        ("updates=0", "above 0"),
        ("seconds=nan", "finite"),
        ("updates=1.5", "whole number"),
    ],
)
def test_wrong_budget_raises_one_line(text: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arms": (Arm("a", "vinepo"),)}, "did you mean vineppo?"),
        ({"arms": arms_of(("ppo", "ppo"))}, "contains ppo more than once"),
        ({"arms": (Arm("a", "ppo"), Arm("A", "grpo"))}, "contains A, a more than once"),
        ({"arms": (Arm("a", "ppo", {"run.seed": "3"}),)}, "run.seed is set by `vineppo compare`"),
        ({"seeds": ()}, "seeds is empty"),
        ({"baselines": ("rloo",)}, "baselines has rloo, which is not compared; arms: vineppo, ppo"),
        ({"baselines": ("ppo", "ppo")}, "baselines has ppo more than once"),
        ({"jobs": 0}, "jobs is 0"),
        ({"recipe": ""}, "recipe is empty"),
        ({"out": ""}, "out is empty"),
        ({"overrides": {"run.seed": "3"}}, "run.seed is set by `vineppo compare`"),
        ({"overrides": {"run.max_updates": "9"}}, "run.max_updates is set by `vineppo compare`"),
        (
            {"overrides": {"grpo.scale_by_std": "false"}},
            "grpo.scale_by_std is a setting of grpo, which is not compared",
        ),
    ],
)
def test_wrong_specification_raises_one_line(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(UserError) as caught:
        make_spec(tmp_path, **changes)
    assert named in str(caught.value) and "\n" not in str(caught.value)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_finished_comparison_is_reported_without_training(tmp_path: Path) -> None:
    opened(make_spec(tmp_path), tmp_path)
    write_ppo_and_vine(tmp_path, kl=True)
    result = compare(make_spec(tmp_path), buffer_console())
    assert result["missing"] == []
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["vs_reference"]["updates_ratio"] == pytest.approx(2.0)
    assert stored["arms"]["vineppo"]["curve"]["kl"] == pytest.approx([0, 0.01, 0.02, 0.03, None])
    assert (stored["spec"]["budget"], stored["spec"]["level"]) == ("updates=40", "judgement")
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], float(row["accuracy_after"])) for row in rows] == [
        ("vineppo", "0", 0.8),
        ("vineppo", "1", 0.9),
        ("ppo", "0", 0.6),
        ("ppo", "1", 0.6),
    ]
    table = (tmp_path / "table.md").read_text()
    cells = "| vineppo | 2 of 2 | 20.0% | 85.0% [21.5, 100.0] | 40 | 4,000 | 12,000 | 4,000 | 200 |"
    assert f"{cells} 15 | 6,000 | 1,500 | 75 |" in table
    assert "updates 2.00" in table and "seconds 0.60" in table
    assert (
        "At equal generated tokens (4,000 a run), accuracy during training: vineppo 50.0% [0.0, 100.0], ppo 60.0%"
        in table
    )
    for name in ("over_updates", "over_tokens", "over_trained", "over_seconds", "over_kl"):
        assert (tmp_path / f"accuracy_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "final_accuracy.png").exists()


def test_figures_do_not_depend_on_other_runs_in_the_directory(tmp_path: Path) -> None:
    opened(make_spec(tmp_path), tmp_path)
    write_ppo_and_vine(tmp_path)
    write_run(tmp_path, "grpo", 0, points([0.2] * 5, 100, 1))
    result = compare(make_spec(tmp_path, seeds=(0,)), buffer_console())
    assert list(result["arms"]) == ["vineppo", "ppo"]
    assert [run["seed"] for run in result["arms"]["vineppo"]["per_seed"]] == [0]


def scripted_plan(out: Path, seed: int, script: str) -> PlannedRun:
    directory = out / "runs" / f"ppo-seed{seed}"
    log = out / "logs" / f"ppo-seed{seed}.log"
    return PlannedRun("ppo", seed, directory, log, "start", (sys.executable, "-c", script))


def test_failed_run_is_reported_and_the_others_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "template", "ppo", 1, points(PPO[1], 100, 2))
    copy = f"import shutil; shutil.copytree({str(tmp_path / 'template/runs/ppo-seed1')!r}, {{!r}})"
    out = tmp_path / "out"
    plans = [
        scripted_plan(out, 0, "print('loading'); raise SystemExit('error: no such model [x]')"),
        scripted_plan(out, 1, copy.format(str(out / "runs" / "ppo-seed1"))),
    ]
    monkeypatch.setattr(compare_module, "plan_runs", lambda spec: plans)
    console = buffer_console()
    result = compare(make_spec(out, arms=arms_of(("ppo",)), jobs=2), console)
    assert result["missing"] == [
        {
            "arm": "ppo",
            "seed": 0,
            "state": "failed",
            "reason": "error: no such model [x]",
            "log": str(plans[0].log),
        }
    ]
    assert result["arms"]["ppo"]["num_runs"] == 1
    assert table_rows(result)[0][1] == "1 of 2 (1 failed)"
    assert missing_lines(result)[-1] == "FAILED: ppo seed 0: error: no such model [x]"
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ppo seed 0 FAILED with exit code 1" in output and "    error: no such model [x]" in output
    assert "ppo seed 1: accuracy 20.0% -> 60.0%, 40 updates, 80 s" in output
    assert "FAILED: ppo seed 0" in (out / "table.md").read_text()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("command", [(), (sys.executable, "-c", "")])
def test_a_finished_run_of_a_comparison_keeps_no_checkpoint(
    tmp_path: Path, kept: bool, command: tuple[str, ...]
) -> None:
    """The checkpoint of a model with 135 million parameters has 1.8 GB.

    A run may have finished just now, or in an earlier call that was stopped before it removed the checkpoint.
    """
    overrides = {"run.keep_checkpoints": "1"} if kept else {}
    plans = plan_runs(make_spec(tmp_path, overrides=overrides))
    assert [plan.keep_checkpoint for plan in plans] == [kept] * 4
    plan = dataclasses.replace(next(plan for plan in plans if plan.name == "ppo seed 0"), command=command)
    write_run(tmp_path, "ppo", 0, points(PPO[0], 100, 1))
    (plan.directory / "checkpoints" / "000020").mkdir(parents=True)
    plan.log.parent.mkdir(exist_ok=True)
    before = {path for path in plan.directory.rglob("*") if "checkpoints" not in path.parts}
    assert run_all([plan], 1, buffer_console()) == {}
    assert (plan.directory / "checkpoints" / "000020").exists() == kept
    assert {path for path in plan.directory.rglob("*") if "checkpoints" not in path.parts} == before
    assert run_state(plan.directory) == "finished"


def test_the_table_says_which_runs_failed_were_stopped_or_skipped(tmp_path: Path) -> None:
    """A stopped run can be continued; a skipped one was never started."""
    plans = [scripted_plan(tmp_path, seed, "") for seed in range(4)]
    for seed, reason in ((0, "interrupted"), (1, None), (3, None)):
        plans[seed].directory.mkdir(parents=True)
        if reason:
            (plans[seed].directory / "summary.json").write_text(json.dumps({"finish_reason": reason}))
    failures = {"ppo seed 3": "error: disk is full"}
    entries = [missing_entry(plan, failures) for plan in plans]
    assert [(entry["seed"], entry["state"]) for entry in entries] == [
        (0, "stopped"),
        (1, "stopped"),
        (2, "skipped"),
        (3, "failed"),
    ]
    assert entries[3]["reason"] == "error: disk is full"
    # A run that was interrupted before and now fails has failed, although its summary is that of the interruption.
    again = missing_entry(plans[0], {"ppo seed 0": "error: model.path 'm' does not exist"})
    assert (again["state"], again["reason"]) == ("failed", "error: model.path 'm' does not exist")
    figures = {
        name: {"mean": None, "low": None, "high": None}
        for name in ("accuracy_before", "final_accuracy", "greedy_before", "greedy_after")
    }
    result = {
        "spec": {"seeds": [0, 1, 2, 3, 4]},
        "reference": None,
        "missing": entries,
        "arms": {
            "ppo": {
                **figures,
                "cells": None,
                "num_runs": 1,
                "reach_reference_best": None,
                "updates": None,
                "tokens": {"rollouts": None, "mc": None, "trained": None},
                "seconds": {"mean": None},
            }
        },
    }
    assert table_rows(result)[0][:2] == ("ppo", "1 of 5 (1 failed, 2 stopped, 1 skipped)")


@pytest.mark.parametrize(("code", "failed"), [(130, False), (1, True), (-9, True)])
def test_only_an_error_is_a_failure(tmp_path: Path, code: int, failed: bool) -> None:
    """Exit code 130 is that of a run that a signal stopped, with a checkpoint."""
    plan = scripted_plan(tmp_path, 0, "")
    plan.log.parent.mkdir(parents=True)
    plan.log.write_text("error: no\n")
    process = subprocess.Popen(["true"])
    process.wait()
    process.returncode = code
    failures: dict[str, str] = {}
    with open(plan.log, encoding="utf-8") as log:
        _report(_Child(plan, process, log), "[1/1]", failures, buffer_console())
    assert failures == ({"ppo seed 0": "error: no"} if failed else {})


def test_reports_are_written_if_all_runs_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [scripted_plan(tmp_path / "out", 0, "raise SystemExit(2)")]
    monkeypatch.setattr(compare_module, "plan_runs", lambda spec: plans)
    result = compare(make_spec(tmp_path / "out", arms=arms_of(("ppo",)), seeds=(0,)), buffer_console())
    assert result["missing"][0]["reason"] == "exit code 2"
    assert result["arms"]["ppo"]["final_accuracy"] == {"mean": None, "low": None, "high": None}
    assert not (tmp_path / "out" / "compare.csv").exists()


def test_plots_of_one_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: {name: chain}\n")
    start = {"iteration": 0, "updates": 0, "eval/accuracy": 0.2, "eval/accuracy_low": 0.1, "eval/accuracy_high": 0.3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    assert plot_run(tmp_path) == []
    line = {"iteration": 1, "updates": 2, "tokens/rollouts": 100, "tokens/mc": 0, "reward/mean": 0.25}
    seconds = {"seconds/sample": 1.5, "seconds/credit": 0.0, "seconds/update": 0.5, "seconds/eval": 0.0}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**line, **seconds}) + "\n")
        file.write('{"iteration": 2, "upd')  # cut off by a crash
    files = plot_run(tmp_path)
    assert [file.name for file in files] == ["accuracy.png", "tokens.png", "seconds.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
