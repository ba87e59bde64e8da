"""Every rollout as one row of a Parquet file: what was asked, what was written, and which step earned the reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vineppo.run.files import written_aside
from vineppo.types import RolloutGroup, StepCredit, TrainingSample

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text without special tokens."""

_ALTERNATIVE = pa.struct(
    [("position", pa.int32()), ("token_id", pa.int32()), ("text", pa.string()), ("advantage", pa.float32())]
)
SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),  # 1-based
        ("problem_id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int32()),  # T, of the response
        ("response_ids", pa.list_(pa.int32())),  # (T,)
        ("token_advantages", pa.list_(pa.float32())),  # (T,)
        ("sampler_logprobs", pa.list_(pa.float32())),  # (T,), nats
        ("step_texts", pa.list_(pa.string())),  # (S,)
        ("step_ends", pa.list_(pa.int32())),  # (S,), in response tokens, the last one is T
        ("values", pa.list_(pa.float64())),  # (S,), of the state before each step, or empty
        ("num_mc_rollouts", pa.list_(pa.int32())),  # (S,), or empty
        ("step_advantages", pa.list_(pa.float64())),  # (S,), or empty
        ("alternatives", pa.list_(_ALTERNATIVE)),  # (A,), in the order of their positions, or empty
    ]
)
"""Columns of a rollout file. The lists after `sampler_logprobs` are empty where an algorithm has no steps, and
`alternatives` where it has none."""


def step_texts(response_ids: Sequence[int], boundaries: Sequence[int], decode: Decode) -> list[str]:
    """Text of each step, shape (S,); joined they are the decoded response.

    A step decoded alone can lose its leading space (SentencePiece) or be half a character (byte-level BPE). So each is
    decoded behind the step before it and that step's text is cut off, and a character that a boundary splits belongs
    to the step that completes it.

    Args:
        boundaries: end of each step in response tokens, shape (S,).
    """
    texts = []
    context, start = 0, 0  # tokens [context, start) are already told and decoded again as context
    for end in boundaries:
        known = decode(response_ids[context:start]) if start > context else ""
        text = decode(response_ids[context:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end != boundaries[-1]:
            texts.append("")
            continue
        texts.append(text[len(known) :])
        context, start = start, end
    return texts


def rollout_rows(
    iteration: int, groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample], decode: Decode
) -> list[dict[str, Any]]:
    """One row per rollout, keys as in `SCHEMA`.

    Args:
        samples: one per rollout, in the order of the groups and of the rollouts inside them.
        decode: token ids to text; used for `step_texts`.
    Raises:
        ValueError: if a sample does not belong to its rollout.
    """
    pairs = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    if len(pairs) != len(samples):
        raise ValueError(f"{len(samples)} training samples for {len(pairs)} rollouts")
    rows = []
    for (problem, rollout), sample in zip(pairs, samples, strict=True):
        if tuple(sample.token_ids) != tuple(rollout.prompt_ids) + tuple(rollout.response_ids):
            raise ValueError(f"the training sample of a rollout of {problem.id} has other token ids")
        credit = sample.credit or StepCredit(boundaries=())
        rows.append(
            {
                "iteration": iteration,
                "problem_id": problem.id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "response": rollout.text,
                "reward": rollout.reward,
                "finish_reason": rollout.finish_reason,
                "num_tokens": len(rollout.response_ids),
                "response_ids": rollout.response_ids,
                "token_advantages": sample.advantages[len(rollout.prompt_ids) :],
                "sampler_logprobs": rollout.sampler_logprobs,
                "step_texts": step_texts(rollout.response_ids, credit.boundaries, decode),
                "step_ends": credit.boundaries,
                "values": credit.values,
                "num_mc_rollouts": credit.num_mc_rollouts,
                "step_advantages": credit.step_advantages,
                "alternatives": [{**asdict(a), "text": decode([a.token_id])} for a in sample.alternatives],
            }
        )
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the columns of `SCHEMA`, atomically.

    Raises:
        OSError: where the file cannot be written.
    """
    with written_aside(path) as aside:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), aside)
