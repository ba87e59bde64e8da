"""Convert the responses of a run to data sets that TRL's trainers read: PRMTrainer, DPOTrainer and SFTTrainer.

All rows are plain texts (TRL's standard format, not its conversational one). The prompt is the text that the model saw,
with the prompt template and the chat template applied.

A Monte-Carlo value is not the correctness of a step. It is the probability that the policy of that iteration reaches a
right answer from there: a policy that recovers gives a wrong step a high value, and a policy that fails gives a right
step a low one (arXiv 2501.07301). Labels made from values inherit this.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vineppo.run.files import write_text, written_aside
from vineppo.types import UserError
from vineppo.view.queues import lowest_step
from vineppo.view.response import Continuation, Response, Step

Rule = Literal["value", "advantage"]
Pairs = Literal["auto", "prefix", "whole"]
Row = dict[str, Any]
_TEXT, _TEXTS, _LABELS = pa.string(), pa.list_(pa.string()), pa.list_(pa.bool_())
SCHEMAS: Mapping[str, pa.Schema] = {
    "prm": pa.schema([("prompt", _TEXT), ("completions", _TEXTS), ("labels", _LABELS)]),
    "dpo": pa.schema([("prompt", _TEXT), ("chosen", _TEXT), ("rejected", _TEXT)]),
    "sft": pa.schema([("prompt", _TEXT), ("completion", _TEXT)]),
}
"""Name of each format -> its columns, which are those of TRL's trainer. Labels have one entry per step, shape (S,)."""
SUFFIXES = (".jsonl", ".parquet")
"""Suffixes of the files that can be written."""


@dataclass(frozen=True)
class ExportSettings:
    """What counts as right, and how labels and pairs are made."""

    right: float = 1.0
    """Smallest reward of a right response."""
    wrong: float = 0.0
    """Largest reward of a wrong response."""
    rule: Rule = "value"
    """Label of a step (`prm`). "value": true if the value after the step is at least `threshold`. "advantage": true if
    the step advantage is at least `-tolerance`."""
    threshold: float = 0.5
    """Smallest value, in reward units, after a step that is labelled true. A small number such as 0.01 labels a step
    true if any continuation after it was right."""
    tolerance: float = 0.0
    """Largest fall of the value, in reward units, over a step that is labelled true."""
    pairs: Pairs = "auto"
    """Pairs of `dpo`. "prefix": both responses share the wrong one's text up to its worst step. "whole": two responses
    to the same problem. "auto": the first if there is one for a wrong response, else the second."""


@dataclass
class Exported:
    """Rows of a data set, and what became of the responses.

    Attributes:
        rows: the rows, with the columns of `SCHEMAS`.
        problems: for each row, a text that is the same for all rows of a problem.
        left_out: reason -> number of responses that are in no row.
        notes: further lines for the user.
        num_responses: number of responses that were read.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    num_responses: int = 0

    def add(self, problem: tuple[str, str], row: Row) -> None:
        """Add a row that was made from a response to a problem, which is (id, prompt)."""
        self.rows.append(row)
        self.problems.append("\n".join(problem))


def export(responses: Iterable[Response], form: str, settings: ExportSettings | None = None) -> Exported:
    """Return the rows of a data set.

    Args:
        responses: the responses of one or several iterations. Training samples that are no rollouts are left out.
        form: `prm`, `dpo` or `sft`.
        settings: what counts as right, and how labels and pairs are made; None for the defaults.
    """
    chosen, result = settings or ExportSettings(), Exported()
    FORMATS[form](_rollouts(responses, result), chosen, result)
    return result


def _rollouts(responses: Iterable[Response], result: Exported) -> Iterator[Response]:
    """Yield the rollouts with a reward, and count the others."""
    for response in responses:
        result.num_responses += 1
        if response.kind != "rollout":
            result.left_out["training samples that are no rollouts"] += 1
        elif response.reward is None:
            result.left_out["without a reward"] += 1
        else:
            yield response


def _export_prm(responses: Iterator[Response], settings: ExportSettings, result: Exported) -> None:
    """Add one row per response with Monte-Carlo values: prompt, texts of the steps, and a label per step.

    A text has no line break at its end, because TRL writes one after each step (`PRMConfig.step_separator`).
    """
    other_ends, true, total = 0, 0, 0
    for response in responses:
        labels = step_labels(response, settings)
        if response.finish_reason == "length":
            result.left_out["cut off by the length limit"] += 1
        elif labels is None:
            reason = "without Monte-Carlo values" if settings.rule == "value" else "without step advantages"
            result.left_out[reason] += 1
        else:
            texts = [step.text for step in response.steps]
            if all(text.endswith("\n") for text in texts[:-1]):
                texts = [text.removesuffix("\n") for text in texts]
            else:
                other_ends += 1
            result.add(
                (response.problem_id, response.prompt),
                {"prompt": response.prompt, "completions": texts, "labels": labels},
            )
            true, total = true + sum(labels), total + len(labels)
    if total:
        rule = (
            f"the value after it is at least {settings.threshold:g}"
            if settings.rule == "value"
            else f"its advantage is at least {-settings.tolerance or 0.0:g}"
        )
        result.notes.append(f"labels: {true:,} of {total:,} steps are true ({100 * true / total:.1f}%): {rule}")
        result.notes.append("a Monte-Carlo value is not step correctness (arXiv 2501.07301)")
    if other_ends:
        result.notes.append(
            f"the steps of {other_ends:,} responses do not end in line breaks: train with "
            "PRMConfig(step_separator=''), or TRL adds line breaks that the model did not write"
        )


def step_labels(response: Response, settings: ExportSettings) -> list[bool] | None:
    """Return the label of each step, shape (S,), or None if the numbers for it are unknown.

    With the rule "value", all values must come from continuations or be known without sampling; the value after the
    last step is the reward. With the rule "advantage", the algorithm must compute step advantages from values.
    """
    if not response.steps:
        return None
    if settings.rule == "advantage":
        advantages = [step.advantage for step in response.steps if step.advantage is not None]
        known = response.credit == "values" and len(advantages) == len(response.steps)
        return [a >= -settings.tolerance for a in advantages] if known else None
    if any(step.value is None or step.num_mc_rollouts is None for step in response.steps):
        return None
    values = [response.value_after(step) for step in response.steps]
    return [value is not None and value >= settings.threshold for value in values]


def _export_dpo(responses: Iterator[Response], settings: ExportSettings, result: Exported) -> None:
    """Add pairs of a right and a wrong response to the same problem. Each response is in one pair at most."""
    # Only the texts are kept, because a run can have more tokens than memory has room for.
    right: dict[tuple[str, str], list[str]] = {}
    wrong: dict[tuple[str, str], list[str]] = {}
    prefixes, seen = 0, set[tuple[str, str, str]]()
    for response in responses:
        reward, problem = response.reward or 0.0, (response.problem_id, response.prompt)
        if reward >= settings.right:
            right.setdefault(problem, []).append(response.text)
        elif reward > settings.wrong:
            result.left_out["neither right nor wrong"] += 1
        elif response.finish_reason == "length":
            result.left_out["cut off by the length limit"] += 1
        elif settings.pairs != "whole" and (pair := prefix_pair(response, settings)):
            prefixes += _add_pair(result, problem, pair, seen)
        else:
            wrong.setdefault(problem, []).append(response.text)
    num_right, num_wrong = (sum(map(len, texts.values())) for texts in (right, wrong))
    whole = used = 0
    for problem, losers in wrong.items() if settings.pairs != "prefix" else ():
        for winner, loser in zip(right.get(problem, []), losers, strict=False):
            row = {"prompt": problem[1], "chosen": winner, "rejected": loser}
            whole += _add_pair(result, problem, row, seen)
            used += 1
    partner = "only for whole pairs" if settings.pairs == "prefix" else "without a wrong partner"
    result.left_out[f"right, {partner}"] += num_right - used
    lacking = "continuation" if settings.pairs == "prefix" else "partner"
    result.left_out[f"wrong, without a right {lacking}"] += num_wrong - used
    result.notes.append(f"pairs: {prefixes:,} share the text up to the worst step, {whole:,} are whole responses")


def _add_pair(result: Exported, problem: tuple[str, str], row: Row, seen: set[tuple[str, str, str]]) -> bool:
    """Add a pair if it is new, and return whether it was."""
    key = (row["prompt"], row["chosen"], row["rejected"])
    if key in seen:
        result.left_out["the same pair again"] += 1
        return False
    seen.add(key)
    result.add(problem, row)
    return True


def prefix_pair(response: Response, settings: ExportSettings) -> Row | None:
    """Return a pair that starts before the worst step of a wrong response, or None if there is none.

    The worst step is the one with the most negative advantage from values. The prompt of the pair ends before this
    step. Rejected is the rest of the response. Chosen is the first saved continuation with the reward of a right
    response that passes through the state before the step and leaves the response within the step, so that the pair
    differs in this step.
    """
    worst = lowest_step(response)
    if response.credit != "values" or worst is None or (worst.advantage or 0.0) >= 0:
        return None
    start = response.character(worst.start)
    if start is None:
        return None
    for continuation in response.continuations:
        chosen = _rest(response, continuation, worst, settings.right)
        if chosen:
            prefix = response.prompt + response.text[:start]
            return {"prompt": prefix, "chosen": chosen, "rejected": response.text[start:]}
    return None


def _rest(response: Response, continuation: Continuation, worst: Step, right: float) -> str | None:
    """Return the text of a right continuation from the state before a step on; None if it does not fit.

    It fits if it starts at this state or before it, and leaves the response within the step.
    """
    leaves = continuation.state + continuation.shared
    fits = continuation.state <= worst.start <= leaves < worst.end
    if not fits or continuation.accepted is not None or (continuation.reward or 0.0) < right:
        return None
    before, start = response.character(continuation.state), response.character(worst.start)
    if before is None or start is None:
        return None
    shared = response.text[before:start]
    # The texts differ in the shared part only if a token splits a character there.
    return continuation.text.removeprefix(shared) if continuation.text.startswith(shared) else None


def _export_sft(responses: Iterator[Response], settings: ExportSettings, result: Exported) -> None:
    """Add one row per right response; equal responses to equal prompts give one row."""
    seen: set[tuple[str, str]] = set()
    for response in responses:
        if (response.reward or 0.0) < settings.right:
            result.left_out["not right"] += 1
        elif (response.prompt, response.text) in seen:
            result.left_out["the same response again"] += 1
        else:
            seen.add((response.prompt, response.text))
            result.add((response.problem_id, response.prompt), {"prompt": response.prompt, "completion": response.text})


FORMATS: Mapping[str, Callable[[Iterator[Response], ExportSettings, Exported], None]] = {
    "prm": _export_prm,
    "dpo": _export_dpo,
    "sft": _export_sft,
}
"""Name of each format -> the function that makes its rows."""


def split_rows(exported: Exported, share: float) -> tuple[list[Row], list[Row]]:
    """Return the rows in two parts, such that all rows of a problem are in the same part.

    The part follows from a hash of the problem, so that a later export splits in the same way.

    Args:
        exported: the rows.
        share: expected share of the problems in the second part, from 0 to 1.
    Returns:
        (rows of the first part, rows of the second part).
    """
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, problem in zip(exported.rows, exported.problems, strict=True):
        digest = hashlib.sha256(problem.encode("utf-8", "replace")).digest()
        parts[int.from_bytes(digest[:8], "big") / 2**64 < share].append(row)
    return parts


def write_rows(path: Path, rows: Sequence[Row], form: str) -> None:
    """Write rows as JSONL or Parquet, by the suffix of the file, atomically. The directory is created if needed.

    Raises:
        UserError: if the suffix is another one, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} has the suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            with written_aside(path) as temporary:
                pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMAS[form]), temporary)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or type(error).__name__})") from None
