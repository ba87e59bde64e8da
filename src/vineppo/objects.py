"""Loads objects of user code by `module:object`, and formats exceptions as one line."""

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


def load_object(spec: str, what: str) -> Any:
    """Load the object that a setting names as `module:object`.

    Modules are looked up in the current directory first, as with `python -m`; `__main__` is the running script.

    Args:
        spec: for example `my_rewards:length`.
        what: kind of the object, for messages: "grader", "algorithm" or "splitter".
    Raises:
        UserError: if `spec` is malformed, the module or object does not exist, or importing the module fails.
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
    """An exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _public_names(module: Any) -> list[str]:
    """Public names of a module, without imported modules and names from `typing` and `__future__`."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and type(value).__module__ not in ("__future__", "typing")
    ]


def _import_module(spec: str, what: str, name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        # A missing import inside the user's module is reported as a failure of that module, not as a missing module.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what} {spec!r}: no module {error.name!r} in the current directory or among the installed packages"
            ) from error
        raise UserError(f"{what} {spec!r}: importing {name!r} failed: {first_line(error)}") from error
