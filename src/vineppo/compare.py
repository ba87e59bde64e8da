"""`vineppo compare`: the same problems and the same budget for several algorithms and seeds, then honest figures.

Reading path: `compare` names the stages; `plan_runs` decides what is left to do; `_run_all` runs it, every run in a
process of its own; `analysis.comparison.analyse` turns finished runs into the numbers of `compare.json`;
`_write_reports` writes them down.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vineppo.analysis.comparison import RunRecord, analyse, load_run, number_in
from vineppo.analysis.tables import HEADER, conclusions, count, markdown, percent, table_rows
from vineppo.config import ALGORITHMS
from vineppo.files import write_text, written_aside
from vineppo.plots import plot_comparison
from vineppo.run import RunDirectory
from vineppo.types import UserError

_BUDGET_KEYS = {"updates": "run.max_updates", "tokens": "run.max_tokens", "seconds": "run.max_seconds"}
_ENDLESS_ITERATIONS = "1000000"
"""So that the budget ends a run, never the recipe's number of iterations."""
_STATUS_SECONDS = 2.0
"""Between looks at the running processes' metrics; the processor is theirs."""

# --- what is asked ----------------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """How much training every run gets."""

    kind: str
    """`updates` (optimizer updates), `tokens` (generated for training, MC rollouts included) or `seconds` (of training,
    evaluation not counted)."""
    amount: float

    def __str__(self) -> str:
        """As on the command line: `updates=96`."""
        return f"{self.kind}={self.amount:.15g}"


def parse_budget(text: str) -> Budget:
    """The budget written as `updates=N`, `tokens=N` or `seconds=N`.

    Raises:
        UserError: if the text has another form, or the amount is not above 0 (and whole, but for seconds).
    """
    kind, _, amount_text = text.partition("=")
    advice = "write --budget updates=N, tokens=N or seconds=N"
    if kind not in _BUDGET_KEYS:
        raise UserError(f"budget is {text!r}; {advice}")
    try:
        amount = float(amount_text)
    except ValueError:
        raise UserError(f"budget {text!r} has {amount_text!r} where a number belongs; {advice}") from None
    return _checked_budget(Budget(kind, amount))


def _checked_budget(budget: Budget) -> Budget:
    kind, amount = budget
    if kind not in _BUDGET_KEYS:
        raise UserError(f"budget kind is {kind!r}; allowed: {', '.join(_BUDGET_KEYS)}")
    if not (math.isfinite(amount) and amount > 0):
        raise UserError(f"budget {kind}={amount:g} is not a finite number above 0; give every run some training")
    if kind != "seconds" and amount != int(amount):
        raise UserError(f"budget {kind}={amount:g} is not a whole number; {kind} are counted in ones")
    return Budget(kind, float(amount))


def settings_of_budget(budget: Budget) -> dict[str, str]:
    """The settings of a run, key -> text, that make the budget what ends it."""
    limits = {key: f"{budget.amount:.15g}" if kind == budget.kind else "0" for kind, key in _BUDGET_KEYS.items()}
    return {"run.iterations": _ENDLESS_ITERATIONS, **limits}


@dataclass(frozen=True)
class CompareSpec:
    """One comparison, whole."""

    recipe: str
    """Name of a recipe, or path of a YAML file; every run trains with it."""
    algorithms: tuple[str, ...] = ("vineppo", "ppo", "grpo", "rloo")
    """Compared algorithms, each once; the tables keep this order."""
    seeds: int = 5
    """Number of runs per algorithm, with run.seed 0, 1, ..., seeds - 1."""
    budget: Budget = Budget("updates", 96)  # noqa: RUF009 (a named tuple is immutable)
    """What every run may use."""
    out: str = ""
    """Directory of the comparison: runs, logs, tables, plots. An existing comparison is continued."""
    jobs: int = 1
    """Runs at the same time. More than 1 shares the processor, and with it the meaning of seconds."""
    overrides: tuple[str, ...] = ()
    """Further arguments of `vineppo train`, the same for all runs, such as `--learner.lr=1e-4`."""

    def __post_init__(self) -> None:
        _require(bool(self.recipe), "recipe is empty; name a recipe or a YAML file")
        _require(bool(self.out), "out is empty; name the directory of the comparison with --out DIR")
        _require(bool(self.algorithms), f"algorithms is empty; allowed: {', '.join(ALGORITHMS)}")
        for name in self.algorithms:
            near = difflib.get_close_matches(name, ALGORITHMS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            _require(name in ALGORITHMS, f"algorithms has {name!r}; {hint}allowed: {', '.join(ALGORITHMS)}")
        doubled = sorted({name for name in self.algorithms if self.algorithms.count(name) > 1})
        _require(not doubled, f"algorithms names {', '.join(doubled)} more than once; name each once")
        _require(self.seeds >= 1, f"seeds is {self.seeds}; it must be at least 1")
        _require(self.jobs >= 1, f"jobs is {self.jobs}; it must be at least 1")
        _checked_budget(self.budget)
        limits = (f"--{key}" for key in settings_of_budget(self.budget))
        ours = ("--algorithm", "--run.dir", "--run.seed", "--resume", *limits)
        for argument in self.overrides:
            key = argument.split("=", 1)[0]
            _require(key not in ours, f"override {key} is set by compare itself; use --algorithms, --seeds, --budget")

    def identity(self) -> dict[str, Any]:
        """What may not change while a comparison goes on; algorithms and seeds may grow, jobs may change."""
        return {
            "recipe": self.recipe,
            "recipe_sha256": _recipe_digest(self.recipe),
            "budget": str(self.budget),
            "overrides": list(self.overrides),
        }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _recipe_digest(recipe: str) -> str | None:
    """Hash of the recipe's text, so that a recipe edited half-way is noticed; None where there is no such file."""
    packaged = Path(__file__).parent / "recipes" / f"{recipe}.yaml"
    for path in (packaged, Path(recipe)):
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


# --- what is left to do -----------------------------------------------------------------------------------------------

RunState = Literal["absent", "finished", "resumable", "broken"]
Action = Literal["start", "keep", "resume", "restart"]
_ACTIONS: dict[RunState, Action] = {
    "absent": "start",
    "finished": "keep",
    "resumable": "resume",
    "broken": "restart",
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison and what has to be done for it."""

    algorithm: str
    seed: int
    directory: Path
    log: Path
    action: Action
    """`keep` a finished run, `resume` one with a checkpoint, `restart` one without, `start` one that is not there."""
    command: tuple[str, ...]
    """The process to run; empty for `keep`."""

    @property
    def name(self) -> str:
        """As in messages: `vineppo seed 0`."""
        return f"{self.algorithm} seed {self.seed}"


def plan_runs(spec: CompareSpec) -> list[PlannedRun]:
    """All runs of a comparison with what is left to do for each. Reads the directory and changes nothing.

    Seeds are the outer loop, algorithms the inner one: a machine that slows down over hours then slows all alike.
    """
    return [_plan_run(spec, algorithm, seed) for seed in range(spec.seeds) for algorithm in spec.algorithms]


def _plan_run(spec: CompareSpec, algorithm: str, seed: int) -> PlannedRun:
    name = f"{algorithm}-seed{seed}"
    directory = Path(spec.out) / "runs" / name
    action = _ACTIONS[run_state(directory)]
    train = (sys.executable, "-m", "vineppo", "train")
    budget = tuple(word for key, amount in settings_of_budget(spec.budget).items() for word in (f"--{key}", amount))
    address = ("--algorithm", algorithm, "--run.seed", str(seed), "--run.dir", str(directory))
    commands: dict[Action, tuple[str, ...]] = {
        "keep": (),
        "resume": (*train, "--resume", str(directory)),
    }
    fresh = (*train, spec.recipe, *address, *budget, *spec.overrides)
    log = Path(spec.out) / "logs" / f"{name}.log"
    return PlannedRun(algorithm, seed, directory, log, action, commands.get(action, fresh))


def run_state(directory: Path) -> RunState:
    """How far a run directory got; `broken` is one that began and left neither a result nor a whole checkpoint."""
    if not directory.exists():
        return "absent"
    summary = _read_json(directory / "summary.json")
    if summary and summary.get("finish_reason") not in (None, "interrupted"):
        return "finished"
    # A checkpoint that is being written has a name with dots; one without a manifest is not whole.
    manifests = directory.glob("checkpoints/*/manifest.json")
    return "resumable" if any(re.fullmatch(r"\d+(\.old)?", path.parent.name) for path in manifests) else "broken"


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file or it was cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# --- the command ------------------------------------------------------------------------------------------------------


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
        _say(console, _plan_line(plans))
        failures = _run_all(plans, spec, console)
        runs = [load_run(plan.directory) for plan in plans if run_state(plan.directory) == "finished"]
        result = {"spec": _spec_record(spec, runs), **_surroundings(), **analyse(runs, spec.algorithms)}
        result["missing"] = [_missing(plan, failures) for plan in plans if run_state(plan.directory) != "finished"]
        _write_reports(result, out)
    _print_table(result, console)
    _say(console, f"tables and plots: {out}")
    return result


def _open_directory(spec: CompareSpec, out: Path) -> None:
    """Make or check the comparison's directory, and write down what it compares."""
    record = out / "compare-spec.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory")
    try:
        if out.is_dir() and any(out.iterdir()) and not record.exists():
            raise UserError(f"--out {out} is not empty and holds no comparison; name a new directory")
        check_same_comparison(_read_json(record), spec, out)
        for folder in (out / "runs", out / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(record, _json(spec.identity()))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name a directory of yours") from None


def check_same_comparison(recorded: dict[str, Any] | None, spec: CompareSpec, out: Path) -> None:
    """Refuse to mix runs of different settings in one directory.

    Raises:
        UserError: naming the first setting that differs from the recorded one.
    """
    wanted = spec.identity()
    for key in wanted if recorded is not None else ():
        old, new = (recorded or {}).get(key), wanted[key]
        if old == new:
            continue
        what = f"{key} {_show(old)}, not {_show(new)}"
        if key == "recipe_sha256":
            what = f"an earlier text of recipe {spec.recipe}"
        raise UserError(f"--out {out} holds a comparison with {what}; name another --out, or go back to that setting")


def _show(value: Any) -> str:
    return (" ".join(map(str, value)) or "(none)") if isinstance(value, list) else str(value)


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


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Child:
    plan: PlannedRun
    process: subprocess.Popen[bytes]
    log: TextIO


def _run_all(plans: Sequence[PlannedRun], spec: CompareSpec, console: Console) -> dict[str, str]:
    """Run every plan that has a command, `jobs` at a time; returns name -> last words of the runs that failed."""
    waiting = [plan for plan in plans if plan.command]
    running: list[_Child] = []
    failures: dict[str, str] = {}
    done = len(plans) - len(waiting)
    next_look = 0.0
    with _stop_signals(), console.status("starting", refresh_per_second=2) as status:
        try:
            while waiting or running:
                while waiting and len(running) < spec.jobs:
                    running.append(_start(waiting.pop(0), spec.jobs))
                time.sleep(0.2)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    child.log.close()
                    done += 1
                    _report(child, f"[{done}/{len(plans)}]", failures, console)
                if console.is_terminal and time.monotonic() >= next_look:
                    status.update("running " + ", ".join(_progress(child.plan) for child in running))
                    next_look = time.monotonic() + _STATUS_SECONDS
        except KeyboardInterrupt:
            status.update("stopping: the running processes save their checkpoints")
            _stop(running)
            _say(console, "interrupted; the same command goes on from here")
            raise
        finally:
            for child in running:
                if child.process.poll() is None:
                    child.process.kill()
                child.log.close()
    return failures


def _start(plan: PlannedRun, jobs: int) -> _Child:
    """Start a run in a process and session of its own, so that Ctrl-C reaches it once, through us."""
    if plan.action == "restart":
        shutil.rmtree(plan.directory)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # a log that can be followed
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    log = open(plan.log, "a" if plan.action == "resume" else "w", encoding="utf-8")  # noqa: SIM115 (the child's)
    log.write(f"$ {' '.join(plan.command)}\n")
    log.flush()
    process = subprocess.Popen(
        plan.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        close_fds=False,
    )
    return _Child(plan, process, log)


def _report(child: _Child, counter: str, failures: dict[str, str], console: Console) -> None:
    """Say how a run ended; note it when it failed."""
    plan, code = child.plan, child.process.returncode
    if code == 0 and run_state(plan.directory) == "finished":
        run = load_run(plan.directory)
        before, after = (percent(number_in(run.summary, key, "mean")) for key in ("accuracy_before", "accuracy_after"))
        amounts = f"{count(run.summary.get('updates'))} updates, {count(run.summary.get('seconds'))} s"
        _say(console, f"{counter} {plan.name}: accuracy {before} -> {after}, {amounts}")
        return
    lines = _last_lines(plan.log)
    failures[plan.name] = lines[-1] if lines else f"exit code {code}"
    _say(console, f"{counter} {plan.name} FAILED with exit code {code}; the end of {plan.log}:")
    for line in lines:
        _say(console, f"    {line}")


def _last_lines(log: Path, count: int = 8) -> list[str]:
    """Last lines of a log that say something, without the command we wrote into it ourselves."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("$ ")][-count:]


def _progress(plan: PlannedRun) -> str:
    """`vineppo seed 0 (16 updates)`, read from the run's metrics."""
    lines = RunDirectory(plan.directory, {}).read_metrics()
    return f"{plan.name} ({lines[-1].get('updates', 0) if lines else 0} updates)"


def _stop(running: Sequence[_Child]) -> None:
    """Ask the processes to save and end, and wait for them; a second Ctrl-C kills them."""
    for child in running:
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGINT)
    for child in running:
        child.process.wait()


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end us as Ctrl-C does: our processes live in sessions of their own and would go on."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        before = {number: signal.getsignal(number) for number in signals}
        for number in signals:
            if before[number] != signal.SIG_IGN:  # started under nohup: stay deaf
                signal.signal(number, stop)
    except ValueError:  # not the main thread, where signals cannot be set
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- reports ----------------------------------------------------------------------------------------------------------


def _spec_record(spec: CompareSpec, runs: Sequence[RunRecord]) -> dict[str, Any]:
    return {
        **spec.identity(),
        "level": next((run.level for run in runs if run.level), ""),
        "algorithms": list(spec.algorithms),
        "seeds": spec.seeds,
        "jobs": spec.jobs,
    }


def _surroundings() -> dict[str, Any]:
    """What the figures depend on beside the spec."""
    versions = {"python": platform.python_version()}
    for name in ("vineppo", "torch", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"versions": versions, "platform": platform.platform(), "cpu_count": os.cpu_count()}


def _missing(plan: PlannedRun, failures: dict[str, str]) -> dict[str, Any]:
    reason = failures.get(plan.name, "did not finish")
    return {"algorithm": plan.algorithm, "seed": plan.seed, "reason": reason, "log": str(plan.log)}


def _write_reports(result: dict[str, Any], out: Path) -> None:
    """`compare.json`, `compare.csv`, `table.md` and the plots."""
    write_text(out / "compare.json", _json(result))
    rows = [row for figures in result["algorithms"].values() for row in figures["per_seed"]]
    if rows:
        with written_aside(out / "compare.csv") as aside, open(aside, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plot_comparison(result, out)
    write_text(out / "table.md", markdown(result))


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _print_table(result: dict[str, Any], console: Console) -> None:
    """The table in the terminal; a narrow one goes without the columns of tokens."""
    rows = [[cell.replace(" [", "\n[") for cell in row] for row in table_rows(result)]
    widths = [
        max(len(part) for part in [*name.split(), *(line for row in rows for line in row[i].splitlines())])
        for i, name in enumerate(HEADER)
    ]
    everything = sum(width + 2 for width in widths) < console.width - 4
    table = Table(
        title=f"{result['spec']['recipe']}: {result['spec']['budget']} for each run",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
    )
    shown = [i for i, name in enumerate(HEADER) if everything or not name.endswith("tokens")]
    for i in shown:
        table.add_column(HEADER[i], justify="left" if i == 0 else "right", width=widths[i])
    for row in rows:
        table.add_row(*(escape(row[i]) for i in shown))
    console.print(table)
    for line in conclusions(result):
        _say(console, line)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
