"""Hostile text through every grader and splitter: nothing is executed, hangs, exceeds its limits or is left running.

`make test` tries 300 strings, of which `boxed` gets 30 (several of them take its whole time limit). `make test-faults`
tries all 5,000.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from vineppo.config.schema import GradingConfig, TaskConfig
from vineppo.steps import build_splitter
from vineppo.tasks import build_task
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.tasks.gym import EVALUATING
from vineppo.types import Failure, Problem

Draw = Callable[[random.Random], str]

CODE = (
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w')",
    "__import__('subprocess').run(['touch', '{file}'])",
    "[__import__('pathlib').Path('{file}').touch()]",
    "exec('import os; os.mkdir(\"{file}\")')",
    "(lambda: __import__('os').symlink('x', '{file}'))()",
    "__import__('os').fork()",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('socket').create_connection(('127.0.0.1', 9))",
    "Symbol.__class__.__base__.__subclasses__()",
    "print('\\x1b[2J') or exit(0)",
    "\\input{{{file}}}\\write18{{touch {file}}}",
    "$(touch {file}) `touch {file}` && touch {file}; touch {file}",
    "<script>alert(1)</script>' OR 1=1 --",
)
HUGE: tuple[str, ...] = (
    "9**9**9",
    "9^{9^{9}}",
    "10^{10^{10}}",
    "factorial(10**6)",
    "1e999999999",
    "(10**6)!",
    "2^{2^{100}}",
    "9" * 5000,
)
HUGE += ("\\sum_{n=1}^{10^{12}} \\frac{1}{n}", "\\int_0^1 x^{x^{x^x}} dx", "\\binom{10^8}{10^7}", "range(10**12)")
UNICODE: tuple[str, ...] = (
    "\u202e",
    "\u200b",
    "\ufeff",
    "\U0001f4a5",
    "e\u0301" * 30,
    "\ufdfa",
    "½",
    "٣",
    "\u2028",
    "\x00",
    "\x1b[2J",
    "\x9b",
)
UNICODE += ("\ud800", "\r", "\x07", "\x08" * 20)
FORMATS = (
    "%s%s%s%n",
    "{0.__class__.__mro__}",
    "{prompt}",
    "%(asctime)s",
    "${{jndi:ldap://127.0.0.1/a}}",
    "{!r:>999999}",
)
BACKTRACKING = (
    "a" * 40 + "!",
    "1," * 300,
    "-+" * 300,
    "$" * 301,
    "((((1)+)+)+)+" * 20,
    "." * 999,
    " \n" * 500,
    ",000" * 200,
)


PAIRS: tuple[tuple[str, str], ...] = (
    ("(", ")"),
    ("[", "]"),
    ("{", "}"),
    ("\\frac{1}{", "}"),
    ("\\sqrt{", "}"),
    ("\\begin{a}", "\\end{a}"),
)
PAIRS += (("\\[", "\\]"), ("\\boxed{", "}"), ("\\left(", "\\right)"), ("-", ""), ("not ", ""), ("$", "$"))


def nested(rng: random.Random) -> str:
    opening, closing = rng.choice(PAIRS)
    depth = rng.choice([10, 60, 250, 1500])
    return opening * depth + "1" + closing * rng.choice([depth, depth - 1, 0])


def megabyte(rng: random.Random) -> str:
    return rng.choice(["x", "9", "(", "\\", "#", " ", "\n", "{", "1+", "a,"]) * (1 << rng.choice([12, 15, 20]))


def noise(rng: random.Random) -> str:
    return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) for _ in range(rng.randrange(1, 200)))


def mixed(rng: random.Random) -> str:
    return rng.choice(["", " ", "+", "=", "\n"]).join(rng.choice(PLAIN)(rng) for _ in range(rng.randrange(2, 5)))


def one_of(texts: tuple[str, ...]) -> Draw:
    return lambda rng: rng.choice(texts)


PLAIN: tuple[Draw, ...] = (*map(one_of, (CODE, HUGE, UNICODE, FORMATS, BACKTRACKING)), noise)
# Texts that can use up the time limit are drawn less often.
KINDS: tuple[tuple[Draw, int], ...] = ((nested, 10), (megabyte, 4), (mixed, 20), *((draw, 12) for draw in PLAIN))
FRAMES = (
    "{}",
    "#### {}",
    "The answer is\n#### {}",
    "\\boxed{{{}}}",
    "so $\\boxed{{{}}}$.\n#### {}",
    "{}\n#### 10",
    "\\boxed {}",
)


def hostile_texts(count: int, file: Path) -> list[str]:
    """Return `count` different texts, always the same ones. Code in them tries to make `file`."""
    rng, texts = random.Random(17), dict[str, None]()
    draws, weights = zip(*KINDS, strict=True)
    while len(texts) < count:
        [draw] = rng.choices(draws, weights)
        frame = rng.choice(FRAMES)
        texts[frame.replace("{}", draw(rng)).replace("{{", "{").replace("}}", "}").replace("{file}", str(file))] = None
    return list(texts)


@pytest.fixture(params=[300, pytest.param(5000, marks=pytest.mark.faults)])
def count(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def owned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that executed code would make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VINEPPO_HOSTILE", str(tmp_path))  # marks the processes of this test
    yield tmp_path / "owned"
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 10
    while (left := marked_processes(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def marked_processes(mark: str) -> list[int]:
    """Return the ids of the other processes whose environment has the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"VINEPPO_HOSTILE={mark}".encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", ["exact", "hash", "chain"])
def test_graders_in_the_trainer(name: str, count: int, owned: Path) -> None:
    task = build_task(TaskConfig(num_steps=3, rewards=() if name == "chain" else (name,)))
    problem = task.problem("train", 0) if name == "chain" else Problem("train/0", "?", "#### 1234567")
    texts = hostile_texts(count, owned)
    assert task.grade([problem] * count, texts) == [0.0] * count


def test_the_grader_of_mathematics(count: int, owned: Path) -> None:
    """Case 5. Some of the texts need more time or memory than allowed; no process fails in another way."""
    pytest.importorskip("math_verify")
    limits = GradingConfig(workers=2, seconds=1.0, memory=2.0, max_error_share=1.0)
    task = build_task(TaskConfig(num_steps=3, rewards=("boxed",), grading=limits))
    assert isinstance(task, Graded) and isinstance(task.judge, WorkerPool)
    problem = Problem("train/0", "?", "\\boxed{\\frac{1234567}{89}}")
    texts = hostile_texts(count, owned) if count == 5000 else hostile_texts(30, owned)
    verdicts = task.judge.verdicts([problem] * len(texts), texts, [])
    failures = [verdict.text for verdict in verdicts if isinstance(verdict, Failure)]
    assert {verdict for verdict in verdicts if not isinstance(verdict, Failure)} == {(0.0,)}
    assert len(failures) < len(texts) / 5
    allowed = re.compile(r"was not graded within 1 s|ran out of memory|MemoryError|RecursionError|\(signal (6|9|11)\)")
    assert [text for text in failures if not allowed.search(text)] == []
    task.judge.close()


@pytest.mark.parametrize("spec", ["newline", "math", "tokens:3", "cutpoints", r"regex:[.!?\n]+"])
def test_splitters(spec: str, count: int, tmp_path: Path) -> None:
    split = build_splitter(spec)
    for text in hostile_texts(count, tmp_path / "owned"):
        tokens = re.findall(r"\s?\S{1,5}|\s", text)
        ends = split(tokens, [-0.5] * len(tokens))
        assert ends[-1] == len(tokens) and all(a < b for a, b in pairwise(ends)) and ends[0] > 0


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="needs the sandbox")
@pytest.mark.parametrize("name", sorted(EVALUATING - {"composite"}))
def test_scorers_that_evaluate_text(name: str, owned: Path) -> None:
    """Case 5."""
    pytest.importorskip("reasoning_gym")
    limits = GradingConfig(workers=2, seconds=1.0, memory=2.0, max_error_share=1.0)
    task = build_task(TaskConfig(name=f"reasoning_gym:{name}", grading=limits))
    assert isinstance(task, Graded) and isinstance(task.judge, WorkerPool)
    texts = [f"#### {text}" for text in hostile_texts(40, owned)]
    verdicts = task.judge.verdicts([task.problem("train", 0)] * len(texts), texts, [])
    rewards = [verdict[0] for verdict in verdicts if not isinstance(verdict, Failure)]
    assert max(reward or 0.0 for reward in rewards) <= 0.05 and len(rewards) > 20
    task.judge.close()
