"""Command lines read into requests: a parser per command, its settings as options, mistakes in one line."""

from __future__ import annotations

import argparse
import shutil
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from vineppo.config.load import COMMAND_LINE, convert, did_you_mean, sections_of, settings_of, suggestion
from vineppo.types import UserError


@dataclass(frozen=True)
class Command:
    """One command of the program."""

    purpose: str
    """One line, for the overview and the top of its help."""
    takes: str
    """Name of what may stand without dashes; empty: nothing."""
    usage: str
    """What follows the command's name."""
    options: Callable[[argparse.ArgumentParser], None]
    """Adds the options to the parser."""
    run: Callable[[Request], int]
    """Does it; returns the exit code."""
    examples: tuple[tuple[str, str], ...]
    """(what it does, command line)."""
    config: type | None = None
    """The config dataclass whose dotted keys are options."""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    positional: str | None
    """RECIPE or MODEL, as written."""
    options: Mapping[str, Any]
    """The command's own options, without their dashes; None where not given."""
    overrides: Mapping[str, str]
    """Dotted keys that were given, with their text."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A mistake is one line, without the usage of a hundred options."""
        text = message.removeprefix("argument ")
        raise UserError(f"{text}; see `{self.prog} --help`")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def parser_of(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of a command, with its options, its settings and its examples."""
    examples = "\n".join(f"  # {what}\n  {line}" for what, line in command.examples)
    parser = _Parser(
        prog=f"vineppo {name}",
        usage=f"vineppo {name} {command.usage}".rstrip(),
        description=command.purpose,
        epilog=f"examples:\n{examples}",
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    command.options(parser)
    return parser


def parse_request(parser: argparse.ArgumentParser, command: Command, argv: list[str]) -> Request:
    """What the command line asks for; raises UserError for an unknown option or an argument too many."""
    # What is left over is unknown options and the positional; argparse's own positionals must not stand after options.
    given, left = parser.parse_known_args(_join_negative_numbers(argv))
    cls = command.config
    names = [option.lstrip("-") for option in parser._option_string_actions]
    for word in left:
        if word.startswith("-") and word != "-":
            key = word.split("=", 1)[0].lstrip("-")
            hint = suggestion(cls, key, others=names, prefix="--") if cls else did_you_mean(key, names, "--")
            raise UserError(f"unknown option {word.split('=', 1)[0]}; {hint or f'see `{parser.prog} --help`'}")
    if len(left) > bool(command.takes):
        raise UserError(f"{left[-1]} is one argument too many; usage: {parser.usage}")
    values = vars(given)
    keys = settings_of(cls) if cls else {}
    return Request(
        positional=left[0] if left else None,
        options={name: value for name, value in values.items() if name not in keys and name != "help"},
        overrides={name: value for name, value in values.items() if name in keys and value is not None},
    )


def _join_negative_numbers(argv: list[str]) -> list[str]:
    """`--key -1e-4` as `--key=-1e-4`: argparse takes some negative numbers for options."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _is_negative_number(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_negative_number(word: str) -> bool:
    try:
        return word.startswith("-") and float(word) <= 0
    except ValueError:
        return False


def add_settings(parser: argparse.ArgumentParser, cls: type, hidden: Collection[str] = ()) -> None:
    """Every setting of a config dataclass as an option, in a group per section, with the text under its field."""
    groups: dict[str, Any] = {
        key: parser.add_argument_group(f"{key}: {section.doc}" if key else "settings")
        for key, section in sections_of(cls).items()
    }
    for key, setting in settings_of(cls).items():
        default = _default_text(setting.default)
        help_text = f"{setting.doc}{f' (default: {default})' if default else ''}".replace("%", "%%")
        is_bool = setting.type is bool
        groups[key.rpartition(".")[0]].add_argument(
            f"--{key}",
            metavar=_metavar(setting.type),
            nargs="?" if is_bool else None,
            const="true" if is_bool else None,
            help=argparse.SUPPRESS if key in hidden else help_text,
        )


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    if typing.get_origin(kind) is tuple:
        return "A,B"
    return {int: "N", float: "X", bool: "true|false"}.get(kind, "TEXT")


def _default_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def count(request: Request, name: str, default: int) -> int:
    """A whole number among the command's own options."""
    value = request.options[name]
    return default if value is None else int(convert(f"--{name}", int, value, COMMAND_LINE))


def add_note(parser: argparse.ArgumentParser, title: str, text: str) -> None:
    """A paragraph of its own in the help."""
    width = max(40, min(shutil.get_terminal_size().columns, 120) - 4)
    parser.add_argument_group(title, textwrap.fill(text, width))
