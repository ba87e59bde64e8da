"""Several processes (ranks) of which one is killed, or that are interrupted or refused. Slow: `make test-ranks`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.test_ranks import SMALL, start, train

pytestmark = pytest.mark.ranks


def test_killed_and_interrupted_processes_and_the_run_goes_on(tmp_path: Path) -> None:
    """Rank 0 of a run is killed, then rank 1 when it goes on, then Ctrl-C stops it, and then it runs to its end."""
    run = tmp_path / "run"
    arguments = [*SMALL, "--algorithm", "grpo", "--run.iterations", "500", "--run.dir", str(run)]
    for rank in (0, 1):
        process = start(2, *arguments)
        wait_for_checkpoints(run, 2, process)
        os.kill(process_of_rank(process.pid, rank), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)  # all processes have ended within a minute
        assert process.returncode != 0
        lines = [line for line in output.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "--resume" in lines[0], output
        arguments = ["--resume", str(run)]
    process = start(2, *arguments)
    wait_for_checkpoints(run, 1, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert '"finish_reason": "interrupted"' in (run / "summary.json").read_text(), output
    done = newest(run)
    train(2, "--resume", str(run), "--run.iterations", str(done + 1))
    assert newest(run) == done + 1 and f'"iterations": {done + 1}' in (run / "summary.json").read_text()


def newest(run: Path) -> int:
    """Return the number of the newest checkpoint of a run; 0 if there is none."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


def wait_for_checkpoints(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written some number of further checkpoints."""
    target, deadline = newest(run) + count, time.monotonic() + 300
    while newest(run) < target and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert newest(run) >= target, process.communicate(timeout=60)[0]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    process = start(2, *SMALL, "--model.path", str(tmp_path / "absent"), "--run.dir", str(tmp_path / "a"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and not (tmp_path / "a").exists()
    assert [line for line in output.splitlines() if "error:" in line.lower() and "absent" in line][1:] == []


def process_of_rank(parent: int, rank: int) -> int:
    """Return the number of the process with a rank among the children of a launcher."""
    for folder in Path("/proc").iterdir():
        try:
            is_child = re.search(rf"^PPid:\t{parent}$", (folder / "status").read_text(), re.MULTILINE)
            if is_child and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process has rank {rank}")
