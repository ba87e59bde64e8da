"""Build the configuration of a training run.

Its sources are the recipe, the command line and the settings of the chosen algorithm.
"""

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


def config_class_with_all_sections(*extra: Algorithm) -> type[Config]:
    """Return the `Config` class with a section for every built-in algorithm and for every algorithm in `extra`."""
    algorithms = {**BUILT_IN, **{algorithm.name: algorithm for algorithm in extra}}
    return with_sections(**{algorithm.name: algorithm.settings for algorithm in algorithms.values()})


def build_config(
    recipe: Mapping[str, Any],
    algorithm: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str = "",
) -> Config:
    """Build the resolved configuration of a training run.

    Of the algorithms' sections, the result contains only that of the chosen algorithm. Sources, from lowest to highest
    priority: defaults, recipe, the recipe's overrides for the chosen algorithm, `overrides`.

    Args:
        recipe: dictionary returned by `load_recipe`, with the keys of `Config` plus `description`, `overrides`
            and `offline`, which only `vineppo offline` uses.
        algorithm: the algorithm to train with. The section of the recipe's own algorithm is ignored if another one is
            chosen. None uses `algorithm` from `overrides` or, if missing, from the recipe.
        overrides: dictionary from dotted keys to values, as on the command line; values may be text.
        name: name of the recipe, used in error messages.
    Raises:
        UserError: for an unknown key, a wrong type, or values that are not allowed.
    """
    if not isinstance(recipe, Mapping):
        raise UserError(
            f"recipe is {_shown(recipe)}; it must be a dictionary of settings, as in build_config(load_recipe(NAME))"
        )
    if not isinstance(overrides, Mapping | None):
        raise UserError(f"overrides is {_shown(overrides)}; it must be a dictionary from dotted keys to values")
    where = f"in recipe {name}" if name else "in the recipe"
    base = {key: value for key, value in recipe.items() if key not in ("description", "overrides", "offline")}
    command_line = dict(overrides or {})
    if algorithm is not None:
        command_line["algorithm"] = algorithm
    specs = [_algorithm_spec({**base, **command_line}), _algorithm_spec(base)]
    known = {spec: find_algorithm(spec) for spec in reversed(specs)}
    chosen = known[specs[0]]
    refuse_settings_of_other_algorithms(chosen, command_line, COMMAND_LINE, known.values())
    layers = [(base, where), *_recipe_overrides(recipe, chosen, known, where), (command_line, COMMAND_LINE)]
    return _resolved(chosen, layers, others=known.values())


def config_from_dict(cls: type[T], data: Mapping[str, Any], where: str = "in the configuration") -> T:
    """Build settings from a dictionary with nested keys, dotted keys, or both. Missing keys get their default values.

    If `cls` is `Config`, the result also contains the section of the algorithm that `data` selects.

    Args:
        where: the source of `data` in error messages, for example "in runs/a/config.yaml".
    Raises:
        UserError: for an unknown key (the message suggests a similar one), a wrong type, or a value that is not
            allowed.
    """
    if not issubclass(cls, Config):
        return settings_from_layers(cls, [(data, where)])
    return config_from_layers([(data, where)])  # type: ignore[return-value]


def config_from_layers(layers: Iterable[Layer]) -> Config:
    """Build a training configuration from several layers; later layers override earlier ones.

    Raises:
        UserError: for an unknown key, a wrong type, or values that are not allowed.
    """
    layers = list(layers)
    specs = [_algorithm_spec(data) for data, _ in layers if "algorithm" in data]
    return _resolved(find_algorithm(specs[-1] if specs else Config().algorithm), layers)


def with_algorithm_section(config: Config) -> Config:
    """Return the configuration with the section of its algorithm.

    If the section is missing, it is added with default values.

    Raises:
        UserError: if `config` is not a Config.
    """
    if not isinstance(config, Config):
        raise UserError(
            f"config is {_shown(config)}; it must be a vineppo.Config, as in train(build_config(load_recipe(NAME))) or "
            "train(config_from_dict(Config, {...}))"
        )
    values = {name: getattr(config, name) for name in Config.model_fields}
    algorithm = find_algorithm(config.algorithm)
    section = getattr(config, algorithm.name, None)
    sections = {algorithm.name: section} if section is not None else {}
    return _checked(algorithm, config_class(config.algorithm)(**values, **sections))


def algorithm_settings(config: Config, algorithm: Algorithm) -> Any:
    """Return the section of `algorithm` in the configuration, or its default settings if the section is missing."""
    return getattr(config, algorithm.name, None) or algorithm.settings()


def with_run_dir(config: Config, recipe: str) -> Config:
    """Return the configuration with `run.dir` set. An empty one becomes `runs/<recipe>-<algorithm>-seed<seed>`."""
    if config.run.dir:
        return config
    name = find_algorithm(config.algorithm).name
    folder = f"runs/{recipe or config.task.name}-{name}-seed{config.run.seed}"
    return replace(config, run=replace(config.run, dir=folder))


def _shown(value: Any) -> str:
    """Return a text itself, or the type of another value, for an error message."""
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def _algorithm_spec(data: Mapping[str, Any]) -> str:
    spec = data.get("algorithm", Config.model_fields["algorithm"].default)
    if not isinstance(spec, str):
        raise UserError(f"algorithm is {spec!r}; allowed: {', '.join(BUILT_IN)}, or module:object")
    return spec


def config_class(spec: str) -> type[Config]:
    """Return the `Config` class with the section of one algorithm, given by its name or as `module:object`."""
    algorithm = find_algorithm(spec)
    return with_sections(**{algorithm.name: algorithm.settings})


def _resolved(algorithm: Algorithm, layers: Iterable[Layer], others: Iterable[Algorithm] = ()) -> Config:
    return _checked(
        algorithm,
        settings_from_layers(
            with_sections(**{algorithm.name: algorithm.settings}),
            layers,
            unused=config_class_with_all_sections(*others, algorithm),
        ),
    )


def _checked(algorithm: Algorithm, config: Config) -> Config:
    """Check the configuration against the algorithm's requirements, and return it."""
    size, count = config.rollouts.group_size, config.rollouts.group_size * config.rollouts.num_problems
    if size < algorithm.min_group_size:
        raise UserError(
            f"rollouts.group_size is {size}; {algorithm.name} compares the responses to one problem and needs at "
            f"least {algorithm.min_group_size}; raise rollouts.group_size"
        )
    if count < algorithm.min_rollouts:
        raise UserError(
            f"an iteration has {count} rollouts; {algorithm.name} needs at least {algorithm.min_rollouts}; raise "
            "rollouts.num_problems"
        )
    if config.learner.minibatch_size > count:
        raise UserError(
            f"learner.minibatch_size is {config.learner.minibatch_size} but an iteration has {count} rollouts "
            "(rollouts.num_problems x rollouts.group_size); lower learner.minibatch_size or sample more rollouts"
        )
    algorithm.check(algorithm_settings(config, algorithm), config)
    return config


def refuse_settings_of_other_algorithms(
    algorithm: Algorithm, settings: Mapping[str, Any], where: str, known: Iterable[Algorithm] = ()
) -> None:
    """Raise UserError if a dotted key in `settings` belongs to another algorithm, because it would have no effect.

    Args:
        known: further algorithms to check for, in addition to the built-in ones.
    """
    others = {*BUILT_IN, *(other.name for other in known)} - {algorithm.name}
    for key in settings:
        section = key.split(".")[0]
        if section in others:
            raise UserError(
                f"{key} {where} is a setting of {section}, but the algorithm is {algorithm.name}; remove {key}"
            )


def _recipe_overrides(
    recipe: Mapping[str, Any], chosen: Algorithm, known: Mapping[str, Algorithm], where: str
) -> list[Layer]:
    """Return the recipe's overrides for the chosen algorithm. Check the overrides for other known algorithms too.

    A user-defined algorithm that is neither chosen nor known is not imported, so its overrides are not checked.

    Args:
        known: the chosen algorithm and the recipe's own algorithm, by the value of the setting `algorithm`.
    """
    by_name = BUILT_IN | {algorithm.name: algorithm for algorithm in [*known.values(), chosen]}
    sections = recipe.get("overrides")
    sections = {} if sections is None else sections
    if not isinstance(sections, Mapping):
        raise UserError(f"overrides is {sections!r} {where}; it must be a mapping from algorithms to settings")
    layers: list[Layer] = []
    for spec, data in sections.items():
        if spec not in by_name and ":" not in str(spec):
            hint = did_you_mean(str(spec), BUILT_IN) or f"allowed: {', '.join(BUILT_IN)}, or module:object"
            raise UserError(f"unknown algorithm {spec!r} under overrides {where}; {hint}")
        place = f"under overrides.{spec} {where}"
        if not isinstance(data, Mapping | None):
            raise UserError(f"overrides.{spec} is {data!r} {where}; it must be a mapping from dotted keys to values")
        algorithm = by_name.get(spec) or known.get(spec)
        if algorithm is None:
            continue
        if "algorithm" in flat_values(config_class_with_all_sections(algorithm), data or {}, place):
            raise UserError(
                f"the key algorithm is set {place}, but overrides cannot change the algorithm; remove the key"
            )
        if algorithm is chosen:
            layers.append((data or {}, place))
    return layers
