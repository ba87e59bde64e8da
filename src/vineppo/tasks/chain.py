"""The embedded task: chained arithmetic with named variables, one line per step.

A problem is `a=7;b=a*3;c=b+5;c?`; every operation is modulo 10. A response evaluates one variable per line, says in
which of two ways it did so, and ends with an answer line:

    b=7*3 by rote = 1
    c=1+5 by rule is 6
    #### 6

The ways are habits of writing that demonstrations teach, and at some steps one of the two is a trap. A third of the 42
kinds of step (operator, operand, parity of the left number) has a slipping way: written in it, the step gets a fixed
wrong number, always. Everywhere else both ways write the right number. Which way slips depends on the level:

- `judgement`: at half of the traps the first way slips, at the other half the second, with nothing in the text to say
  which: 14 decisions, of which a chain mixes three or four.
- `habit`: at every trap the first way slips, so one decision settles everything.

The model never lacks a fact, and it cannot win by being more certain of what it does: its favourite way at a trap is
the slipping one. Two groups of writers make the demonstrations. The `wavering` ones have a usual way for every kind of
step and take it in 80% of the cases; they teach the facts, and to tell the kinds apart. The `settled` ones keep to
their usual way (in 95%) where both ways are right and are torn at the traps, where they take the slipping way in 60%;
in `habit` a writer writes a whole response in one way, nine of ten in the slipping one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from vineppo.seeds import derive_seed
from vineppo.types import Problem, Split

MODULUS = 10
LEVELS = ("judgement", "habit")
WAYS = {"judgement": (" by rote", " by rule"), "habit": (" in haste", " with care")}
LINKS = (" = ", " is ", " -> ")
"""Harmless variation in wording: which link is written says nothing about the number after it."""
OPERANDS = {"+": tuple(range(1, 10)), "-": tuple(range(1, 10)), "*": (3, 7, 9)}
"""Every operation is a bijection modulo 10, so a slip is never undone by chance of the operation."""
Kind = tuple[str, int, int]
"""(operator, operand, parity of the left number)."""
_ANSWER = re.compile(r"(?:^|\n)#### (\d+)\s*\Z")
_SPLIT_OF_RESIDUE: dict[int, Split] = {0: "validation", 1: "test"}


def apply(left: int, operator: str, operand: int) -> int:
    """The number that one step should write."""
    return {"+": left + operand, "-": left - operand, "*": left * operand}[operator] % MODULUS


def _kinds() -> tuple[dict[Kind, int], dict[Kind, int]]:
    """(slipping way of every trap, usual way of every kind); a third of each operator's kinds are traps."""
    traps: dict[Kind, int] = {}
    usual: dict[Kind, int] = {}
    for operator, operands in OPERANDS.items():
        kinds = [(operator, operand, parity) for operand in operands for parity in (0, 1)]
        kinds.sort(key=lambda kind: derive_seed("trap", *kind))
        for position, kind in enumerate(kinds):
            usual[kind] = position % 2 ^ (position // 2 % 2)
            if position < len(kinds) // 3:
                traps[kind] = position % 2
    return traps, usual


TRAPS, USUAL = _kinds()


def slipping_way(level: str, left: int, operator: str, operand: int) -> int | None:
    """Index into WAYS[level] of the way that writes a wrong number on this step; None where both are right."""
    way = TRAPS.get((operator, operand, left % 2))
    return 0 if way is not None and level == "habit" else way


def written(level: str, left: int, operator: str, operand: int, way: int) -> int:
    """The number that a step gets when it is written in a way: the right one, or the trap's fixed wrong one."""
    right = apply(left, operator, operand)
    if way != slipping_way(level, left, operator, operand):
        return right
    return (right + 1 + derive_seed("slip", left, operator, operand) % (MODULUS - 1)) % MODULUS


def _habitual_way(level: str, writers: str, kind: Kind, before: int | None, rng: random.Random) -> int:
    """The way that a writer of demonstrations takes; `before` is that of the step before, None at the first."""
    if level == "habit":
        return int(rng.random() < 0.1) if before is None else before
    if writers == "wavering":
        return USUAL[kind] ^ (rng.random() < 0.2)
    return TRAPS[kind] ^ (rng.random() < 0.4) if kind in TRAPS else USUAL[kind] ^ (rng.random() < 0.05)


def answer_of(text: str) -> str:
    """The number on the answer line that ends a response; empty where there is none."""
    match = _ANSWER.search(text)
    return match.group(1) if match else ""


def grade_chain(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the answer line holds the right number and ends the response, else 0; a reward function."""
    return [float(answer_of(text) == right) for text, right in zip(completions, answer, strict=True)]


class ChainTask:
    """Endless problems addressed by (split, index); implements `types.ProblemSource`.

    The splits are disjoint: a problem's text decides its split.
    """

    def __init__(self, level: str, num_steps: int, writers: str = "settled"):
        self.level = level
        self.num_steps = num_steps
        self.writers = writers

    def with_steps(self, num_steps: int) -> ChainTask:
        """The same level with chains of another length."""
        return ChainTask(self.level, num_steps, self.writers)

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
        """(prompt, response) of a writer with both habits, who walks into traps and goes on from there.

        Every second demonstration is a shorter chain, of 2 steps or more, so that a model taught on long chains can be
        asked short ones.
        """
        if index % 2 and self.num_steps > 2:
            shorter = 2 + derive_seed("chain length", split, index) % (self.num_steps - 2)
            return self.with_steps(shorter).demonstration(split, index - 1)
        problem = self.problem(split, index)
        rng = random.Random(derive_seed("chain demonstration", self.level, problem.prompt))
        left, lines = int(problem.columns["start"]), []
        way: int | None = None
        for position, (operator, operand) in enumerate(problem.columns["steps"]):
            way = _habitual_way(self.level, self.writers, (operator, operand, left % 2), way, rng)
            result = written(self.level, left, operator, operand, way)
            # Settled writers write the first link in 18 of 20 steps.
            link = rng.choice(LINKS) if self.writers == "wavering" else LINKS[max(0, rng.randrange(20) - 17)]
            lines.append(f"{_name(position + 1)}={left}{operator}{operand}{WAYS[self.level][way]}{link}{result}\n")
            left = result
        return problem.prompt, "".join(lines) + f"#### {left}"


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
