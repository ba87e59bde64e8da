"""Train several algorithms with several seeds, and analyse the finished runs (`vineppo compare`).

`compare` calls four functions in this order: `plan_runs` determines which runs are not finished, `run_all` trains each
of them in a separate process, `analyse` computes the content of `compare.json`, and `write_reports` writes the files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vineppo.compare.figures import analyse, load_run
from vineppo.compare.report import environment_record, missing_entry, print_table, spec_record, to_json, write_reports
from vineppo.compare.runs import Action, PlannedRun, plan_runs, print_line, read_json, run_all, run_state
from vineppo.compare.spec import CompareSpec, check_same_comparison
from vineppo.run.files import write_text
from vineppo.types import UserError


def compare(spec: CompareSpec, console: Console | None = None) -> dict[str, Any]:
    """Train the missing runs, write tables and plots of all finished runs, and return the content of `compare.json`.

    Runs that did not finish are listed under the key `missing`. If this list is not empty, `vineppo compare` exits with
    code 1.

    Raises:
        UserError: if the directory `spec.out` cannot be written, is in use, contains other files, or contains a
            comparison with other settings.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the running processes have saved their checkpoints.
    """
    console = console or Console()
    out = Path(spec.out)
    _open_directory(spec, out)
    with _exclusive_lock(out):
        plans = plan_runs(spec)
        print_line(console, _plan_line(plans))
        failures = run_all(plans, spec, console)
        runs = [load_run(plan.directory) for plan in plans if run_state(plan.directory) == "finished"]
        result = {"spec": spec_record(spec, runs), **environment_record(), **analyse(runs, spec.arms)}
        result["missing"] = [missing_entry(plan, failures) for plan in plans if run_state(plan.directory) != "finished"]
        write_reports(result, out)
    print_table(result, console)
    print_line(console, f"tables and plots: {out}")
    return result


def _open_directory(spec: CompareSpec, out: Path) -> None:
    """Create the directory of the comparison, or check an existing one, and write `compare-spec.json`."""
    record = out / "compare-spec.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a directory")
    try:
        if out.is_dir() and any(out.iterdir()) and not record.exists():
            raise UserError(f"--out {out} is not empty and contains no comparison; choose a new directory")
        check_same_comparison(read_json(record), spec, out)
        for folder in (out / "runs", out / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(record, to_json(spec.identity()))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose a writable directory") from None


@contextlib.contextmanager
def _exclusive_lock(out: Path) -> Iterator[None]:
    """Lock the directory, so that a second comparison cannot use it at the same time.

    The training processes inherit the lock. If the comparison is killed, the directory stays locked until these
    processes end.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl, so the directory is not locked
        yield
        return
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out {out} is in use by another comparison or by one of its runs; wait until it ends, or stop it"
            ) from None
        os.set_inheritable(lock.fileno(), True)
        yield


def _plan_line(plans: Sequence[PlannedRun]) -> str:
    """Return a summary of the plans, for example `4 runs: 1 already finished, 3 to start`."""
    labels: dict[Action, str] = {
        "keep": "already finished",
        "resume": "to resume",
        "restart": "to restart",
        "start": "to start",
    }
    counts = {label: sum(plan.action == action for plan in plans) for action, label in labels.items()}
    return f"{len(plans)} runs: " + ", ".join(f"{count} {label}" for label, count in counts.items() if count)
