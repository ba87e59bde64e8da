"""Build the configuration of `vineppo offline` from a recipe of `vineppo train` and further settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vineppo.config.load import COMMAND_LINE, Layer, config_to_dict, settings_from_layers
from vineppo.config.messages import did_you_mean
from vineppo.config.offline import METHODS, OfflineConfig
from vineppo.config.settings import replace
from vineppo.training.configure import build_config
from vineppo.types import UserError

_SAMPLING = ("temperature", "max_new_tokens", "stop", "max_rows", "kv_memory")
"""Settings of the section `rollouts` that a run takes from its recipe."""


def build_offline_config(
    recipe: Mapping[str, Any],
    method: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str = "",
) -> OfflineConfig:
    """Build the configuration of an offline run, so that it can be compared with the training runs of the same recipe.

    Sources, from lowest to highest priority: defaults; model, task, sampler, evaluation and sampling settings of the
    recipe; the settings for the method in the recipe's section `offline`; `overrides`. The number of problems and of
    responses per problem, the interval of evaluations and the settings of the learner are not taken from the recipe.

    Args:
        recipe: dictionary returned by `load_recipe`.
        method: one of `METHODS`. None uses `method` from `overrides`, or the default.
        overrides: dictionary from dotted keys to values, as on the command line; values may be text.
        name: name of the recipe, used in error messages.
    Raises:
        UserError: for an unknown key, a wrong type, or values that are not allowed.
    """
    where = f"in recipe {name}" if name else "in the recipe"
    command_line = dict(overrides or {}) | ({"method": method} if method is not None else {})
    chosen = str(command_line.get("method", OfflineConfig.model_fields["method"].default))
    layers: list[Layer] = [(_shared(build_config(recipe, name=name)), where)]
    own = _sections(recipe, where).get(chosen)
    if own is not None:
        layers.append((own, f"under offline.{chosen} {where}"))
    layers.append((command_line, COMMAND_LINE))
    config = settings_from_layers(OfflineConfig, layers)
    for key in command_line:
        section = key.split(".")[0]
        if section in METHODS and section != config.method:
            raise UserError(f"{key} {COMMAND_LINE} is a setting of {section}, but method is {chosen}; remove {key}")
    return config


def with_offline_dir(config: OfflineConfig, recipe: str) -> OfflineConfig:
    """Return the configuration with `run.dir` set. An empty one becomes `runs/<recipe>-<method>-seed<seed>`."""
    if config.run.dir:
        return config
    folder = f"runs/{recipe or config.task.name}-{config.method}-seed{config.run.seed}"
    return replace(config, run=replace(config.run, dir=folder))


def _shared(config: Any) -> dict[str, Any]:
    """Return the settings of a training run that an offline run uses too."""
    settings = config_to_dict(config)
    return {
        "model": settings["model"],
        "task": settings["task"],
        "sampler": settings["sampler"],
        "rollouts": {key: settings["rollouts"][key] for key in _SAMPLING},
        "eval": {key: value for key, value in settings["eval"].items() if key != "every"},
    }


def _sections(recipe: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the recipe's section `offline`: method -> settings for this method.

    Raises:
        UserError: if the section is not a mapping from methods to mappings.
    """
    sections = recipe.get("offline") or {}
    if not isinstance(sections, Mapping):
        raise UserError(f"offline is {sections!r} {where}; it must be a mapping from methods to settings")
    for method, settings in sections.items():
        if method not in METHODS:
            hint = did_you_mean(str(method), METHODS) or f"allowed: {', '.join(METHODS)}"
            raise UserError(f"unknown method {method!r} under offline {where}; {hint}")
        if not isinstance(settings, Mapping | None):
            raise UserError(f"offline.{method} is {settings!r} {where}; it must be a mapping from keys to values")
    return sections
