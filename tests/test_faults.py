"""Runs that are killed, signalled, short of disk space or damaged end with the same bits as an unbroken run.

`make test-faults` runs these tests. They print a table of every fault and its outcome, and write it as Markdown to the
file that the environment variable VINEPPO_FAULTS_TABLE names.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.helpers import ROOT, weights_hash
from vineppo.run.checkpoint import latest_checkpoint
from vineppo.run.directory import RunDirectory

pytestmark = pytest.mark.faults

_OPTIONS = """
judgement --task.num_steps 3 --rollouts.num_problems 4 --rollouts.group_size 4 --rollouts.max_new_tokens 40
--learner.minibatch_size 8 --eval.num_problems 4 --eval.final_num_problems 4 --eval.every 2 --run.iterations 3
--run.checkpoint_every 1 --run.keep_checkpoints 2
"""
SMALL = _OPTIONS.split()
KINDS = {
    "vineppo": SMALL,
    "ppo": [*SMALL, "--algorithm", "ppo", "--learner.kl.coefficient", "0.001"],
    "lora": [*SMALL, "--model.lora.r", "4", "--model.lora.dropout", "0.1"],
}
TABLE: list[tuple[str, str, str]] = []
"""Rows (fault, outcome, what was lost)."""


class Servers:
    """Processes that run jobs at the same time (tests/fault_server.py): two, or VINEPPO_FAULTS_JOBS."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", "tests.fault_server"]
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )
            for _ in range(int(os.environ.get("VINEPPO_FAULTS_JOBS", "2")))
        ]
        self._free: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        for process in self.processes:
            self._free.put(process)

    def run(self, log: Path, command: Sequence[str], **job: Any) -> int:
        """Run a command line of `vineppo`; return its exit code, which is negative if a signal ended it."""
        process = self._free.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({"command": list(command), "log": str(log), **job}) + "\n")
            process.stdin.flush()
            return int(json.loads(process.stdout.readline()))
        finally:
            self._free.put(process)

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


@dataclass
class Lab:
    """The unbroken runs, with which every broken run is compared."""

    servers: Servers
    folder: Path
    prints: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def start(self, kind: str, run: Path, **job: Any) -> int:
        return self.servers.run(log_of(run), ["train", *KINDS[kind], "--run.dir", str(run)], **job)

    def go_on(self, kind: str, run: Path, **job: Any) -> int:
        """Continue a run as a user would: with `--resume`, or with the first command if there is no run yet."""
        if not (run / "config.yaml").exists():
            return self.start(kind, run, **job)
        if RunDirectory(run, {}).is_finished:
            return self.servers.run(log_of(run), ["plot", str(run)], **job)
        return self.servers.run(log_of(run), ["train", "--resume", str(run)], **job)

    def check_same(self, kind: str, run: Path) -> None:
        found = fingerprint(run)
        for key, expected in self.prints[kind].items():
            assert found[key] == expected, f"{run.name}: {key} differs; {log_of(run).read_text()}"


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def last_line(run: Path) -> str:
    return log_of(run).read_text().strip().splitlines()[-1]


def fingerprint(run: Path) -> dict[str, Any]:
    """Return everything that must not differ: final weights, metrics without seconds, rollouts, the recipe's name."""
    lines = RunDirectory(run, {}).read_metrics()
    summary = RunDirectory(run, {}).read_summary()
    tables = {path.name: repr(pq.read_table(path).to_pylist()) for path in sorted((run / "rollouts").iterdir())}
    return {
        "weights": weights_hash(run / "final"),
        "metrics": [{key: v for key, v in line.items() if not key.startswith("seconds/")} for line in lines],
        "rollouts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in tables.items()},
        "recipe": summary["recipe"],
        "accuracy": [summary["accuracy_before"], summary["accuracy_after"]],
        "plots": sorted(path.name for path in (run / "plots").iterdir()),
        "leftovers": [str(path.relative_to(run)) for path in run.rglob("*.tmp")],
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(Servers(), tmp_path_factory.mktemp("faults"))
    for kind in KINDS:
        began = time.monotonic()
        assert lab.start(kind, lab.folder / kind) == 0, log_of(lab.folder / kind).read_text()
        lab.seconds[kind] = time.monotonic() - began
        lab.prints[kind] = fingerprint(lab.folder / kind)
        assert lab.prints[kind]["leftovers"] == []
    yield lab
    lab.servers.close()
    rows = [("fault", "outcome", "lost"), ("---", "---", "---"), *TABLE]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    if reporter := request.config.pluginmanager.getplugin("terminalreporter"):
        reporter.write_line(f"\n{text}")
    if path := os.environ.get("VINEPPO_FAULTS_TABLE"):
        Path(path).write_text(text + "\n", encoding="utf-8")


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Call all functions, two at a time, and raise the first error."""
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


# --- kills

CHOSEN = (
    ("sampling", 2, "before"),
    ("credit", 20, "before"),
    ("update", 3, "before"),
    ("sampler weights", 2, "before"),
    ("evaluation", 2, "before"),
    ("rollouts file", 2, "after"),
    ("metrics line", 1, "before"),
    ("metrics line", 3, "after"),
    ("checkpoint", 1, "before"),
    ("checkpoint", 1, "after"),
    ("checkpoint", 3, "after"),
    ("checkpoint file", 3, "before"),
    ("checkpoint rename", 3, "before"),
    ("checkpoint rename", 3, "after"),
    ("old checkpoint", 4, "before"),
    ("final model", 1, "after"),
    ("summary", 1, "before"),
    ("summary", 1, "after"),
    ("plots", 2, "before"),
)
FEWER = ("update", "checkpoint", "checkpoint rename", "final model", "summary")
"""Places in which runs other than `vineppo` are killed."""
RANDOM_KILLS = {"vineppo": 7, "ppo": 4, "lora": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_same_bits(lab: Lab, kind: str) -> None:
    """Cases 14 and 18: 54 kills by SIGKILL in all, at chosen places and at random times."""

    def killed(name: str, **job: Any) -> None:
        run = lab.folder / f"{kind}-{len(name)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        code = lab.start(kind, run, signal=signal.SIGKILL, **job)
        assert code == -signal.SIGKILL or "delay" in job, f"{name}: the run was not killed (exit code {code})"
        assert lab.go_on(kind, run) == 0, f"{name}: {log_of(run).read_text()}"
        lab.check_same(kind, run)
        TABLE.append((f"SIGKILL, {kind}, {name}", "resumed, the same bits", "nothing"))
        shutil.rmtree(run)

    rng = random.Random(f"{kind} {os.environ.get('VINEPPO_KILL_SEED', '0')}")
    calls: list[Callable[[], None]] = []
    for place, number, when in (entry for entry in CHOSEN if kind == "vineppo" or entry[0] in FEWER):
        job = {"place": place, "number": number, "when": when}
        calls.append(lambda job=job: killed(f"{job['when']} {job['place']} {job['number']}", **job))  # type: ignore[misc]
    for _ in range(RANDOM_KILLS[kind]):
        delay = rng.uniform(0, lab.seconds[kind])
        calls.append(lambda delay=delay: killed(f"after {delay:.3f} s", delay=delay))  # type: ignore[misc]
    together(calls)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(lab: Lab) -> None:
    """Every process is killed in the update after its first checkpoint, also while the run is resumed."""
    run, codes = lab.folder / "often", list[int]()
    while not codes or codes[-1] != 0:
        assert len(codes) < 10
        codes.append(lab.go_on("vineppo", run, signal=signal.SIGKILL, place="checkpoint file", number=12))
    assert len(codes) >= 3
    lab.check_same("vineppo", run)
    TABLE.append((f"SIGKILL, vineppo, {len(codes) - 1} times in a row", "resumed, the same bits", "nothing"))


# --- signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PHASES = {
    "sampling": ("sampling", 2),
    "credit": ("credit", 20),
    "update": ("update", 3),
    "checkpoint": ("checkpoint", 2),
    "evaluation": ("evaluation", 2),
    "final evaluation": ("evaluation", 5),
    "plots": ("plots", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_signals_in_every_phase(lab: Lab, phase: str) -> None:
    """SIGINT and SIGTERM end the run after the iteration, with a checkpoint. SIGHUP changes nothing."""
    place, number = PHASES[phase]

    def signalled(number_of_signal: signal.Signals) -> None:
        run = lab.folder / f"{phase.replace(' ', '-')}-{number_of_signal.name}"
        code = lab.start("vineppo", run, signal=number_of_signal, place=place, number=number)
        log = log_of(run).read_text()
        is_last = phase in ("final evaluation", "plots") or number_of_signal == signal.SIGHUP
        assert code == (0 if is_last else 130), log
        assert "Traceback" not in log
        reason = RunDirectory(run, {}).read_summary()["finish_reason"]
        assert reason == ("iterations" if is_last else "interrupted")
        if not is_last:
            assert lab.go_on("vineppo", run) == 0
        lab.check_same("vineppo", run)
        outcome = "finished" if is_last else "checkpoint, exit code 130; resumed, the same bits"
        TABLE.append((f"{number_of_signal.name} in {phase}", outcome, "nothing"))

    together([lambda number=number: signalled(number) for number in SIGNALS])  # type: ignore[misc]


def test_a_run_without_console_finishes(lab: Lab) -> None:
    """Nobody reads standard output any more, and the terminal sends SIGHUP."""
    run = lab.folder / "no-console"
    code = lab.start("vineppo", run, closed_stdout=True, signal=signal.SIGHUP, place="update", number=2)
    assert code == 0, log_of(run).read_text()
    lab.check_same("vineppo", run)
    TABLE.append(("standard output closed and SIGHUP", "finished", "the console's output"))


# --- full disks


def check_stopped_by_disk(run: Path, code: int) -> None:
    """Check that the run ended with one line, whole checkpoints and no temporary files."""
    log = log_of(run).read_text()
    assert code == 2 and "Traceback" not in log, log
    line = last_line(run)
    assert line.startswith("error: ") and ("File too large" in line or "No space left on device" in line), line
    assert list(run.rglob("*.tmp")) == []
    if list((run / "checkpoints").glob("0*")):
        latest_checkpoint(run / "checkpoints", warn=lambda message: pytest.fail(message))


@pytest.mark.parametrize("size", [500, 1_500, 5_000, 20_000, 200_000])
def test_a_file_that_cannot_grow_is_one_line(lab: Lab, size: int) -> None:
    """Case 17, with a limit of the file size: config.yaml, metrics.jsonl, rollouts or checkpoints do not fit."""
    run = lab.folder / f"limit-{size}"
    check_stopped_by_disk(run, lab.start("vineppo", run, file_size=size))
    failed = last_line(run).partition(":")[2].partition(str(lab.folder))[0].strip()
    assert lab.go_on("vineppo", run) == 0, log_of(run).read_text()
    lab.check_same("vineppo", run)
    TABLE.append((f"files limited to {size:,} bytes ({failed})", "one line; resumed, the same bits", "nothing"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a file system")
@pytest.mark.parametrize("share", [0.3, 0.6, 1.4, 2.2])
def test_a_disk_that_fills_is_one_line(lab: Lab, share: float) -> None:
    """Case 17, with a file system that is full after a part of the run; then it gets larger."""
    disk = lab.folder / f"disk-{share}"
    disk.mkdir()
    checkpoint = sum(path.stat().st_size for path in (lab.folder / "vineppo/checkpoints/000003").iterdir())
    size = int((share + 0.1) * checkpoint)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        run = disk / "run"
        shutil.rmtree(run, ignore_errors=True)
        log = lab.folder / f"disk-{share}.log"
        code = lab.servers.run(log, ["train", *KINDS["vineppo"], "--run.dir", str(run)])
        text = log.read_text()
        assert code == 2 and "Traceback" not in text, text
        line = text.strip().splitlines()[-1]
        assert line.startswith("error: ") and "No space left on device" in line, line
        assert list(run.rglob("*.tmp")) == []
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert lab.servers.run(log, ["train", "--resume", str(run)]) == 0, log.read_text()
        lab.check_same("vineppo", run)
    finally:
        subprocess.run(["umount", disk], check=True)
    TABLE.append((f"disk full after {share} checkpoints", "one line; resumed, the same bits", "nothing"))


# --- two processes


def test_the_second_process_is_refused(lab: Lab, tmp_path: Path) -> None:
    """Case 14. While the first process trains, another one cannot resume its run or start one in its directory."""
    run, pause = lab.folder / "shared", tmp_path / "pause"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lab.start, "vineppo", run, place="update", number=3, pause=str(pause))
        while not pause.exists():
            time.sleep(0.02)
            assert not first.done()
        log = tmp_path / "second.log"
        codes = [lab.servers.run(log, ["train", "--resume", str(run)])]
        codes.append(lab.servers.run(log, ["train", *KINDS["vineppo"], "--run.dir", str(run)]))
        pause.unlink()
        assert first.result() == 0
    assert codes == [2, 2]
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "is in use by process" in lines[0] and "already exists and is not empty" in lines[1]
    lab.check_same("vineppo", run)
    TABLE.append(("a second process in the directory", "refused in one line; the first one finished", "nothing"))


# --- damaged files


def interrupted_run(lab: Lab, name: str) -> Path:
    """Return a run that was killed in the third iteration, with two checkpoints."""
    template, run = lab.folder / "template", lab.folder / name
    if not template.exists():
        lab.start("vineppo", template, signal=signal.SIGKILL, place="metrics line", number=4, when="after")
        assert [path.name for path in sorted((template / "checkpoints").iterdir())] == ["000000", "000001", "000002"]
    shutil.copytree(template, run)
    return run


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_text(path: Path, text: str) -> None:
    path.write_text(text)


def newest(run: Path) -> Path:
    return run / "checkpoints/000002"


MENDED: dict[str, Callable[[Path], None]] = {
    "newest checkpoint cut": lambda run: cut(newest(run) / "learner.pt"),
    "a byte of the newest checkpoint flipped": lambda run: flip(newest(run) / "learner.pt"),
    "state of the newest checkpoint missing": lambda run: (newest(run) / "state.pt").unlink(),
    "manifest of the newest checkpoint missing": lambda run: (newest(run) / "manifest.json").unlink(),
    "last metrics line cut": lambda run: os.truncate(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 9),
    "summary cut": lambda run: cut_text(run / "summary.json", '{"finish_reason": "iter'),
    "a rollouts file cut": lambda run: cut(run / "rollouts/000003.parquet"),
    "half a checkpoint left": lambda run: (run / "checkpoints/.000003.tmp").mkdir(),
}


def refuse_middle_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))


def damage_all(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        flip(path / "learner.pt")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "all checkpoints damaged": (damage_all, "are damaged (3)"),
    "a metrics line cut": (refuse_middle_line, "line 2 is not a JSON object"),
    "config.yaml missing": (lambda run: (run / "config.yaml").unlink(), "it has no config.yaml"),
    "config.yaml cut": (lambda run: flip_yaml(run / "config.yaml"), "config.yaml is damaged"),
}


def flip_yaml(path: Path) -> None:
    path.write_text("learner: [1, 2\n" + path.read_text())


@pytest.mark.parametrize("damage", MENDED)
def test_a_damaged_file_costs_nothing(lab: Lab, damage: str) -> None:
    run = interrupted_run(lab, damage.replace(" ", "-"))
    MENDED[damage](run)
    assert lab.go_on("vineppo", run) == 0, log_of(run).read_text()
    lab.check_same("vineppo", run)
    TABLE.append((damage, "resumed, the same bits", "nothing"))


@pytest.mark.parametrize("damage", REFUSED)
def test_a_damaged_file_is_refused_in_one_line(lab: Lab, damage: str) -> None:
    run = interrupted_run(lab, damage.replace(" ", "-"))
    apply, message = REFUSED[damage]
    apply(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert lab.servers.run(log_of(run), ["train", "--resume", str(run)]) == 2
    lines = [line for line in log_of(run).read_text().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    TABLE.append((damage, f"one line: {message}", "what was damaged"))
