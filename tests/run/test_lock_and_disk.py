"""One process per run directory; full disks; symbolic links; what a killed process leaves behind."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vineppo.config.schema import Config
from vineppo.run import trackers as trackers_module
from vineppo.run.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vineppo.run.directory import RunDirectory
from vineppo.run.environment import package_version
from vineppo.run.files import directory_written_aside, disk_error, disk_errors_in_one_line
from vineppo.run.lock import locked
from vineppo.run.trackers import build_trackers
from vineppo.types import UserError


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk, with `File too large`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


HOLD = """
import sys
from pathlib import Path
from vineppo.run.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    """Case 14. The lock of a process that was killed does not have to be removed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as error, locked(tmp_path):
            pass
        assert re.fullmatch(
            rf"run directory {tmp_path} is in use by process {process.pid} on .+; wait until that run ends, or stop it",
            str(error.value),
        )
        process.send_signal(signal.SIGKILL)
    assert f"process {process.pid}" in (tmp_path / ".lock").read_text()
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
        with pytest.raises(UserError, match="is in use by"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A reward function may fork. The lock ends with the run, although the forked process is still alive."""
    ready, go_on = os.pipe(), os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(go_on[1])
            os.write(ready[1], b"1")
            os.read(go_on[0], 1)
            os._exit(0)
        assert os.read(ready[0], 1) == b"1"
        with pytest.raises(UserError, match="is in use by"), locked(tmp_path):  # the child did not unlock it
            pass
    try:
        with locked(tmp_path):
            pass
    finally:
        os.close(go_on[1])
        os.waitpid(child, 0)


def test_a_folder_with_nothing_but_a_lock_is_a_new_run(tmp_path: Path) -> None:
    """Case 14. The process was killed before it wrote the configuration."""
    with locked(tmp_path):
        RunDirectory.create(tmp_path, Config(), "mine")
    assert RunDirectory.open(tmp_path).read_record() == {
        "recipe": "mine",
        "vineppo": package_version(),
        "model_in_memory": False,
    }


# --- full disks


def test_a_disk_that_fills_during_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    """Case 17. The previous checkpoint is whole, and nothing is left of the new one."""
    checkpoints = tmp_path / "checkpoints"
    save_checkpoint(checkpoints, 1, {"w": torch.ones(2)})
    with file_size_limit(10_000), pytest.raises(UserError) as error:
        save_checkpoint(checkpoints, 2, {"w": torch.ones(100_000)})
    assert str(error.value) == (
        f"the checkpoint of iteration 2 cannot be written to {checkpoints}: File too large; the earlier checkpoints "
        f"are intact; free some space, then continue with --resume {tmp_path}"
    )
    assert [path.name for path in checkpoints.iterdir()] == ["000001"]
    assert load_checkpoint(latest_checkpoint(checkpoints))["w"].tolist() == [1, 1]


def test_a_writer_that_finds_the_disk_full_is_one_line(tmp_path: Path) -> None:
    """Case 17. safetensors has an exception of its own."""

    def write(folder: Path) -> None:
        save_file({"w": torch.ones(100_000)}, folder / "w.safetensors")

    with (
        file_size_limit(10_000),
        pytest.raises(UserError, match=r"checkpoint of iteration 3 .*: File too large"),
    ):
        save_checkpoint(tmp_path, 3, {}, writers=[write])
    assert list(tmp_path.iterdir()) == []


def test_a_metrics_line_that_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    """Case 17. Lines longer than the buffer of a file object were written in several parts."""
    run = RunDirectory.create(tmp_path / "a", Config())
    run.append_metrics({"iteration": 1})
    before = run.metrics.read_bytes()
    with file_size_limit(10_000), pytest.raises(UserError) as error, disk_errors_in_one_line(run.path):
        run.append_metrics({"iteration": 2, "text": "x" * 20_000})
    assert str(error.value).startswith(f"{run.path} cannot be written: File too large; the run stopped and its checkp")
    assert run.metrics.read_bytes() == before


def test_a_reader_never_gets_half_a_line(tmp_path: Path) -> None:
    """While one thread appends lines of 50 kB, another one reads. What is read are the first lines, all whole."""
    run = RunDirectory.create(tmp_path / "a", Config())
    line = {"text": "x" * 50_000}

    def write() -> None:
        for iteration in range(100):
            run.append_metrics({"iteration": iteration, **line})

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        lines = run.read_metrics()
        assert lines == [{"iteration": i, **line} for i in range(len(lines))]
    writer.join()
    assert len(run.read_metrics()) == 100


def test_only_errors_of_the_disk_are_recognised() -> None:
    assert disk_error(OSError(28, "No space left on device")) == "No space left on device"
    assert disk_error(ValueError("I/O error: No space left on device (os error 28)")) == "No space left on device"
    assert disk_error(FileNotFoundError(2, "No such file")) is None and disk_error(RuntimeError("shape")) is None


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """The final model: a kill or a full disk while it is saved leaves no half model."""
    final = tmp_path / "final"
    for content in ("old", "new"):
        with directory_written_aside(final) as folder:
            folder.mkdir()
            (folder / "model").write_text(content)
    with pytest.raises(OSError, match="full"), directory_written_aside(final) as folder:
        folder.mkdir()
        (folder / "model").write_text("half")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["final"] and (final / "model").read_text() == "new"


# --- checkpoints


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    """Case 15."""
    for iteration, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save_checkpoint(tmp_path, iteration, {}, best=best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000004"]
    save_checkpoint(tmp_path, 5, {}, best=5)
    assert [path.name for path in tmp_path.iterdir()] == ["000005"]


def test_a_symbolic_link_is_removed_without_its_target(tmp_path: Path) -> None:
    """Case 18. shutil.rmtree refuses links; the checkpoint may have been moved to another disk."""
    elsewhere, checkpoints = tmp_path / "elsewhere", tmp_path / "checkpoints"
    save_checkpoint(checkpoints, 1, {"a": 1})
    (checkpoints / "000001").rename(elsewhere)
    (checkpoints / "000001").symlink_to(elsewhere)
    assert load_checkpoint(latest_checkpoint(checkpoints)) == {"a": 1}
    save_checkpoint(checkpoints, 1, {"a": 2})
    save_checkpoint(checkpoints, 2, {"a": 3})
    assert [path.name for path in checkpoints.iterdir()] == ["000002"]
    assert load_checkpoint(elsewhere) == {"a": 1}
    (checkpoints / "000003").symlink_to(tmp_path / "gone")
    save_checkpoint(checkpoints, 3, {"a": 4})
    assert load_checkpoint(checkpoints / "000003") == {"a": 4}


def test_the_folder_of_all_checkpoints_may_be_a_link(tmp_path: Path) -> None:
    """Case 18. A link whose target is gone is reported before training starts."""
    run = RunDirectory.create(tmp_path / "run", Config())
    run.checkpoints.rmdir()
    (tmp_path / "disk").mkdir()
    run.checkpoints.symlink_to(tmp_path / "disk")
    save_checkpoint(run.checkpoints, 1, {"a": 1})
    assert load_checkpoint(latest_checkpoint(RunDirectory.open(run.path).checkpoints)) == {"a": 1}
    (tmp_path / "disk").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory.open(run.path)


def test_a_checkpoint_of_another_format_is_refused_with_its_version(tmp_path: Path) -> None:
    """It is not skipped in favour of an older one, as a damaged checkpoint is."""
    save_checkpoint(tmp_path, 1, {})
    manifest = json.loads((save_checkpoint(tmp_path, 2, {}, keep=2) / "manifest.json").read_text())
    assert (manifest["format"], manifest["vineppo"]) == (1, package_version())
    (tmp_path / "000002" / "manifest.json").write_text(json.dumps({**manifest, "format": 2, "vineppo": "9.0"}))
    with pytest.raises(UserError) as error:
        latest_checkpoint(tmp_path)
    assert str(error.value) == (
        f"checkpoint {tmp_path}/000002 has format 2 of vineppo 9.0; this is vineppo {package_version()}, which reads "
        "format 1; continue with vineppo 9.0, or start a new run"
    )


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """Case 14."""
    run = RunDirectory.create(tmp_path, Config())
    for folder in (run.path, run.rollouts, run.plots):
        (folder / ".a.tmp").write_text("half")
    for folder in (run.path / ".final.tmp", run.checkpoints / ".000000.tmp"):
        folder.mkdir()
    run.remove_leftovers()
    assert list(tmp_path.rglob("*.tmp")) == []


# --- trackers


class Failing:
    """A tracker whose server goes away at iteration 3."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, metrics: object, step: int) -> None:
        if step >= 3:
            raise ConnectionError("no route to host\nsecond line")
        self.steps.append(step)

    def close(self) -> None:
        raise ConnectionError


def test_a_tracker_that_fails_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Case 17."""
    failing = Failing()
    monkeypatch.setattr(trackers_module, "_build", lambda *_: failing)
    (tracker,) = build_trackers(("tensorboard",), tmp_path, {})
    for step in range(1, 6):
        tracker.log({}, step)
    tracker.close()
    assert failing.steps == [1, 2]
    assert [str(warning.message) for warning in recwarn] == [
        "the tracker tensorboard failed at iteration 3 (ConnectionError: no route to host); the run goes on, and "
        "metrics.jsonl has all metrics; later failures of this tracker are not reported"
    ]


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(trackers_module, "_build", refuse)
    with pytest.raises(UserError) as error:
        build_trackers(("tensorboard",), tmp_path, {})
    assert str(error.value) == (
        "the tracker tensorboard did not start (ConnectionError: no route to host); mend that, or remove tensorboard "
        "from run.report_to"
    )
