"""Grading with hosts that die or are silent: the same verdicts as those of local grader processes."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vineppo.config.schema import GradingConfig, SamplerConfig, TaskConfig
from vineppo.tasks import build_task
from vineppo.tasks.grading import host as host_module
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.graders import load_grader
from vineppo.tasks.grading.host import GraderHost, HostSettings, Report
from vineppo.tasks.grading.jobs import Job, Jobs
from vineppo.tasks.grading.ray import RayGraders
from vineppo.tasks.grading.remote import HostDied, RemotePool
from vineppo.tasks.grading.workers import Place, WorkerPool
from vineppo.training.changes import CHANGEABLE
from vineppo.training.configure import config_class
from vineppo.types import Failure, Problem, TrainingWarning, UserError, Verdict

REWARDS = """
import os, time
from pathlib import Path
from vineppo.types import UserError

def troubled(completions, answer, **columns):
    [text] = completions
    print("grading", text)
    if text == "die":
        os._exit(7)
    if text == "hang":
        time.sleep(60)
    if text == "raise":
        raise KeyError("no such key")
    if text == "stop":
        raise UserError("the judge model has no credit")
    if text == "file":
        return [float(Path("number.txt").read_text())]
    return [len(text) / 3 + int(answer[0]) * 1e-9]
"""
TEXTS = ["a" * i for i in range(30)] + ["hang", "die", "raise", "file"]


def problem(i: int) -> Problem:
    return Problem(f"train/{i}", "?", str(i), {})


def graded_by(pool: RemotePool | WorkerPool, texts: Sequence[str]) -> list[Verdict]:
    return pool.verdicts([problem(i) for i in range(len(texts))], texts, [])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostSettings:
    (tmp_path / "my_remote_rewards.py").write_text(REWARDS)
    (tmp_path / "number.txt").write_text("0.125")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # the current directory, as it is for `python -c`
    loader = functools.partial(load_grader, "my_remote_rewards:troubled")
    return HostSettings((loader,), 2.0, 0, "none", Place.here())


class Threads:
    """A crew whose hosts are `GraderHost`s of this process, each with its grader process, and a thread for each call.

    Args:
        before: called in the thread with (number of the host, jobs) before a list of jobs is graded.
    """

    def __init__(self, settings: HostSettings, size: int, before: Callable[[int, Sequence[Job]], None]):
        self.settings, self.size, self.before = settings, size, before
        self.hosts = [GraderHost(settings) for _ in range(size)]
        self.threads = ThreadPoolExecutor(8)
        self.sent: list[tuple[str, ...]] = []
        self.replaced: list[int] = []

    def start(self, host: int, jobs: Sequence[Job]) -> Future[Report]:
        def run(grader: GraderHost) -> Report:
            self.before(host, jobs)
            return grader.grade(jobs)

        self.sent.append(tuple(text for _, text, _ in jobs))
        return self.threads.submit(run, self.hosts[host])

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        return list(wait(handles, seconds, FIRST_COMPLETED).done)

    def result(self, handle: Future[Report]) -> Report:
        return handle.result()

    def replace(self, host: int) -> None:
        self.replaced.append(host)
        self.hosts[host].close()
        self.hosts[host] = GraderHost(self.settings)

    def close(self) -> list[str]:
        return [host.close() for host in self.hosts]


@pytest.fixture
def pool_of(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[RemotePool, list[Threads]]]]:
    pools: list[RemotePool] = []
    # A host catches the warnings of its whole process. These hosts are threads of one process, so they would catch
    # those of the pool.
    quiet = SimpleNamespace(catch_warnings=lambda record: contextlib.nullcontext([]), simplefilter=lambda action: None)
    monkeypatch.setattr(host_module, "warnings", quiet)

    def build(
        size: int = 2, before: Callable[[int, Sequence[Job]], None] = lambda host, jobs: None, **options: Any
    ) -> tuple[RemotePool, list[Threads]]:
        crews: list[Threads] = []

        def start_crew() -> Threads:
            crews.append(Threads(settings, size, before))
            return crews[-1]

        pools.append(RemotePool(start_crew, settings.seconds, **options))
        return pools[-1], crews

    yield build
    for pool in pools:
        pool.close()


def test_verdicts_are_those_of_local_grader_processes(
    settings: HostSettings, pool_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    """Also the texts of failures and the current directory, which another process may have chosen differently."""
    local = WorkerPool(settings.loaders, 2, settings.seconds, 0)
    expected = graded_by(local, TEXTS)
    local.close()
    assert expected[:30] == [(i / 3 + i * 1e-9,) for i in range(30)] and expected[33] == (0.125,)
    late, died, raised = expected[30:33]
    assert isinstance(late, Failure) and late.timed_out and isinstance(died, Failure) and "exit code 7" in died.text
    assert isinstance(raised, Failure) and "KeyError" in raised.text
    capfd.readouterr()
    pool, crews = pool_of()
    monkeypatch.chdir(tmp_path.parent)
    assert graded_by(pool, TEXTS) == expected
    # The jobs are sent as local ones are: at most eight, and in equal shares at the end. Each is sent once.
    assert sorted(text for chunk in crews[0].sent for text in chunk) == sorted(TEXTS)
    assert max(map(len, crews[0].sent)) == 8
    pool.close()
    printed = capfd.readouterr().err
    assert all(f"grading {text}\n" in printed for text in TEXTS)


def test_a_host_finds_the_packages_of_its_own_machine(tmp_path: Path) -> None:
    """The trainer's packages are in a directory that this machine does not have."""
    (tmp_path / "my_numeric_rewards.py").write_text(
        "import numpy\n\ndef length(completions, **columns):\n    return [float(numpy.log2(len(completions[0])))]\n"
    )
    loader = functools.partial(load_grader, "my_numeric_rewards:length")
    elsewhere = Place([str(tmp_path), "/no/such/site-packages"], "/no/such/folder")
    host = GraderHost(HostSettings((loader,), 20.0, 0, "none", elsewhere))
    assert host.grade([(problem(0), "aaaaaaaa", [])]) == Report(((3.0,),))
    host.close()


def test_a_host_that_dies_is_replaced_and_only_the_jobs_without_a_verdict_are_graded_again(pool_of: Any) -> None:
    deaths: list[tuple[str, ...]] = []

    def die_once(host: int, jobs: Sequence[Job]) -> None:
        if not deaths and any(text == "aaaa" for _, text, _ in jobs):
            deaths.append(tuple(text for _, text, _ in jobs))
            raise HostDied("the machine is gone")

    pool, crews = pool_of(before=die_once)
    texts = TEXTS[:30]
    with pytest.warns(TrainingWarning, match=r"was replaced \(the machine is gone\); .* again, .*: 8$"):
        assert graded_by(pool, texts) == [(i / 3 + i * 1e-9,) for i in range(30)]
    [crew] = crews
    assert len(crew.replaced) == 1
    sent = [text for chunk in crew.sent for text in chunk]
    assert {text for text in texts if sent.count(text) == 2} == set(deaths[0]) and len(sent) == 38


def test_a_silent_host_is_replaced_and_a_response_that_no_host_survives_ends_the_run(pool_of: Any) -> None:
    """The clock advances by an hour whenever it is read, until the silent host is replaced."""
    hours, released, crews = [0.0], threading.Event(), list[Threads]()

    def clock() -> float:
        hours[0] += 0.0 if crews and crews[0].replaced else 3600.0
        return hours[0]

    def be_silent(host: int, jobs: Sequence[Job]) -> None:
        if not crews[0].replaced:
            released.wait(60)
            raise HostDied("late, which nobody reads")

    pool, crews = pool_of(size=1, before=be_silent, clock=clock)
    with pytest.warns(TrainingWarning, match="no sign of life"):
        assert graded_by(pool, ["abc"]) == [(1.0,)]
    released.set()
    assert crews[0].replaced == [0]

    def die(host: int, jobs: Sequence[Job]) -> None:
        raise HostDied("out of memory")

    pool, crews = pool_of(size=1, before=die)
    with (
        pytest.warns(TrainingWarning, match="replaced"),
        pytest.raises(UserError, match=r"3 grading workers died while they graded the same response; .*: out of memo"),
    ):
        graded_by(pool, ["abc"])
    assert crews[0].replaced == [0, 0]


def test_a_mistake_of_the_user_ends_the_run_with_the_line_of_local_grading(
    settings: HostSettings, pool_of: Any
) -> None:
    messages = []
    for pool in (WorkerPool(settings.loaders, 1, 2.0, 0), pool_of(size=1)[0]):
        with pytest.raises(UserError) as error:
            graded_by(pool, ["a", "stop"])
        messages.append(str(error.value))
        pool.close()
    assert messages[0] == messages[1] == "the judge model has no credit"


def test_equal_responses_are_one_job_and_jobs_that_come_back_are_first() -> None:
    jobs = Jobs()
    keys = jobs.submit([problem(0), problem(0), problem(1)], ["x", "x", "x"], [[1], [1], [2]])
    assert len(jobs) == jobs.waiting == 2 and jobs[keys[2]] == (problem(1), "x", [2])
    assert jobs.take(2) == [keys[0]]  # half of the queue
    jobs.finish(keys[0], (1.0,))
    jobs.submit([problem(0)], ["x"], [])
    assert jobs.waiting == 1  # a response whose verdict is known is not graded again
    assert jobs.take(1) == [keys[2]]
    more = jobs.submit([problem(i) for i in range(2, 30)], ["x"] * 28, [])
    jobs.put_back([keys[2]])
    assert jobs.take(1) == [keys[2], *more[:7]] and jobs.unfinished(keys)
    jobs.finish(keys[2], Failure("no"))
    assert not jobs.unfinished(keys)
    assert jobs.collect(keys) == [(1.0,), (1.0,), Failure("no")] and len(jobs) == 28


def test_without_a_connection_to_ray_the_graders_are_local(settings: HostSettings, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "answer": "1"}\n' * 3)
    config = TaskConfig(
        name="dataset",
        train_path=str(tmp_path / "rows.jsonl"),
        rewards=("my_remote_rewards:troubled",),
        grading=GradingConfig(pool="ray", workers=1),
    )
    task = build_task(config)
    assert isinstance(task, Graded) and isinstance(task.judge, RayGraders)
    assert task.grades_early and task.grade([task.problem("train", 0)], ["abc"]) == [1.0 + 1e-9]
    assert isinstance(task.judge.judge, WorkerPool)
    task.judge.close()


def test_graders_in_a_pool_need_the_pool_and_may_change_when_a_run_is_resumed() -> None:
    grading = TaskConfig(grading=GradingConfig(pool="ray"))
    with pytest.raises(UserError, match=r"task.grading.pool is ray and sampler.pool is none; .*: set sampler.pool to"):
        config_class("grpo")(algorithm="grpo", task=grading)
    assert config_class("grpo")(algorithm="grpo", task=grading, sampler=SamplerConfig(pool="ray"))
    assert "task.grading.pool" in CHANGEABLE
