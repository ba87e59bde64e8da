"""Write the rollouts and training samples of an iteration to a Parquet file, with their rewards and their credit.

Credit means the values, advantages and weights that the credit function of the algorithm computed for tokens and
reasoning steps. Shapes use the letters T (number of response tokens), S (number of steps of the response) and A (number
of alternative tokens, which MC rollouts sampled in place of a token of the response).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vineppo.run.files import written_aside
from vineppo.types import Problem, Rollout, RolloutGroup, StepCredit, TrainingSample

Decode = Callable[[Sequence[int]], str]
"""Function that converts token ids to text without special tokens."""

_ALTERNATIVE = pa.struct(
    [("position", pa.int32()), ("token_id", pa.int32()), ("text", pa.string()), ("advantage", pa.float32())]
)
"""An alternative token (see `types.Alternative`). The position is an index into the response tokens."""
_CONTINUATION = pa.struct(
    [
        ("state", pa.int32()),  # number of response tokens before the continuation
        ("shared", pa.int32()),  # number of first tokens that are also those of the response after the state
        ("accepted", pa.int32()),  # number of tokens taken from a draft; null without a draft
        ("num_tokens", pa.int32()),
        ("text", pa.string()),  # text of the whole continuation, with the shared tokens
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
    ]
)
"""A continuation from which credit was computed (see `types.MCRollout`)."""
SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),  # counted from 1
        ("kind", pa.string()),  # "rollout", or "sample" for a training sample with a row of its own
        ("problem_id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),  # null if no reward function applies, and for a sample without a rollout
        ("finish_reason", pa.string()),  # null for a sample without a rollout
        ("num_tokens", pa.int32()),  # T
        ("response_ids", pa.list_(pa.int32())),  # (T,)
        ("token_advantages", pa.list_(pa.float32())),  # (T,)
        # (T,), weight of each token in the loss, 0 for tokens that are not trained; empty if all weights are 1
        ("token_weights", pa.list_(pa.float32())),
        ("sampler_logprobs", pa.list_(pa.float32())),  # (T,), nats
        ("step_texts", pa.list_(pa.string())),  # (S,)
        # (S,), number of response tokens before the end of each step; the last number is T
        ("step_ends", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),  # (S,), value of the state before each step, or empty
        ("num_mc_rollouts", pa.list_(pa.int32())),  # (S,), number of MC rollouts used for each value, or empty
        ("step_advantages", pa.list_(pa.float64())),  # (S,), or empty
        ("alternatives", pa.list_(_ALTERNATIVE)),  # (A,), ordered by position, or empty
        # (T,), number of characters of `response` before the end of each token; empty if the tokens cannot be found
        ("token_ends", pa.list_(pa.int32())),
        # (T,), nats, entropy of the policy's distribution for each token at the start of the iteration, rounded to four
        # decimal places; null for tokens that are not trained in this row; empty if unknown
        ("token_entropies", pa.list_(pa.float32())),
        # (T,), value of the state before each token as predicted by the value network; empty without one
        ("token_values", pa.list_(pa.float32())),
        ("continuations", pa.list_(_CONTINUATION)),  # of the first `run.save_continuations` rollouts that have any
    ]
)
"""Columns of a Parquet file. The columns about steps contain empty lists if the algorithm computes no credit for steps.
A file of an earlier version lacks the last four columns. Continuations are a column of the same file, and not a file of
their own, so that both are written at once and removed together; a reader of Parquet that does not ask for the column
does not read it. `alternatives` contains empty lists if the algorithm gives no advantages to alternative tokens. All
columns of credit contain empty lists for a rollout without a training sample."""
_DIGITS = 4
"""Number of decimal places of the saved entropies. All digits would take three times the space."""
_CREDIT_COLUMNS = (
    "token_advantages", "token_weights", "step_texts", "step_ends", "values", "num_mc_rollouts", "step_advantages",
    "alternatives", "token_entropies", "token_values", "continuations",
)  # fmt: skip
"""Names of the columns of credit."""


def step_texts(response_ids: Sequence[int], boundaries: Sequence[int], decode: Decode) -> list[str]:
    """Return the text of each of the S steps of a response. The texts joined together are the decoded response.

    A step that is decoded alone can lose its leading space (SentencePiece) or begin or end inside a character
    (byte-level BPE). So each step is decoded together with the previous step, and the text of the previous step is then
    removed. If a boundary splits a character, the character belongs to the step that completes it.

    Args:
        response_ids: token ids of the response, shape (T,).
        boundaries: for each step, the number of response tokens before its end, shape (S,).
        decode: function that converts token ids to text.
    """
    texts = []
    context, start = 0, 0  # The step before `start` begins at `context`. Its tokens are decoded a second time.
    for end in boundaries:
        context_text = decode(response_ids[context:start]) if start > context else ""
        text = decode(response_ids[context:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end != boundaries[-1]:
            # The step ends inside a character. Its tokens are decoded together with the next step, which gets the text.
            texts.append("")
            continue
        texts.append(text[len(context_text) :])
        context, start = start, end
    return texts


def token_ends(response_ids: Sequence[int], text: str, decode: Decode, alone: dict[int, str]) -> list[int]:
    """Return the number of characters of a text before the end of each of its T tokens, shape (T,).

    If tokens split a character, it belongs to the token that completes it. The list is empty if the texts of the tokens
    do not add up to the text, which no known tokenizer does.

    Args:
        response_ids: token ids of the response, shape (T,).
        text: the decoded response.
        decode: function that converts token ids to text.
        alone: texts of tokens that were decoded alone, which this function adds to.
    """
    for token in response_ids:
        if token not in alone:
            alone[token] = decode([token])
    texts = [alone[token] for token in response_ids]
    if "".join(texts) != text:  # a token of a part of a character, or a tokenizer that drops a leading space
        texts = step_texts(response_ids, range(1, len(response_ids) + 1), decode)
    return list(itertools.accumulate(map(len, texts))) if "".join(texts) == text else []


def rollout_rows(
    iteration: int,
    groups: Sequence[RolloutGroup],
    samples: Sequence[TrainingSample],
    decode: Decode,
    entropies: Sequence[Sequence[float]] = (),
) -> list[dict[str, Any]]:
    """Return the rows of an iteration: one per rollout in the order of the groups, then one per other training sample.

    The row of a rollout contains the credit of the first sample that belongs to the rollout (`TrainingSample.rollout`).
    Every other sample, for example a second sample of a rollout or a trained MC rollout, gets a separate row. A rollout
    without a sample has empty lists in the columns of credit.

    Args:
        iteration: number of the iteration, counted from 1.
        groups: the rollouts.
        samples: the training samples that the credit function returned, in any order.
        decode: function that converts token ids to text.
        entropies: entropies of the trained tokens of each sample, in the order of `samples`; empty if they are unknown.
    Returns:
        Rows with the keys of `SCHEMA`.
    Raises:
        ValueError: if the first sample of a rollout has other token ids than the rollout.
    """
    rollouts = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    rollout_ids = {id(rollout) for _, rollout in rollouts}
    credit: dict[int, TrainingSample] = {}
    other_samples = []
    for sample in samples:
        if id(sample.rollout) in rollout_ids and id(sample.rollout) not in credit:
            credit[id(sample.rollout)] = sample
        else:
            other_samples.append(sample)
    of_samples = {id(sample): row for sample, row in zip(samples, entropies, strict=False)}
    rows = [
        _rollout_row(problem, rollout, credit.get(id(rollout)), decode, of_samples) for problem, rollout in rollouts
    ]
    prompts = {rollout.prompt_ids: problem for problem, rollout in rollouts}
    rows += [_sample_row(prompts, sample, decode, of_samples) for sample in other_samples]
    alone: dict[int, str] = {}
    for row in rows:
        row["iteration"] = iteration
        row["token_ends"] = token_ends(row["response_ids"], row["response"], decode, alone)
    return rows


_Entropies = Mapping[int, Sequence[float]]
"""`id` of a training sample -> entropies of its trained tokens."""


def _rollout_row(
    problem: Problem, rollout: Rollout, sample: TrainingSample | None, decode: Decode, entropies: _Entropies
) -> dict[str, Any]:
    """Return the row of a rollout, with the credit of its first sample, or without credit if `sample` is None."""
    if sample is not None and tuple(sample.token_ids) != tuple(rollout.prompt_ids) + tuple(rollout.response_ids):
        raise ValueError(
            f"the training sample of a rollout of problem {problem.id} has other token ids than the rollout"
        )
    return {
        "kind": "rollout",
        "problem_id": problem.id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "response": rollout.text,
        "reward": rollout.reward,
        "finish_reason": rollout.finish_reason,
        "num_tokens": len(rollout.response_ids),
        "response_ids": rollout.response_ids,
        "sampler_logprobs": rollout.sampler_logprobs,
        **_credit_columns(sample, len(rollout.prompt_ids), decode, entropies),
    }


def _sample_row(
    prompts: Mapping[tuple[int, ...], Problem], sample: TrainingSample, decode: Decode, entropies: _Entropies
) -> dict[str, Any]:
    """Return the row of a training sample that is not written to the row of a rollout.

    If the sample starts with the prompt of one of the problems, its response is everything after that prompt. Otherwise
    its response starts at the first trained token.

    Args:
        prompts: token ids of a prompt -> its problem, for all problems of the iteration.
        sample: the training sample.
        decode: function that converts token ids to text.
    """
    ids = tuple(sample.token_ids)
    start = max((len(prompt) for prompt in prompts if ids[: len(prompt)] == prompt), default=0)
    if start:
        problem = prompts[ids[:start]]
    else:
        start = next((i for i, trained in enumerate(sample.loss_mask) if trained), len(ids))
        problem = Problem(id="", prompt=decode(ids[:start]))
    return {
        "kind": "sample",
        "problem_id": problem.id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "response": decode(ids[start:]),
        "reward": None if sample.rollout is None else sample.rollout.reward,
        "finish_reason": None if sample.rollout is None else sample.rollout.finish_reason,
        "num_tokens": len(ids) - start,
        "response_ids": ids[start:],
        "sampler_logprobs": sample.sampler_logprobs[start:],
        **_credit_columns(sample, start, decode, entropies),
    }


def _credit_columns(sample: TrainingSample | None, start: int, decode: Decode, entropies: _Entropies) -> dict[str, Any]:
    """Return the columns of credit for a response.

    Args:
        sample: the training sample; None returns empty lists.
        start: index of the first response token in the sample.
        decode: function that converts token ids to text.
    """
    if sample is None:
        return {name: [] for name in _CREDIT_COLUMNS}
    credit = sample.credit or StepCredit(boundaries=())
    weights = [w * trained for w, trained in zip(sample.weights or sample.loss_mask, sample.loss_mask, strict=True)]
    # Positions of the trained tokens in the response. `Alternative.position` is an index into this list.
    positions = [i - start for i, trained in enumerate(sample.loss_mask) if trained]
    texts = {token: decode([token]) for token in {a.token_id for a in sample.alternatives}}
    return {
        "token_advantages": sample.advantages[start:],
        "token_weights": [] if all(weight == 1 for weight in weights[start:]) else weights[start:],
        "step_texts": step_texts(sample.token_ids[start:], credit.boundaries, decode),
        "step_ends": credit.boundaries,
        "values": credit.values,
        "num_mc_rollouts": credit.num_mc_rollouts,
        "step_advantages": credit.step_advantages,
        "alternatives": [
            {
                "position": positions[a.position],
                "token_id": a.token_id,
                "text": texts[a.token_id],
                "advantage": a.advantage,
            }
            for a in sample.alternatives
        ],
        "token_entropies": _of_trained(sample, entropies.get(id(sample), ()))[start:],
        "token_values": [] if sample.values is None else sample.values[start:],
        "continuations": _continuations(sample, start, decode),
    }


def _of_trained(sample: TrainingSample, values: Sequence[float]) -> list[float | None]:
    """Return one rounded number per token from those of the trained tokens, None for the others.

    The list is empty if there are no numbers.
    """
    remaining = iter(values)
    return [round(next(remaining), _DIGITS) if trained else None for trained in sample.loss_mask] if values else []


def _continuations(sample: TrainingSample, start: int, decode: Decode) -> list[dict[str, Any]]:
    """Return the entries of the column `continuations` of a sample whose response begins at the token `start`."""
    response = tuple(sample.token_ids[start:])
    entries = []
    for mc_rollout in sample.mc_rollouts:
        ids = mc_rollout.token_ids
        before = decode(response[: mc_rollout.state]) if mc_rollout.state else ""
        whole = decode(response[: mc_rollout.state] + ids)
        entries.append(
            {
                "state": mc_rollout.state,
                "shared": _same_start(ids, response[mc_rollout.state :]),
                "accepted": mc_rollout.accepted,
                "num_tokens": len(ids),
                # `before` ends with replacement characters if the state is inside a character.
                "text": whole[_same_start(before, whole) :],
                "reward": mc_rollout.reward,
                "finish_reason": mc_rollout.finish_reason,
            }
        )
    return entries


def _same_start(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the number of equal entries at the start of two sequences, such as characters of texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a Parquet file with the columns of `SCHEMA`, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    with written_aside(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
