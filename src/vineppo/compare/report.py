"""Write the results of a comparison as JSON, CSV, Markdown and plots, and print a table.

In all functions, `result` is the content of `compare.json`.
"""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vineppo.compare.checklist import checklist
from vineppo.compare.plots import plot_comparison
from vineppo.compare.records import RunRecord, setting_in
from vineppo.compare.runs import PlannedRun, outcome_of_missing, print_line
from vineppo.compare.spec import CompareSpec
from vineppo.compare.tables import conclusions, header, markdown, missing_lines, table_rows
from vineppo.run.environment import version_of
from vineppo.run.files import write_text, written_aside

_COMMON = (
    "model.path",
    "model.dtype",
    "model.device",
    "task.name",
    "task.level",
    "task.num_steps",
    "rollouts.max_new_tokens",
    "rollouts.temperature",
    "eval.every",
    "eval.num_problems",
    "eval.final_num_problems",
    "eval.num_samples",
    "eval.temperature",
    "eval.greedy",
    "eval.split",
)
"""Settings of the runs that the record of a comparison and its checklist show."""


_LEFT_OUT = (("tokens", "greedy"), ("'s best",), ("tuning",))
"""Groups of words. If the terminal is too narrow, the columns whose names contain a word of the first group are left
out, then those of the second group, and so on."""


def spec_record(spec: CompareSpec, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the settings of a comparison, which `compare.json` contains under the key `spec`.

    Args:
        spec: settings of the comparison.
        runs: the finished runs. The entry `level`, a text that names the problems in titles of plots, is taken from
            them, and so are the settings under `common` (`_common_value`). They are empty if no run has finished.
    """
    return {
        **spec.identity(),
        "level": next((run.level for run in runs if run.level), ""),
        "seeds": list(spec.seeds),
        "jobs": spec.jobs,
        "common": {key: _common_value(runs, key) for key in _COMMON} if runs else {},
    }


def _common_value(runs: Sequence[RunRecord], key: str) -> Any:
    """Return the value of a setting in all runs, or a text such as `64 (reinforce), 512 (grpo)` if arms differ."""
    of_arm = {run.arm: setting_in(run.config, key) for run in runs}
    values = list(of_arm.values())
    if all(value == values[0] for value in values):
        return values[0]
    names: dict[str, list[str]] = {}
    for arm, value in of_arm.items():
        names.setdefault(str(value), []).append(arm)
    return ", ".join(f"{value} ({', '.join(arms)})" for value, arms in names.items())


def environment_record() -> dict[str, Any]:
    """Return the package versions, the operating system and the number of CPU cores, for `compare.json`."""
    packages = {name: version_of(name) for name in ("vineppo", "torch", "transformers", "numpy")}
    installed = {name: version for name, version in packages.items() if version}
    versions = {"python": platform.python_version(), **installed}
    return {"versions": versions, "platform": platform.platform(), "cpu_count": os.cpu_count()}


def missing_entry(plan: PlannedRun, failures: dict[str, str]) -> dict[str, Any]:
    """Return the entry of a run that did not finish, for the list `missing` in `compare.json`.

    Its state is `failed` if the process of the run ended with an error, `stopped` if the run was interrupted, and
    `skipped` if it was not started.

    Args:
        plan: the run.
        failures: name of each failed run -> reason.
    """
    state, reason = outcome_of_missing(plan, failures)
    return {"arm": plan.arm, "seed": plan.seed, "state": state, "reason": reason, "log": str(plan.log)}


def write_reports(result: dict[str, Any], out: Path) -> None:
    """Write `compare.json`, `compare.csv`, `table.md` and the plots to the directory `out`.

    `compare.csv` and the plots are left out if no run has finished.
    """
    write_text(out / "compare.json", to_json(result))
    write_text(out / "table.md", markdown(result, checklist(result)))
    rows = [row for figures in result["arms"].values() for row in figures["per_seed"]]
    if rows:
        with written_aside(out / "compare.csv") as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plot_comparison(result, out)


def to_json(content: dict[str, Any]) -> str:
    """Format a dictionary as the text of a JSON file."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def print_table(result: dict[str, Any], console: Console) -> None:
    """Print the table of results. Below it, print sentences about differences between arms and missing runs.

    If the terminal is too narrow for the whole table, columns are left out (`_LEFT_OUT`); `table.md` has all columns.
    """
    names = header(result)
    # An interval such as "[40.0, 60.0]" gets its own line in the cell.
    rows = [[cell.replace(" [", "\n[") for cell in row] for row in table_rows(result)]
    # A column is as wide as the longest word of its name or the longest line of its cells. Names wrap between words.
    widths = [
        max(len(part) for part in [*name.split(), *(line for row in rows for line in row[i].splitlines())])
        for i, name in enumerate(names)
    ]
    shown = list(range(len(names)))
    for words in _LEFT_OUT:
        if sum(widths[i] + 2 for i in shown) < console.width - 4:
            break
        shown = [i for i in shown if not any(word in names[i] for word in words)]
    table = Table(
        title=f"{result['spec']['recipe']}: {result['spec']['budget']} per run",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
    )
    for i in shown:
        table.add_column(escape(names[i]), justify="left" if i == 0 else "right", width=widths[i])
    for row in rows:
        table.add_row(*(escape(row[i]) for i in shown))
    console.print(table)
    for line in conclusions(result):
        print_line(console, line)
    for line in missing_lines(result):
        print_line(console, line)
