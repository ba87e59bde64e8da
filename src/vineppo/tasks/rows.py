"""Read tables of problems from JSON lines, JSON, CSV or Parquet files, or with the library `datasets`.

Every row is returned together with a text that tells its location in error messages, such as `train.jsonl line 3`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from vineppo.config.hub import is_repository_name, needs_local_copy, without_requests
from vineppo.objects import first_line
from vineppo.tasks.arrow import ArrowRow, converter
from vineppo.tasks.cells import written_float
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
        source: a path ending in .jsonl, .json, .csv (also with .gz behind it) or .parquet; a directory written by
            `save_to_disk` of `datasets`; or a Hub id, `org/name` or `org/name/subset`, optionally followed by `:split`.
        default_split: split to read from a directory with several splits, or from the Hub if `source` names no split.
    Raises:
        UserError: if the rows cannot be read; the message names the file, the row and what is required.
    """
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return table_rows(source, _from_disk(setting, source, default_split))
    if _kind(path) in _KINDS or path.is_file() or path.is_dir():
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
    if path.is_file() and _kind(path) not in (".json", ".parquet"):
        rows = _from_file(setting, path, limit=1)
        if not rows:
            raise empty_table(f"task.{setting}: {source}")
        return rows[0][1]
    if _kind(path) in _KINDS or path.is_file() or path.is_dir():
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
    schema = getattr(getattr(table, "features", None), "arrow_schema", None)
    if schema is None:
        return rows
    converters = {field.name: convert for field in schema if (convert := converter(field.type))}
    return [
        (where, ArrowRow({key: converters[key](value) if key in converters else value for key, value in row.items()}))
        for where, row in rows
    ]


_LINE_END = "\n"
_MAGIC = {
    b"PAR1": "is a Parquet file; name it .parquet",
    b"\x1f\x8b": "is compressed by gzip; add .gz to its name",
    b"PK\x03\x04": "is a zip archive or an Excel sheet; unpack it, or save it as .csv",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}
"""First bytes of files that are often given a wrong name."""


def _kind(path: Path) -> str:
    """Return the suffix that says how a file is read, without `.gz`."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def _from_file(setting: str, path: Path, limit: int | None = None) -> Rows:
    """Read a file in the format of its suffix. `.ndjson`, `.txt` and files without a suffix are read as JSON lines.

    Args:
        limit: maximum number of rows to read; None means all.
    """
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    readers |= dict.fromkeys((".jsonl", ".ndjson", ".txt", ""), _json_lines)
    try:
        if not path.is_dir():
            _check_name(setting, path, readers)
        return list(islice(readers.get(_kind(path), _json_lines)(path), limit))
    except FileNotFoundError as error:
        raise _no_file(setting, path) from error
    except UnicodeDecodeError as error:
        raise UserError(f"task.{setting}: {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"task.{setting}: cannot read {path}: {reason}") from error


def _check_name(setting: str, path: Path, readers: Mapping[str, Any]) -> None:
    """Raise UserError if the name of a file does not fit its content, or names a form that is not read."""
    with path.open("rb") as file:
        start = file.read(4)
    kind, compressed = _kind(path), path.suffix.lower() == ".gz"
    found = next((text for magic, text in _MAGIC.items() if start.startswith(magic)), "")
    expected = "Parquet" if kind == ".parquet" else "gzip" if compressed else ""
    if found and not (expected and expected in found):
        raise UserError(f"task.{setting}: {path} {found}")
    if kind not in readers or (compressed and kind == ".parquet"):
        raise UserError(f"task.{setting}: {path} ends in {path.suffix}; allowed: {', '.join(_KINDS)} files")


def _open(path: Path, newline: str | None = None) -> IO[str]:
    """Open a text file, compressed or not. A byte order mark is skipped."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary. Raises ValueError if a key occurs twice: one value would be lost."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the key {Counter(names).most_common(1)[0][0]!r} occurs more than once")
    return dict(pairs)


def _parsed(where: str, text: str, message: str) -> Any:
    """Parse JSON without losing digits or keys.

    Args:
        where: location of the text for error messages.
        message: what is said of text that is not JSON, with {} in the place of the error.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_float=written_float)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} {message.format(first_line(error))}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) for each line of a JSON lines file that is not blank. Lines are counted from 1."""
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path} line {number}"
                row = _parsed(where, line, "is not a JSON object ({}); every line must be one")
                if not isinstance(row, dict):
                    raise UserError(f"{where} is a {type(row).__name__}, not a JSON object; every line must be one")
                yield where, row


def _json_rows(path: Path) -> Rows:
    """Return the rows of a file that contains one JSON list of objects."""
    with _open(path) as file:
        text = file.read()
    message = "is not valid JSON ({}); a file with one object per line must be named .jsonl"
    table = _parsed(str(path), text, message) if text.strip() else []
    if not isinstance(table, list):
        raise UserError(
            f"{path} contains a {type(table).__name__}; it must contain a list of objects, one for each row (pandas: "
            "to_json with orient='records')"
        )
    return table_rows(str(path), table)


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) for each row of a CSV file with a header line. All values are text."""
    with _open(path, newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        last = 0
        try:
            for cells in reader:
                last = reader.line_num
                where = f"{path} line {last - sum(value.count(_LINE_END) for value in cells)}"
                if not header:
                    header = _csv_header(path, cells)
                elif cells:
                    yield where, _csv_row(where, header, cells)
        except csv.Error as error:
            raise UserError(f"{path} line {last + 1} is not valid CSV: {error}") from error


def _csv_header(path: Path, cells: list[str]) -> list[str]:
    """Return the names of the columns, without spaces around them."""
    header = [name.strip() for name in cells]
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"{path} line 1: column {repeated[0]!r} occurs more than once; every column needs its own name")
    if len(header) == 1 and (separator := re.search(r"[;\t|]", header[0])):
        raise UserError(f"{path} line 1: columns are separated by {separator[0]!r}; allowed: commas")
    return header


def _csv_row(where: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        raise UserError(f"{where} does not have the same number of cells as the header, which has {len(header)}")
    for name, value in zip(header, cells, strict=True):
        if re.fullmatch(r'\s+".*"\s*', value, re.DOTALL):
            # The quotes would become a part of the value.
            raise UserError(f"{where}: column {name!r} has a space before a quotation mark; remove the space")
    return dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        # `read_table` would add columns for folders named like `level=3`.
        table = pyarrow.parquet.ParquetFile(path).read()
    except ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {first_line(error)}") from error
    if repeated := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise UserError(f"{path}: column {repeated[0]!r} occurs more than once; every column needs its own name")
    columns = {name: _arrow_column(path, name, table[name]) for name in table.column_names}
    values = zip(*columns.values(), strict=True)
    return table_rows(str(path), [ArrowRow(zip(columns, row, strict=True)) for row in values])


def _arrow_column(path: Path, name: str, column: Any) -> list[Any]:
    """Return the values of a column of a Parquet file. Raise UserError if Python has no values for them."""
    from pyarrow import ArrowException

    try:
        values: list[Any] = column.to_pylist()
        convert = converter(column.type)
        return [convert(value) for value in values] if convert else values
    except (ValueError, KeyError, OverflowError, ArrowException) as error:
        raise UserError(
            f"{path}: column {name!r} cannot be read ({first_line(error)}); remove it, or write it in another type"
        ) from error


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
