"""Read tables of problems from JSON lines, JSON, CSV or Parquet files, or with the library `datasets`.

Every row is returned together with a text that tells its location in error messages, such as `train.jsonl line 3`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    if source.startswith((".", "/", "~")) or not 1 <= source.count("/") <= 2:
        raise UserError(
            f"task.{setting}: no such file: {source} (a relative path starts at {Path.cwd()}); allowed: "
            f"{', '.join(_KINDS)} files, a directory saved by datasets, or a Hugging Face Hub id such as org/name"
        )
    return table_rows(source, _from_hub(setting, source, default_split))


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


def _from_file(setting: str, path: Path) -> Rows:
    """Read a file in the format of its suffix. A file with an unknown suffix is read as JSON lines."""
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        return list(readers.get(path.suffix.lower(), _json_lines)(path))
    except FileNotFoundError as error:
        message = f"task.{setting}: no such file: {path} (a relative path starts at {Path.cwd()})"
        raise UserError(message) from error
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
    name, _, split = source.partition(":")
    organisation, repository, *subset = name.split("/")
    split = split or default_split
    try:
        return _datasets(setting).load_dataset(f"{organisation}/{repository}", *subset, split=split)
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
        raise UserError(
            f"task.{setting} needs the library `datasets`, which is not installed; install it with "
            "pip install 'vineppo[data]', or use a .jsonl, .csv or .parquet file"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def as_sequence(table: Any) -> Sequence[Any]:
    """Return a table as an object with a length. A table without a length, such as a generator, is read to a list."""
    return table if hasattr(table, "__len__") else list(table)
