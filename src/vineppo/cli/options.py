"""Command lines read into requests: a parser per command, its settings as options, mistakes in one line."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from vineppo.config.load import sections_of, settings_of, suggestion
from vineppo.config.messages import did_you_mean
from vineppo.config.settings import Settings
from vineppo.types import UserError


@dataclass(frozen=True)
class Command:
    """One command of the program."""

    purpose: str
    """One line, for the overview and the top of the help."""
    takes: str
    """Name of the positional argument; empty: there is none."""
    usage: str
    """What follows the command's name."""
    options: Callable[[argparse.ArgumentParser], None]
    """Adds the options to the parser."""
    run: Callable[[Request], int]
    """Runs the command; returns the exit code."""
    examples: tuple[tuple[str, str], ...]
    """(what it does, command line)."""
    settings: Callable[[], type[Settings]] | None = None
    """Returns the settings whose dotted keys are options."""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    positional: str | None
    """RECIPE or MODEL, as written."""
    options: Mapping[str, Any]
    """The command's own options, without dashes; None where not given."""
    overrides: Mapping[str, str]
    """Dotted keys that were given, with their text."""


class _Parser(argparse.ArgumentParser):
    _negative_number_matcher = re.compile(r"-\.?\d")  # `-1e-4` is a value too

    def error(self, message: str) -> NoReturn:
        """A mistake is one line, without the usage of a hundred options."""
        raise UserError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


def parser_of(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of a command, with its options, its settings and its examples."""
    examples = "\n".join(f"  # {what}\n  {line}" for what, line in command.examples)
    parser = _Parser(
        prog=f"vineppo {name}",
        usage=f"vineppo {name} {command.usage}".rstrip(),
        description=command.purpose,
        epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
        add_help=False,
    )
    parser._negative_number_matcher = _Parser._negative_number_matcher
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    command.options(parser)
    return parser


def parse_request(parser: argparse.ArgumentParser, command: Command, argv: list[str]) -> Request:
    """Parse a command line.

    Options of a section that the command does not know (`--my_algorithm.trace 0.9`) are kept: they may be settings of a
    user's algorithm, and are checked with it.

    Raises:
        UserError: for an unknown option or an argument too many.
    """
    cls = command.settings() if command.settings else Settings
    given, left = parser.parse_known_args(argv)
    foreign, positionals = _foreign_options(parser, cls, left)
    if len(positionals) > bool(command.takes):
        raise UserError(f"{positionals[-1]} is one argument too many; usage: {parser.usage}")
    keys = settings_of(cls)
    return Request(
        positional=positionals[0] if positionals else None,
        options={name: value for name, value in vars(given).items() if name not in keys and name != "help"},
        overrides={k: value for k, value in vars(given).items() if k in keys and value is not None} | foreign,
    )


def _foreign_options(
    parser: argparse.ArgumentParser, cls: type[Settings], words: list[str]
) -> tuple[dict[str, str], list[str]]:
    """(settings of sections that `cls` does not have, positional arguments) among what argparse did not take."""
    foreign, positionals, rest = dict[str, str](), list[str](), iter(words)
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("-") or word == "-":
            positionals.append(word)
        elif (
            word.startswith("--")
            and "." in key
            and "algorithm" in cls.model_fields
            and key.split(".")[0] not in cls.model_fields
        ):
            foreign[key] = value if equals else next(rest, "true")
        else:
            names = [option.lstrip("-") for option in parser._option_string_actions]
            hint = (
                suggestion(cls, key, others=names, prefix="--") if cls.model_fields else did_you_mean(key, names, "--")
            )
            raise UserError(f"unknown option {word.partition('=')[0]}; {hint or f'see `{parser.prog} --help`'}")
    return foreign, positionals


def add_settings(parser: argparse.ArgumentParser, cls: type[Settings], hidden: Collection[str] = ()) -> None:
    """Add every setting as an option, in a group per section, with the text under its field."""
    groups: dict[str, Any] = {
        key: parser.add_argument_group(f"{key}: {doc}" if key else "settings") for key, doc in sections_of(cls).items()
    }
    for key, setting in settings_of(cls).items():
        default = ",".join(map(str, setting.default)) if isinstance(setting.default, tuple) else str(setting.default)
        default = default.lower() if setting.type is bool else default
        help_text = f"{setting.doc}{f' (default: {default})' if default else ''}".replace("%", "%%")
        groups[key.rpartition(".")[0]].add_argument(
            f"--{key}",
            metavar=_metavar(setting.type),
            nargs="?" if setting.type is bool else None,
            const="true" if setting.type is bool else None,
            help=argparse.SUPPRESS if key in hidden else help_text,
        )


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return {int: "N", float: "X", bool: "true|false", tuple: "A,B"}.get(typing.get_origin(kind) or kind, "TEXT")


def count(request: Request, name: str, default: int) -> int:
    """A whole number among the command's own options."""
    text = request.options[name]
    try:
        return default if text is None else int(text)
    except ValueError:
        raise UserError(f"--{name} is {text!r}; it must be a whole number") from None


def add_note(parser: argparse.ArgumentParser, title: str, text: str) -> None:
    """Add a paragraph to the help."""
    width = max(40, min(shutil.get_terminal_size().columns, 120) - 4)
    parser.add_argument_group(title, textwrap.fill(text, width))
