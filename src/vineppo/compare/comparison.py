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

from vineppo.compare.figures import analyse
from vineppo.compare.lock import exclusive_lock
from vineppo.compare.records import load_run
from vineppo.compare.report import environment_record, missing_entry, print_table, spec_record, to_json, write_reports
from vineppo.compare.runs import Action, PlannedRun, plan_runs, print_line, read_json, run_all, run_state
from vineppo.compare.spec import CompareSpec, check_same_comparison
from vineppo.run.files import write_text
from vineppo.types import UserError


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
    _open_directory(spec, out)
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


def _open_directory(spec: CompareSpec, out: Path) -> None:
    """Create the directory of a comparison, or check that an existing directory belongs to the same comparison.

    The settings that identify the comparison are written to `compare-spec.json` in the directory.

    Raises:
        UserError: if the directory cannot be written, contains other files, or contains another comparison.
    """
    record = out / "compare-spec.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a directory")
    try:
        if out.is_dir() and any(out.iterdir()) and not record.exists():
            raise UserError(f"--out {out} is not empty and contains no comparison; choose a new directory")
        content = check_same_comparison(read_json(record), spec, out)
        for folder in (out / "runs", out / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(record, to_json(content))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose a writable directory") from None


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
