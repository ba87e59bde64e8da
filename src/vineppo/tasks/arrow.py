"""Convert rows of Arrow tables (Parquet files, data sets of the library `datasets`) to the values of other tables.

Arrow stores a column in one type, which differs from JSON in three ways: 16- and 32-bit floats print with digits that
the number never had (0.1 is 0.10000000149011612), structs of different keys get all keys with null for the missing
ones, and maps are lists of pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from vineppo.tasks.cells import InexactFloat, exact_until

Convert = Callable[[Any], Any]
"""Function that converts a value of a column."""


class ArrowRow(dict[str, Any]):
    """A row of an Arrow table. A None inside a nested value may be a key that the row did not have."""


def without_nulls(value: Any) -> Any:
    """Remove the entries of mappings whose value is None, at any depth of a value. Lists keep their None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def converter(kind: Any) -> Convert | None:
    """Return the function that converts the values of a column, or None if they need no conversion.

    The function turns floats of 16 or 32 bits into the shortest decimal number that has their value, and maps into
    dictionaries, at any depth. Values of another type than the column's (a transform of `datasets` can return any) stay
    unchanged.

    Args:
        kind: the `pyarrow.DataType` of the column.
    """
    import numpy as np
    from pyarrow import types

    if types.is_float16(kind) or types.is_float32(kind):
        return partial(_shortest, np.float16 if types.is_float16(kind) else np.float32)
    if types.is_struct(kind):
        fields = {kind.field(i).name: converter(kind.field(i).type) for i in range(kind.num_fields)}
        found = {name: convert for name, convert in fields.items() if convert}
        return partial(_struct, found) if found else None
    if types.is_map(kind):
        return partial(_map, converter(kind.item_type))
    if (storage := getattr(kind, "storage_type", None)) is not None:
        return converter(storage)
    # Lists of every kind, and dictionaries, whose values are stored once.
    inner = converter(kind.value_type) if hasattr(kind, "value_type") else None
    return partial(_items, inner) if inner else None


def _shortest(narrow: Any, value: Any) -> Any:
    """Return the shortest decimal number that `narrow`, a float type of NumPy, reads as `value`, as a float."""
    if type(value) is not float or float(narrow(value)) != value:
        return value
    return InexactFloat(value) if abs(value) >= exact_until(narrow) else float(str(narrow(value)))


def _struct(converters: Mapping[str, Convert], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: converters[name](item) if name in converters else item for name, item in value.items()}


def _map(convert: Convert | None, value: Any) -> Any:
    """Return a map, a list of pairs, as a dictionary. Raises ValueError if a key occurs twice: one would be lost."""
    if not isinstance(value, list):
        return value
    keys = Counter(key for key, _ in value)
    if len(keys) < len(value):
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r} occurs more than once")
    return {key: convert(item) if convert else item for key, item in value}


def _items(convert: Convert, value: Any) -> Any:
    return [convert(item) for item in value] if isinstance(value, list) else convert(value)
