"""The command `vineppo export`: responses of a run as a data set for TRL's trainers."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vineppo.cli.options import Command, Request, add_note
from vineppo.config.messages import did_you_mean
from vineppo.types import UserError

if TYPE_CHECKING:
    from vineppo.view.export import Exported, ExportSettings, Pairs, Rule

_FORMATS = ("prm", "dpo", "sft")
_RULES = ("value", "advantage")
_PAIRS = ("auto", "prefix", "whole")
_ONLY_FOR = {
    "labels": ("prm",),
    "threshold": ("prm",),
    "tolerance": ("prm",),
    "pairs": ("dpo",),
    "wrong": ("dpo",),
    "right": ("dpo", "sft"),
}
"""Option -> the formats for which it has a meaning."""


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo export` to its parser."""
    add_note(parser, "RUN", "The directory of a run, finished or not; or a file that `vineppo show` opens.")
    add_note(
        parser,
        "FORMATS",
        "prm: prompt, completions (the steps) and labels, for PRMTrainer (TRL up to 1.13). dpo: prompt, chosen and "
        "rejected, for DPOTrainer. sft: prompt and completion, for SFTTrainer. Labels come from Monte-Carlo values; "
        "such a value is not step correctness (arXiv 2501.07301).",
    )
    parser.add_argument("--format", metavar="{" + ",".join(_FORMATS) + "}", help="format of the data set; needed")
    parser.add_argument("--out", metavar="FILE", help=".jsonl or .parquet (default: RUN/exports/FORMAT.jsonl)")
    parser.add_argument("--iterations", metavar="A-B", help="iterations, such as 5 or 5-9 (default: all)")
    parser.add_argument(
        "--split", metavar="X", help="write about this share of the problems to a second file, FILE-test (default: 0)"
    )
    parser.add_argument("--right", metavar="X", help="dpo, sft: smallest reward of a right response (default: 1)")
    parser.add_argument("--wrong", metavar="X", help="dpo: largest reward of a wrong response (default: 0)")
    parser.add_argument(
        "--labels",
        metavar="{" + ",".join(_RULES) + "}",
        help="prm: whether a step's label comes from the value after it or from its advantage (default: value)",
    )
    parser.add_argument("--threshold", metavar="X", help="prm: smallest value after a true step (default: 0.5)")
    parser.add_argument("--tolerance", metavar="X", help="prm: largest fall of a true step's value (default: 0)")
    parser.add_argument(
        "--pairs",
        metavar="{" + ",".join(_PAIRS) + "}",
        help="dpo: prefix: pairs that share the text up to the worst step; whole: pairs of whole responses; auto: "
        "the first where there is one, else the second (default: auto)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="as for `vineppo show`, for files without text")


def _run(request: Request) -> int:
    """Write the data set, and print what was written and what was left out. Return the exit code 0."""
    if request.positional is None:
        raise UserError("no RUN is given; give the directory of a run, such as runs/demo")
    form = _choice(request, "format", _FORMATS)
    if form is None:
        raise UserError(f"no format is given; add --format with one of {', '.join(_FORMATS)}")
    settings, share, out = _settings(request, form), _share(request), _out(request, form)
    from vineppo.view.export import export, split_rows, write_rows
    from vineppo.view.records import iterations_of, read_each, responses_of

    run, damaged = request.positional, dict[int, str]()
    numbers = _iterations(request, iterations_of(run))
    read = functools.partial(responses_of, run, tokenizer=request.options["tokenizer"])
    found = (response for _, responses in read_each(run, numbers, read, damaged) for response in responses)
    exported = export(found, form, settings)
    if not exported.rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in exported.left_out.items() if count)
        unread = f"; {_counted(len(damaged))} cannot be read" if damaged else ""
        raise UserError(
            f"{run} has nothing to export as {form}: of {exported.num_responses:,} responses are {reasons or 'none'}"
            f"{unread}; choose other iterations, another format or another threshold"
        )
    first, second = split_rows(exported, share)
    files = [(out, first)]
    if share:
        files.append((out.with_name(f"{out.stem}-test{out.suffix}"), second))
    for path, rows in files:
        write_rows(path, rows, form)
        print(f"{path}: {len(rows):,} rows")
    _report(exported, len(numbers) - len(damaged), list(damaged.values()))
    return 0


def _report(exported: Exported, num_iterations: int, damaged: Sequence[str]) -> None:
    """Print where the rows come from, and what was left out.

    Args:
        num_iterations: number of the iterations that were read.
        damaged: for each iteration that could not be read, the message that names its file.
    """
    print(f"from {exported.num_responses:,} responses of {_counted(num_iterations)}")
    for message in damaged:
        print(f"left out: {message}")
    if damaged:
        print(f"left out: {_counted(len(damaged))} that cannot be read")
    for reason, count in exported.left_out.items():
        if count:
            print(f"left out: {count:,} {reason}")
    for note in exported.notes:
        print(note)


def _counted(num_iterations: int) -> str:
    return f"{num_iterations:,} iteration{'' if num_iterations == 1 else 's'}"


def _choice(request: Request, name: str, allowed: tuple[str, ...]) -> str | None:
    """Return the value of an option that allows some texts, or None if it is not given."""
    value = cast("str | None", request.options[name])
    if value is not None and value not in allowed:
        hint = did_you_mean(value, allowed)
        raise UserError(f"--{name} is {value!r}; {hint + ' ' if hint else ''}allowed: {', '.join(allowed)}")
    return value


def _float(request: Request, name: str, default: float) -> float:
    """Return the value of an option as a finite number, or `default` if it is not given."""
    text = request.options[name]
    try:
        number = default if text is None else float(text)
    except ValueError:
        number = float("nan")
    if number - number != 0:  # NaN or infinite
        raise UserError(f"--{name} is {text!r}; it must be a number")
    return number


def _settings(request: Request, form: str) -> ExportSettings:
    """Return the settings of the export.

    Raises:
        UserError: if an option has no meaning for the format, or a value is not allowed.
    """
    from vineppo.view.export import ExportSettings

    for name, formats in _ONLY_FOR.items():
        if request.options[name] is not None and form not in formats:
            raise UserError(f"--{name} is for {' and '.join(formats)}, not for {form}; remove it")
    rule = _choice(request, "labels", _RULES) or ("value" if request.options["tolerance"] is None else "advantage")
    other = "tolerance" if rule == "value" else "threshold"
    if request.options[other] is not None:
        raise UserError(f"--{other} has no meaning with --labels {rule}; remove one of the two")
    given: dict[str, Any] = {
        name: _float(request, name, getattr(ExportSettings, name))
        for name in ("right", "wrong", "threshold", "tolerance")
    }
    if given["right"] <= given["wrong"]:
        raise UserError(f"--right is {given['right']:g} and --wrong {given['wrong']:g}; --right must be larger")
    if given["tolerance"] < 0:
        raise UserError(f"--tolerance is {given['tolerance']:g}; it must be at least 0")
    pairs = _choice(request, "pairs", _PAIRS) or "auto"
    return ExportSettings(rule=cast("Rule", rule), pairs=cast("Pairs", pairs), **given)


def _share(request: Request) -> float:
    share = _float(request, "split", 0.0)
    if not 0 <= share < 1:
        raise UserError(f"--split is {share:g}; it must be at least 0 and below 1")
    return share


def _out(request: Request, form: str) -> Path:
    """Return the file to write.

    Raises:
        UserError: if none is given for a file of another trainer, or the suffix is not allowed.
    """
    run, out = Path(str(request.positional)), request.options["out"]
    if out is None and run.is_file():
        raise UserError(f"{run} is a file, so there is no directory for the data set; add --out FILE")
    path = run / "exports" / f"{form}.jsonl" if out is None else Path(out)
    if path.suffix not in (".jsonl", ".parquet") or path.is_dir():
        raise UserError(f"--out is {path}; give the name of a file that ends in .jsonl or .parquet")
    return path


def _iterations(request: Request, known: list[int]) -> list[int]:
    """Return the iterations to read.

    Raises:
        UserError: if the option is no number or range, or none of them is saved.
    """
    text = request.options["iterations"]
    if text is None:
        return known
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not all(part.isascii() and part.isdigit() for part in (first, last)):
        raise UserError(f"--iterations is {text!r}; give a number such as 5, or a range such as 5-9")
    chosen = [number for number in known if int(first) <= number <= int(last)]
    if not chosen:
        raise UserError(f"--iterations is {text}, but none of them is saved; saved are {known[0]} to {known[-1]}")
    return chosen


COMMAND = Command(
    purpose="Write the responses of a run as a data set for TRL's PRMTrainer, DPOTrainer or SFTTrainer.",
    takes="RUN",
    usage="RUN --format prm|dpo|sft [--out FILE]",
    options=_options,
    run=_run,
    examples=(
        ("label every step by the value after it", "vineppo export runs/vines --format prm"),
        (
            "label a step true if any continuation after it was right; a tenth of the problems in a test file",
            "vineppo export runs/vines --format prm --threshold 0.01 --split 0.1",
        ),
        (
            "pairs of a right and a wrong response, as Parquet",
            "vineppo export runs/vines --format dpo --out dpo.parquet",
        ),
        ("right responses of the last iterations", "vineppo export runs/vines --format sft --iterations 50-60"),
    ),
)
"""The command `vineppo export`."""
