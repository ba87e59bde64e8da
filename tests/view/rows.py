"""Rows of rollouts files with known numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vineppo.config.schema import Config
from vineppo.run.directory import RunDirectory
from vineppo.run.records import write_parquet
from vineppo.view.records import responses_from_rows
from vineppo.view.response import Response


def row(
    lines: Sequence[str],
    reward: float | None,
    values: Sequence[float] = (),
    *,
    num_mc_rollouts: int = 9,
    advantages: Sequence[float] | None = None,
    **columns: Any,
) -> dict[str, Any]:
    """Return a row whose tokens are characters, one step per line.

    Args:
        lines: text of each step.
        values: value of the state before each step, from which the step advantages follow; empty: no steps.
        num_mc_rollouts: K of every value.
        advantages: advantage of each token; None: that of its step.
    """
    text = "".join(lines)
    ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
    steps = [b - a for a, b in zip(values, [*values[1:], reward or 0.0], strict=True)] if values else []
    of_tokens = [a for a, line in zip(steps, lines, strict=True) for _ in line] if steps else [0.0] * len(text)
    return {
        "iteration": 1,
        "kind": "rollout",
        "problem_id": "train/3",
        "prompt": "a=1;k?",
        "answer": "1",
        "response": text,
        "reward": reward,
        "finish_reason": "stop",
        "num_tokens": len(text),
        "response_ids": list(range(len(text))),
        "token_advantages": of_tokens if advantages is None else list(advantages),
        "token_weights": [],
        "sampler_logprobs": [-0.5] * len(text),
        "step_texts": list(lines) if values else [],
        "step_ends": ends if values else [],
        "values": list(values),
        "num_mc_rollouts": [num_mc_rollouts] * len(values),
        "step_advantages": steps,
        "alternatives": [],
        "token_ends": list(range(1, len(text) + 1)),
        "token_entropies": [],
        "token_values": [],
        "continuations": [],
        **columns,
    }


def responses(*rows: dict[str, Any]) -> list[Response]:
    """Return the responses of rows of one iteration."""
    return responses_from_rows(rows)


def run_with(path: Path, *rows: dict[str, Any], iteration: int = 1, algorithm: str = "vineppo") -> Path:
    """Write a run directory with one iteration, and return its path."""
    run = RunDirectory.create(path, Config(algorithm=algorithm)) if not path.exists() else RunDirectory(path, {})
    write_parquet(run.rollouts_of(iteration), list(rows))
    return path
