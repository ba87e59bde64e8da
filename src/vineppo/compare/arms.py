"""Read the arms of a comparison from the command line or from a YAML file, and sweep settings over values."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vineppo.compare.spec import Arm
from vineppo.config.load import flat_values
from vineppo.config.recipes import parse_yaml
from vineppo.credit import BUILT_IN, find_algorithm
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError

_FORM = "write --arm NAME=algorithm=A,KEY=VALUE,..."


def parse_arm(text: str) -> Arm:
    """Return the arm for a text such as `grpo320=algorithm=grpo,rollouts.num_problems=80,learner.lr=4e-4`.

    A comma ends a value only if a key and an equals sign follow, so a value may be a list: `KEY=a,b`.

    Raises:
        UserError: if the text has another form, a key occurs twice, or the algorithm is missing or unknown.
    """
    name, equals, rest = text.partition("=")
    pairs = [part.partition("=") for part in re.split(r",(?=[A-Za-z_][\w.]*=)", rest)]
    if not equals or not all(key and sign for key, sign, _ in pairs):
        raise UserError(f"--arm is {text!r}; {_FORM}")
    keys = [key.strip() for key, _, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"--arm {name} sets {', '.join(twice)} twice; remove one of the two values")
    values = {key: value for key, (_, _, value) in zip(keys, pairs, strict=True)}
    return _arm(name.strip(), values, None, f"in --arm {name}")


def load_arms(path: str | Path) -> tuple[Arm, ...]:
    """Return the arms in a YAML file: a mapping from names to mappings with settings.

    The settings have nested or dotted keys. `algorithm` is required. `cells` is optional: the number of combinations of
    settings among which those of the arm were chosen.

    Raises:
        UserError: if the file cannot be read, has another form, names an arm or a key twice, or sets an unknown key.
    """
    if not os.path.isfile(path):
        raise UserError(f"--arms {path} is not a file; give a YAML file with a mapping from names to settings")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"--arms {path} is not UTF-8 text; it must be a YAML file that maps names to settings"
        ) from None
    except OSError as error:
        raise UserError(f"--arms {path} cannot be read ({error.strerror})") from None
    content = parse_yaml(text, f"--arms {path}")
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"--arms {path} contains no arms; it must map names to settings, as in grpo: {{algorithm: grpo}}"
        )
    return tuple(_arm_of_entry(str(name), entry, f"in {path}, arm {name}") for name, entry in content.items())


def _arm_of_entry(name: str, entry: Any, where: str) -> Arm:
    if not isinstance(entry, dict):
        raise UserError(f"the arm is {entry!r} {where}; it must be a mapping with algorithm and settings")
    cells = entry.get("cells")
    if cells is not None and (isinstance(cells, bool) or not isinstance(cells, int)):
        raise UserError(f"cells is {cells!r} {where}; it must be a whole number")
    return _arm(name, {key: value for key, value in entry.items() if key != "cells"}, cells, where)


def _arm(name: str, values: Mapping[Any, Any], cells: int | None, where: str) -> Arm:
    """Return an arm from its settings with nested or dotted keys; `algorithm` is one of them."""
    algorithm = values.get("algorithm")
    if not isinstance(algorithm, str) or not algorithm:
        raise UserError(f"algorithm is not set {where}; set it to one of {', '.join(BUILT_IN)}, or module:object")
    try:
        known = config_class_with_all_sections(find_algorithm(algorithm))
    except UserError as error:
        raise UserError(f"{error} ({where})") from None
    flat = flat_values(known, {key: value for key, value in values.items() if key != "algorithm"}, where)
    return Arm(name, algorithm, {key: as_text(value) for key, value in flat.items()}, cells)


def as_text(value: Any) -> str:
    """Return a value of YAML as the text of a command line, where lists and mappings are JSON, which YAML reads."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def parse_values(text: str, option: str) -> tuple[str, tuple[str, ...]]:
    """Return the key and its values for a text such as `vineppo.num_mc_rollouts=1,3,9`.

    Args:
        option: the option, for error messages.
    Raises:
        UserError: if the text has another form, or a value occurs twice.
    """
    key, _, rest = text.partition("=")
    values = tuple(value.strip() for value in rest.split(","))
    if not key.strip() or not all(values):
        raise UserError(f"{option} is {text!r}; write {option} KEY=A,B,C")
    if len(set(values)) < len(values):
        raise UserError(f"{option} is {text!r}, where a value occurs twice; list each value once")
    return key.strip(), values


def swept(arms: Sequence[Arm], sweeps: Iterable[str]) -> tuple[Arm, ...]:
    """Replace every arm to which a swept key applies by one arm per value. Several sweeps give all combinations.

    A key in the section of an algorithm applies to the arms of this algorithm, any other key to all arms.

    Args:
        sweeps: texts such as `vineppo.num_mc_rollouts=1,3,9`.
    Raises:
        UserError: if a text has another form, a key is swept twice, or a key applies to no arm.
    """
    grid = [parse_values(text, "--sweep") for text in sweeps]
    keys = [key for key, _ in grid]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"--sweep has {', '.join(twice)} more than once; give all values of a key in one --sweep")
    sections = {*BUILT_IN, *(arm.method.name for arm in arms)}
    result = list(arms)
    for key, values in grid:
        section = key.split(".")[0]
        chosen = [arm for arm in result if section not in sections or section == arm.method.name]
        if not chosen:
            raise UserError(f"--sweep {key}: no compared arm uses {section}; remove it, or add an arm of {section}")
        shown, given, result = short_name(key, keys), result, []
        for arm in given:
            result += [with_setting(arm, key, value, shown) for value in values] if arm in chosen else [arm]
    return tuple(result)


def short_name(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a dotted key, or the whole key if another one of `keys` has the same last part."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def with_setting(arm: Arm, key: str, value: str, shown: str) -> Arm:
    """Return a copy of an arm with another value of a setting, which the name of the copy shows.

    The copy has no `cells`, because its value was not chosen among others.

    Args:
        shown: the key in the name.
    """
    name = f"{arm.name}-{shown}={value}"
    safe = re.sub(r"[^A-Za-z0-9._=+-]", "_", name)
    return Arm(safe, arm.algorithm, {**arm.overrides, key: value})
