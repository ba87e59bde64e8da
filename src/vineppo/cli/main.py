"""Entry point of the command-line program `vineppo`.

PyTorch and the modules that import it load slowly. The commands import them inside functions, so that `--help` and
error messages appear at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from vineppo.cli import (
    blame,
    compare,
    demo,
    doctor,
    eval,
    export,
    offline,
    plan,
    plot,
    report,
    scaling,
    sft,
    show,
    train,
    tune,
    values,
    variance,
    view,
)
from vineppo.cli.options import Command, parse_request, parser_of
from vineppo.config.messages import did_you_mean
from vineppo.model.hardware import keep_freed_memory
from vineppo.run.environment import package_version, require_one_process
from vineppo.run.peers import PeerEnded, may_report
from vineppo.types import UserError, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the name of the command and its arguments; by default, those of the process.
    Returns:
        0 on success, 1 if a run of a comparison did not finish, 2 after a user error (printed as one line on standard
        error), 130 if the command was interrupted, or 141 if standard output was closed.
    """
    warnings.showwarning = _show_warning
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except PeerEnded:
        return 2  # another process reports why
    except UserError as error:
        if may_report():
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # standard output was closed, for example by `| head`
        with contextlib.suppress(OSError, ValueError):
            # Python flushes standard output again at exit. With the null device in its place, the flush does not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # ENAMETOOLONG means that a path given by the user is too long. Other errors are not mistakes of the user.
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {error.filename} is too long for a file name", file=sys.stderr)
        return 2
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, without the source file and line number."""
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone while a run goes on
        print(f"warning: {printable(' '.join(str(message).splitlines()))}", file=sys.stderr, flush=True)


def _dispatch(argv: list[str]) -> int:
    """Run the command that `argv` names, or print help or the version. Return the exit code.

    Raises:
        UserError: if the command or an option is unknown, or the command reports a mistake of the user.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"vineppo {package_version()}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        hint = did_you_mean(name, ["--help", "--version"] if name.startswith("-") else COMMANDS)
        raise UserError(f"unknown {kind} {name}; {hint + ' ' if hint else ''}commands: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    parser = parser_of(name, command)
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        return 0
    if command is not train.COMMAND:
        require_one_process()
    # This call makes training on the CPU faster. It must come before any thread starts.
    keep_freed_memory()
    return command.run(parse_request(parser, command, rest))


def _overview() -> str:
    """Return the text that `vineppo --help` prints."""
    purposes = "\n".join(f"  {name:<9} {command.purpose}" for name, command in COMMANDS.items())
    return (
        "usage: vineppo COMMAND [...]\n\n"
        "Fine-tune language models by reinforcement learning with an advantage for every reasoning step.\n\n"
        f"commands:\n{purposes}\n\n"
        "  vineppo COMMAND --help   print the options of a command, with examples\n"
        "  vineppo --version        print the version"
    )


COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "sft": sft.COMMAND,
    "offline": offline.COMMAND,
    "eval": eval.COMMAND,
    "plan": plan.COMMAND,
    "show": show.COMMAND,
    "view": view.COMMAND,
    "export": export.COMMAND,
    "report": report.COMMAND,
    "plot": plot.COMMAND,
    "compare": compare.COMMAND,
    "tune": tune.COMMAND,
    "values": values.COMMAND,
    "blame": blame.COMMAND,
    "variance": variance.COMMAND,
    "scaling": scaling.COMMAND,
    "demo": demo.COMMAND,
    "doctor": doctor.COMMAND,
}
"""The commands by name, in the order in which `vineppo --help` lists them."""
