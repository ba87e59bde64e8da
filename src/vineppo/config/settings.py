"""Define the base class of all settings: a pydantic model that converts text and reports one error in one line."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from vineppo.types import UserError

_LIST = 'it must be a list such as [a, b]; put items with brackets or commas in quotes, such as ["[a]", "b,c"]'
_ALLOWED: dict[Any, str] = {
    int: "it must be a whole number",
    float: "it must be a number",
    bool: "it must be true or false",
    str: "it must be text; put it in quotes",
    dict: "it must map names to values, such as {a: 1, b: [2, 3]}",
    list: _LIST,
    tuple: _LIST,
}


class SettingError(UserError):
    """Error for a value that is not allowed, or for a missing value of a setting that has no default."""

    def __init__(self, owner: str, name: str, problem: str, allowed: str) -> None:
        super().__init__(f"{owner}.{name} {problem}; {allowed}")
        self.name, self.problem, self.allowed = name, problem, allowed


class Settings(BaseModel):
    """Base class of immutable settings. The docstring under a field is the documentation of the field.

    Values may be written as on the command line or in YAML. A number may be a number or a text (`3`, `3.0`, `"1e-4"`);
    3.5 is not an integer, and true is not a number. A boolean may be a boolean or one of the texts `true`, `yes`, `on`,
    `false`, `no`, `off`. A list may be a list or a text such as `a,b` or `[a, b]`.

    Raises:
        UserError: for a wrong type, a number out of range, an unknown field, a missing value of a field that has no
            default, or a combination that `check` rejects.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _first_error(type(self), error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: Any, info: ValidationInfo) -> Any:
        return from_text(cls.model_fields[str(info.field_name)].annotation, value)

    @model_validator(mode="after")
    def _checked(self) -> Settings:
        self.check()
        return self

    def check(self) -> None:
        """Raise UserError for combinations of values that are not allowed. Subclasses override this method."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` if the condition is false."""
    if not condition:
        raise UserError(message)


def is_section(annotation: Any) -> bool:
    """Return whether the type of a field is a subclass of `Settings`."""
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def replace(settings: Any, **changes: Any) -> Any:
    """Return a copy of the settings with some values changed. The copy is checked.

    Raises:
        UserError: for values that are not allowed.
    """
    return type(settings)(**{name: getattr(settings, name) for name in type(settings).model_fields} | changes)


def accepts_none(kind: Any) -> bool:
    """Return whether None is a value of a field of type `kind`, such as `float | None`."""
    return kind is Any or not {None, type(None)}.isdisjoint(typing.get_args(kind))


def from_text(kind: Any, value: Any) -> Any:
    """Convert a value to a form that pydantic accepts for a field of type `kind`.

    Numbers may be text: YAML reads `1e-4` as text, and all values of the command line are text.

    Raises:
        ValueError: if text is not valid YAML or not a number, if a field for a number gets a boolean, or if a field for
            a boolean gets anything else.
    """
    if accepts_none(kind):
        inner = _without_none(kind)
        is_none = value is None or (value in ("null", "none") and inner in (int, float, bool))
        return None if is_none else from_text(inner, value)
    origin = typing.get_origin(kind) or kind
    if origin in (tuple, list) and isinstance(value, str) and not value.strip(" ").startswith("["):
        return [item.strip(" ") or None for item in value.split(",")] if value else []
    if origin in (bool, dict, tuple, list) and isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(_ALLOWED[origin]) from None
    if origin is int and isinstance(value, str) and "e" in value.lower() and float(value).is_integer():
        return int(float(value))  # pydantic does not accept "2e6" for an integer
    if origin in (int, float, bool) and isinstance(value, bool) is not (origin is bool):
        raise ValueError(_ALLOWED[origin])
    if origin in (tuple, list) and isinstance(value, Sequence) and not isinstance(value, str):
        numbers = not {int, float}.isdisjoint(typing.get_args(kind))
        return [
            "true" if numbers and item is True else "false" if numbers and item is False else item for item in value
        ]
    return value


def _without_none(kind: Any) -> Any:
    """Return `X` for `X | None`, and Any for other unions."""
    kinds = [item for item in typing.get_args(kind) if item is not type(None)]
    return kinds[0] if len(kinds) == 1 else Any


def _first_error(cls: type[Settings], error: ValidationError) -> UserError:
    """Convert the first error of a pydantic ValidationError to a UserError with a message of one line."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    name = str(first["loc"][0])
    if name not in cls.model_fields:
        return UserError(f"{cls.__name__} has no field {name!r}; its fields: {', '.join(cls.model_fields)}")
    field = cls.model_fields[name]
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return SettingError(cls.__name__, name, "is not set", _allowed(field, first))
    return SettingError(cls.__name__, name, f"is {first['input']!r}", _allowed(field, first))


def _allowed(field: FieldInfo, error: Mapping[str, Any]) -> str:
    """Return a text that describes the values allowed for a field, after pydantic rejected a value with `error`."""
    annotation = _without_none(field.annotation) if accepts_none(field.annotation) else field.annotation
    kind, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Literal:
        return f"allowed: {', '.join(map(str, inner))}"
    if error["type"].startswith(("greater", "less")):
        return _range(field) or str(error["msg"])
    if kind is tuple and error["type"] in ("missing", "too_long") and ... not in inner:
        return f"it must have {len(inner)} values"
    if kind in (tuple, list) and len(error["loc"]) > 1 and error["input"] is not None:
        kind = inner[0]
    return _ALLOWED.get(kind, str(error["msg"]))


def _range(field: FieldInfo) -> str:
    """Return a text with the bounds of a field, such as `it must be at least 1` or `allowed: at least 0, below 1`.

    The text is empty if the field itself has no bounds, for example because they belong to the items of a list.
    """
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = {key: getattr(item, key) for item in field.metadata for key in words if hasattr(item, key)}
    texts = [f"{words[key]} {bound:g}" for key, bound in bounds.items()]
    if not texts:
        return ""
    return f"allowed: {', '.join(texts)}" if len(texts) > 1 else f"it must be {texts[0]}"
