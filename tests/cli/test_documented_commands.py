"""The commands of docs/scaling.md are accepted, and the table of plans there has what the commands print."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers import ROOT
from vineppo.cli.common import training_config
from vineppo.cli.main import COMMANDS, main
from vineppo.cli.options import parse_request, parser_of

TEXT = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return the arguments of every `vineppo` in the blocks of code and in the text."""
    blocks = "\n".join(re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    lines = [*blocks.splitlines(), *re.findall(r"`(vineppo [a-z]+ [^-`][^`]*)`", TEXT)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if "vineppo" in words and words[0] in ("vineppo", "torchrun", "srun"):
            found.append(words[words.index("vineppo") + 1 :])
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the recipe of the reader."""
    recipe = ROOT / "src/vineppo/recipes/gpu/qwen05b-gsm8k.yaml"
    (tmp_path / "my.yaml").write_text(recipe.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_accepted() -> None:
    """Commands are parsed and their settings checked; nothing is trained."""
    found = commands()
    assert len(found) > 14 and {arguments[0] for arguments in found} == {"train", "plan"}
    for name, *rest in found:
        command = COMMANDS[name]
        request = parse_request(parser_of(name, command), command, rest)
        if request.options.get("resume") is None:
            assert request.positional
            training_config(request.positional, request.overrides)


def test_the_table_of_plans_is_what_the_commands_print(folder: Path) -> None:
    rows = re.findall(r"^\| ([^|]+) \| (\dx\dx[^|]+) \| (.+) \|$", TEXT, re.MULTILINE)
    plans = [rest for name, *rest in commands() if name == "plan" and rest[0] != "my.yaml"]
    assert len(rows) == len(plans) == 4
    for (_, cluster, cells), arguments in zip(rows, plans, strict=True):
        assert arguments[arguments.index("--cluster") + 1] == cluster
        assert main(["plan", *arguments, "--json", "plan.json"]) == 0
        figures = json.loads((folder / "plan.json").read_text())
        phases = [f"{figures['phases'][phase]:.1f}" for phase in ("sample", "credit", "update", "transfer")]
        printed = [f"{figures['memory']['peak'] / 2**30:.0f}", *phases, f"{figures['seconds_per_iteration']:.0f}"]
        assert cells.split(" | ") == printed, cluster
