"""Grading in worker processes: order of verdicts, limits, failures distinguished from wrong answers, early grading."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vineppo.config.schema import GradingConfig, ModelConfig, TaskConfig
from vineppo.model.policy import Policy
from vineppo.sampling.graded import grade_finished
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.tasks import build_task
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.graders import load_grader
from vineppo.tasks.grading.judge import InProcess
from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.training.evaluate import Measurement
from vineppo.training.rollouts import problem_range, sample_groups
from vineppo.types import Failure, Problem, UserError, Verdict

REWARDS = """
import os, time

def length(prompts, completions, completion_ids, answer, unit, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == len(unit)
    return [len(text) + 10 * len(ids) for text, ids in zip(completions, completion_ids)]

async def slowly(completions, **columns):
    import asyncio
    await asyncio.sleep(0.01)
    return [None if text == "none" else 1.0 for text in completions]

def troubled(completions, **columns):
    print("a grader that prints")
    [text] = completions
    if text == "hang":
        while True:
            pass
    if text == "die":
        os._exit(7)
    if text == "raise":
        raise KeyError("no such key")
    if text == "memory":
        return [float(len(bytearray(1 << 40)))]
    return [float(os.getpid()) if text == "pid" else 2.0]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_grading_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_grading_rewards"


@pytest.fixture
def pool_of(module: str) -> Iterator[Any]:
    pools: list[WorkerPool] = []

    def build(*names: str, workers: int = 2, seconds: float = 20.0, memory: int = 0) -> WorkerPool:
        loaders = [functools.partial(load_grader, f"{module}:{name}") for name in names]
        pools.append(WorkerPool(loaders, workers, seconds, memory))
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


def problem(i: int) -> Problem:
    return Problem(f"train/{i}", "?", str(i), {"unit": "cm"})


def graded_by(pool: WorkerPool, texts: list[str]) -> list[Verdict]:
    return pool.verdicts([problem(i) for i in range(len(texts))], texts, [])


def test_verdicts_come_in_order_with_every_column_and_none(pool_of: Any) -> None:
    pool = pool_of("length", "slowly")
    texts = ["a" * i for i in range(40)] + ["none"]
    ids = [[7] * (i % 3) for i in range(41)]
    problems = [problem(i) for i in range(41)]
    expected = [(float(len(t) + 10 * len(i)), None if t == "none" else 1.0) for t, i in zip(texts, ids, strict=True)]
    assert pool.verdicts(problems, texts, ids) == expected
    assert pool.verdicts(problems[::-1], texts[::-1], ids[::-1]) == expected[::-1]


def test_hanging_exiting_raising_or_exceeding_memory_is_a_failure_of_one_response_only(pool_of: Any) -> None:
    pool = pool_of("troubled", workers=2, seconds=1.0, memory=2 << 30)
    texts = ["a", "hang", "b", "die", "c", "raise", "memory", "d", "e", "f"]
    verdicts = graded_by(pool, texts)
    assert [v for v, t in zip(verdicts, texts, strict=True) if len(t) == 1] == [(2.0,)] * 6
    hang, die, broken, memory = (verdicts[texts.index(t)] for t in ("hang", "die", "raise", "memory"))
    assert isinstance(hang, Failure) and hang.timed_out and "within 1 s" in hang.text
    assert isinstance(die, Failure) and not die.timed_out and "exit code 7" in die.text
    assert isinstance(broken, Failure) and "troubled failed: KeyError: 'no such key'" in broken.text
    assert isinstance(memory, Failure) and "MemoryError" in memory.text
    assert graded_by(pool, ["g"]) == [(2.0,)]


def test_workers_are_other_processes_and_equal_responses_are_graded_once(pool_of: Any) -> None:
    pool = pool_of("troubled", workers=2)
    [(one,), (two,)] = pool.verdicts([problem(0)] * 2, ["pid", "pid"], [])
    assert one == two != os.getpid()


def test_expect_starts_grading_before_verdicts_are_requested(pool_of: Any) -> None:
    pool = pool_of("slowly", workers=1)
    pool.verdicts([problem(0)], ["x"], [])
    pool.expect([problem(i) for i in range(5)], list("abcde"), [])
    time.sleep(0.5)
    pool.expect([], [], [])
    assert pool._jobs.graded == 5  # before verdicts() was called
    assert pool.verdicts([problem(i) for i in range(5)], list("abcde"), []) == [(1.0,)] * 5
    assert not pool._jobs.graded and not pool._jobs


def test_sampling_passes_responses_to_the_grader_as_they_end() -> None:
    task = build_task(TaskConfig(num_steps=3))
    policy = Policy.load(ModelConfig())
    told: list[list[str]] = []

    class Listening(InProcess):
        def expect(self, problems: Any, texts: Any, completion_ids: Any) -> None:
            told.append(list(texts))

    listening = Graded(task, Listening((load_grader("exact"),), grades_in_background=True), ("exact",), (1.0,))
    sampler = TorchSampler(policy)
    shape: dict[str, Any] = {
        "group_size": 3,
        "max_new_tokens": 60,
        "temperature": 1.0,
        "stop": ("rule",),
        "address": (0,),
    }
    problems = problem_range(task, "train", 4)
    groups = sample_groups(problems, policy.codec, sampler, listening, **shape)
    ended = sorted(r.text for group in groups for r in group.rollouts if r.finish_reason == "stop")
    assert sorted(text for texts in told for text in texts) == ended and len(ended) > 6
    assert len([texts for texts in told if texts]) > 1  # not all at the end
    quiet = Graded(task, InProcess((load_grader("exact"),)), ("exact",), (1.0,))
    assert groups == sample_groups(problems, policy.codec, sampler, quiet, **shape)


def test_rewards_are_weighted_and_counted_and_none_is_left_out() -> None:
    def half(completions: list[str], **_: Any) -> list[float | None]:
        return [None if text == "x" else 0.5 for text in completions]

    async def one(completions: list[str], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [None if text in ("x", "y") else 1.0 for text in completions]

    task = build_task(
        TaskConfig(num_steps=3, rewards=("exact", "hash"), reward_weights=(2.0, -1.0)), reward_fn=[half, one]
    )
    assert isinstance(task, Graded)
    assert task.grade([problem(0)] * 3, ["a", "x", "y"]) == [2 * 0.5 - 1.0, None, 1.0]  # case 3
    assert task.tally.shares() == {
        "grader/graded": 3.0,
        "grader/error_share": 0.0,
        "grader/timeout_share": 0.0,
        "grader/not_applicable_share": 1 / 3,
    }
    assert task.tally.means() == {"rewards/half/mean": 0.5, "rewards/one/mean": 1.0}
    task.count_anew()
    assert task.tally.shares() == task.tally.means() == {}


def test_none_of_all_functions_is_no_reward_and_a_truncated_response_has_reward_0() -> None:
    """Case 3: the first response has no reward; the second is truncated and not graded."""
    task = build_task(TaskConfig(num_steps=3), reward_fn=lambda completions, **_: [None for _ in completions])
    assert grade_finished(task, [problem(0)] * 2, ["x", "x"], [True, False]) == [None, 0.0]
    assert (task.total.graded, task.total.not_applicable, task.total.errors) == (1, 1, 0)


def test_the_chain_task_is_graded_like_every_other() -> None:
    task = build_task(TaskConfig(num_steps=3))
    assert (task.grades_early, task.grade_truncated) == (False, False)
    problems = [task.problem("train", i) for i in range(3)]
    before = task.count_anew()
    assert task.grade(problems, [f"x\n#### {problems[0].answer}", "####", f"#### {problems[2].answer} "]) == [1, 0, 1]
    after = task.count_anew()
    assert task.grade(problems[:1], [f"#### {problems[0].answer} 1"]) == [0]
    assert before.means() == {"rewards/chain/mean": 2 / 3} and after.means() == {"rewards/chain/mean": 0}
    assert (before.graded, after.graded, task.total.graded, task.total.errors) == (3, 1, 4, 0)
    with pytest.raises(UserError, match=r"task.reward_weights has 2 numbers for 1 reward functions"):
        build_task(TaskConfig(reward_weights=(1.0, 1.0)))


def test_a_grader_defined_in_the_running_script_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "grade_here", lambda **_: [1.0], raising=False)
    with pytest.raises(UserError, match=r"grader '__main__:grade_here' is defined in the running script.*reward_fn"):
        build_task(TaskConfig(rewards=("exact", "__main__:grade_here")))


def test_too_many_failures_raise_with_the_text_of_the_first_error(module: str) -> None:
    limits = GradingConfig(workers=1, max_error_share=0.1)
    task = build_task(TaskConfig(num_steps=3, rewards=(f"{module}:troubled",), grading=limits))
    assert task.grade([problem(i) for i in range(3)], ["a", "raise", "raise"]) == [2.0, 0.0, 0.0]  # 2 of 20: allowed
    with pytest.raises(UserError, match=r"grading failed for 3 of 4 responses, 0 of them .* KeyError: 'no such key'"):
        task.grade([problem(5)], ["raise"])


def test_a_user_error_of_a_grader_is_raised_immediately(pool_of: Any) -> None:
    pool = WorkerPool([functools.partial(load_grader, "hash")], 1, 20.0, 0)
    with pytest.raises(UserError, match="the reference answer '0' has no number"):
        graded_by(pool, ["#### 1"])
    pool = WorkerPool([functools.partial(load_grader, "no_such_module_anywhere:f")], 1, 20.0, 0)
    with pytest.raises(UserError, match="no module 'no_such_module_anywhere'"):
        graded_by(pool, ["a"])


def test_asynchronous_functions_run_concurrently() -> None:
    async def meet(event: str, completions: list[str]) -> list[float]:
        started.append(event)
        while len(started) < 2:  # without concurrency, the first one would never return
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    async def a(completions: list[str], **_: Any) -> list[float]:
        return await meet("a", completions)

    async def b(completions: list[str], **_: Any) -> list[float]:
        return await meet("b", completions)

    started: list[str] = []
    assert apply_rewards([a, b], [problem(0)], ["x"]) == [(1.0, 1.0)]


def test_rewards_are_computed_inside_a_running_event_loop_as_in_a_notebook() -> None:
    def even(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 2 == 0) for text in completions]

    async def cell() -> list[Any]:
        return apply_rewards([even], [problem(0)] * 2, ["ab", "abc"])

    assert asyncio.run(cell()) == [(1.0,), (0.0,)]


def test_a_timeout_kills_processes_that_the_grader_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    (tmp_path / "my_starting_rewards.py").write_text(
        "import subprocess\n"
        "def start(completions, **_):\n"
        f"    child = subprocess.Popen(['sleep', '60'])\n    open({str(note)!r}, 'w').write(str(child.pid))\n"
        "    child.wait()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = WorkerPool([functools.partial(load_grader, "my_starting_rewards:start")], 1, 1.0, 0)
    [verdict] = pool.verdicts([problem(0)], ["x"], [[1]])
    assert isinstance(verdict, Failure) and verdict.timed_out
    status = Path(f"/proc/{note.read_text()}/status")
    deadline = time.monotonic() + 10  # the kernel may need some time to end the process
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()
    pool.close()


def test_a_closed_pool_grades_unanswered_responses_again(pool_of: Any) -> None:
    pool = pool_of("troubled", workers=1, seconds=1.0)
    pool.expect([problem(0), problem(1)], ["hang", "quick"], [[1], [2]])
    while not any(worker.jobs for worker in pool._workers):  # until both were sent to the worker
        pool.expect([], [], [])
        time.sleep(0.02)
    pool.close()
    assert pool.verdicts([problem(1)], ["quick"], [[2]]) == [(2.0,)]


def test_a_grader_that_breaks_late_in_a_run_raises() -> None:
    class Breaking:
        grades_in_background = False
        failing = False

        def expect(self, problems: Any, texts: Any, completion_ids: Any) -> None: ...

        def verdicts(self, problems: Any, texts: Any, completion_ids: Any) -> list[Verdict]:
            return [Failure("broken") if self.failing else (1.0,) for _ in texts]

    judge = Breaking()
    task = Graded(build_task(TaskConfig()), judge, ("one",), (1.0,))
    task.grade([problem(0)] * 1000, ["x"] * 1000)
    judge.failing = True
    task.count_anew()
    with pytest.raises(UserError, match=r"grading failed for 30 of 30 responses.*the first error: broken"):
        task.grade([problem(0)] * 30, ["x"] * 30)


def test_weights_that_sum_to_1_give_a_reward_of_exactly_1() -> None:
    def one(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    task = Graded(build_task(TaskConfig()), InProcess((one, one, one)), ("a", "b", "c"), (0.7, 0.2, 0.1))
    [reward] = task.grade([problem(0)], ["x"])
    assert reward == 1.0
    assert Measurement(((0.7 + 0.2 + 0.1,),), 1, 0.0).pass_at_k(1, 0).mean == 1.0
