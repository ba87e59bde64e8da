"""`vineppo tune`: the rule of successive halving by hand, and a small tuning with real runs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from vineppo.cli.main import main
from vineppo.cli.options import parse_request, parser_of
from vineppo.cli.tune import COMMAND, _spec_of, check_cells
from vineppo.compare import tuning
from vineppo.compare.arms import load_arms
from vineppo.compare.grid import cells_of, grids_of
from vineppo.compare.records import Evaluation
from vineppo.compare.runs import PlannedRun
from vineppo.compare.spec import arms_of
from vineppo.compare.tuning import Score, TuneSpec, budgets_of, planned_run, ranked, score_of, survivors, tune
from vineppo.types import UserError


def evaluations(*pairs: tuple[float, float]) -> tuple[Evaluation, ...]:
    """Evaluations (tokens, accuracy), with one update per 100 tokens."""
    return tuple(Evaluation(tokens / 100, tokens, tokens, tokens, accuracy, None) for tokens, accuracy in pairs)


def test_cells_that_reach_the_target_are_ranked_by_tokens_and_come_first() -> None:
    scores = {
        "slow": Score(0.95, 900.0),
        "failed": Score(None, reason="error: no"),
        "low": Score(0.5),
        "fast": Score(0.91, 400.0),
        "high": Score(0.89),
    }
    assert ranked(scores) == ["fast", "slow", "high", "low", "failed"]
    assert survivors(ranked(scores), 2) == ["fast", "slow", "high"]
    assert survivors(["a"], 3) == ["a"]


def test_budgets_of_the_rungs() -> None:
    assert budgets_of(800_000, 3, 2) == (200_000, 400_000, 800_000)
    assert budgets_of(900, 3, 3) == (100, 300, 900)


def test_the_score_of_a_cell_by_hand() -> None:
    """The budget is 250 tokens. The mean curve is .2, .45, .7 after 0, 100, 200 tokens, and reaches .6 after 160."""
    runs = [
        evaluations((0, 0.2), (100, 0.4), (200, 0.6), (300, 0.8)),
        evaluations((0, 0.2), (100, 0.5), (200, 0.8), (300, 0.6)),
    ]
    result = score_of(runs, 250, 0.6)
    assert result.accuracy == pytest.approx(0.7)  # .7 with both seeds, half-way between 200 and 300
    assert result.tokens == pytest.approx(160)
    assert score_of(runs, 150, 0.6).tokens is None  # reached only beyond the budget
    longer = [(*run, *evaluations((400, 0.99))) for run in runs]
    assert score_of(longer, 250, 0.6) == result  # a run that has gone on counts as it was at the budget


def test_every_algorithm_gets_the_same_number_of_cells() -> None:
    algorithms = arms_of(("grpo", "vineppo"))
    texts = ["learner.lr=1,2,3", "grpo:rollouts.group_size=2,4", "vineppo.num_mc_rollouts=1,3,9", "grpo:learner.lr=5,6"]
    grids = grids_of(algorithms, texts)
    assert grids["grpo"] == {"learner.lr": ("5", "6"), "rollouts.group_size": ("2", "4")}
    assert grids["vineppo"] == {"learner.lr": ("1", "2", "3"), "vineppo.num_mc_rollouts": ("1", "3", "9")}
    assert [cell.name for cell in cells_of(algorithms[0], grids["grpo"], 4)] == [
        "grpo-lr=5-group_size=2",
        "grpo-lr=5-group_size=4",
        "grpo-lr=6-group_size=2",
        "grpo-lr=6-group_size=4",
    ]
    chosen = cells_of(algorithms[1], grids["vineppo"], 4)
    assert len({cell.name for cell in chosen}) == 4 and chosen == cells_of(algorithms[1], grids["vineppo"], 4)
    with pytest.raises(UserError, match="the grid of grpo has 4 combinations, but --cells is 5"):
        cells_of(algorithms[0], grids["grpo"], 5)
    with pytest.raises(UserError, match="rloo is not tuned"):
        grids_of(algorithms, ["rloo:learner.lr=1,2"])


def test_tied_settings_have_the_same_value() -> None:
    arm = arms_of(["grpo"])[0]
    grid = grids_of([arm], ["rollouts.num_problems+learner.minibatch_size=32,64"])["grpo"]
    cells = cells_of(arm, grid, None)
    assert [dict(cell.overrides) for cell in cells] == [
        {"rollouts.num_problems": value, "learner.minibatch_size": value} for value in ("32", "64")
    ]
    assert [cell.name for cell in cells] == ["grpo-num_problems=32", "grpo-num_problems=64"]
    pairs = grids_of([arm], ["rollouts.num_problems+learner.minibatch_size=8:32,20:80"])["grpo"]
    assert dict(cells_of(arm, pairs, None)[1].overrides) == {
        "rollouts.num_problems": "20",
        "learner.minibatch_size": "80",
    }
    # Values that begin in the same way are different cells, in different directories.
    alike = grids_of([arm], ["rollouts.num_problems+learner.lr=64:1e-4,64:2e-4,8:2e-4"])["grpo"]
    assert [(cell.name, *cell.overrides.values()) for cell in cells_of(arm, alike, None)] == [
        ("grpo-num_problems=64+1e-4", "64", "1e-4"),
        ("grpo-num_problems=64+2e-4", "64", "2e-4"),
        ("grpo-num_problems=8+2e-4", "8", "2e-4"),
    ]
    # The name of a cell does not depend on other values, so that values can be added to a grid.
    assert cells_of(arm, {key: values[1:] for key, values in alike.items()}, None) == cells_of(arm, alike, None)[1:]
    wrong = grids_of([arm], ["rollouts.num_problems+learner.minibatch_size=8:32:4"])["grpo"]
    with pytest.raises(UserError, match="8:32:4 has 3 values for 2 settings"):
        cells_of(arm, wrong, None)


def test_cells_with_one_name_are_refused() -> None:
    cell = replace(arms_of(["grpo"])[0], name="grpo-lr=1_2")
    with pytest.raises(
        UserError, match="--grid gives two cells the name grpo-lr=1_2, which is also the name of their dir"
    ):
        TuneSpec("judgement", {"grpo": (cell, replace(cell, overrides={"learner.lr": "2"}))}, 1000, "out")


SMALL = (
    *("judgement", "--budget", "tokens=1200", "--rungs", "2", "--target", "0.9", "--grid", "learner.lr=1e-5,3e-4"),
    *("--rollouts.num_problems", "2", "--rollouts.group_size", "2", "--learner.minibatch_size", "4"),
    *("--eval.every", "1", "--eval.num_problems", "4"),
)


def spec_of(*arguments: str) -> TuneSpec:
    """What a command line asks for."""
    return _spec_of(parse_request(parser_of("tune", COMMAND), COMMAND, list(arguments)))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def tokens_of(run: Path) -> list[int]:
    """The cumulative generated tokens of a run after each iteration, which are numbered without gaps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    return [line["tokens/generated"] for line in lines]


def run_in_this_process(plans: Sequence[PlannedRun], jobs: int, console: Console) -> dict[str, str]:
    """Train as `run_all` does, but in this process, which saves its start."""
    codes = {plan.name: main(list(plan.command[3:])) for plan in plans if plan.command}
    return {name: f"exit code {code}" for name, code in codes.items() if code}


def test_survivors_go_on_and_nothing_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "run_all", run_in_this_process)
    spec = spec_of(*SMALL, "--algorithms", "grpo", "--seeds", "100-100", "--out", str(tmp_path))
    check_cells(spec)
    result = tune(spec, quiet())
    own = result["algorithms"]["grpo"]
    first, second = own["rungs"]
    best, lost = first["cells"]
    assert (first["budget"], second["budget"]) == (600, 1200)
    assert list(second["cells"]) == [best] == [own["best"]]
    assert all(cell["accuracy"] is not None for cell in (*first["cells"].values(), *second["cells"].values()))
    tokens = {cell: tokens_of(tmp_path / "runs" / f"{cell}-seed100") for cell in (best, lost)}
    assert tokens[best][-1] >= 1200 > tokens[best][-2]
    assert tokens[lost][-1] >= 600 > tokens[lost][-2]
    assert own["generated_tokens"] == tokens[best][-1] + tokens[lost][-1]
    (tuned,) = load_arms(tmp_path / "arms.yaml")
    shared = {"rollouts.num_problems": "2", "rollouts.group_size": "2", "learner.minibatch_size": "4"}
    assert tuned.overrides == {**shared, **own["settings"][best]} and tuned.cells == 2
    assert yaml.safe_load((tmp_path / "arms.yaml").read_text())["grpo"]["algorithm"] == "grpo"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert planned_run(spec, spec.cells["grpo"][0], 100, 600).action == "keep"
    assert tune(spec, quiet())["algorithms"] == result["algorithms"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.jsonl")}
    other = spec_of(*SMALL, "--algorithms", "grpo", "--out", str(tmp_path), "--learner.epochs", "1")
    named = r"contains a tuning with overrides .*--rollouts.num_problems=2.*, not .*--learner.epochs=1"
    with pytest.raises(UserError, match=named):
        tune(other, quiet())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--grid", "learner.epochs=1,x"], "learner.epochs is 'x'"),
        (["--eval.every", "0"], "eval.every is 0"),
        (["--grid", "reinforce:learner.epochs=1,2"], "different numbers of cells"),
        (["--eta", "1"], "eta is 1; it must be a finite number above 1"),
        (["--eta", "two"], "--eta is 'two'; it must be a number"),
        (["--cells", "0"], "--cells is 0"),
        (["--budget", "updates=9"], "cells are ranked by tokens"),
        (["--budget", "tokens=1", "--rungs", "3"], "first of 3 rungs has less than one token"),
        (["--run.seed", "1"], "run.seed is set by `vineppo tune`"),
        (["--grid", "run.max_tokens=1,2"], "run.max_tokens is set by `vineppo tune`"),
        (["--vineppo.splitter", "newline"], "vineppo.splitter is a setting of vineppo, which is not tuned"),
        (["--algorithms", "grpo,grpo"], "an algorithm occurs twice"),
    ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path: Path, more: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named) as raised:
        check_cells(spec_of(*SMALL, "--algorithms", "reinforce,grpo", "--out", str(tmp_path / "o"), *more))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["algorithms", "grid", "budget", "out"])
def test_a_missing_option_is_named(name: str, capsys: pytest.CaptureFixture) -> None:
    options = {"algorithms": "grpo", "grid": "learner.lr=1,2", "budget": "tokens=9", "out": "somewhere"}
    given = [text for key, value in options.items() if key != name for text in (f"--{key}", value)]
    assert main(["tune", "judgement", *given]) == 2
    assert capsys.readouterr().err.startswith(f"error: --{name} is not given; give ")


def test_a_setting_of_one_algorithm_is_given_to_its_cells_only() -> None:
    algorithms = ("--algorithms", "vineppo,grpo", "--vineppo.num_mc_rollouts", "3")
    spec = spec_of("judgement", *algorithms, "--grid", "learner.lr=1e-4,2e-4", "--budget", "tokens=800", "--out", "o")
    settings = {name: spec.settings_of(cells[0], 200) for name, cells in spec.cells.items()}
    assert settings["vineppo"]["vineppo.num_mc_rollouts"] == "3"
    assert "vineppo.num_mc_rollouts" not in settings["grpo"]
    assert {own["run.max_tokens"] for own in settings.values()} == {"200"}
    assert {own["learner.lr"] for own in settings.values()} == {"1e-4"}


def test_an_algorithm_without_a_finished_cell_has_no_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(plans: Sequence[PlannedRun], jobs: int, console: Console) -> dict[str, str]:
        return {plan.name: "error: no memory" for plan in plans}

    monkeypatch.setattr(tuning, "run_all", failing)
    console = quiet()
    result = tune(spec_of(*SMALL, "--algorithms", "grpo", "--seeds", "100-100", "--out", str(tmp_path)), console)
    own = result["algorithms"]["grpo"]
    reasons: dict[str, Any] = own["rungs"][-1]["cells"]
    assert own["best"] is None and {cell["reason"] for cell in reasons.values()} == {"error: no memory"}
    assert isinstance(console.file, io.StringIO)
    assert "no cell of the last rung finished, so arms.yaml has no grpo" in console.file.getvalue()
    assert yaml.safe_load((tmp_path / "arms.yaml").read_text()) == {}


def test_an_edited_recipe_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise runs with two versions of the recipe would be ranked together."""
    monkeypatch.setattr(tuning, "run_all", lambda plans, jobs, console: {})
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learner: {lr: 1.0e-4}\n")
    arguments = (str(recipe), *SMALL[1:], "--algorithms", "grpo", "--out", str(tmp_path / "out"))
    tune(spec_of(*arguments), quiet())
    tune(spec_of(*arguments), quiet())  # the same text: no error
    recipe.write_text("learner: {lr: 2.0e-4}\n")
    with pytest.raises(UserError, match="contains a tuning with another version of recipe"):
        tune(spec_of(*arguments), quiet())


def test_another_directory_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    for out, message in ((tmp_path, "is not empty and contains no tuning"), (tmp_path / "thesis.tex", "is a file")):
        with pytest.raises(UserError, match=message):
            tune(spec_of(*SMALL, "--algorithms", "grpo", "--out", str(out)), quiet())
