"""The embedded task: chained arithmetic with named variables, one line per step.

A problem is `a=7;b=a*3;c=b+5;c?`; every operation is modulo 10. A response evaluates one variable per line, says in
which of two ways it did so, and ends with an answer line:

    b=7*3 by rote = 1
    c=1+5 by rule is 6
    #### 6

The two ways are habits of writing that demonstrations teach half and half. One of them slips: the number it writes is
wrong with probability SLIP. Which one it is depends on the level. In `habit` the first way slips everywhere, so one
decision settles everything. In `judgement` it is a fixed table over (operator, operand, parity of the left number): 42
decisions, and a response mixes `num_steps` of them. The model never lacks a fact; it only has habits to sharpen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from vineppo.seeds import derive_seed
from vineppo.types import Problem, Split

MODULUS = 10
SLIP = 0.4
LEVELS = ("judgement", "habit")
WAYS = {"judgement": (" by rote", " by rule"), "habit": (" in haste", " with care")}
LINKS = (" = ", " is ", " -> ")
"""Harmless variation in wording: which link is written says nothing about the number after it."""
OPERANDS = {"+": tuple(range(1, 10)), "-": tuple(range(1, 10)), "*": (3, 7, 9)}
"""Every operation is a bijection modulo 10, so a slip is never undone by chance of the operation."""
MAX_STEPS = 25
_ANSWER = re.compile(r"(?:^|\n)#### (\d+)\s*\Z")
_SPLIT_OF_RESIDUE: dict[int, Split] = {0: "validation", 1: "test"}


def apply(left: int, operator: str, operand: int) -> int:
    """The number that one step should write."""
    return {"+": left + operand, "-": left - operand, "*": left * operand}[operator] % MODULUS


def reliable_way(level: str, left: int, operator: str, operand: int) -> int:
    """Index into WAYS[level] of the way that does not slip on this step."""
    if level == "habit":
        return 1
    return derive_seed("reliable way", operator, operand, left % 2) % 2


def answer_of(text: str) -> str:
    """The number on the answer line that ends a response; empty where there is none."""
    match = _ANSWER.search(text)
    return match.group(1) if match else ""


class ChainTask:
    """Endless problems addressed by (split, index); the splits are disjoint: a problem's text decides its split."""

    def __init__(self, level: str, num_steps: int):
        self.level = level
        self.num_steps = num_steps

    def with_steps(self, num_steps: int) -> ChainTask:
        """The same level with chains of another length."""
        return ChainTask(self.level, num_steps)

    def size(self, split: Split) -> int | None:
        """None: endless."""
        return None

    def problem(self, split: Split, index: int) -> Problem:
        """The problem at an address: drawn again until its text falls into the split (8, 1 and 1 tenths of all)."""
        rng = random.Random(derive_seed("chain problem", self.num_steps, split, index))
        while True:
            steps = [_draw_step(rng) for _ in range(self.num_steps)]
            start = rng.randrange(MODULUS)
            prompt = _prompt(start, steps)
            if _SPLIT_OF_RESIDUE.get(derive_seed("chain split", prompt) % 10, "train") == split:
                break
        answer = start
        for operator, operand in steps:
            answer = apply(answer, operator, operand)
        return Problem(
            id=f"{split}/{index}", prompt=prompt, answer=str(answer), columns={"start": start, "steps": steps}
        )

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """(prompt, response) of a writer with both habits, who slips in the unreliable way and goes on from there.

        Every second demonstration is a shorter chain, of 2 steps or more, so that a model taught on long chains can be
        asked short ones.
        """
        if index % 2 and self.num_steps > 2:
            shorter = 2 + derive_seed("chain length", split, index) % (self.num_steps - 2)
            return self.with_steps(shorter).demonstration(split, index - 1)
        problem = self.problem(split, index)
        rng = random.Random(derive_seed("chain demonstration", self.level, problem.prompt))
        left, lines = int(problem.columns["start"]), []
        for position, (operator, operand) in enumerate(problem.columns["steps"]):
            way = rng.randrange(2)
            result = apply(left, operator, operand)
            if way != reliable_way(self.level, left, operator, operand) and rng.random() < SLIP:
                result = (result + rng.randrange(1, MODULUS)) % MODULUS
            lines.append(
                f"{_name(position + 1)}={left}{operator}{operand}{WAYS[self.level][way]}{rng.choice(LINKS)}{result}\n"
            )
            left = result
        return problem.prompt, "".join(lines) + f"#### {left}"

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
        """1.0 where the answer line holds the right number and ends the response, else 0.0."""
        return [float(answer_of(text) == problem.answer) for problem, text in zip(problems, texts, strict=True)]


def _draw_step(rng: random.Random) -> tuple[str, int]:
    operator = rng.choice("+-*")
    return operator, rng.choice(OPERANDS[operator])


def _name(position: int) -> str:
    return chr(ord("a") + position)


def _prompt(start: int, steps: Sequence[tuple[str, int]]) -> str:
    parts = [f"a={start}"]
    for position, (operator, operand) in enumerate(steps):
        parts.append(f"{_name(position + 1)}={_name(position)}{operator}{operand}")
    return ";".join(parts) + f";{_name(len(steps))}?\n"
