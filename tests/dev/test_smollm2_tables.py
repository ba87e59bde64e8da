"""The tables of experiments/smollm2 and the recipes that read them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tests.helpers import ROOT

from vineppo.config.load import settings_from_layers
from vineppo.config.schema import TaskConfig
from vineppo.tasks.build import build_task

pytestmark = pytest.mark.real  # reasoning-gym


@pytest.mark.parametrize("recipe", ["sft-sums.yaml", "sums.yaml"])
def test_the_solutions_of_the_tables_earn_the_reward_of_the_recipes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "experiments", raising=False)
    from experiments.smollm2.tables import rows

    table = rows(24)
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    settings = yaml.safe_load((ROOT / "experiments" / "smollm2" / recipe).read_text())["task"]
    files = {key: str(tmp_path / Path(value).name) for key, value in settings.items() if key.endswith("_path")}
    task = build_task(
        settings_from_layers(
            TaskConfig, [(settings | {"demonstration_column": "solution"} | files, f"in recipe {recipe}")]
        )
    )
    problems = [task.problem("train", index) for index in range(24)]
    solutions = [task.demonstration("train", index)[1] for index in range(24)]
    assert list(task.grade(problems, solutions)) == [1.0] * 24
    # A wrong number after the mark earns nothing.
    wrong = [solution.rpartition(" ")[0] + " 77" for solution in solutions]
    assert list(task.grade(problems, wrong)) == [0.0] * 24
    assert problems[0].prompt == table[0]["prompt"] + "\n"
