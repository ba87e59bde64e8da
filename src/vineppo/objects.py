"""Objects of the user's own code: loaded by `module:object`, and their errors as one line."""

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
    """The object that a setting names as `module:object`.

    Modules are imported as `python -m` would, from the current directory first; `__main__` is the running script.

    Args:
        spec: for example `my_rewards:length`.
        what: what the object is for, in messages: "grader", "algorithm", "splitter".
    Raises:
        UserError: if `spec` has another form, there is no such module or object, or the module fails to import.
    """
    found = _SPEC.fullmatch(spec)
    if not found:
        raise UserError(f"no {what} {spec!r}; allowed: module:object, for example my_module:my_{what}")
    module, name = _import_module(spec, what, found["module"]), found["name"]
    try:
        return getattr(module, name)
    except AttributeError:
        names = _public_names(module)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(names) or 'nothing'}"
        raise UserError(f"{what} {spec!r}: module {found['module']!r} has no {name!r}; {hint}") from None


def first_line(error: BaseException) -> str:
    """An error as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _public_names(module: Any) -> list[str]:
    """Names that a user may have meant: not those of imported modules, of typing and of `from __future__`."""
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
        # A missing import *inside* the user's module is a failure of that module, not a missing module.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what} {spec!r}: no module {error.name!r} in the current directory or among the installed packages"
            ) from error
        raise UserError(f"{what} {spec!r}: importing {name!r} failed: {first_line(error)}") from error
