"""The task `chain`, which is included in the package: chained arithmetic with named variables, one line per step.

A problem is, for example, `a=7;b=a*3;c=b+5;c?`; every operation is modulo 10. A response evaluates one variable per
line, names one of two ways of doing so, and ends with an answer line:

    b=7*3 by rote = 1
    c=1+5 by rule is 6
    #### 6

There are 42 kinds of step (operator, operand, parity of the left number). A third of them are traps. At a
trap one of the two ways, called the slipping way, always gives a fixed wrong number. At all other kinds of step both
ways give the right number. The level determines which way slips:

- `judgement`: the first way slips at half of the traps, the second way at the other half. The problem does not show
  which way slips, so the policy has to learn 14 decisions. One chain contains three or four of them.
- `habit`: the first way slips at every trap, so there is one decision to learn.

The demonstrations teach all arithmetic facts. Making the policy more deterministic does not solve the task, because the
policy uses the slipping way more often at a trap. In the level `judgement` there are two kinds of demonstrations.
`wavering` demonstrations have a usual way for every kind of step and use it in 80% of the cases. `settled`
demonstrations use this usual way in 95% of the cases where both ways are right, and at traps the slipping way in 60% of
the cases. In the level `habit` all steps of a demonstration use the same way, which is the slipping way in nine of ten
demonstrations.
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
"""Different wordings between the way and the result. The choice does not depend on the result."""
OPERANDS = {"+": tuple(range(1, 10)), "-": tuple(range(1, 10)), "*": (3, 7, 9)}
"""Operands of each operator. Every operation is a bijection modulo 10, so a wrong number never leads to a right answer
through later right steps."""
Kind = tuple[str, int, int]
"""(operator, operand, parity of the left number)."""
_ANSWER = re.compile(r"(?:^|\n)#### (\d+)\s*\Z")
_SPLIT_OF_RESIDUE: dict[int, Split] = {0: "validation", 1: "test"}


def apply(left: int, operator: str, operand: int) -> int:
    """Return the right result of one step."""
    return {"+": left + operand, "-": left - operand, "*": left * operand}[operator] % MODULUS


def _kinds() -> tuple[dict[Kind, int], dict[Kind, int]]:
    """Return (slipping way of every trap, usual way of every kind). A third of the kinds of each operator are traps."""
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
    """Return the index in WAYS[level] of the way that gives a wrong number at this step, or None if both are right."""
    way = TRAPS.get((operator, operand, left % 2))
    return 0 if way is not None and level == "habit" else way


def written(level: str, left: int, operator: str, operand: int, way: int) -> int:
    """Return the result of a step in a given way: the right number, or the fixed wrong number if this way slips."""
    right = apply(left, operator, operand)
    if way != slipping_way(level, left, operator, operand):
        return right
    return (right + 1 + derive_seed("slip", left, operator, operand) % (MODULUS - 1)) % MODULUS


def _habitual_way(level: str, writers: str, kind: Kind, previous_way: int | None, rng: random.Random) -> int:
    """Draw the way of one step of a demonstration. `previous_way` is the way of the previous step, or None."""
    if level == "habit":
        return int(rng.random() < 0.1) if previous_way is None else previous_way
    if writers == "wavering":
        return USUAL[kind] ^ (rng.random() < 0.2)
    return TRAPS[kind] ^ (rng.random() < 0.4) if kind in TRAPS else USUAL[kind] ^ (rng.random() < 0.05)


def answer_of(text: str) -> str:
    """Return the number on the answer line at the end of a response; empty if there is no such line."""
    match = _ANSWER.search(text)
    return match.group(1) if match else ""


def grade_chain(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return the reward of each response: 1 if it ends with an answer line with the right number, else 0."""
    return [float(answer_of(text) == right) for text, right in zip(completions, answer, strict=True)]


class ChainTask:
    """The problems of the task `chain`, unlimited in number; implements `types.ProblemSource`.

    The splits are disjoint, because the text of a problem determines its split.
    """

    def __init__(self, level: str, num_steps: int, writers: str = "settled"):
        self.level = level
        self.num_steps = num_steps
        self.writers = writers

    def with_steps(self, num_steps: int) -> ChainTask:
        """Return the same task with chains of `num_steps` steps."""
        return ChainTask(self.level, num_steps, self.writers)

    def size(self, split: Split) -> int | None:
        """Return None, because the number of problems is unlimited."""
        return None

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split. It is drawn again until its text belongs to the split.

        Of all texts, 80% belong to `train`, 10% to `validation` and 10% to `test`.
        """
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
        """Return a pair (prompt, response). After a slip, the response continues with the wrong number.

        Every second demonstration is a shorter chain of at least 2 steps, so that the model also learns short chains.
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
            # Settled demonstrations use the first link in 18 of 20 steps.
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
