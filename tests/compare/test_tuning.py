"""dev/tune.py: the rule of successive halving by hand, and a small tuning with real runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from dev.tune import Score, budgets_of, cells_of, command_of, grids_of, parsed, ranked, score, survivors

from dev import tune
from vineppo.cli.main import main
from vineppo.compare.arms import load_arms
from vineppo.compare.records import Evaluation
from vineppo.compare.spec import arms_of
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
    result = score(runs, 250, 0.6)
    assert result.accuracy == pytest.approx(0.7)  # .7 with both seeds, half-way between 200 and 300
    assert result.tokens == pytest.approx(160)
    assert score(runs, 150, 0.6).tokens is None  # reached only beyond the budget
    longer = [(*run, *evaluations((400, 0.99))) for run in runs]
    assert score(longer, 250, 0.6) == result  # a run that has gone on counts as it was at the budget


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
    wrong = grids_of([arm], ["rollouts.num_problems+learner.minibatch_size=8:32:4"])["grpo"]
    with pytest.raises(UserError, match="8:32:4 has 3 values for 2 settings"):
        cells_of(arm, wrong, None)


SMALL = [
    *("judgement", "--budget", "1200", "--rungs", "2", "--target", "0.9", "--grid", "learner.lr=1e-5,3e-4"),
    *("--set", "rollouts.num_problems=2", "--set", "rollouts.group_size=2", "--set", "learner.minibatch_size=4"),
    *("--set", "eval.every=1", "--set", "eval.num_problems=4"),
]


def tokens_of(run: Path) -> list[int]:
    """The cumulative generated tokens of a run after each iteration, which are numbered without gaps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    return [line["tokens/generated"] for line in lines]


def test_survivors_go_on_and_nothing_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings are real, but run in this process, which saves its start."""

    def in_this_process(command: Sequence[str], **options: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=main(list(command[3:])))

    monkeypatch.setattr(tune, "subprocess", SimpleNamespace(run=in_this_process, STDOUT=None))
    arguments = [*SMALL, "--algorithms", "grpo", "--seeds", "100-100", "--out", str(tmp_path)]
    result = tune.tune(*parsed(arguments))
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
    plan, algorithms, cells = parsed(arguments)
    assert command_of(plan, cells["grpo"][0], 100, 600) == ()
    assert tune.tune(plan, algorithms, cells)["algorithms"] == result["algorithms"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.jsonl")}
    with pytest.raises(UserError, match="was tuned with"):
        tune.tune(*parsed([*arguments, "--set", "learner.epochs=1"]))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--grid", "learner.epochs=1,x"], "learner.epochs is 'x'"),
        (["--set", "eval.every=0"], "eval.every is 0"),
        (["--grid", "reinforce:learner.epochs=1,2"], "different numbers of cells"),
        (["--eta", "1"], "--eta above 1"),
    ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path: Path, more: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        tune.tune(*parsed([*SMALL, "--algorithms", "reinforce,grpo", "--out", str(tmp_path / "o"), *more]))
    assert not (tmp_path / "o").exists()


def test_an_algorithm_whose_cells_all_failed_has_no_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(command: Sequence[str], stdout: Any, **options: Any) -> SimpleNamespace:
        stdout.write("error: no memory\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(tune, "subprocess", SimpleNamespace(run=failing, STDOUT=None))
    result = tune.tune(*parsed([*SMALL, "--algorithms", "grpo", "--seeds", "100-100", "--out", str(tmp_path)]))
    own = result["algorithms"]["grpo"]
    assert own["best"] is None and {cell["reason"] for cell in own["rungs"][-1]["cells"].values()} == {
        "error: no memory"
    }
    assert "all cells of the last rung failed, so arms.yaml has no grpo" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "arms.yaml").read_text()) == {}
