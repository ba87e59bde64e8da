"""Load recipes, that is, YAML files with the settings of a training run, from the package or from a path.

A recipe for `vineppo sft` has the keys of `SFTConfig`. A recipe for reinforcement learning has the keys of `Config`,
and a section for each algorithm whose settings it changes. It can have three more keys: `description` is a text,
`overrides` maps the name of an algorithm to settings that are applied only if this algorithm is selected, and `offline`
maps a method of `vineppo offline` to settings (keys of `OfflineConfig`) for this method. An example:

```
description: What this recipe is for.
algorithm: vineppo
learner: {lr: 1.0e-4}
overrides:
  ppo: {learner.lr: 5.0e-5, ppo.value_lr: 1.0e-3}
offline:
  restem: {restem.rounds: 5, rollouts.group_size: 16}
```
"""

from __future__ import annotations

import importlib.resources
import os
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from vineppo.config.messages import did_you_mean
from vineppo.types import UserError


def recipe_names() -> list[str]:
    """Return the sorted names of the recipes in the package. A recipe in a subfolder is named `folder/name`."""
    root = Path(str(importlib.resources.files("vineppo") / "recipes"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def _by_folder(names: list[str]) -> list[str]:
    """Return the names without a folder, and one entry such as `paper/... (20)` for each folder of recipes."""
    folders = Counter(name.partition("/")[0] for name in names if "/" in name)
    return [name for name in names if "/" not in name] + [f"{name}/... ({n})" for name, n in folders.items()]


def is_sft_recipe(name: str) -> bool:
    """Return whether a recipe is for `vineppo sft`: its name starts with `sft-` or ends with `-sft`."""
    return name.startswith("sft-") or name.endswith("-sft")


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """Load a recipe from the package by its name, or from a YAML file by its path.

    Returns:
        The keys and values of the recipe, as nested dictionaries; {} for an empty file.
    Raises:
        UserError: if the recipe or file does not exist, cannot be read, is not a YAML mapping, or has a description
            that is not text.
    """
    name, path, names = str(name_or_path), Path(name_or_path), recipe_names()
    if name in names:
        text = (importlib.resources.files("vineppo") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        return _parse_recipe(text, name)
    if not os.path.isfile(path):  # For a name that is too long, Path.is_file raises; os.path.isfile returns False.
        what = "is a directory" if os.path.isdir(path) else "is neither a recipe of the package nor a file"
        if path.suffix in (".yaml", ".yml") and not os.path.isdir(path):
            what = f"does not exist (a relative path starts at {Path.cwd()})"
        hint = did_you_mean(name, names) or f"recipes: {', '.join(_by_folder(names))}"
        raise UserError(f"recipe {name!r} {what}; {hint}")
    try:
        return _parse_recipe(path.read_text(encoding="utf-8"), name)
    except UnicodeDecodeError:
        raise UserError(f"recipe {name} is not UTF-8 text; a recipe must be a YAML file") from None
    except OSError as error:
        raise UserError(f"recipe {name} cannot be read ({error.strerror})") from None


def recipe_stem(name_or_path: str | Path) -> str:
    """Return the last part of a recipe's name or path without the suffix, for example `mine` for `conf/mine.yaml`.

    The default name of the run directory starts with this text.
    """
    return Path(name_or_path).stem


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that rejects repeated keys. PyYAML alone would silently use the last value of such a key."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Raise ConstructorError for a repeated key, except for the merge key `<<`."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is repeated", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, what: str) -> Any:
    """Return the content of a YAML text in which no key is repeated.

    Args:
        what: the file in error messages, such as `recipe mine.yaml`.
    Raises:
        UserError: if the text is not valid YAML, or a key is repeated. The message names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "the file contains control characters, which are not allowed"
        raise UserError(f"{what} is not valid YAML{line}: {reason}") from None


def _parse_recipe(text: str, name: str) -> dict[str, Any]:
    """Return the keys and values in the text of a recipe.

    Args:
        name: name or path of the recipe in error messages.
    Raises:
        UserError: if the text is not a YAML mapping, or the description is not text.
    """
    data = parse_yaml(text, f"recipe {name}")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"recipe {name} contains a {type(data).__name__}; it must contain keys such as `learner:`")
    if not isinstance(data.get("description", ""), str):
        raise UserError(f"description is {data['description']!r} in recipe {name}; it must be text")
    return data
