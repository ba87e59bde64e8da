"""The door: `vineppo <command>`. Parse, call, print; what the commands do stands elsewhere.

Heavy modules (PyTorch and all that need it) are imported inside the commands, so that `--help` and a user's mistake
are answered at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from vineppo.cli import compare, demo, doctor, eval, plan, sft, train
from vineppo.cli.options import Command, parse_request, parser_of
from vineppo.config.load import (
    did_you_mean,
)
from vineppo.model.hardware import keep_freed_memory
from vineppo.run.environment import package_version
from vineppo.types import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 the user's mistake (one line on stderr), 130 interrupted."""
    warnings.showwarning = _show_warning
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone, for example `| head`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        return 141
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {error.filename} is too long for the name of a file", file=sys.stderr)
        return 2
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line, without the place in the source that it came from."""
    print(f"warning: {' '.join(str(message).splitlines())}", file=sys.stderr, flush=True)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"vineppo {package_version()}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        hint = did_you_mean(name, ["--help", "--version"] if name.startswith("-") else COMMANDS)
        raise UserError(f"unknown {what} {name}; {hint + ' ' if hint else ''}commands: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    parser = parser_of(name, command)
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        return 0
    keep_freed_memory()
    return command.run(parse_request(parser, command, rest))


def _overview() -> str:
    purposes = "\n".join(f"  {name:<9} {command.purpose}" for name, command in COMMANDS.items())
    return (
        "usage: vineppo COMMAND [...]\n\n"
        "Fine-tune language models by reinforcement learning and give every reasoning step the credit it earned.\n\n"
        f"commands:\n{purposes}\n\n"
        "  vineppo COMMAND --help   its options and examples\n"
        "  vineppo --version        the version"
    )


COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "sft": sft.COMMAND,
    "eval": eval.COMMAND,
    "plan": plan.COMMAND,
    "compare": compare.COMMAND,
    "demo": demo.COMMAND,
    "doctor": doctor.COMMAND,
}
