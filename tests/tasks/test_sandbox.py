"""The sandbox of grader processes: what it refuses, what it allows, who runs in it, and systems without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, known
from vineppo.cli.main import main
from vineppo.config.schema import GradingConfig, TaskConfig
from vineppo.tasks import build_task
from vineppo.tasks.grading import sandbox
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.tasks.gym import EVALUATING, scorer_protection
from vineppo.types import Problem, UserError

needs_sandbox = pytest.mark.skipif(bool(sandbox.missing_protection()), reason=sandbox.missing_protection())

ATTEMPTS = """
import ctypes, importlib, json, os, resource, signal, socket, subprocess, sys, tempfile, threading, urllib.request
from vineppo.tasks.grading.sandbox import enter_sandbox

out = os.dup(1)
libc = ctypes.CDLL(None, use_errno=True)
open("old", "w").write("old")

def system_call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def in_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(attempt(lambda: open("new", "w"))))
    thread.start()
    thread.join()
    return results[0]

def attempt(function):
    try:
        return f"allowed: {function()}"
    except PermissionError:
        return "refused"
    except Exception as error:
        return repr(error)

attempts = {
    "create": lambda: open("new", "w"),
    "append": lambda: open("old", "a"),
    "empty": lambda: os.open("old", os.O_RDONLY | os.O_TRUNC),
    "truncate": lambda: os.truncate("old", 0),
    "delete": lambda: os.unlink("old"),
    "move": lambda: os.rename("old", "new"),
    "directory": lambda: os.mkdir("new"),
    "link": lambda: os.symlink("old", "new"),
    "mode": lambda: os.chmod("old", 0),
    "times": lambda: os.utime("old", (0, 0)),
    "shared memory": lambda: open("/dev/shm/new", "w"),
    "memory file": lambda: os.memfd_create("new"),
    "memory of the trainer": lambda: open(f"/proc/{os.getppid()}/mem", "r+b"),
    "socket": lambda: socket.create_connection(("127.0.0.1", 9)),
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "pair of sockets": lambda: socket.socketpair(),
    "program": lambda: subprocess.run([sys.executable, "-c", ""]),
    "execute": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
    "fork": lambda: os.fork(),
    "signal": lambda: os.kill(os.getppid(), 0),
    "group": lambda: os.setsid(),
    "namespace": lambda: system_call("unshare", 0x10000000),
    "trace": lambda: system_call("ptrace", 16, os.getppid(), 0, 0),
    "in a thread": in_thread,
    "null device": lambda: open(os.devnull, "w").write("abc"),
    "read": lambda: open("old").read(),
    "import": lambda: importlib.import_module("colorsys").__name__,
    "thread": lambda: [t := threading.Thread(target=print), t.start(), t.join()][2],
    "own limits": lambda: resource.getrlimit(resource.RLIMIT_CORE) is not None,
}
enter_sandbox()
results = {name: attempt(function) for name, function in attempts.items()}
results["system"] = os.system("echo > new")
os.write(out, json.dumps(results).encode())
os.abort()
"""
ALLOWED = {
    "in a thread": "allowed: refused",
    "null device": "allowed: 3",
    "read": "allowed: old",
    "import": "allowed: colorsys",
    "thread": "allowed: None",
}


@needs_sandbox
def test_the_sandbox_refuses_writing_the_network_programs_and_signals(tmp_path: Path) -> None:
    """Case 5."""
    ran = subprocess.run(
        [sys.executable, "-c", ATTEMPTS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == -6, ran.stderr  # abort works: a process may send signals to itself
    results = json.loads(ran.stdout)
    assert results.pop("system") != 0
    assert {name: result for name, result in results.items() if result != "refused"} == ALLOWED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


FILTER_ONLY = """
import ctypes, errno, os, sys
from vineppo.tasks.grading import sandbox

libc, machine = ctypes.CDLL(None, use_errno=True), sandbox._machine()
sandbox._checked(libc.prctl(sandbox._NO_NEW_PRIVILEGES, 1, 0, 0, 0))
sandbox._install(sandbox._filter(machine, os.getpid()))
tkill = {"x86_64": 200, "aarch64": 130}[machine]
tgkill = sandbox._TGKILL[machine]
refused = []
for name, call in {
    "kill": lambda: os.kill(os.getppid(), 0),
    "tkill": lambda: sandbox._checked(libc.syscall(tkill, os.getppid(), 0)),
    "tgkill": lambda: sandbox._checked(libc.syscall(tgkill, os.getppid(), os.getppid(), 0)),
    "execve": lambda: os.execv(sys.executable, [sys.executable, "-c", "print('executed')"]),
    "fork": os.fork,
}.items():
    try:
        call()
    except OSError as error:
        refused.append(f"{name} {errno.errorcode[error.errno]}")
print(*refused, sep=", ")
"""


@needs_sandbox
def test_the_filter_alone_refuses_signals_programs_and_processes() -> None:
    """Landlock refuses some of these too, so the other test does not see a gap in the filter."""
    ran = subprocess.run(
        [sys.executable, "-c", FILTER_ONLY],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert (ran.stdout, ran.stderr) == ("kill EPERM, tkill EPERM, tgkill EPERM, execve EPERM, fork EPERM\n", "")


PROBE = """
import os, socket, subprocess, sys, threading

def probe(**_):
    socket.socket().close()
    subprocess.run([sys.executable, "-c", ""], check=True)
    with open("written", "w"):
        pass
    return [1.0]

def load_probe():
    return probe

def load_with_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return probe
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "my_probes.py").write_text(PROBE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    import my_probes  # type: ignore[import-not-found]

    yield my_probes
    sys.modules.pop("my_probes")


@needs_sandbox
def test_functions_of_the_user_are_trusted_and_graders_of_the_package_are_not(module: Any, tmp_path: Path) -> None:
    """Case 5: a user's reward may need the network or a compiler."""
    problem = Problem("train/0", "?", "1")
    task = build_task(TaskConfig(num_steps=3, rewards=("my_probes:probe",)))
    assert task.grade([problem], ["x"]) == [1.0] and (tmp_path / "written").exists()
    (tmp_path / "written").unlink()
    pool = WorkerPool([module.load_probe], 1, 20.0, 0, "required")
    [verdict] = pool.verdicts([problem], ["x"], [])
    assert "PermissionError" in verdict.text and not (tmp_path / "written").exists()  # type: ignore[union-attr]
    pool.close()
    [setup] = [pool._setup for pool in [build_task(TaskConfig(num_steps=3, rewards=("boxed",))).judge]]  # type: ignore[attr-defined]
    assert b"available" in setup


@needs_sandbox
def test_a_process_that_cannot_enter_the_sandbox_says_so(module: Any) -> None:
    problem = Problem("train/0", "?", "1")
    pool = WorkerPool([module.load_with_thread], 1, 20.0, 0, "required")
    with pytest.raises(UserError, match=r"more than one thread, so it cannot enter .*trust_scorer to true to run the"):
        pool.verdicts([problem], ["x"], [])
    pool = WorkerPool([module.load_with_thread], 1, 20.0, 0, "available")
    with pytest.warns(
        UserWarning, match="grader processes run without a sandbox: the grader process has more than one"
    ):
        assert pool.verdicts([problem], ["x"], []) == [(1.0,)]
    pool.close()


def test_scorers_that_evaluate_text_are_refused_without_a_sandbox(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 5: as on macOS."""
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    assert sandbox.missing_protection() == "Darwin has neither Landlock nor seccomp"
    for name in EVALUATING:
        with pytest.raises(UserError) as caught:
            scorer_protection(name, trusted=False)
        assert str(caught.value) == (
            f"task.name reasoning_gym:{name}: its scorer evaluates the model's answers as Python code, and this system "
            "has no sandbox for that: Darwin has neither Landlock nor seccomp; use Linux with Landlock and seccomp, or "
            "set task.grading.trust_scorer to true"
        )
        assert scorer_protection(name, trusted=True) == "available"
    assert scorer_protection("chain_sum", trusted=False) == "available"
    assert main(["doctor"]) == 0
    assert "no sandbox for grader processes: Darwin has neither Landlock nor seccomp" in capsys.readouterr().out


def test_the_filters_of_both_processors_refuse_equally_many_calls() -> None:
    """aarch64 has no fork, vfork, creat, chmod, chown, lchown, utime, utimes and futimesat."""
    numbers = {machine: list(calls) for machine, calls in sandbox._REFUSED.items()}
    assert all(len(set(calls)) == len(calls) for calls in numbers.values())
    assert len(numbers["x86_64"]) - len(numbers["aarch64"]) == 9
    for machine in numbers:
        program = sandbox._filter(machine, 17)
        for i, (code, _, yes, no) in enumerate(program):
            if code in (sandbox._JUMP_EQUAL, sandbox._JUMP_AT_LEAST):
                assert i + 1 + max(yes, no) < len(program)
        assert program[-1] == (sandbox._RETURN, sandbox._ALLOW, 0, 0)


CODE = (
    "__import__('os').system('touch owned')",
    "open('owned', 'w')",
    "__import__('socket').create_connection(('127.0.0.1', 9))",
    "[[__import__('os').system('touch owned')]]",
    "[__import__('subprocess').run(['touch', 'owned'])]",
)


@pytest.mark.real
@pytest.mark.parametrize("name", sorted(EVALUATING - {"composite"}))
def test_code_in_an_answer_has_no_effect(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 5: no file appears, and the reward is that of any wrong answer."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    if sandbox.missing_protection():
        with pytest.raises(UserError, match="has no sandbox"):
            build_task(TaskConfig(name=f"reasoning_gym:{name}"))
        return
    task = build_task(TaskConfig(name=f"reasoning_gym:{name}", grading=GradingConfig(workers=1)))
    problem = task.problem("train", 0)
    texts = [f"#### {text}" for text in (problem.answer, "wrong", *CODE)]
    right, wrong, *rewards = known(task.grade([problem] * 7, texts))
    assert right == 1.0 and wrong <= 0.05
    assert all(reward <= 0.05 for reward in rewards)
    assert list(tmp_path.iterdir()) == []
    assert isinstance(task, Graded) and isinstance(task.judge, WorkerPool)
    task.judge.close()


@pytest.mark.real
def test_evaluating_lists_every_scorer_that_evaluates_answers() -> None:
    """A scorer evaluates text if Python compiles the answer. Answers are wrapped as the data sets expect them."""
    pytest.importorskip("reasoning_gym")
    code = """
import sys
import reasoning_gym
from reasoning_gym.factory import DATASETS
WORD, found, name = "canary12345", set(), ""
def hook(event, arguments):
    if event == "compile" and name and WORD in repr(arguments[0]):
        found.add(name)
sys.addaudithook(hook)
for candidate in sorted(set(DATASETS) - {"composite"}):
    name = ""
    data = reasoning_gym.create_dataset(candidate, seed=0, size=1)
    entry = data[0]
    answer = str(entry["answer"])
    name = candidate
    forms = (WORD, f"[{WORD}]", f"[[{WORD}]]", f"'{WORD}'", f"{WORD}()")
    for text in (*forms, f"{answer} + {WORD}", f"{answer}\\n{WORD}"):
        try:
            data.score_answer(text, entry)
        except Exception:
            pass
name = ""
print(",".join(sorted(found)), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1].split(",") == sorted(EVALUATING - {"composite"})
