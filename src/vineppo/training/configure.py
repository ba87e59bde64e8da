"""Configurations of training runs: recipe, command line and the settings of the chosen algorithm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from vineppo.config.load import COMMAND_LINE, Layer, flat_values, settings_from_layers
from vineppo.config.messages import did_you_mean
from vineppo.config.schema import Config, with_sections
from vineppo.config.settings import Settings, replace
from vineppo.credit import BUILT_IN, find_algorithm
from vineppo.credit.algorithm import Algorithm
from vineppo.types import UserError

T = TypeVar("T", bound=Settings)


def every_section(*more: Algorithm) -> type[Config]:
    """The class of configurations with the sections of all built-in algorithms, and of further ones."""
    algorithms = {**BUILT_IN, **{one.name: one for one in more}}
    return with_sections(**{one.name: one.settings for one in algorithms.values()})


def build_config(
    recipe: Mapping[str, Any],
    algorithm: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str = "",
) -> Config:
    """The resolved configuration of a training run, with the section of its own algorithm only.

    Defaults, the recipe, the recipe's overrides for the chosen algorithm, and `overrides`: later ones win.

    Args:
        recipe: what `load_recipe` returns: the keys of `Config`, `description` and `overrides`.
        algorithm: the algorithm to train with; None takes that of `overrides`, else the recipe's.
        overrides: dotted key -> value, as on the command line; values may be text.
        name: the recipe's name, for messages.
    Raises:
        UserError: for unknown keys in any of the three, wrong types, and values that cannot work.
    """
    where = f"in recipe {name}" if name else "in the recipe"
    base = {key: value for key, value in recipe.items() if key not in ("description", "overrides")}
    line = dict(overrides or {})
    if algorithm is not None:
        line["algorithm"] = algorithm
    chosen = find_algorithm(_named({**base, **line}))
    refuse_foreign(chosen, line, COMMAND_LINE)
    return _resolved(chosen, [(base, where), *_tuned(recipe, chosen, where), (line, COMMAND_LINE)])


def config_from_dict(cls: type[T], data: Mapping[str, Any], where: str = "in the configuration") -> T:
    """Settings from nested dictionaries, dotted keys, or both; what is left out keeps its default.

    For `Config` the class of the result also has the section of the algorithm that `data` names.

    Args:
        where: named in messages, for example "in runs/a/config.yaml".
    Raises:
        UserError: for an unknown key (with the most similar one), a wrong type, or a value that cannot work.
    """
    if not issubclass(cls, Config):
        return settings_from_layers(cls, [(data, where)])
    return config_from_layers([(data, where)])  # type: ignore[return-value]


def config_from_layers(layers: Iterable[Layer]) -> Config:
    """A training configuration from several (data, where), in which later ones win."""
    layers = list(layers)
    named = [_named(data) for data, _ in layers if "algorithm" in data]
    return _resolved(find_algorithm(named[-1] if named else Config().algorithm), layers)


def with_own_section(config: Config) -> Config:
    """The same configuration with the section of its algorithm, by default values if it had none."""
    values = {name: getattr(config, name) for name in Config.model_fields}
    algorithm = find_algorithm(config.algorithm)
    own = getattr(config, algorithm.name, None)
    return _checked(
        algorithm, config_class(config.algorithm)(**values, **({algorithm.name: own} if own is not None else {}))
    )


def own_settings(config: Config, algorithm: Algorithm) -> Any:
    """The settings of the configuration's algorithm."""
    return getattr(config, algorithm.name, None) or algorithm.settings()


def with_run_dir(config: Config, recipe: str) -> Config:
    """The same configuration; an empty `run.dir` becomes `runs/<recipe>-<algorithm>-seed<seed>`."""
    if config.run.dir:
        return config
    name = find_algorithm(config.algorithm).name
    folder = f"runs/{recipe or config.task.name}-{name}-seed{config.run.seed}"
    return replace(config, run=replace(config.run, dir=folder))


def _named(data: Mapping[str, Any]) -> str:
    spec = data.get("algorithm", Config.model_fields["algorithm"].default)
    if not isinstance(spec, str):
        raise UserError(f"algorithm is {spec!r}; allowed: {', '.join(BUILT_IN)}, or module:object")
    return spec


def config_class(spec: str) -> type[Config]:
    """The class of an algorithm's configurations: `Config` with the section of the algorithm."""
    algorithm = find_algorithm(spec)
    return with_sections(**{algorithm.name: algorithm.settings})


def _resolved(algorithm: Algorithm, layers: Iterable[Layer]) -> Config:
    return _checked(
        algorithm,
        settings_from_layers(
            with_sections(**{algorithm.name: algorithm.settings}), layers, unused=every_section(algorithm)
        ),
    )


def _checked(algorithm: Algorithm, config: Config) -> Config:
    """Refuse what the algorithm cannot work with."""
    size, count = config.rollouts.group_size, config.rollouts.group_size * config.rollouts.num_problems
    if size < algorithm.min_group_size:
        raise UserError(
            f"rollouts.group_size is {size}; {algorithm.name} compares the responses to one problem and needs at "
            f"least {algorithm.min_group_size}"
        )
    if count < algorithm.min_rollouts:
        raise UserError(
            f"an iteration has {count} rollouts; {algorithm.name} needs at least {algorithm.min_rollouts}; raise "
            "rollouts.num_problems"
        )
    if config.learner.minibatch_size > count:
        raise UserError(
            f"learner.minibatch_size is {config.learner.minibatch_size} but an iteration has {count} rollouts "
            "(rollouts.num_problems x rollouts.group_size); lower it"
        )
    algorithm.check(own_settings(config, algorithm), config)
    return config


def refuse_foreign(algorithm: Algorithm, settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings, by dotted key, that belong to another algorithm and would have no effect."""
    for key in settings:
        section = key.split(".")[0]
        if section in BUILT_IN and section != algorithm.name:
            raise UserError(
                f"{key} {where} is a setting of {section}, and the algorithm is {algorithm.name}; leave it out"
            )


def _tuned(recipe: Mapping[str, Any], chosen: Algorithm, where: str) -> list[Layer]:
    """The recipe's overrides for the chosen algorithm. The keys of all overrides are checked, chosen or not."""
    sections = recipe.get("overrides")
    sections = {} if sections is None else sections
    if not isinstance(sections, Mapping):
        raise UserError(f"overrides is {sections!r} {where}; it must map algorithms to settings")
    layers: list[Layer] = []
    for spec, data in sections.items():
        if spec not in BUILT_IN and ":" not in str(spec) and spec != chosen.name:
            hint = did_you_mean(str(spec), BUILT_IN) or f"allowed: {', '.join(BUILT_IN)}, or module:object"
            raise UserError(f"unknown algorithm {spec!r} under overrides {where}; {hint}")
        here = f"under overrides.{spec} {where}"
        if not isinstance(data, Mapping | None):
            raise UserError(f"overrides.{spec} is {data!r} {where}; it must map dotted keys to values")
        algorithm = chosen if spec == chosen.name else find_algorithm(str(spec))
        if "algorithm" in flat_values(every_section(algorithm), data or {}, here):
            raise UserError(f"algorithm stands {here}; overrides cannot change the algorithm they belong to")
        if algorithm is chosen:
            layers.append((data or {}, here))
    return layers
