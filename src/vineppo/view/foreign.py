"""Read the responses that other trainers wrote, so that the commands for the responses of a run can show them, too.

Formats, which are recognised by the content of the file and not by its name:

- the Parquet file with completions that TRL's `GRPOTrainer` writes with `log_completions=True`, one per log
  (`completions/completions_00010.parquet`; columns step, prompt, completion, one per reward function, advantage), and
  the directory with such files;
- the JSONL file with tokens that prime-rl's trainer writes (`token_exports/step_3/rank_0.jsonl`; one sequence per line
  with `token_ids`, `loss_mask`, `advantages` and others);
- one Parquet file of a run of this package.

Such trainers compute one advantage per response. It is repeated for every step (`Response.credit` is "response"), and
the steps are the lines of the response. There are no values. Iterations are the trainer's steps.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vineppo.run.records import SCHEMA, Decode, token_ends
from vineppo.types import UserError
from vineppo.view.records import checked_responses, line_ends, ranges, reason_of, step_texts_of, sum_of
from vineppo.view.response import Credit, Response, Step, Token

Format = Literal["TRL completions", "prime-rl tokens", "rollouts"]
_TRL_COLUMNS = frozenset({"step", "prompt", "completion", "advantage"})
_PRIME_KEYS = frozenset({"token_ids", "loss_mask", "advantages", "inference_logprobs"})
_PRIME_LISTS = ("loss_mask", "advantages", "rewards", "inference_logprobs", "entropy", "is_masked")
"""Lists of prime-rl that are read, each with one entry per token. Older files lack some of them."""
_ALLOWED = (
    "allowed are the Parquet files with completions of TRL's GRPOTrainer, the JSONL files with tokens of prime-rl, the "
    "files rollouts/*.parquet of a run, and directories of runs"
)


def is_foreign(path: str | Path) -> bool:
    """Return whether a path is a file, or a directory with TRL's files of completions, and not a run directory."""
    return Path(path).is_file() or (not (Path(path) / "config.yaml").exists() and bool(_trl_files(path)))


def format_of(path: str | Path) -> Format:
    """Return the format of a file, or of the files of a directory.

    Raises:
        UserError: if the file has none of the formats, or cannot be read.
    """
    file = _files(path)[0]
    record: Any = None
    try:
        with open(file, "rb") as opened:
            start = opened.read(4)
        if start == b"PAR1":
            with _damage(file):
                return _parquet_format(file, set(pq.read_schema(file).names))
        with open(file, "rb") as opened, contextlib.suppress(ValueError, RecursionError):
            record = json.loads(next((line for line in opened if line.strip()), b""))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or type(error).__name__})") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} is no file of responses: it is neither Parquet nor JSONL; {_ALLOWED}")
    if missing := ", ".join(sorted(_PRIME_KEYS - record.keys())):
        raise UserError(f"{file} is no file of responses: its first line is JSON without {missing}; {_ALLOWED}")
    return "prime-rl tokens"


def lacks_text(path: str | Path) -> bool:
    """Return whether a path is a file with token ids and without text, for which a tokenizer is of use.

    Raises:
        UserError: if it is a file whose format is unknown.
    """
    return is_foreign(path) and format_of(path) == "prime-rl tokens"


def _parquet_format(file: Path, columns: set[str]) -> Format:
    if columns >= _TRL_COLUMNS:
        return "TRL completions"
    if columns >= {"response_ids", "token_advantages", "step_ends"} and columns <= set(SCHEMA.names):
        return "rollouts"
    missing = ", ".join(sorted(_TRL_COLUMNS - columns))
    raise UserError(f"{file} is no file of responses: it is Parquet without the columns {missing}; {_ALLOWED}")


def foreign_iterations(path: str | Path) -> list[int]:
    """Return the trainer's steps whose responses a file or directory has, in ascending order.

    Raises:
        UserError: if the format is unknown, the file is damaged, or it has no responses.
    """
    kind = format_of(path)
    found: set[int] = set()
    for file in _files(path):
        with _damage(file):
            if kind == "prime-rl tokens":
                found |= {_step_of(record) for record in _lines(file)}
            else:
                name = "step" if kind == "TRL completions" else "iteration"
                found |= {int(step) for step in pq.read_table(file, columns=[name])[name].to_pylist()}
    if not found:
        raise UserError(f"{path} has no responses; give another file")
    return sorted(found)


def foreign_responses(path: str | Path, iteration: int, tokenizer: str | Path | None = None) -> list[Response]:
    """Return the responses of one of the trainer's steps, in the order of the file.

    Responses to the same prompt get the same problem id, such as `prompt 3f2a9c01`. The reward of TRL is the sum
    of the columns of its reward functions, which are the floating-point columns: the file has no weights, and a value
    that is missing counts as 0. They have no tokens; a line of the response stands for a token.

    Args:
        path: the file, or a directory with TRL's files.
        iteration: a step of the trainer.
        tokenizer: file `tokenizer.json`, or a directory with one, for prime-rl's files, which have no text. Without it,
            tokens are shown as their ids, and the response is one step.
    Raises:
        UserError: if there is no such step, the format is unknown, or a file is damaged.
    """
    kind = format_of(path)
    if tokenizer is not None and not lacks_text(path):
        raise UserError(f"{path} has the texts of its responses, so a tokenizer has no meaning; remove --tokenizer")
    decode = None if tokenizer is None else _decoder(Path(tokenizer))
    found: list[Response] = []
    for file in _files(path):
        with _damage(file):
            if kind == "prime-rl tokens":
                found += _prime_responses(file, iteration, decode)
            elif kind == "TRL completions":
                found += _trl_responses(file, iteration)
            else:
                rows = pq.read_table(file).to_pylist()
                found += checked_responses([row for row in rows if row["iteration"] == iteration])
    if not found:
        known = ranges(foreign_iterations(path))
        raise UserError(f"{path} has no responses of iteration {iteration}; it has {known}")
    return [replace(response, number=number) for number, response in enumerate(found, start=1)]


class _damage:
    """Context that converts an error while a file is read to one line for the user."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        damaged = (pa.ArrowException, OSError, KeyError, TypeError, ValueError, IndexError, RecursionError)
        if isinstance(error, damaged) and not isinstance(error, UserError):
            raise UserError(f"{self.file} is damaged ({reason_of(error)}); give another file") from None


def _trl_files(path: str | Path) -> list[Path]:
    """Return TRL's files in a directory, or in its folder `completions`."""
    folder = Path(path)
    pattern = "completions_*.parquet"
    return sorted(folder.glob(pattern)) or sorted((folder / "completions").glob(pattern))


def _files(path: str | Path) -> list[Path]:
    return [Path(path)] if Path(path).is_file() else _trl_files(path)


def _number(value: Any) -> float | None:
    """Return a number as float; None if it is missing or not finite.

    Raises:
        ValueError: if it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r:.40} in place of a number")
    return float(value) if math.isfinite(value) else None


def _problem_id(prompt: object) -> str:
    """Return an id of a prompt, which is the same in all files."""
    return f"prompt {hashlib.sha256(str(prompt).encode()).hexdigest()[:8]}"


def _trl_responses(file: Path, iteration: int) -> Iterator[Response]:
    table = pq.read_table(file)
    fields = {field.name: field.type for field in table.schema}
    rewards = [name for name, kind in fields.items() if pa.types.is_floating(kind) and name not in _TRL_COLUMNS]
    for row in table.to_pylist():
        if int(row["step"]) != iteration:
            continue
        prompt, text = _chat_text(row["prompt"], labels=True), _chat_text(row["completion"], labels=False)
        parts = [value for value in (_number(row[name]) for name in rewards) if value is not None]
        advantage = _number(row["advantage"])
        lines = [line for line in re.split(r"(?<=\n)", text) if line]
        # Equal lines have equal ids, so that responses with the same beginning share a prefix.
        tokens = tuple(Token(-1 - zlib.crc32(line.encode()), line, None, None, advantage, 1.0) for line in lines)
        yield Response(
            iteration=iteration,
            number=0,
            kind="rollout",
            problem_id=_problem_id(prompt),
            prompt=prompt,
            answer="",
            text=text,
            reward=sum(parts) if parts else None,
            finish_reason=None,
            tokens=tokens,
            steps=_steps(text, tokens, advantage, "response"),
            credit="none" if advantage is None else "response",
        )


def _chat_text(value: Any, labels: bool) -> str:
    """Return the text of a prompt or a completion, which is a text or a list of messages.

    Args:
        value: the text, or messages with `role` and `content`.
        labels: whether to write the role before each message.
    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{value!r:.40} in place of a text or messages")
    texts = [_content(message) for message in value]
    if labels:
        texts = [f"{message.get('role')}: {text}" for message, text in zip(value, texts, strict=True)]
    return "\n".join(texts)


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be a list of parts, followed by its tool calls as JSON."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
    calls = message.get("tool_calls")
    return str(content) + (f"\n{json.dumps(calls, default=str)}" if calls else "")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file.

    Raises:
        ValueError: if a line is not an object with the lists of prime-rl.
    """
    with open(file, encoding="utf-8") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                raise ValueError(f"line {number} is not JSON") from None
            if not isinstance(record, dict) or not record.keys() >= _PRIME_KEYS:
                raise ValueError(f"line {number} lacks some of {', '.join(sorted(_PRIME_KEYS))}")
            ids = record["token_ids"]
            if not all(isinstance(token, int) and 0 <= token < 2**32 for token in ids):
                raise ValueError(f"line {number} has an entry in token_ids that is no token id")
            for name in _PRIME_LISTS:
                if record.get(name) is not None and len(record[name]) != len(ids):
                    raise ValueError(f"line {number} has {len(record[name])} entries in {name} for {len(ids)} tokens")
            yield record


def _step_of(record: Mapping[str, Any]) -> int:
    """Return the step of a record: that of its run, or else that of the trainer."""
    return int(record["export_step"] if record.get("export_step") is not None else record["step"])


def _prime_responses(file: Path, iteration: int, decode: Decode | None) -> Iterator[Response]:
    alone: dict[int, str] = {}
    for record in _lines(file):
        if _step_of(record) == iteration:
            yield _prime_response(record, iteration, decode, alone)


def _prime_response(
    record: Mapping[str, Any], iteration: int, decode: Decode | None, alone: dict[int, str]
) -> Response:
    """Return the response of a record: everything from its first trained token on.

    Args:
        record: the record.
        iteration: its step.
        decode: function that converts token ids to text; None if there is no tokenizer.
        alone: texts of tokens that were decoded alone, which this function adds to.
    """
    start = next((i for i, trained in enumerate(record["loss_mask"]) if trained), len(record["token_ids"]))
    ids, problem = record["token_ids"][start:], _problem_id(tuple(record["token_ids"][:start]))
    text, texts = _token_texts(ids, decode, alone)

    def column(name: str) -> list[Any]:
        return list((record.get(name) or [None] * len(record["token_ids"]))[start:])

    mask, clipped = column("loss_mask"), column("is_masked")
    advantages = [_number(a) if trained else None for a, trained in zip(column("advantages"), mask, strict=True)]
    logprobs, entropies = map(_number, column("inference_logprobs")), map(_number, column("entropy"))
    weights = [float(bool(trained) and not cut) for trained, cut in zip(mask, clipped, strict=True)]
    tokens = tuple(map(Token, ids, texts, logprobs, entropies, advantages, weights))
    known = {a for a in advantages if a is not None}
    credit: Credit = "none" if not known else "response" if len(known) == 1 else "tokens"
    rewards = (reward for reward in map(_number, column("rewards")) if reward is not None)
    return Response(
        iteration=iteration,
        number=0,
        kind="rollout",
        problem_id=f"{record['env_name']}, {problem}" if record.get("env_name") else problem,
        prompt=f"({start} tokens)" if decode is None else decode(record["token_ids"][:start]),
        answer="",
        text=text,
        reward=next(rewards, None),
        finish_reason=None,
        tokens=tokens,
        steps=_steps(text, tokens, next(iter(known), None), credit),
        credit=credit,
    )


def _token_texts(ids: Sequence[int], decode: Decode | None, alone: dict[int, str]) -> tuple[str, list[str | None]]:
    """Return the text of a response and that of each of its tokens; without a tokenizer, ids take their place."""
    if decode is None:
        texts = [f"[{token}]" for token in ids]
        return "".join(texts), list(texts)
    text = decode(ids)
    ends = token_ends(ids, text, decode, alone)
    pairs = zip([0, *ends], ends, strict=False)
    return text, [text[a:b] for a, b in pairs] if ends else [None] * len(ids)


def _steps(text: str, tokens: Sequence[Token], advantage: float | None, credit: Credit) -> tuple[Step, ...]:
    """Return the lines of a response as steps. With credit "response", each has the advantage of the response."""
    ends = line_ends([token.text for token in tokens])
    steps = []
    for number, (start, end, part) in enumerate(zip([0, *ends], ends, step_texts_of(text, tokens, ends), strict=False)):
        total = None if credit == "none" else sum_of(tokens[start:end])
        steps.append(
            Step(number + 1, part, start, end, None, None, None, advantage if credit == "response" else total, total)
        )
    return tuple(steps)


@functools.lru_cache(maxsize=4)
def _decoder(path: Path) -> Callable[[Sequence[int]], str]:
    """Return the function that converts token ids to text without special tokens.

    Raises:
        UserError: if there is no such tokenizer.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--tokenizer is {path}; it must be a file tokenizer.json, or a directory with this file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{file} is no tokenizer ({str(error)[:100]}); give the tokenizer.json of a model") from None
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))
