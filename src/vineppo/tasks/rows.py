"""Read tables of problems from JSON lines, JSON, CSV or Parquet files, or with the library `datasets`.

Every row is returned together with a text that tells its location in error messages, such as `train.jsonl line 3`.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vineppo.hub import is_repository_name, needs_local_copy, without_requests
from vineppo.objects import first_line
from vineppo.types import UserError

Row = Mapping[str, Any]
"""Column name -> value."""
Rows = list[tuple[str, Row]]
"""One pair (location of the row in error messages, row) for each row of a table."""
_KINDS = {".jsonl": "one JSON object a line", ".json": "a list of objects", ".csv": "a header line", ".parquet": ""}
"""Suffix of a file that can be read -> required content of the file."""


def read_rows(setting: str, source: str, default_split: str) -> Rows:
    """Return all rows of a file, of a directory saved by `datasets`, or of a data set on the Hugging Face Hub.

    Args:
        setting: name of the setting that contains `source`, such as `train_path`, for error messages.
        source: a path ending in .jsonl, .json, .csv or .parquet; a directory written by `save_to_disk` of `datasets`;
            or a Hub id, `org/name` or `org/name/subset`, optionally followed by `:split`.
        default_split: split to read from a directory with several splits, or from the Hub if `source` names no split.
    Raises:
        UserError: if the rows cannot be read; the message names the file, the row and what is required.
    """
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return table_rows(source, _from_disk(setting, source, default_split))
    if path.suffix.lower() in _KINDS or path.is_file() or path.is_dir():
        return _from_file(setting, path)
    return table_rows(source, _from_hub(setting, source, default_split))


def check_source(setting: str, source: str) -> Row | None:
    """Check that a source of `read_rows` exists, without reading all of it.

    Returns:
        The first row of a file in JSON lines or CSV; None for other sources.
    Raises:
        UserError: if the file does not exist or its first row cannot be read, or if the Hub does not have the data set,
            or it cannot be reached and there is no copy.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() not in (".json", ".parquet"):
        reader = _csv_rows if path.suffix.lower() == ".csv" else _json_lines
        rows = _from_file(setting, path, lambda path: islice(reader(path), 1))
        if not rows:
            raise empty_table(f"task.{setting}: {source}")
        return rows[0][1]
    if path.suffix.lower() in _KINDS or path.is_file() or path.is_dir():
        if not path.exists():
            raise _no_file(setting, path)
        return None
    _hub_name(setting, source)
    return None


def empty_table(what: str) -> UserError:
    """Return the error for a table without rows."""
    return UserError(f"{what} is empty; it must contain problems, one per row")


def _no_file(setting: str, path: Path) -> UserError:
    return UserError(f"task.{setting}: no such file: {path} (a relative path starts at {Path.cwd()})")


def _hub_name(setting: str, source: str) -> tuple[str, bool]:
    """Return (name of the data set on the Hub, whether only its local copy can be loaded).

    Raises:
        UserError: if the source looks like a path, `datasets` is not installed, or the data set cannot be loaded.
    """
    name = "/".join(source.partition(":")[0].split("/")[:2])
    if source.startswith((".", "/", "~")) or not 1 <= source.count("/") <= 2 or not is_repository_name(name):
        raise UserError(
            f"task.{setting}: no such file: {source} (a relative path starts at {Path.cwd()}); allowed: "
            f"{', '.join(_KINDS)} files, a directory saved by datasets, or a Hugging Face Hub id such as org/name"
        )
    if importlib.util.find_spec("datasets") is None:
        raise _no_datasets(setting)
    advice = f"set task.{setting} to a file with the problems ({', '.join(_KINDS)}), or connect to the network once"
    return name, needs_local_copy(f"task.{setting} {source!r}", name, "dataset", advice)


def table_rows(name: str, table: Any) -> Rows:
    """Return the rows of a `datasets.Dataset` or of any other iterable of mappings.

    Args:
        name: name of the table in the location of each row.
        table: one mapping from column names to values per row.
    Raises:
        UserError: if a row is not a mapping.
    """
    rows = [(f"{name} row {number}", row) for number, row in enumerate(table)]
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise UserError(f"{where} is a {type(row).__name__}; every row must map column names to values")
    return rows


def _from_file(setting: str, path: Path, read: Callable[[Path], Iterable[tuple[str, Row]]] | None = None) -> Rows:
    """Read a file with the function `read`, or in the format of its suffix. An unknown suffix means JSON lines."""
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        return list((read or readers.get(path.suffix.lower(), _json_lines))(path))
    except FileNotFoundError as error:
        raise _no_file(setting, path) from error
    except UnicodeDecodeError as error:
        raise UserError(f"task.{setting}: {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"task.{setting}: cannot read {path}: {error.strerror or first_line(error)}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) for each line of a JSON lines file that is not blank. Lines are counted from 1."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{where} is not a JSON object ({first_line(error)}); every line must be one"
                    ) from error
                if not isinstance(row, dict):
                    raise UserError(f"{where} is a {type(row).__name__}, not a JSON object; every line must be one")
                yield where, row


def _json_rows(path: Path) -> Rows:
    """Return the rows of a file that contains one JSON list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({first_line(error)}); a file with one object per line must be named .jsonl"
        ) from error
    if not isinstance(table, list):
        raise UserError(f"{path} contains a {type(table).__name__}; it must contain a list of objects")
    return table_rows(str(path), table)


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) for each row of a CSV file with a header line. All values are text."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    count = len(reader.fieldnames or ())
                    raise UserError(f"{where} does not have the same number of cells as the header, which has {count}")
                yield where, row
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}") from error


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet
    from pyarrow import ArrowInvalid

    try:
        table = pyarrow.parquet.read_table(path)
    except ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from error
    return table_rows(str(path), table.to_pylist())


def _from_disk(setting: str, source: str, split: str) -> Any:
    """Load a table from a directory saved by `datasets`. If the directory has several splits, use `split`."""
    table = _datasets(setting).load_from_disk(source)
    return _split_of(setting, source, table, split) if isinstance(table, Mapping) else table


def _from_hub(setting: str, source: str, default_split: str) -> Any:
    """Load a table from the Hugging Face Hub. `read_rows` describes the arguments."""
    name, local = _hub_name(setting, source)
    path, _, split = source.partition(":")
    subset = path.split("/")[2:]
    library = _datasets(setting)
    try:
        with without_requests() if local else contextlib.nullcontext():
            return library.load_dataset(name, *subset, split=split or default_split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"task.{setting}: {source!r} is not a file and cannot be loaded from the Hugging Face Hub: "
            f"{first_line(error)}"
        ) from error


def _split_of(setting: str, source: str, tables: Mapping[str, Any], split: str) -> Any:
    """Return the table of a split. Raise UserError if `tables`, a mapping from splits to tables, does not have it."""
    if split not in tables:
        raise UserError(f"task.{setting}: {source} has no split {split!r}; it has: {', '.join(tables)}")
    return tables[split]


def _datasets(setting: str) -> Any:
    """Import and return the module `datasets`. Raise UserError if it is not installed."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _no_datasets(setting) from error
    datasets.disable_progress_bars()
    return datasets


def _no_datasets(setting: str) -> UserError:
    return UserError(
        f"task.{setting} needs the library `datasets`, which is not installed; install it with "
        "pip install 'vineppo[data]', or use a .jsonl, .csv or .parquet file"
    )


def as_sequence(table: Any) -> Sequence[Any]:
    """Return a table as an object with a length. A table without a length, such as a generator, is read to a list."""
    return table if hasattr(table, "__len__") else list(table)
