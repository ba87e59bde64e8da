"""Read the responses of a run with their credit, from the Parquet files that the run wrote.

Everything that shows credit (the terminal, pages, exports) gets the responses from this module. It loads no tokenizer
and no model. `response.py` has the types.

Letters: T response tokens, S steps, K MC rollouts of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from vineppo.run.directory import RunDirectory
from vineppo.statistics import Interval, wilson
from vineppo.types import UserError
from vineppo.view.response import Alternative, Continuation, Credit, Response, Step, Token

_T = TypeVar("_T")


def algorithm_of(run: str | Path) -> str:
    """Return the name of the algorithm of a run, or the name of the format of another trainer's file.

    Raises:
        UserError: if `run` is not a run directory, or a file whose format is unknown.
    """
    from vineppo.view.foreign import format_of, is_foreign

    if is_foreign(run):
        return format_of(run)
    return str(RunDirectory.open(run, writable=False).config.get("algorithm", ""))


def iterations_of(run: str | Path) -> list[int]:
    """Return the numbers of the iterations whose responses are saved, in ascending order.

    Args:
        run: a run directory, or what another trainer wrote (`foreign.py`), whose steps are its iterations.
    Raises:
        UserError: if `run` is neither, or no responses are saved.
    """
    from vineppo.view.foreign import foreign_iterations, is_foreign

    if is_foreign(run):
        return foreign_iterations(run)
    directory = RunDirectory.open(run, writable=False)
    stems = (path.stem for path in directory.rollouts.glob("*.parquet"))
    found = sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())
    if found:
        return found
    section = directory.config.get("run")
    if isinstance(section, Mapping) and section.get("save_rollouts") is False:
        raise UserError(
            f"{run} has saved no responses, because run.save_rollouts is false; train with --run.save_rollouts true"
        )
    raise UserError(f"{run} has saved no responses yet; wait for the end of its first iteration")


def responses_of(run: str | Path, iteration: int, tokenizer: str | Path | None = None) -> list[Response]:
    """Return the responses of an iteration in the order of the file: rollouts, then other training samples.

    The rollouts of a problem are neighbours.

    Args:
        run: a run directory, or what another trainer wrote (`foreign.py`).
        iteration: number of the iteration.
        tokenizer: file `tokenizer.json`, or a directory with one. Only a file that has token ids and no text needs it.
    Raises:
        UserError: if the run has no such iteration, or the file cannot be read.
    """
    from vineppo.view.foreign import foreign_responses, is_foreign

    if is_foreign(run):
        return foreign_responses(run, iteration, tokenizer)
    if tokenizer is not None:
        raise UserError(f"{run} has the texts of its responses, so a tokenizer has no meaning; remove --tokenizer")
    return responses_from_rows(_rows(run, iteration))


def read_each(
    run: str | Path, iterations: Iterable[int], read: Callable[[int], _T], damaged: dict[int, str]
) -> Iterator[tuple[int, _T]]:
    """Yield the number of each iteration with what `read` returns for it. Iterations that cannot be read are left out.

    Args:
        run: the run, for the message.
        iterations: numbers of the iterations.
        read: function that reads an iteration. It raises UserError if the iteration cannot be read.
        damaged: receives the number of each iteration that is left out, with the message, which names the file.
    Raises:
        UserError: if there are iterations, and none of them can be read.
    """
    found = False
    for iteration in iterations:
        try:
            content = read(iteration)
        except UserError as error:
            damaged[iteration] = str(error)
            continue
        found = True
        yield iteration, content
    if damaged and not found:
        raise UserError(f"{run} has no iteration that can be read: {next(iter(damaged.values()))}")


def responses_from_rows(rows: Sequence[Mapping[str, Any]]) -> list[Response]:
    """Return the responses of rows with the keys of `vineppo.run.records.SCHEMA`, for example from `rollout_rows`.

    The rows should be those of a whole iteration, because the intervals of values need to know whether all rewards are
    between 0 and 1.
    """
    unit = all(0 <= reward <= 1 for row in rows for reward in _rewards(row))
    return [_response(row, number, unit) for number, row in enumerate(rows, start=1)]


def checked_responses(rows: Sequence[Mapping[str, Any]]) -> list[Response]:
    """Return the responses of rows from a file, after a check that the lists of each row fit together.

    Raises:
        KeyError, TypeError, ValueError: if they do not.
    """
    for row in rows:
        _check(row)
    return responses_from_rows(rows)


def response_of(run: str | Path, iteration: int, number: int, tokenizer: str | Path | None = None) -> Response:
    """Return one response of an iteration.

    Raises:
        UserError: as `responses_of`, and if there is no response with this number.
    """
    responses = responses_of(run, iteration, tokenizer)
    if not 1 <= number <= len(responses):
        raise UserError(
            f"iteration {iteration} of {run} has no response {number}; it has the responses 1 to {len(responses)}"
        )
    return responses[number - 1]


def _rows(run: str | Path, iteration: int) -> list[dict[str, Any]]:
    known = iterations_of(run)
    if iteration not in known:
        raise UserError(f"{run} has no responses of iteration {iteration}; it has {ranges(known)}")
    path = RunDirectory(Path(run), {}).rollouts_of(iteration)
    try:
        rows = pq.ParquetFile(path).read().to_pylist()
        for row in rows:
            _check(row)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or not a file of rollouts ({reason_of(error)}); the other iterations can still be read"
        ) from None
    return list(rows)


def reason_of(error: BaseException) -> str:
    """Return why a file could not be read, in one short line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing" if error.args else "a key is missing"
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


_NEEDED = ("response", "response_ids", "token_advantages", "sampler_logprobs", "step_texts", "step_ends")
"""Columns of every version that are read without a default."""


def _check(row: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError if the lists of a row do not fit together."""
    T, S = len(row["response_ids"]), len(row["step_ends"])
    if any(row[name] is None for name in _NEEDED):
        raise ValueError("a row lacks an entry")
    for name in ("token_advantages", "sampler_logprobs", "token_weights", "token_ends", "token_entropies"):
        if len(row.get(name) or ()) not in (0, T):
            raise ValueError(f"column {name} has {len(row[name])} entries for {T} tokens")
    for name in ("step_texts", "values", "num_mc_rollouts", "step_advantages"):
        if len(row.get(name) or ()) not in (0, S):
            raise ValueError(f"column {name} has {len(row[name])} entries for {S} steps")
    if S and (row["step_ends"] != sorted(set(row["step_ends"])) or not 0 < row["step_ends"][-1] <= T):
        raise ValueError("the ends of the steps are not in order")


def consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of consecutive numbers, in ascending order."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as a text such as `1 to 20, 25`."""
    texts = [f"{first}" if first == last else f"{first} to {last}" for first, last in consecutive(numbers)]
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more ranges" if len(texts) > 5 else "")


def _rewards(row: Mapping[str, Any]) -> Iterator[float]:
    """Yield all rewards and values of a row."""
    rewards = [row.get("reward"), *(c.get("reward") for c in row.get("continuations") or ())]
    yield from (reward for reward in [*rewards, *(row.get("values") or ())] if reward is not None)


def _response(row: Mapping[str, Any], number: int, unit: bool) -> Response:
    """Return the response of a row.

    Args:
        unit: whether all rewards of the iteration are between 0 and 1.
    """
    tokens = _tokens(row)
    steps, credit = _steps(row, tokens, unit)
    return Response(
        iteration=int(row.get("iteration") or 0),
        number=number,
        kind=row.get("kind") or "rollout",
        problem_id=row.get("problem_id") or "",
        prompt=row.get("prompt") or "",
        answer=row.get("answer") or "",
        text=row["response"],
        reward=row.get("reward"),
        finish_reason=row.get("finish_reason"),
        tokens=tokens,
        steps=steps,
        credit=credit,
        alternatives=tuple(
            Alternative(a["position"], a["token_id"], a["text"], a["advantage"]) for a in row.get("alternatives") or ()
        ),
        continuations=tuple(
            Continuation(
                c["state"], c["shared"], c["num_tokens"], c["text"], c["reward"], c["finish_reason"], c["accepted"]
            )
            for c in row.get("continuations") or ()
        ),
    )


def _tokens(row: Mapping[str, Any]) -> tuple[Token, ...]:
    ids, T = row["response_ids"], len(row["response_ids"])

    def column(name: str, default: Any) -> list[Any]:
        return row.get(name) or [default] * T

    ends, text = row.get("token_ends"), row["response"]
    texts = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)] if ends else [None] * T
    names = {"sampler_logprobs": None, "token_entropies": None, "token_advantages": None, "token_weights": 1.0}
    columns = [column(name, default) for name, default in (*names.items(), ("token_values", None))]
    return tuple(Token(*fields) for fields in zip(ids, texts, *columns, strict=True))


def _steps(row: Mapping[str, Any], tokens: Sequence[Token], unit: bool) -> tuple[tuple[Step, ...], Credit]:
    """Return the steps of a row, and what their advantages are."""
    ends, advantages = list(row["step_ends"]), row.get("step_advantages") or ()
    has_credit = any(token.advantage is not None for token in tokens)
    if ends:
        texts = list(row["step_texts"])
    else:
        ends = line_ends([token.text for token in tokens])
        texts = step_texts_of(row["response"], tokens, ends)
    values, counts = row.get("values") or (), row.get("num_mc_rollouts") or ()
    steps = []
    for i, (text, start, end) in enumerate(zip(texts, [0, *ends], ends, strict=False)):
        token_sum = sum_of(tokens[start:end]) if has_credit else None
        value = values[i] if values else tokens[start].value
        count = counts[i] if counts else None
        interval = None if value is None or count is None else interval_of(value, count, unit)
        advantage = advantages[i] if advantages else token_sum
        steps.append(Step(i + 1, text, start, end, value, count, interval, advantage, token_sum))
    return tuple(steps), "none" if not has_credit else "values" if advantages else "tokens"


def sum_of(tokens: Sequence[Token]) -> float:
    """Return the sum of the advantages of tokens. Tokens without credit count as 0."""
    return math.fsum(token.advantage or 0.0 for token in tokens)


def line_ends(texts: Sequence[str | None]) -> list[int]:
    """Return the end of each line of a response as a number of tokens. The last one is T; empty if there are no tokens.

    A line ends after the token with its line break. A last line without text, such as the end-of-sequence token alone,
    belongs to the line before it. If the texts of the tokens are unknown, the whole response is one line.
    """
    ends = [i + 1 for i, text in enumerate(texts) if text is not None and "\n" in text]
    if not texts:
        return []
    if ends and not any((text or "").strip() for text in texts[ends[-1] :]):
        ends.pop()
    return [*ends, len(texts)]


def step_texts_of(text: str, tokens: Sequence[Token], ends: Sequence[int]) -> list[str]:
    """Return the text of each step from the texts of the tokens, or the whole text if they are unknown."""
    if any(token.text is None for token in tokens):
        return [text] * bool(ends)
    return ["".join(t.text or "" for t in tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def interval_of(value: float, num_mc_rollouts: int, unit: bool = True) -> Interval | None:
    """Return the 95% interval of a Monte-Carlo value: Wilson's, of `value` successes per rollout in K rollouts.

    For rewards of 0 and 1 it is the usual interval. For other rewards from 0 to 1 it is too wide rather than too
    narrow. A value that was known without sampling has an interval of width 0.

    Args:
        value: mean reward of the MC rollouts.
        num_mc_rollouts: K.
        unit: whether all rewards are known to be between 0 and 1. If not, there is no interval.
    """
    if num_mc_rollouts == 0:
        return Interval(value, value, value)
    if not unit or not 0 <= value <= 1:
        return None
    return wilson(min(value * num_mc_rollouts, num_mc_rollouts), num_mc_rollouts)
