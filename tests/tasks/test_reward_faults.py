"""Reward functions that misbehave: event loops, NaN, memory, descriptors, forks, children, escape sequences."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from vineppo.cli.main import main
from vineppo.config.schema import GradingConfig, TaskConfig
from vineppo.tasks import build_task
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.graders import load_grader
from vineppo.tasks.grading.output import Output
from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.tasks.grading.worker import _grade
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.types import Failure, Problem, UserError, Verdict

REWARDS = """
import asyncio, os, resource, sys

leaked = []

class NoText(Exception):
    def __str__(self):
        raise ValueError("no text")

async def later(value):
    await asyncio.sleep(0)
    return value

def misbehave(completions, **_):
    [text] = completions
    if text == "asyncio.run":
        return [asyncio.run(later(3.0))]
    if text == "own loop":
        loop = asyncio.new_event_loop()
        value = loop.run_until_complete(later(4.0))
        loop.close()
        return [value]
    if text in ("nan", "1e308"):
        return [float(text)]
    if text == "descriptor 1":
        os.write(1, b"printed")
    if text == "other descriptors":
        for descriptor in range(3, 40):
            try:
                os.write(descriptor, b"\\x00\\x00\\x00\\xff printed")
            except OSError:
                pass
    if text == "invalid messages":
        for descriptor in range(3, 40):
            try:
                os.write(descriptor, b"[" * 5000 + b"\\n{}\\n")
            except OSError:
                pass
    if text == "close descriptors":
        os.closerange(3, 40)
    if text == "fork":
        os.fork()
    if text == "program":
        os.system("printf '\\033[2J program\\n'; printf '\\033[2J error\\n' >&2")
    if text == "interrupt":
        raise KeyboardInterrupt
    if text == "no text":
        raise NoText
    if text.startswith("{"):
        for descriptor in range(3, 40):
            try:
                os.write(descriptor, text.encode() + b"\\n")
            except OSError:
                pass
    if text == "escape":
        print("\\x1b[2J printed", flush=True)
        raise ValueError("\\x1b[2J raised")
    return [float(len(text))]

def memory(completions, **_):
    [text] = completions
    if text.startswith("leak"):
        leaked.append(bytearray(50 << 20))
    if text == "much":
        bytearray(600 << 20)
    if text == "too much":
        bytearray(2000 << 20)
    return [float(os.getpid())]

def limit(**_):
    return [float(resource.getrlimit(resource.RLIMIT_AS)[0])]

def protected(**_):
    import json, socket
    refused = 0
    try:
        open("written", "w")
    except PermissionError:
        refused += 1
    try:
        socket.socket()
    except PermissionError:
        refused += 1
    try:
        os.execv(sys.executable, [sys.executable, "-c", ""])
    except PermissionError:
        refused += 1
    return [float(refused)]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_faulty_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_faulty_rewards"


@pytest.fixture
def pool_of(module: str) -> Iterator[Any]:
    pools: list[WorkerPool] = []

    def build(name: str, workers: int = 1, memory: int = 0, **options: Any) -> WorkerPool:
        pools.append(WorkerPool([functools.partial(load_grader, f"{module}:{name}")], workers, 20.0, memory, **options))
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


def problem(i: int) -> Problem:
    return Problem(f"train/{i}", "?", str(i))


def graded_by(pool: WorkerPool, texts: list[str]) -> list[Verdict]:
    return pool.verdicts([problem(i) for i in range(len(texts))], texts, [])


def test_misbehaviour_in_a_worker_affects_at_most_its_own_response(pool_of: Any) -> None:
    """Cases 1 and 4."""
    texts = ["a", "asyncio.run", "own loop", "nan", "1e308", "descriptor 1", "other descriptors", "bc", "fork", "def"]
    texts += ["invalid messages", "close descriptors", "ghij", "interrupt", "no text"]
    verdicts = dict(zip(texts, graded_by(pool_of("misbehave"), texts), strict=True))
    failures = {text: verdict.text for text, verdict in verdicts.items() if isinstance(verdict, Failure)}
    assert {text: verdict for text, verdict in verdicts.items() if text not in failures} == {
        "a": (1.0,),
        "asyncio.run": (3.0,),
        "own loop": (4.0,),
        "descriptor 1": (12.0,),
        "bc": (2.0,),
        "fork": (4.0,),
        "def": (3.0,),
        "ghij": (4.0,),
    }
    allowed = "allowed: a number from -1e12 to 1e12, or None"
    invalid = (
        "the grader process sent an invalid message; a reward function probably wrote to a file descriptor that it did "
        "not open"
    )
    assert failures == {
        "nan": f"reward function my_faulty_rewards:misbehave: reward 0 is nan; {allowed}",
        "1e308": f"reward function my_faulty_rewards:misbehave: reward 0 is 1e+308; {allowed}",
        "other descriptors": invalid,
        "invalid messages": invalid,
        "close descriptors": "the grader process ended unexpectedly (exit code 0)",
        "interrupt": "a reward function raised KeyboardInterrupt",
        "no text": "reward function my_faulty_rewards:misbehave failed: NoText; it is called as fn(prompts, "
        "completions, completion_ids, **columns) with columns answer and must return a list of numbers",
    }


@pytest.mark.parametrize(
    ("message", "verdict"),
    [
        ('{"error":"ended by the model"}', "invalid message"),
        ('{"job":0,"rewards":[1e300]}', "invalid message"),
        ('{"job":0,"rewards":[5.0]}', (5.0,)),  # code that runs in a grader process can choose its own reward
    ],
)
def test_forged_messages_neither_end_the_run_nor_fail_the_next_response(
    message: str, verdict: Any, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = WorkerPool([functools.partial(load_grader, f"{module}:misbehave")], 1, 20.0, 0, "available")
    forged, following = graded_by(pool, [message, "ab"])
    pool.close()
    assert following == (2.0,)
    if isinstance(forged, Failure):
        assert verdict in forged.text
    else:
        assert forged == verdict


def test_a_user_error_in_the_sandbox_is_a_failure() -> None:
    def reward(**_: Any) -> list[float]:
        raise UserError("ended by the model")

    assert _grade((reward,), problem(0), "x", [], trusted=False) == ({"failure": "ended by the model"}, False)
    with pytest.raises(UserError, match="ended by the model"):
        _grade((reward,), problem(0), "x", [], trusted=True)


def test_output_is_printed_in_lines_and_a_flood_neither_hangs_nor_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    output = Output()
    write_end = os.dup(output.write_end)
    output.start()
    for part in (b"one \x1b[2J ", "l\u00edne\n".encode()[:2], "l\u00edne\n".encode()[2:], b"\xff" * 3, b"\n"):
        os.write(write_end, part)
    for _ in range(100):  # more than a pipe holds: it ends because the pipe is read
        os.write(write_end, b"x" * (1 << 14))
    os.close(write_end)
    output.drain()
    lines = capfd.readouterr().err.split("\n")
    assert lines == [r"one \x1b[2J líne", r"\xff\xff\xff", "x" * (100 << 14)]


def test_plain_functions_run_in_the_thread_of_the_caller_outside_any_event_loop() -> None:
    """Case 1."""
    threads = []

    async def three() -> float:
        await asyncio.sleep(0)
        return 3.0

    def plain(completions: list[str], **_: Any) -> list[float]:
        threads.append(threading.get_ident())
        return [asyncio.run(three()) for _ in completions]

    async def asynchronous(completions: list[str], **_: Any) -> list[float]:
        return [1 + await three() for _ in completions]

    assert apply_rewards([asynchronous, plain], [problem(0)], ["x"]) == [(4.0, 3.0)]
    assert threads == [threading.get_ident()]

    async def cell_of_a_notebook() -> list[Verdict]:
        return apply_rewards([asynchronous, plain], [problem(0)], ["x"])

    assert asyncio.run(cell_of_a_notebook()) == [(4.0, 3.0)]


def test_a_plain_function_that_fails_leaves_no_coroutine_behind() -> None:
    async def asynchronous(completions: list[str], **_: Any) -> list[float]:
        return [1.0]

    def broken(**_: Any) -> list[float]:
        raise ValueError("no")

    with warnings.catch_warnings(), pytest.raises(UserError, match="broken failed: ValueError: no"):
        warnings.simplefilter("error")
        apply_rewards([asynchronous, broken], [problem(0)], ["x"])


def test_one_nan_among_1000_rewards_is_one_counted_error() -> None:
    """Case 4."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [math.nan if text == "617" else 1.0 for text in completions]

    task = build_task(TaskConfig(num_steps=3, grading=GradingConfig(max_error_share=0.3)), reward_fn=reward)
    rewards = task.grade([problem(i) for i in range(1000)], [str(i) for i in range(1000)])
    assert rewards == [0.0 if i == 617 else 1.0 for i in range(1000)]
    assert (task.total.graded, task.total.errors, task.total.sums) == (1000, 1, {"reward": 999.0})


def test_weights_that_are_too_large_are_refused() -> None:
    """Case 4. A reward is at most 1e12, so a weighted sum never ends a run."""
    for weights in ((1e308,), (600.0, -500.0), (math.inf,)):
        with pytest.raises(UserError, match=r"reward_weights"):
            TaskConfig(num_steps=3, reward_weights=weights)
    task = build_task(
        TaskConfig(num_steps=3, reward_weights=(1000.0,)), reward_fn=lambda completions, **_: [1e12] * len(completions)
    )
    assert task.grade([problem(0)], ["x"]) == [1e15]


def test_a_worker_that_leaks_memory_is_replaced(pool_of: Any) -> None:
    """Case 4: 24 calls leak more than the limit, and every response gets its reward."""
    pool = pool_of("memory", memory=1 << 30)
    verdicts = graded_by(pool, [f"leak {i}" for i in range(24)])
    assert not any(isinstance(verdict, Failure) for verdict in verdicts)
    assert 3 <= len(set(verdicts)) <= 8
    # Earlier responses took the memory: the response is graded by a new process.
    [leak, *_], [much] = graded_by(pool, ["leak"] * 4), pool.verdicts([problem(9)], ["much"], [])
    assert isinstance(much, tuple) and much != leak
    [too_much, small] = graded_by(pool, ["too much", "small"])
    assert isinstance(too_much, Failure) and "MemoryError" in too_much.text
    assert isinstance(small, tuple)


def test_refused_memory_limits_warn_once(pool_of: Any, tmp_path: Path) -> None:
    """Case 2."""
    (tmp_path / "my_faulty_rewards.py").write_text(
        REWARDS + "\ndef refuse(*_):\n    raise ValueError('current limit exceeds maximum limit')\n"
        "resource.setrlimit = refuse\n"
    )
    pool = pool_of("limit", workers=2, memory=4 << 30)
    with pytest.warns(UserWarning) as caught:
        verdicts = graded_by(pool, [str(i) for i in range(20)])
    assert verdicts == [(-1.0,)] * 20
    assert [str(warning.message) for warning in caught] == [
        "the system refuses a limit on the memory of grader processes (current limit exceeds maximum limit); they run "
        "without one; set task.grading.memory to 0 to hide this warning"
    ]


def run_script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,  # a process that is left running keeps the output open
    )


def test_a_lower_hard_limit_is_the_memory_limit(module: str, tmp_path: Path) -> None:
    """Case 2."""
    ran = run_script(
        """
        import functools, resource
        from vineppo.tasks.grading.graders import load_grader
        from vineppo.tasks.grading.workers import WorkerPool
        from vineppo.types import Problem
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        pool = WorkerPool([functools.partial(load_grader, "my_faulty_rewards:limit")], 1, 20.0, 4 << 30)
        print(pool.verdicts([Problem("a", "?")], ["x"], []))
        """,
        tmp_path,
    )
    assert (ran.stdout, ran.stderr) == (f"[({float(3 << 30)},)]\n", "")


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the test looks into /proc")
def test_the_processes_of_a_reward_function_end_with_a_killed_trainer(tmp_path: Path) -> None:
    """Case 4: SIGKILL of the trainer also ends a hanging worker, its guard and a `sleep 1000`."""
    (tmp_path / "my_sleeping_rewards.py").write_text(
        "import os, subprocess\n"
        "def start(**_):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        "    with open('pids.new', 'w') as file:\n"
        "        file.write(f'{os.getpid()} {os.getppid()} {child.pid}')\n"
        "    os.rename('pids.new', 'pids')\n"
        "    while True: pass\n"
    )
    ran = run_script(
        """
        import functools, os, signal, time
        from vineppo.tasks.grading.graders import load_grader
        from vineppo.tasks.grading.workers import WorkerPool
        from vineppo.types import Problem
        pool = WorkerPool([functools.partial(load_grader, "my_sleeping_rewards:start")], 1, 60.0, 0)
        pool.expect([Problem("a", "?")], ["x"], [])
        while not os.path.exists("pids"):
            pool.expect([], [], [])
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert ran.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if alive(pid)] == []


def test_escape_sequences_never_reach_the_terminal(
    module: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 5: texts of exceptions, of messages and of what a grader process prints are escaped."""
    limits = GradingConfig(workers=1, max_error_share=0.0)
    task = build_task(TaskConfig(num_steps=3, rewards=(f"{module}:misbehave",), grading=limits))
    assert task.grade([problem(1)], ["program"]) == [7.0]
    with pytest.raises(UserError) as caught:
        task.grade([problem(0)], ["escape"])
    assert r"ValueError: \x1b[2J raised" in str(caught.value) and "\x1b" not in str(caught.value)
    assert main(["train\x1b[2J\x9b\u202e\ud800"]) == 2
    monkeypatch.setattr("vineppo.cli.main._dispatch", lambda argv: warnings.warn("\x1b[2J warned", stacklevel=1) or 0)
    with warnings.catch_warnings():
        assert main(["train"]) == 0
    assert isinstance(task, Graded) and isinstance(task.judge, WorkerPool)
    task.judge.close()
    printed = capfd.readouterr().err
    for text in ("printed", "program", "error"):
        assert rf"\x1b[2J {text}" in printed
    assert r"error: unknown command train\x1b[2J\x9b\u202e\ud800; commands:" in printed
    assert r"warning: \x1b[2J warned" in printed
    assert "\x1b" not in printed and "\x9b" not in printed
