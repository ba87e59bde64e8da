"""Loads recipes: YAML files with the settings of a training run, from the package by name or from a path.

A recipe has the keys of `Config` and two more at the top level: `description` (text) and `overrides` (settings per
algorithm, applied if that algorithm is selected):

```
description: What this recipe is for.
algorithm: vineppo
learner: {lr: 1.0e-4}
overrides:
  ppo: {learner.lr: 5.0e-5, ppo.value_lr: 1.0e-3}
```
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import Any

import yaml

from vineppo.config.messages import did_you_mean
from vineppo.types import UserError


def recipe_names() -> list[str]:
    """Names of the recipes in the package; `folder/name` for a recipe in a folder."""
    root = Path(str(importlib.resources.files("vineppo") / "recipes"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def is_sft_recipe(name: str) -> bool:
    """Whether a recipe in the package is for `vineppo sft`."""
    return name.startswith("sft-") or name.endswith("-sft")


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """Load a recipe of the package by name, or a YAML file by path.

    Raises:
        UserError: if the recipe or file does not exist, cannot be read, or is not a YAML mapping.
    """
    name, path, names = str(name_or_path), Path(name_or_path), recipe_names()
    if name in names:
        text = (importlib.resources.files("vineppo") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        return _parse_recipe(text, name)
    if not os.path.isfile(path):  # unlike Path.is_file, os.path.isfile never raises
        what = "is a directory" if os.path.isdir(path) else "is neither a recipe of the package nor a file"
        hint = did_you_mean(name, names)
        raise UserError(f"recipe {name!r} {what}; {hint + ' ' if hint else ''}recipes: {', '.join(names)}")
    try:
        return _parse_recipe(path.read_text(encoding="utf-8"), name)
    except UnicodeDecodeError:
        raise UserError(f"recipe {name} is not UTF-8 text; a recipe must be a YAML file") from None
    except OSError as error:
        raise UserError(f"recipe {name} cannot be read ({error.strerror})") from None


def recipe_stem(name_or_path: str | Path) -> str:
    """The name of a recipe in run directories: `judgement`, or `mine` for conf/mine.yaml."""
    return Path(name_or_path).stem


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that rejects repeated keys; PyYAML silently keeps the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Raise ConstructorError for repeated keys; merge keys (`<<`) may be repeated and overridden."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is repeated", key.start_mark)
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
        raise UserError(f"recipe {name} contains a {type(data).__name__}; it must contain keys such as `learner:`")
    if not isinstance(data.get("description", ""), str):
        raise UserError(f"description is {data['description']!r} in recipe {name}; it must be text")
    return data
