"""Train several arms with several seeds and compare the finished runs, for the command `vineppo compare`.

The function `compare` calls four functions of other modules. `plan_runs` lists all runs and determines what must be
done with each. `run_all` trains the unfinished runs, each in a separate process. `analyse` computes the results.
`write_reports` writes the results to `compare.json` and other files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vineppo.compare.directory import exclusive_lock, open_directory
from vineppo.compare.figures import analyse
from vineppo.compare.records import load_run
from vineppo.compare.report import environment_record, missing_entry, print_table, spec_record, write_reports
from vineppo.compare.runs import Action, PlannedRun, plan_runs, print_line, run_all, run_state
from vineppo.compare.spec import CompareSpec


def compare(spec: CompareSpec, console: Console | None = None) -> dict[str, Any]:
    """Train the unfinished runs, write tables and plots of all finished runs, and return the content of `compare.json`.

    Runs that did not finish are listed under the key `missing` of the result.

    Args:
        spec: settings of the comparison.
        console: object that prints the progress and the table; by default, it prints to standard output.
    Raises:
        UserError: if the directory `spec.out` cannot be written, is in use, contains other files, or contains a
            comparison with other settings.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the running processes have saved their checkpoints.
    """
    console = console or Console()
    out = Path(spec.out)
    open_directory(out, "compare-spec.json", spec.identity(), "comparison")
    with exclusive_lock(out):
        plans = plan_runs(spec)
        print_line(console, _plan_line(plans))
        failures = run_all(plans, spec.jobs, console)
        runs = [load_run(plan.directory, plan.arm) for plan in plans if run_state(plan.directory) == "finished"]
        figures = analyse(runs, spec.arms, spec.baseline_names)
        result = {"spec": spec_record(spec, runs), **environment_record(), **figures}
        result["missing"] = [missing_entry(plan, failures) for plan in plans if run_state(plan.directory) != "finished"]
        write_reports(result, out)
    print_table(result, console)
    print_line(console, f"tables and plots: {out}")
    return result


def _plan_line(plans: Sequence[PlannedRun]) -> str:
    """Return one line about what will happen to the runs, such as `4 runs: 1 already finished, 3 to start`."""
    labels: dict[Action, str] = {
        "keep": "already finished",
        "resume": "to resume",
        "restart": "to restart",
        "start": "to start",
    }
    counts = {label: sum(plan.action == action for plan in plans) for action, label in labels.items()}
    return f"{len(plans)} runs: " + ", ".join(f"{count} {label}" for label, count in counts.items() if count)
