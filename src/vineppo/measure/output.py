"""Write the results of a measurement: JSON, Markdown, and the plots that the caller draws."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vineppo.measure.intervals import MIN_PROBLEMS
from vineppo.run.files import write_text
from vineppo.run.markdown import table_lines
from vineppo.types import UserError


def number(value: Any, decimals: int = 3) -> str:
    """Return a number as text, or `-` if it is not known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.{decimals}f}"


def interval(value: Mapping[str, Any] | None, decimals: int = 3) -> str:
    """Return `mean [low, high]`, only the mean if the bounds are not known, or `-` if there is no mean."""
    if not value or value.get("mean") is None:
        return "-"
    text = number(value["mean"], decimals)
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{number(value['low'], decimals)}, {number(value['high'], decimals)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose columns are padded, because reports are printed too."""
    return table_lines(head, rows, padded=True)


def write_results(folder: Path, name: str, result: Mapping[str, Any], text: str) -> list[Path]:
    """Write NAME.json and NAME.md to a directory, and return their paths.

    Args:
        folder: the directory.
        name: name of the files without the suffix.
        result: the content of the JSON file, without NaN and infinity (`run.files.json_ready`).
        text: the content of the Markdown file.
    Raises:
        UserError: if a file cannot be written.
    """
    files = {folder / f"{name}.json": json.dumps(result, indent=1) + "\n", folder / f"{name}.md": text}
    for path, content in files.items():
        try:
            write_text(path, content)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another --out") from None
    return list(files)


def about_brackets(num_problems: int) -> str:
    """Return the sentences of a report about its intervals."""
    few = f" {num_problems} problems are too few for them: they are too narrow, so measure at least {MIN_PROBLEMS}."
    return "Brackets are 95% bootstrap intervals over problems." + few * (num_problems < MIN_PROBLEMS)


def heading(result: Mapping[str, Any], what: str) -> list[str]:
    """Return the first lines of a report: its title, the command, where it ran, and its tokens and seconds."""
    return [
        f"# {what}",
        "",
        f"`{result['command']}`, {result['platform']}: {result['tokens']:,} generated tokens, "
        f"{result['seconds']:.0f} s.",
        "",
    ]


def folder_of(out: str, command: str) -> Path:
    """Return the directory of the results of a command, which is created.

    Raises:
        UserError: if it cannot be created.
    """
    folder = Path(out or f"runs/{command}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {str(folder)!r} cannot be written ({error.strerror}); give another directory") from None
    return folder
