"""Build checked settings from nested or dotted keys. Every error message is one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from vineppo.config.messages import did_you_mean
from vineppo.config.settings import SettingError, Settings, accepts_none, is_section
from vineppo.config.trl_fields import settings_for
from vineppo.types import UserError

T = TypeVar("T", bound=Settings)
COMMAND_LINE = "on the command line"
Layer = tuple[Mapping[str, Any], str]
"""(dictionary from nested or dotted keys to values, its source in error messages, such as "in recipe mine.yaml")."""


@dataclass(frozen=True)
class Setting:
    """One field of a settings class or of one of its sections."""

    key: str
    """The dotted key, for example `learner.kl.coefficient`."""
    type: Any
    default: Any
    """The default value; an empty text if the field has none and must be set."""
    doc: str
    """The docstring of the field."""


@cache
def settings_of(cls: type[Settings]) -> dict[str, Setting]:
    """Return a dictionary from dotted keys to all settings of a class and its sections, in the order of the fields."""
    return {setting.key: setting for setting in _walk(cls, "")}


def _walk(cls: type[Settings], prefix: str) -> Iterator[Setting]:
    for name, field in cls.model_fields.items():
        if is_section(field.annotation):
            yield from _walk(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            doc = " ".join((field.description or "").split())
            default = "" if field.is_required() else field.get_default(call_default_factory=True)
            yield Setting(prefix + name, field.annotation, default, doc)


@cache
def sections_of(cls: type[Settings], prefix: str = "") -> dict[str, str]:
    """Return a dictionary from the dotted key of every section to the first line of the section's docstring.

    The key of `cls` is the empty string.
    """
    titles = {prefix.rstrip("."): (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")}
    for name, field in cls.model_fields.items():
        if is_section(field.annotation):
            titles |= sections_of(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
    return titles


def settings_from_layers(cls: type[T], layers: Iterable[Layer], unused: type[Settings] | None = None) -> T:
    """Build nested settings from several layers.

    Later layers override earlier layers. Missing keys get their default values.

    Args:
        unused: a subclass of `cls` with additional sections, such as those of other algorithms. Keys of the additional
            sections are allowed and ignored.
    Raises:
        UserError: for an unknown key (the message suggests a similar one), a key that occurs twice in a layer, a wrong
            type, or values that are not allowed.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for data, where in layers:
        layer_values = flat_values(unused or cls, data, where)
        values |= layer_values
        places |= dict.fromkeys(layer_values, where)
    return _build(cls, values, places, "")


def flat_values(cls: type[Settings], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert nested or dotted keys to a flat dictionary from dotted keys to values. Check that `cls` has the keys.

    Raises:
        UserError: for an unknown key, a section with a value, a key without a value, or a key that occurs twice.
    """
    settings, sections, values = settings_of(cls), sections_of(cls), dict[str, Any]()
    for key, value in _flatten(data, "", settings):
        if key and key in sections:
            if value is not None:  # `learner:` without keys changes nothing
                example = next(known for known in settings if known.startswith(key + "."))
                raise UserError(f"{key} is {value!r} {where}; it is a section, so set its keys, for example {example}")
        elif key not in settings:
            top_level = dict.fromkeys(known.split(".")[0] for known in settings)
            hint = suggestion(cls, key) or f"top-level keys: {', '.join(top_level)}"
            raise UserError(f"unknown key {key} {where}; {hint}")
        elif key in values:
            raise UserError(f"{key} is set twice {where}; remove one of the two values")
        elif value is None and not accepts_none(settings[key].type):
            raise UserError(f"{key} has no value {where}; give a value, or remove the key to use the default")
        else:
            values[key] = value
    return values


def _flatten(data: Mapping[Any, Any], prefix: str, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _flatten(value, key + ".", known) if value else [(key, None)]
        else:
            yield key, value


def _build(cls: type[T], values: Mapping[str, Any], places: Mapping[str, str], prefix: str) -> T:
    arguments: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        key = prefix + name
        if is_section(field.annotation):
            section: Any = field.annotation
            arguments[name] = _build(section, values, places, key + ".")
        elif key in values:
            arguments[name] = values[key]
    try:
        return cls(**arguments)
    except SettingError as error:
        key = prefix + error.name
        raise UserError(f"{key} {error.problem} {places.get(key, '')}".rstrip() + f"; {error.allowed}") from None


def suggestion(cls: type[Settings], name: str, *, others: Iterable[str] = (), prefix: str = "") -> str:
    """Return a hint such as `did you mean learner.lr?` for an unknown key, or an empty string.

    The field names of TRL are recognised too, and the letters of the papers: `K` matches the setting whose docstring
    starts with `K: `.

    Args:
        others: further names that the hint can suggest.
        prefix: text before the suggested name, for example "--".
    """
    settings, others = settings_of(cls), list(others)
    same = next((key for key in settings_for(name.rpartition(".")[2]) if key in settings or key in others), None)
    if same:
        return f"did you mean {prefix}{same}?"
    letters = {setting.doc[0]: key for key, setting in settings.items() if setting.doc[1:3] == ": "}
    letter = letters.get(name.split(".")[-1].upper())
    return f"did you mean {prefix}{letter}?" if letter else did_you_mean(name, [*settings, *others], prefix)


def diff_configs(a: Settings, b: Settings) -> list[str]:
    """Return one text such as `learner.lr: 0.0001 -> 0.0002` for each setting that differs.

    The value of a missing setting is shown as `-`.
    """
    keys = dict.fromkeys([*settings_of(type(a)), *settings_of(type(b))])
    return [
        f"{key}: {_value_at(a, key)} -> {_value_at(b, key)}" for key in keys if _value_at(a, key) != _value_at(b, key)
    ]


def _value_at(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name, "-")
    return settings


def config_to_dict(settings: Settings) -> dict[str, Any]:
    """Convert settings to nested dictionaries, lists and scalars, as written to config.yaml."""
    return settings.model_dump(mode="json")
