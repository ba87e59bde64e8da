"""Load objects from the user's Python modules, such as reward functions, and describe exceptions in one line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from typing import Any

from vineppo.types import UserError

_SPEC = re.compile(r"(?P<module>[^:]+):(?P<name>[^:]+)")
"""The form `module:object` of the name of an object."""


def load_object(spec: str, what: str) -> Any:
    """Import a module and return one of its objects, for example a user-defined reward function.

    The current directory is put first on sys.path if it is not there yet. The module name `__main__` stands for the
    running script.

    Args:
        spec: `module:object`, for example `my_rewards:length`. `object` is a name at the top level of the module.
        what: kind of the object for error messages, such as "grader", "algorithm" or "splitter".
    Raises:
        UserError: if `spec` is not of this form, the module or object does not exist, or importing the module fails.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"unknown {what} {spec!r}; allowed: module:object, for example my_module:my_{what}")
    module, name = _import_module(spec, what, match["module"]), match["name"]
    try:
        return getattr(module, name)
    except AttributeError:
        names = _public_names(module)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(names) or 'nothing'}"
        raise UserError(f"{what} {spec!r}: module {match['module']!r} has no {name!r}; {hint}") from None


def first_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message, as one line.

    If the exception has no message, or its `__str__` fails, this is only the type.
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def message_line(error: BaseException) -> str:
    """Return the first line of the message of an exception, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _public_names(module: Any) -> list[str]:
    """Return the public names in a module, except imported modules and names from `typing` and `__future__`."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and not {getattr(value, "__module__", ""), type(value).__module__} & {"__future__", "typing"}
    ]


def _import_module(spec: str, what: str, name: str) -> Any:
    """Import and return the module `name`. `spec` and `what` are those of `load_object`, for error messages.

    Raises:
        UserError: if the module does not exist, or importing it fails.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        # `error.name` is the module that does not exist. If it is neither `name` nor a parent package of `name`, it is
        # a module that the user's module imports, and the import is reported as failed.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what} {spec!r}: no module {error.name!r} in the current directory or among the installed packages"
            ) from error
        raise UserError(f"{what} {spec!r}: importing {name!r} failed: {first_line(error)}") from error
