"""`vineppo compare`: the same problems and the same budget for several algorithms and seeds, then honest figures.

Reading path: `compare` names the stages; `plan_runs` decides what is left to do; `_run_all` runs it, every run in a
process of its own; `analysis.comparison.analyse` turns finished runs into the numbers of `compare.json`;
`_write_reports` writes them down.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vineppo.compare.figures import analyse, load_run
from vineppo.compare.report import as_json, missing, print_table, spec_record, surroundings, write_reports
from vineppo.compare.runs import Action, PlannedRun, plan_runs, read_json, run_all, run_state, say
from vineppo.compare.spec import CompareSpec, check_same_comparison
from vineppo.run.files import write_text
from vineppo.types import UserError


def compare(spec: CompareSpec, console: Console | None = None) -> dict[str, Any]:
    """Run what is missing, analyse all finished runs, write tables and plots; returns the content of `compare.json`.

    Runs that failed are listed under `missing`; a caller that finds it non-empty should exit with 1.

    Raises:
        UserError: if `out` cannot be written, is something else, or holds a comparison with other settings.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the running processes have saved their checkpoints.
    """
    console = console or Console()
    out = Path(spec.out)
    _open_directory(spec, out)
    with _only_one(out):
        plans = plan_runs(spec)
        say(console, _plan_line(plans))
        failures = run_all(plans, spec, console)
        runs = [load_run(plan.directory) for plan in plans if run_state(plan.directory) == "finished"]
        result = {"spec": spec_record(spec, runs), **surroundings(), **analyse(runs, spec.arms)}
        result["missing"] = [missing(plan, failures) for plan in plans if run_state(plan.directory) != "finished"]
        write_reports(result, out)
    print_table(result, console)
    say(console, f"tables and plots: {out}")
    return result


def _open_directory(spec: CompareSpec, out: Path) -> None:
    """Make or check the comparison's directory, and write down what it compares."""
    record = out / "compare-spec.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory")
    try:
        if out.is_dir() and any(out.iterdir()) and not record.exists():
            raise UserError(f"--out {out} is not empty and holds no comparison; name a new directory")
        check_same_comparison(read_json(record), spec, out)
        for folder in (out / "runs", out / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(record, as_json(spec.identity()))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name a directory of yours") from None


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold the directory's lock. The training processes inherit it, so orphans of a killed comparison hold it on."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out {out} is in use by another comparison or by a run that it started; wait for it or stop it"
            ) from None
        os.set_inheritable(lock.fileno(), True)
        yield


def _plan_line(plans: Sequence[PlannedRun]) -> str:
    words: dict[Action, str] = {
        "keep": "finished before",
        "resume": "to resume",
        "restart": "to start again",
        "start": "to start",
    }
    counts = {word: sum(plan.action == action for plan in plans) for action, word in words.items()}
    return f"{len(plans)} runs: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)
