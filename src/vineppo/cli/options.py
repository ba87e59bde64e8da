"""Parse command lines. Each command has a parser whose options include the settings; error messages have one line."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from vineppo.config.load import sections_of, settings_of, suggestion
from vineppo.config.messages import did_you_mean
from vineppo.config.settings import Settings
from vineppo.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Command:
    """A command of the program, such as `vineppo train`."""

    purpose: str
    """One-line description, shown in the overview and in the help of the command."""
    takes: str
    """Name of the positional argument; empty if the command has none."""
    usage: str
    """Text of the usage line after the name of the command."""
    options: Callable[[argparse.ArgumentParser], None]
    """Adds the options of the command to a parser."""
    run: Callable[[Request], int]
    """Runs the command and returns the exit code."""
    examples: tuple[tuple[str, str], ...]
    """Pairs of (description, command line)."""
    settings: Callable[[], type[Settings]] | None = None
    """Returns the settings class. Each of its dotted keys is an option. None if the command has no settings."""
    takes_more: int = 0
    """Largest number of positional arguments after the first one."""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    positional: str | None
    """The positional argument (RECIPE or MODEL), or None if it is not given."""
    options: Mapping[str, Any]
    """Option name without dashes -> value, for the options that are not settings; the value is None if not given."""
    overrides: Mapping[str, str]
    """Dotted key -> text, for the settings given on the command line."""
    more: tuple[str, ...] = ()
    """The positional arguments after the first one."""


class _Parser(argparse.ArgumentParser):
    _negative_number_matcher = re.compile(r"-\.?\d")  # `-1e-4` is a value, not an option

    def error(self, message: str) -> NoReturn:
        """Raise UserError with one line, without the long usage text that argparse prints."""
        raise UserError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


def parser_of(name: str, command: Command) -> argparse.ArgumentParser:
    """Create the parser of a command with its options, settings and examples."""
    examples = "\n".join(f"  # {description}\n  {line}" for description, line in command.examples)
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
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    command.options(parser)
    return parser


def parse_request(parser: argparse.ArgumentParser, command: Command, argv: list[str]) -> Request:
    """Parse a command line.

    An option with an unknown section, such as `--my_algorithm.trace 0.9`, is accepted: it may be a setting of a
    user-defined algorithm. It is checked when that algorithm is loaded.

    Raises:
        UserError: if an option is unknown or there are too many arguments.
    """
    cls = command.settings() if command.settings else Settings
    namespace, remaining = parser.parse_known_args(argv)
    extra, positionals = _extra_options(parser, cls, remaining)
    if len(positionals) > bool(command.takes) + command.takes_more:
        raise UserError(f"unexpected argument {positionals[-1]}; usage: {parser.usage}")
    keys = settings_of(cls)
    return Request(
        positional=positionals[0] if positionals else None,
        options={name: value for name, value in vars(namespace).items() if name not in keys and name != "help"},
        overrides={k: value for k, value in vars(namespace).items() if k in keys and value is not None} | extra,
        more=tuple(positionals[1:]),
    )


def _extra_options(
    parser: argparse.ArgumentParser, cls: type[Settings], arguments: list[str]
) -> tuple[dict[str, str], list[str]]:
    """Split the arguments that argparse did not recognise into (settings of unknown sections, positional arguments).

    A section is unknown if the settings class `cls` does not have it.
    """
    extra, positionals, rest = dict[str, str](), list[str](), list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("-") or argument == "-":
            positionals.append(argument)
        elif argument.startswith("--") and _may_be_of_an_algorithm(cls, key):
            if not equals:  # an option without a value is a boolean
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            extra[key] = value
        else:
            names = [option.lstrip("-") for option in parser._option_string_actions]
            hint = (
                suggestion(cls, key, others=names, prefix="--") if cls.model_fields else did_you_mean(key, names, "--")
            )
            raise UserError(f"unknown option {argument.partition('=')[0]}; {hint or f'see `{parser.prog} --help`'}")
    return extra, positionals


def _may_be_of_an_algorithm(cls: type[Settings], key: str) -> bool:
    """Return whether a key may be a setting of a user-defined algorithm.

    This is the case if the settings class `cls` has a setting `algorithm` and no section with the name in the key.
    """
    section, dot, _ = key.partition(".")
    return bool(dot) and "algorithm" in cls.model_fields and section not in cls.model_fields


def add_settings(parser: argparse.ArgumentParser, cls: type[Settings], hidden: Collection[str] = ()) -> None:
    """Add every setting as an option, in one group per section. The help text is the docstring of the setting."""
    groups: dict[str, Any] = {
        key: parser.add_argument_group(f"{key}: {doc}" if key else "settings") for key, doc in sections_of(cls).items()
    }
    for key, setting in settings_of(cls).items():
        default = ",".join(map(str, setting.default)) if isinstance(setting.default, tuple) else str(setting.default)
        default = default.lower() if setting.type is bool else "" if setting.default is None else default
        help_text = f"{setting.doc}{f' (default: {default})' if default else ''}".replace("%", "%%")
        groups[key.rpartition(".")[0]].add_argument(
            f"--{key}",
            metavar=_metavar(setting.type),
            nargs="?" if _is_bool(setting.type) else None,
            const="true" if _is_bool(setting.type) else None,
            help=argparse.SUPPRESS if key in hidden else help_text,
        )


def _is_bool(kind: Any) -> bool:
    return kind is bool or bool in typing.get_args(kind)


def _metavar(kind: Any) -> str:
    if _is_bool(kind):
        return "true|false"
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return {int: "N", float: "X", tuple: "A,B"}.get(typing.get_origin(kind) or kind, "TEXT")


def int_option(request: Request, name: str, default: int) -> int:
    """Return the value of an option as an integer, or `default` if the option is not given.

    Raises:
        UserError: if the value is not a whole number.
    """
    return _converted(request, name, default, int, "a whole number")


def float_option(request: Request, name: str, default: float) -> float:
    """Return the value of an option as a number, or `default` if the option is not given.

    Raises:
        UserError: if the value is not a number.
    """
    return _converted(request, name, default, float, "a number")


def _converted(request: Request, name: str, default: T, convert: Callable[[str], T], kind: str) -> T:
    """Return the converted value of an option, or `default` if the option is not given.

    Args:
        convert: raises ValueError for a text that it cannot convert.
        kind: what the option must be, for the error message.
    """
    text = request.options[name]
    try:
        return default if text is None else convert(text)
    except ValueError:
        raise UserError(f"--{name} is {text!r}; it must be {kind}") from None


def add_note(parser: argparse.ArgumentParser, title: str, text: str) -> None:
    """Add a paragraph with a title to the help."""
    width = max(40, min(shutil.get_terminal_size().columns, 120) - 4)
    parser.add_argument_group(title, textwrap.fill(text, width))
