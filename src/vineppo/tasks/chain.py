"""Define the built-in task `chain`: chained arithmetic with named variables, one line of the response per step.

An example of a problem is `a=7;b=a*3;c=b+5;c?`. The operators are +, - and *, and all operations are modulo 10. Every
step is one line of the response. The line computes one variable and names one of two ways of computing, here `by rote`
and `by rule`. The last line is the answer:

    b=7*3 by rote = 1
    c=1+5 by rule is 6
    #### 6

The way is only a text, but the model learns from demonstrations in which the result depends on the way. There are 42
kinds of step. A kind is the operator, the operand, and whether the left number is odd. A third of the kinds are traps.
At a trap, one of the two ways slips: in the demonstrations, it always leads to a wrong result, which is fixed for each
left number, operator and operand. The other way leads to the right result. At all other kinds of step, both ways lead
to the right result. The setting `task.level` determines which way slips:

- `judgement`: the first way slips at half of the traps, the second way at the other half. The problem does not show
  which way slips, so the policy has to learn 14 decisions, one per trap. A chain of ten steps contains three or four
  traps on average.
- `habit`: the first way slips at every trap, so there is one decision to learn.

The demonstrations contain the right results too, so the policy lacks no arithmetic fact. It does not solve the task by
sampling its most probable way more often, because the slipping way is often the most probable way at a trap:

- `judgement`: the setting `task.writers` selects one of three kinds of demonstrations. In `wavering` demonstrations,
  every kind of step has a usual way, which 80% of the steps of this kind use. At 10 of the 14 traps, the usual way is
  the slipping way. In `settled` demonstrations, 60% of the steps at traps use the slipping way, and 95% of the other
  steps use the usual way of their kind. `free` demonstrations are like settled ones, except that every step draws its
  text between the way and the result with equal probabilities, so most of their random choices do not matter.
- `habit`: all steps of a demonstration use the same way. In nine of ten demonstrations, this is the slipping way.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from typing import Any

from vineppo.seeds import derive_seed
from vineppo.types import Problem, Split

MODULUS = 10
LEVELS = ("judgement", "habit")
WAYS = {"judgement": (" by rote", " by rule"), "habit": (" in haste", " with care")}
"""Level -> texts of the first and the second way. The code refers to a way by its index, 0 or 1."""
LINKS = (" = ", " is ", " -> ")
"""Texts that can stand between the way and the result. Which text a demonstration uses does not depend on the
result."""
OPERANDS = {"+": tuple(range(1, 10)), "-": tuple(range(1, 10)), "*": (3, 7, 9)}
"""Operands of each operator. With these operands, every operation is a bijection modulo 10. Therefore the answer is
wrong if one result is wrong and all later steps are right."""
Kind = tuple[str, int, int]
"""Kind of a step: (operator, operand, left number modulo 2)."""
_ANSWER = re.compile(r"(?:^|\n)#### (\d+)\s*\Z")
_SPLIT_OF_RESIDUE: dict[int, Split] = {0: "validation", 1: "test"}
"""Hash of a problem's text modulo 10 -> split of the problem. The other residues belong to `train`."""


def apply(left: int, operator: str, operand: int) -> int:
    """Return `left operator operand` modulo 10, the right result of a step."""
    return {"+": left + operand, "-": left - operand, "*": left * operand}[operator] % MODULUS


def _kinds() -> tuple[dict[Kind, int], dict[Kind, int]]:
    """Choose traps and ways for the level `judgement`. A third of the kinds of each operator become traps.

    The choice depends only on hashes of the kinds, so it is the same in every process.

    Returns:
        (trap -> index of its slipping way, kind -> index of its usual way).
    """
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
"""TRAPS: kind -> index of the way that slips in the level `judgement`; it contains only the traps. USUAL: kind -> index
of the way that demonstrations of the level `judgement` usually use."""


def slipping_way(level: str, left: int, operator: str, operand: int) -> int | None:
    """Return the index of the way that leads to a wrong result at this step, or None if both ways are right."""
    way = TRAPS.get((operator, operand, left % 2))
    return 0 if way is not None and level == "habit" else way


def written(level: str, left: int, operator: str, operand: int, way: int) -> int:
    """Return the result of a step in a demonstration: the right one, or a fixed wrong one if the way slips.

    Args:
        way: index of the way that the step names.
    """
    right = apply(left, operator, operand)
    if way != slipping_way(level, left, operator, operand):
        return right
    return (right + 1 + derive_seed("slip", left, operator, operand) % (MODULUS - 1)) % MODULUS


def _habitual_way(level: str, writers: str, kind: Kind, previous_way: int | None, rng: random.Random) -> int:
    """Draw the way of one step of a demonstration, and return its index.

    Args:
        previous_way: index of the way of the step before, or None for the first step.
    """
    if level == "habit":
        return int(rng.random() < 0.1) if previous_way is None else previous_way
    if writers == "wavering":
        return USUAL[kind] ^ (rng.random() < 0.2)
    return TRAPS[kind] ^ (rng.random() < 0.4) if kind in TRAPS else USUAL[kind] ^ (rng.random() < 0.05)


def answer_of(text: str) -> str:
    """Return the number in the answer line at the end of a response, or an empty text if there is no such line."""
    match = _ANSWER.search(text)
    return match.group(1) if match else ""


def grade_chain(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return the reward of each response: 1 if the response ends with a right answer line, else 0."""
    return [float(answer_of(text) == right) for text, right in zip(completions, answer, strict=True)]


class ChainTask:
    """The problems of the task `chain`, unlimited in number; implements `types.ProblemSource`.

    The splits are disjoint, because the text of a problem determines its split.

    Args:
        level: `judgement` or `habit`.
        num_steps: number of steps of each problem.
        writers: kind of the demonstrations, `settled`, `free` or `wavering`.
        trap_share: probability that a step of a problem is a trap; None: all kinds of steps have their usual frequency,
            and a third of the steps are traps on average.
    """

    def __init__(self, level: str, num_steps: int, writers: str = "settled", trap_share: float | None = None):
        self.level = level
        self.num_steps = num_steps
        self.writers = writers
        self.trap_share = trap_share

    def with_steps(self, num_steps: int) -> ChainTask:
        """Return a task that differs only in the number of steps of its problems."""
        return ChainTask(self.level, num_steps, self.writers, self.trap_share)

    def size(self, split: Split) -> int | None:
        """Return None, because the number of problems is unlimited."""
        return None

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split. The same arguments always give the same problem.

        Problems are drawn until the text of one belongs to the split. Of all texts, 80% belong to `train`, 10% to
        `validation` and 10% to `test`.
        """
        start, steps, prompt = _drawn(self.num_steps, self.trap_share, split, index)
        answer = start
        for operator, operand in steps:
            answer = apply(answer, operator, operand)
        return Problem(
            id=f"{split}/{index}", prompt=prompt, answer=str(answer), columns={"start": start, "steps": list(steps)}
        )

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Return a pair (prompt, response to imitate). After a slip, the response continues with the wrong result.

        If the index is odd, the problem is a shorter one of at least 2 steps, so that the model also learns short
        chains.
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
            # Settled demonstrations use the first of LINKS in 18 of 20 steps.
            link = LINKS[max(0, rng.randrange(20) - 17)] if self.writers == "settled" else rng.choice(LINKS)
            lines.append(f"{_name(position + 1)}={left}{operator}{operand}{WAYS[self.level][way]}{link}{result}\n")
            left = result
        return problem.prompt, "".join(lines) + f"#### {left}"


# Evaluations use the same problems again and again, and about ten are drawn until one belongs to their split.
@functools.lru_cache(maxsize=1024)
def _drawn(
    num_steps: int, trap_share: float | None, split: Split, index: int
) -> tuple[int, tuple[tuple[str, int], ...], str]:
    """Return (start, steps, prompt) of a problem."""
    rng = random.Random(derive_seed("chain problem", num_steps, split, index))
    while True:
        start, steps = _draw_chain(rng, num_steps, trap_share)
        prompt = _prompt(start, steps)
        if _SPLIT_OF_RESIDUE.get(derive_seed("chain split", prompt) % 10, "train") == split:
            return start, steps, prompt


def _draw_chain(
    rng: random.Random, num_steps: int, trap_share: float | None
) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Draw (start, steps) of a problem (`ChainTask`)."""
    if trap_share is None:
        steps = tuple(_draw_step(rng) for _ in range(num_steps))
        return rng.randrange(MODULUS), steps
    start = left = rng.randrange(MODULUS)
    chosen: list[tuple[str, int]] = []
    for _ in range(num_steps):
        trap = rng.random() < trap_share
        step = _draw_step(rng)
        while ((*step, left % 2) in TRAPS) != trap:
            step = _draw_step(rng)
        chosen.append(step)
        left = apply(left, *step)
    return start, tuple(chosen)


def _draw_step(rng: random.Random) -> tuple[str, int]:
    """Draw the (operator, operand) of one step."""
    operator = rng.choice("+-*")
    return operator, rng.choice(OPERANDS[operator])


def _name(position: int) -> str:
    """Return the name of a variable: `a` for position 0, `b` for position 1, and so on."""
    return chr(ord("a") + position)


def _prompt(start: int, steps: Sequence[tuple[str, int]]) -> str:
    """Return the text of a problem, such as `a=7;b=a*3;b?` and a newline."""
    parts = [f"a={start}"]
    for position, (operator, operand) in enumerate(steps):
        parts.append(f"{_name(position + 1)}={_name(position)}{operator}{operand}")
    return ";".join(parts) + f";{_name(len(steps))}?\n"
