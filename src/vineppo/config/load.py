"""From recipes and dotted overrides to a checked configuration, and one clear line for every mistake on the way.

A recipe is a YAML file of `Config`'s sections, with two more keys at the top: `description` (text) and `overrides`
(settings of one algorithm, applied when that algorithm is chosen):

```
description: What it is for.
algorithm: vineppo
learner: {lr: 1.0e-4}
overrides:
  ppo: {learner.lr: 5.0e-5, ppo.value_lr: 1.0e-3}
```

What stands later in this list wins: defaults, recipe, the recipe's overrides of the chosen algorithm, command line.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.resources
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from vineppo.config.schema import ALGORITHMS, Config
from vineppo.types import UserError

T = TypeVar("T")
COMMAND_LINE = "on the command line"
_EXTRAS = ("description", "overrides")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")

# --- what settings there are ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One field of a configuration, addressed by its dotted key."""

    key: str
    """For example `learner.kl.coefficient`."""
    type: Any
    """The field's type: str, int, float, bool, a Literal, a tuple of those, or a dict of anything."""
    default: Any
    doc: str
    """The text under the field."""


@dataclass(frozen=True)
class Section:
    """A nested dataclass of a configuration, addressed by its dotted key; the whole has the key ``."""

    key: str
    doc: str
    """The first line of its docstring, without the full stop."""


@cache
def settings_of(cls: type) -> dict[str, Setting]:
    """Every setting of a nested config dataclass by dotted key, in the order of the fields."""
    return {setting.key: setting for setting in _walk(cls, "") if isinstance(setting, Setting)}


@cache
def sections_of(cls: type) -> dict[str, Section]:
    """Every nested dataclass by dotted key, the whole itself (key ``) first."""
    return {section.key: section for section in _walk(cls, "") if isinstance(section, Section)}


def _walk(cls: Any, prefix: str) -> Iterable[Setting | Section]:
    yield Section(prefix.rstrip("."), (inspect.getdoc(cls) or "").partition("\n")[0].rstrip("."))
    types, docs = typing.get_type_hints(cls), _field_docs(cls.__module__).get(cls.__name__, {})
    for field in dataclasses.fields(cls):
        kind, key = types[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, key + ".")
        else:
            makes = field.default_factory
            default = field.default if makes is dataclasses.MISSING else makes()
            yield Setting(key, kind, default, docs.get(field.name, ""))


@cache
def _field_docs(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the text under the field; Python keeps it in the source only."""
    docs: dict[str, dict[str, str]] = {}
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # installed without sources: --help then has no texts
        return docs
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                text = ast.literal_eval(below.value) if isinstance(below.value, ast.Constant) else ""
                docs.setdefault(node.name, {})[field.target.id] = " ".join(str(text).split())
    return docs


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known dotted keys that `name` most likely means, best first; none where nothing is like it.

    A part of a key counts as well as the whole (`lr` is `learner.lr`), and so do initials (`learning_rate`). Several
    are given where they fit equally (`num_problems`).
    """
    head, _, last = name.rpartition(".")
    initials = "".join(word[:1] for word in re.split(r"[_-]+", last))
    spellings = [name, *([f"{head}.{initials}" if head else initials] if len(initials) > 1 else [])]
    scores = {
        key: max(0.9 * (_likeness(last, key) == 1), *(_likeness(spelling, key) for spelling in spellings))
        for key in known
    }
    best = max(scores.values(), default=0.0)
    return [key for key, score in scores.items() if score >= max(best - 1e-9, 0.6)][:limit]


def _likeness(name: str, key: str) -> float:
    """1 for the same letters, 0.95 for a beginning; compares with the key and its endings (a.b.c, b.c, c)."""
    parts, wanted = key.split("."), _normal(name)
    endings = [_normal(".".join(parts[i:])) for i in range(len(parts))]
    begins = len(wanted) > 2 and any(ending.startswith(wanted) for ending in endings)
    ratios = [difflib.SequenceMatcher(None, wanted, ending).ratio() for ending in endings]
    return max(*ratios, 0.95 * begins)


def _normal(name: str) -> str:
    return re.sub(r"[._-]+", "_", name.lower().strip("-"))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean learner.lr?`, or nothing where no known name is near."""
    names = nearest(name, known)
    return f"did you mean {' or '.join(prefix + near for near in names)}?" if names else ""


# --- values -----------------------------------------------------------------------------------------------------------


def convert(key: str, kind: Any, value: Any, where: str) -> Any:
    """A value of YAML or of the command line as the type that a setting has.

    Numbers may be written in any form (`3`, `3.0`, `1e3`, and as text, since YAML takes `1e-4` for text) as long as the
    value fits: 3.0 is an integer, 3.5 is not. Truth is `true` or `false` (also yes, no, on, off). A tuple is a YAML
    list, or text: `a,b` or `[a, b]`, in which YAML's quotes keep spaces and commas.

    Raises:
        UserError: naming the key, the value, where it stands, and what is allowed.
    """
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(key, kind, value, where)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return value if value in choices else _refuse(key, value, where, f"allowed: {', '.join(map(str, choices))}")
    if typing.get_origin(kind) is dict:
        return _convert_mapping(key, value, where)
    if kind is bool:
        return _convert_bool(key, value, where)
    if kind is int or kind is float:
        return _convert_number(key, kind, value, where)
    if isinstance(value, str):
        return value
    return _refuse(key, value, where, "it must be text; put it in quotes")


def _convert_bool(key: str, value: Any, where: str) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if isinstance(value, bool) or word in _TRUE or word in _FALSE:
        return word is True or word in _TRUE
    _refuse(key, value, where, "it must be true or false")


def _convert_number(key: str, kind: Any, value: Any, where: str) -> int | float:
    allowed = "it must be a whole number" if kind is int else "it must be a number"
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        if kind is int and not isinstance(value, float) and re.fullmatch(r"\s*[+-]?\d+\s*", str(value)):
            return int(value)  # not through float, which rounds large seeds
        number = float(value)
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            raise ValueError
    except (ValueError, OverflowError):
        _refuse(key, value, where, allowed)
    return int(number) if kind is int else number


def _convert_mapping(key: str, value: Any, where: str) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        mapping = None
    if not isinstance(mapping, Mapping):
        _refuse(key, value, where, "it must map names to values, such as {a: 1, b: [2, 3]}")
    return {str(name): item for name, item in mapping.items()}


def _convert_tuple(key: str, kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    inner = typing.get_args(kind)
    items = _list_of_text(key, value, where) if isinstance(value, str) else value
    if not isinstance(items, Sequence):
        _refuse(key, value, where, "it must be a list such as [a, b]")
    if inner[-1] is not Ellipsis and len(items) != len(inner):
        _refuse(key, value, where, f"it must have {len(inner)} values")
    kinds = [inner[0]] * len(items) if inner[-1] is Ellipsis else inner
    return tuple(convert(key, one, item, where) for one, item in zip(kinds, items, strict=True))


def _list_of_text(key: str, text: str, where: str) -> Sequence[Any]:
    if text.strip(" ").startswith("["):
        try:
            items = yaml.safe_load(text)
        except yaml.YAMLError:
            items = None
        if isinstance(items, list):
            return items
        _refuse(key, text, where, 'it must be a list such as [a, b], or ["[a"] for a text that begins with a bracket')
    items = [item.strip(" ") for item in text.split(",")] if text else []
    return items if all(items) else _refuse(key, text, where, 'an item is empty; write ["a", ","] to keep such items')


def _refuse(key: str, value: Any, where: str, allowed: str) -> NoReturn:
    if value is None:
        raise UserError(f"{key} has no value {where}; give one, or leave the key out to keep the default")
    raise UserError(f"{key} is {value!r} {where}; {allowed}")


# --- from dictionaries to a config ------------------------------------------------------------------------------------


def config_from_dict(cls: type[T], data: Mapping[str, Any], where: str = "in the configuration") -> T:
    """A nested config dataclass from nested dictionaries, dotted keys, or both; what is left out keeps its default.

    Args:
        where: named in messages, for example "in runs/a/config.yaml".
    Raises:
        UserError: for an unknown key (with the nearest known one), a wrong type, or a value that cannot work.
    """
    return config_from_layers(cls, [(data, where)])


def config_from_layers(cls: type[T], layers: Iterable[tuple[Mapping[str, Any], str]]) -> T:
    """`config_from_dict` of several (data, where), in which later ones win."""
    values: dict[str, Any] = {}
    for data, where in layers:
        values.update(_flat_values(cls, data, where))
    return _build(cls, values)


def build_config(
    recipe: Mapping[str, Any],
    algorithm: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str = "",
) -> Config:
    """The resolved configuration of a training run.

    Args:
        recipe: what `load_recipe` gives: Config's keys, `description` and `overrides`.
        algorithm: the algorithm to train with; None takes that of `overrides`, else the recipe's.
        overrides: dotted key -> value, as on the command line; values may be text.
        name: the recipe's name, for messages.
    Raises:
        UserError: for unknown keys anywhere in the three, wrong types, and values that cannot work.
    """
    where = f"in recipe {name}" if name else "in the recipe"
    base = _flat_values(Config, {k: v for k, v in recipe.items() if k not in _EXTRAS}, where)
    line = _flat_values(Config, overrides or {}, COMMAND_LINE)
    if algorithm is not None:
        line["algorithm"] = convert("algorithm", settings_of(Config)["algorithm"].type, algorithm, COMMAND_LINE)
    tuned = _tuned(recipe, where)
    chosen = {**base, **line}.get("algorithm", Config.algorithm)
    return _build(Config, {**base, **tuned.get(chosen, {}), **line})


def _tuned(recipe: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The recipe's overrides by algorithm, all of them checked, chosen or not."""
    sections = recipe.get("overrides")
    sections = {} if sections is None else sections
    if not isinstance(sections, Mapping):
        _refuse("overrides", sections, where, "it must map algorithms to settings")
    tuned = {}
    for algorithm, data in sections.items():
        if algorithm not in ALGORITHMS:
            hint = did_you_mean(str(algorithm), ALGORITHMS)
            allowed = f"allowed: {', '.join(ALGORITHMS)}"
            raise UserError(f"unknown algorithm {algorithm!r} under overrides {where}; {hint or allowed}")
        here = f"under overrides.{algorithm} {where}"
        if not isinstance(data, Mapping | None):
            _refuse(f"overrides.{algorithm}", data, where, "it must map dotted keys to values")
        tuned[algorithm] = _flat_values(Config, data or {}, here)
        if "algorithm" in tuned[algorithm]:
            raise UserError(f"algorithm stands {here}; overrides cannot change the algorithm they belong to")
    return tuned


def _flat_values(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted key -> converted value. Refuses unknown keys and keys that are given twice."""
    settings, values = settings_of(cls), dict[str, Any]()
    for key, value in _flatten(data, "", set(settings)):
        if key in sections_of(cls):
            if value is not None:  # `learner:` with nothing under it changes nothing
                inside = [known for known in settings if known.startswith(key + ".")]
                raise UserError(f"{key} is {value!r} {where}; it is a section, give keys of it such as {inside[0]}")
        elif key not in settings:
            raise UserError(_unknown_key(cls, key, where))
        elif key in values:
            raise UserError(f"{key} is given twice {where}; leave one out")
        else:
            values[key] = convert(key, settings[key].type, value, where)
    return values


def _flatten(data: Mapping[Any, Any], prefix: str, known: set[str]) -> Iterable[tuple[str, Any]]:
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _flatten(value, key + ".", known) if value else [(key, None)]
        else:
            yield key, value


def _unknown_key(cls: type, key: str, where: str) -> str:
    tops = dict.fromkeys(known.split(".")[0] for known in settings_of(cls))
    hint = suggestion(cls, key) or f"known at the top: {', '.join(tops)}"
    return f"unknown key {key} {where}; {hint}"


def suggestion(cls: type, name: str, *, others: Iterable[str] = (), prefix: str = "") -> str:
    """`did you mean learner.lr?` for a name that is no key of `cls`; a letter of the texts is known too (`K: ...`)."""
    letters = {setting.doc[0]: key for key, setting in settings_of(cls).items() if setting.doc[1:3] == ": "}
    letter = letters.get(name.split(".")[-1].upper())
    return f"did you mean {prefix}{letter}?" if letter else did_you_mean(name, [*settings_of(cls), *others], prefix)


def _build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    types, arguments = typing.get_type_hints(cls), dict[str, Any]()
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key, kind = prefix + field.name, types[field.name]
        if dataclasses.is_dataclass(kind):
            arguments[field.name] = _build(kind, values, key + ".")  # type: ignore[arg-type]
        elif key in values:
            arguments[field.name] = values[key]
    return cls(**arguments)


def diff_configs(a: Any, b: Any) -> list[str]:
    """What differs between two configs of the same class, a line each: `learner.lr: 0.0001 -> 0.0002`."""
    cls: type = type(a)
    return [f"{key}: {_at(a, key)} -> {_at(b, key)}" for key in settings_of(cls) if _at(a, key) != _at(b, key)]


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain dicts, lists and scalars: what config.yaml holds."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the recipes inside the package, `folder/name` for those in a folder."""
    root = Path(str(importlib.resources.files("vineppo") / "recipes"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def is_sft_recipe(name: str) -> bool:
    """Whether a recipe of the package is one of `vineppo sft`."""
    return name.startswith("sft-") or name.endswith("-sft")


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """The content of a recipe: one of the package by its name, or else a YAML file by its path.

    Raises:
        UserError: when there is neither, or the file cannot be read as YAML with keys.
    """
    name, path, names = str(name_or_path), Path(name_or_path), recipe_names()
    if name in names:
        text = (importlib.resources.files("vineppo") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        return _parse_recipe(text, name)
    if not os.path.isfile(path):  # which, unlike Path's, never raises, whatever the text
        what = "is a directory" if os.path.isdir(path) else "is neither a recipe of the package nor a file"
        hint = did_you_mean(name, names)
        raise UserError(f"recipe {name!r} {what}; {hint + ' ' if hint else ''}recipes: {', '.join(names)}")
    try:
        return _parse_recipe(path.read_text(encoding="utf-8"), name)
    except UnicodeDecodeError:
        raise UserError(f"recipe {name} is not UTF-8 text; give a YAML file") from None
    except OSError as error:
        raise UserError(f"recipe {name} cannot be read ({error.strerror})") from None


def recipe_stem(name_or_path: str | Path) -> str:
    """The name a recipe gives to its runs: `judgement`, or `mine` for conf/mine.yaml."""
    return Path(name_or_path).stem


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice is a mistake: YAML itself would keep the last one silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse repeated keys; merge keys (`<<`) may be overridden."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _parse_recipe(text: str, name: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "special characters are not allowed"
        raise UserError(f"recipe {name} is not valid YAML{line}: {reason}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"recipe {name} holds a {type(data).__name__}; it must hold keys such as `learner:`")
    if not isinstance(data.get("description", ""), str):
        _refuse("description", data["description"], f"in recipe {name}", "it must be text")
    return data
