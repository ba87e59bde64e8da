"""The command `vineppo show`: responses of a run with the credit of their steps, in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vineppo.cli.options import Command, Request, add_note, int_option
from vineppo.types import UserError

if TYPE_CHECKING:
    from vineppo.view.response import Response

_QUEUES = {
    "drops": "list the responses with the largest fall of the value in one step (without values: the lowest sum of "
    "token advantages)",
    "lucky": "list the right responses in which the value of a state was low after it had been higher: right in spite "
    "of a wrong step",
    "truncated": "list the responses that were cut off by the length limit",
    "disagree": "list the steps at which the trained credit and the Monte-Carlo values disagree in sign or in rank",
}
"""Name of each option that lists responses -> its help."""


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo show` to its parser."""
    add_note(
        parser,
        "RUN",
        "The directory of a run, finished or not; or a file with responses of another trainer: TRL's completions "
        "(Parquet, of log_completions) or prime-rl's tokens (JSONL).",
    )
    add_note(
        parser,
        "ITERATION",
        "The number of an iteration (default: the newest one that is saved). With an option that lists responses, "
        "`all` means all iterations.",
    )
    add_note(
        parser,
        "ROLLOUT",
        "The number of a response of the iteration, from 1 (default: the one with the largest fall of the value in one "
        "step).",
    )
    parser.add_argument("--step", metavar="N", help="explain step N (default: the one with the lowest advantage)")
    for name, text in _QUEUES.items():
        parser.add_argument(f"--{name}", action="store_true", default=None, help=text)
    parser.add_argument("--limit", metavar="N", help="number of lines of a list (default: 20)")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="tokenizer.json, or a directory with it, for files with token ids and no text (prime-rl)",
    )


def _run(request: Request) -> int:
    """Print a response or a list of responses. Return the exit code 0."""
    if request.positional is None:
        raise UserError("no RUN is given; give the directory of a run, such as runs/demo")
    queues = [name for name in _QUEUES if request.options[name]]
    if len(queues) > 1:
        raise UserError(f"--{queues[0]} and --{queues[1]} exclude each other; give one of them")
    if queues and (len(request.more) > 1 or request.options["step"] is not None):
        given = "--step" if request.options["step"] is not None else "ROLLOUT"
        raise UserError(f"--{queues[0]} lists responses, so {given} has no meaning; remove one of the two")
    if not queues and request.options["limit"] is not None:
        raise UserError(f"--limit is for a list; give it with one of --{', --'.join(_QUEUES)}, or remove it")
    if queues:
        _print_queue(request, queues[0])
    else:
        _print_response(request)
    return 0


def _print_queue(request: Request, name: str) -> None:
    """Print the entries of a queue, one per line, and how to show one of them."""
    from rich.console import Console

    from vineppo.view.queues import QUEUES
    from vineppo.view.records import iterations_of, responses_of
    from vineppo.view.terminal import show_entries

    run, limit, tokenizer = str(request.positional), int_option(request, "limit", 20), request.options["tokenizer"]
    if limit < 1:
        raise UserError(f"--limit is {limit}; it must be at least 1")
    known = iterations_of(run)
    chosen = known if request.more == ("all",) else [_iteration(request, known)]
    responses: list[Response] = [response for number in chosen for response in responses_of(run, number, tokenizer)]
    entries = QUEUES[name](responses)
    _escape_what_cannot_be_encoded()
    where = f"iteration {chosen[0]}" if len(chosen) == 1 else f"{len(chosen)} iterations"
    if not entries:
        print(f"{where}: none of {len(responses)} responses is in this list")
        return
    shown = entries[:limit]
    unit = "steps in" if name == "disagree" else "of"
    part = f", of which the first {limit} are listed" if limit < len(entries) else ""
    print(f"{where}: {len(entries)} {unit} {len(responses)} responses{part}")
    print("iteration, response and step, reward, reason, text:")
    show_entries(Console(highlight=False), shown)
    first = shown[0]
    step = f" --step {first.step.number}" if first.step else ""
    print(f"show one: vineppo show {run} {first.response.iteration} {first.response.number}{step}")


def _print_response(request: Request) -> None:
    """Print one response with its credit."""
    from rich.console import Console

    from vineppo.view.queues import most_telling
    from vineppo.view.records import algorithm_of, iterations_of, response_of, responses_of
    from vineppo.view.terminal import show_response

    run, tokenizer = str(request.positional), request.options["tokenizer"]
    iteration = _iteration(request, iterations_of(run))
    if len(request.more) > 1:
        response = response_of(run, iteration, _whole_number(request.more[1], "ROLLOUT"), tokenizer)
    else:
        responses = responses_of(run, iteration, tokenizer)
        if not responses:
            raise UserError(f"iteration {iteration} of {run} has no responses; show another iteration")
        response = most_telling(responses)
    number = int_option(request, "step", 0)
    step = None if request.options["step"] is None else response.step(number)
    label = algorithm_of(run)
    _escape_what_cannot_be_encoded()
    show_response(Console(highlight=False), response, label=label, step=step)


def _iteration(request: Request, known: list[int]) -> int:
    """Return the iteration that is asked for, or the newest one."""
    return _whole_number(request.more[0], "ITERATION") if request.more else known[-1]


def _whole_number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()):
        hint = "; `all` is for lists, such as --drops" if text == "all" else ""
        raise UserError(f"{name} is {text!r}; it must be a whole number{hint}")
    return int(text)


def _escape_what_cannot_be_encoded() -> None:
    """Let standard output escape characters that its encoding lacks, instead of failing."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


COMMAND = Command(
    purpose="Show a response of a run line by line, with the value and the advantage of every step.",
    takes="RUN",
    takes_more=2,
    usage="RUN [ITERATION [ROLLOUT]]  |  RUN [ITERATION] --drops",
    options=_options,
    run=_run,
    examples=(
        ("show the response of the newest iteration with the largest fall of the value", "vineppo show runs/demo"),
        ("show response 12 of iteration 9, and explain its step 3", "vineppo show runs/demo 9 12 --step 3"),
        ("show what TRL's GRPOTrainer logged", "vineppo show out/completions/completions_00010.parquet"),
        ("list the largest falls of all iterations", "vineppo show runs/demo all --drops --limit 10"),
    ),
)
