"""Recipes, overrides, and the error messages for mistakes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vineppo.config.load import config_to_dict, diff_configs, sections_of, settings_of, suggestion
from vineppo.config.messages import nearest
from vineppo.config.recipes import is_sft_recipe, load_recipe, recipe_names, recipe_stem
from vineppo.config.schema import Config, EvalSpec, LearnerConfig, SFTConfig, TaskConfig
from vineppo.config.settings import replace
from vineppo.credit import BUILT_IN
from vineppo.training.configure import build_config, config_class_with_all_sections, config_from_dict
from vineppo.types import UserError

TUNED = {
    "description": "Three layers.",
    "algorithm": "vineppo",
    "learner": {"lr": 1e-4, "epochs": 3, "kl": {"coefficient": 0.5}},
    "overrides": {"ppo": {"learner.lr": 2e-4, "ppo.value_lr": 3e-3}, "grpo": {"learner": {"lr": "4e-4"}}},
}


def error_message(call: Any, *args: Any, **options: Any) -> str:
    """Return the message of the UserError that a call raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the list of settings


def test_every_setting_and_section_has_a_docstring() -> None:
    for cls in (config_class_with_all_sections(), SFTConfig, EvalSpec):
        for setting in settings_of(cls).values():
            assert len(setting.doc) > 10, f"{setting.key} has no docstring"
        assert all(sections_of(cls).values())


def test_settings_are_the_leaves_of_the_models() -> None:
    settings = settings_of(Config)
    assert settings["learner.kl.coefficient"].default == 0.0
    assert settings["learner.betas"].default == (0.9, 0.999)
    assert "learner.kl" not in settings and "learner" not in settings
    assert list(sections_of(Config))[:2] == ["", "model"]


def settings_in(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


# --- precedence


def test_precedence_of_recipe_overrides_and_command_line() -> None:
    plain = build_config(TUNED)
    assert (plain.algorithm, plain.learner.lr, plain.learner.epochs) == ("vineppo", 1e-4, 3)
    assert not hasattr(plain, "ppo")

    ppo = build_config(TUNED, "ppo")
    assert (ppo.algorithm, ppo.learner.lr, ppo.learner.epochs) == ("ppo", 2e-4, 3)
    assert settings_in(ppo, "ppo.value_lr") == 3e-3 and not hasattr(ppo, "vineppo")
    assert build_config(TUNED, "grpo").learner.lr == 4e-4

    config = build_config(TUNED, "ppo", {"learner.lr": "5e-4"})
    assert (config.learner.lr, settings_in(config, "ppo.value_lr"), config.learner.kl.coefficient) == (5e-4, 3e-3, 0.5)


def test_the_algorithm_is_that_of_argument_overrides_or_recipe() -> None:
    assert build_config(TUNED, None, {"algorithm": "ppo"}).learner.lr == 2e-4
    assert build_config({**TUNED, "algorithm": "grpo"}).learner.lr == 4e-4
    assert build_config(TUNED, "grpo", {"algorithm": "ppo"}).algorithm == "grpo"


def test_missing_keys_keep_their_defaults() -> None:
    defaults = config_to_dict(Config())
    for recipe in ({}, {"learner": None, "overrides": None}):
        resolved = config_to_dict(build_config(recipe))
        assert resolved.pop("vineppo")["num_mc_rollouts"] == 9 and resolved == defaults


def test_keys_may_be_nested_or_dotted_but_not_both() -> None:
    assert build_config({"learner.kl": {"coefficient": 0.1}}) == build_config({"learner": {"kl.coefficient": 0.1}})
    message = error_message(build_config, {"learner": {"lr": 1e-4}, "learner.lr": 1e-4})
    assert message == "learner.lr is set twice in the recipe; remove one of the two values"


# --- unknown keys


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", ["learner.lr"]),
        ("learning_rate", ["learner.lr"]),
        ("learner.learning_rate", ["learner.lr"]),
        ("lerner.lr", ["learner.lr"]),
        ("rollout.num_problems", ["rollouts.num_problems"]),
        ("num_problems", ["rollouts.num_problems", "eval.num_problems"]),
        ("train.minibatch_size", ["learner.minibatch_size"]),
        ("group-size", ["rollouts.group_size"]),
        ("learner.kl.coef", ["learner.kl.coefficient"]),
        ("seed", ["run.seed"]),
        ("zzzzzz", []),
    ],
)
def test_the_nearest_key(wrong: str, right: list[str]) -> None:
    assert nearest(wrong, settings_of(config_class_with_all_sections())) == right


def test_letters_of_the_papers_are_recognised() -> None:
    assert suggestion(config_class_with_all_sections(), "K") == "did you mean vineppo.num_mc_rollouts?"
    assert suggestion(Config, "rollouts.g", prefix="--") == "did you mean --rollouts.group_size?"


def test_errors_of_unknown_keys_name_their_source() -> None:
    assert error_message(build_config, {"lr": 1}, name="mine.yaml") == (
        "unknown key lr in recipe mine.yaml; did you mean learner.lr?"
    )
    assert error_message(build_config, {"overrides": {"ppo": {"value_lr": 1}}}, name="mine.yaml") == (
        "unknown key value_lr under overrides.ppo in recipe mine.yaml; did you mean ppo.value_lr?"
    )
    assert error_message(build_config, {}, None, {"learner.kl.coef": 1}) == (
        "unknown key learner.kl.coef on the command line; did you mean learner.kl.coefficient?"
    )
    assert "top-level keys: algorithm, model, task" in error_message(build_config, {"zzzzzz": 1})
    assert "unknown key learner.kl.clmp in a/config.yaml; did you mean learner.kl.clamp?" in error_message(
        config_from_dict, Config, {"learner": {"kl": {"clmp": 1}}}, "in a/config.yaml"
    )


def test_overrides_for_other_algorithms_are_checked_too() -> None:
    assert "unknown key lr" in error_message(build_config, {"overrides": {"grpo": {"lr": 1}}}, "vineppo")
    assert error_message(build_config, {"overrides": {"pppo": {}}}) == (
        "unknown algorithm 'pppo' under overrides in the recipe; did you mean ppo?"
    )
    assert "overrides cannot change the algorithm" in error_message(
        build_config, {"overrides": {"grpo": {"algorithm": "ppo"}}}
    )
    assert "it must be a mapping" in error_message(build_config, {"overrides": ["ppo"]})
    assert "it must be a mapping" in error_message(build_config, {"overrides": {"ppo": 3}})


def test_a_section_is_not_a_value() -> None:
    assert error_message(build_config, {"learner": 3}) == (
        "learner is 3 in the recipe; it is a section, so set its keys, for example learner.lr"
    )


# --- types


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learner.lr", "1e-4", 1e-4),
        ("learner.lr", 1, 1.0),
        ("learner.epochs", "3", 3),
        ("learner.epochs", 3.0, 3),
        ("learner.epochs", "3.0", 3),
        ("run.max_tokens", "2e6", 2_000_000),
        ("run.seed", "9007199254740993", 9007199254740993),
        ("grpo.scale_by_std", "false", False),
        ("grpo.scale_by_std", "Yes", True),
        ("grpo.scale_by_std", True, True),
        ("learner.betas", "0.8,0.99", (0.8, 0.99)),
        ("learner.betas", ["0.8", 0], (0.8, 0.0)),
        ("run.report_to", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("run.report_to", "", ()),
        ("run.report_to", "[trackio]", ("trackio",)),
        ("rollouts.stop", "\n\nProblem:", ("\n\nProblem:",)),
        ("rollouts.stop", r'["\n\n", ", "]', ("\n\n", ", ")),
        ("rollouts.stop", ["a,b"], ("a,b",)),
        ("run.dir", "7", "7"),
        ("algorithm", "rloo", "rloo"),
    ],
)
def test_values_of_yaml_and_of_the_command_line(key: str, value: Any, expected: Any) -> None:
    section = key.split(".")[0]
    result = settings_in(build_config({}, section if section in BUILT_IN else None, {key: value}), key)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learner.lr", "abc", "learner.lr is 'abc' in the recipe; it must be a number"),
        ("learner.lr", True, "learner.lr is True in the recipe; it must be a number"),
        ("learner.lr", "nan", "learner.lr is 'nan' in the recipe; it must be a number"),
        ("learner.lr", "inf", "learner.lr is 'inf' in the recipe; it must be a number"),
        ("run.seed", True, "run.seed is True in the recipe; it must be a whole number"),
        (
            "learner.lr",
            None,
            "learner.lr has no value in the recipe; give a value, or remove the key to use the default",
        ),
        ("learner.epochs", 2.5, "learner.epochs is 2.5 in the recipe; it must be a whole number"),
        ("learner.epochs", "two", "learner.epochs is 'two' in the recipe; it must be a whole number"),
        ("learner.epochs", [2], "learner.epochs is [2] in the recipe; it must be a whole number"),
        ("grpo.scale_by_std", 1, "grpo.scale_by_std is 1 in the recipe; it must be true or false"),
        ("grpo.scale_by_std", "2", "grpo.scale_by_std is '2' in the recipe; it must be true or false"),
        ("learner.decay", "step", "learner.decay is 'step' in the recipe; allowed: constant, linear, cosine"),
        ("learner.decay", ["linear"], "learner.decay is ['linear'] in the recipe; allowed: constant, linear, cosine"),
        ("run.dir", 7, "run.dir is 7 in the recipe; it must be text; put it in quotes"),
        ("learner.betas", "0.9", "learner.betas is ['0.9'] in the recipe; it must have 2 values"),
        ("learner.betas", "0.9,x", "learner.betas is 'x' in the recipe; it must be a number"),
        (
            "learner.betas",
            0.9,
            "learner.betas is 0.9 in the recipe; it must be a list such as [a, b]; put items with brackets or commas "
            'in quotes, such as ["[a]", "b,c"]',
        ),
        (
            "algorithm",
            "pppo",
            "algorithm is 'pppo'; did you mean ppo? allowed: vineppo, ppo, grpo, rloo, reinforce, counterfactual, "
            "tree, tempo, grpo_lambda, spo_chain, or module:object",
        ),
        (
            "algorithm",
            3,
            "algorithm is 3; allowed: vineppo, ppo, grpo, rloo, reinforce, counterfactual, tree, tempo, grpo_lambda, "
            "spo_chain, or module:object",
        ),
    ],
)
def test_wrong_types(key: str, value: Any, message: str) -> None:
    recipe = {"algorithm": "grpo", key: value} if key.startswith("grpo") else {key: value}
    assert error_message(build_config, recipe) == message


def test_incomplete_lists_are_errors() -> None:
    for text in ("a,,b", "[a"):
        assert "it must be a list such as [a, b]" in error_message(build_config, {"rollouts.stop": text})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"vineppo.num_mc_rollouts": "0"},
            "vineppo.num_mc_rollouts is '0' on the command line; it must be at least 1",
        ),
        ({"rollouts.group_size": "0"}, "rollouts.group_size is '0' on the command line; it must be at least 1"),
        ({"algorithm": "grpo", "rollouts.group_size": "1"}, "rollouts.group_size is 1; grpo"),
        ({"algorithm": "rloo", "rollouts.group_size": "1"}, "rollouts.group_size is 1; rloo"),
        (
            {
                "algorithm": "reinforce",
                "rollouts.group_size": 1,
                "rollouts.num_problems": 1,
                "learner.minibatch_size": 1,
            },
            "an iteration has 1 rollouts; reinforce needs at least 2",
        ),
        ({"learner.decay": "linear", "run.max_tokens": "1000"}, "learner.decay is linear and run.max_tokens may end"),
        ({"vineppo.alternatives": "true", "vineppo.reuse": "false"}, "vineppo.alternatives is true, but vineppo.reuse"),
        (
            {"vineppo.bisection": "true", "vineppo.alternatives": "true"},
            "vineppo.bisection and vineppo.alternatives excl",
        ),
        (
            {"vineppo.bisection_level": "1"},
            "vineppo.bisection_level is '1' on the command line; allowed: above 0, below 1",
        ),
        ({"rollouts.kv_memory": "0"}, "rollouts.kv_memory is '0' on the command line; it must be above 0"),
        ({"learner.clip_low": "2"}, "learner.clip_low is '2' on the command line; allowed: above 0, at most 1"),
        ({"vineppo.alternatives": "true", "learner.advantage_scaling": "whiten"}, "advantage_scaling is whiten, which"),
        ({"learner.minibatch_size": "33"}, "learner.minibatch_size is 33 but an iteration has 32 rollouts"),
        (
            {"algorithm": "grpo", "vineppo.reuse": "false"},
            "vineppo.reuse on the command line is a setting of vineppo, but the algorithm is grpo; remove vineppo.",
        ),
    ],
)
def test_values_that_are_not_allowed(overrides: dict[str, str], message: str) -> None:
    assert message in error_message(build_config, {}, None, overrides)


# --- round trips


def test_a_config_is_read_back_from_yaml() -> None:
    config = build_config(
        TUNED,
        "ppo",
        {"rollouts.stop": ["\n\n", "#, "], "run.report_to": "wandb", "learner.lr": "3e-7", "run.seed": 2**62 + 1},
    )
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    assert config_from_dict(Config, yaml.safe_load(text)) == config
    sft = SFTConfig(out="a", task=TaskConfig(name="dataset", train_path="é.jsonl"), lr=3e-5)
    assert config_from_dict(SFTConfig, yaml.safe_load(yaml.safe_dump(config_to_dict(sft)))) == sft


def test_a_resolved_configuration_has_only_the_section_of_its_algorithm() -> None:
    sections = {name: set(config_to_dict(build_config(TUNED, name))) for name in BUILT_IN}
    shared = set(config_to_dict(Config()))
    assert {name: keys - shared for name, keys in sections.items()} == {
        "vineppo": {"vineppo"},
        "ppo": {"ppo"},
        "grpo": {"grpo"},
        "rloo": set(),
        "reinforce": set(),
        "counterfactual": {"counterfactual"},
        "tree": {"tree"},
        "tempo": {"tempo"},
        "grpo_lambda": {"grpo_lambda"},
        "spo_chain": {"spo_chain"},
    }


def test_wrong_values_in_python_are_errors_in_one_line() -> None:
    assert error_message(LearnerConfig, lr=-1) == "LearnerConfig.lr is -1; it must be at least 0"
    assert error_message(LearnerConfig, kl={"clamp": 0}) == "KLConfig.clamp is 0; it must be above 0"
    assert error_message(LearnerConfig, rate=1).startswith(
        "LearnerConfig has no field 'rate'; its fields: lr, warmup_updates"
    )
    with pytest.raises(Exception, match="frozen"):
        LearnerConfig().lr = 1.0  # type: ignore[misc]


def test_differences_are_named_by_key() -> None:
    old = Config()
    new = replace(old, algorithm="ppo", learner=LearnerConfig(lr=2e-4))
    assert diff_configs(old, new) == ["algorithm: vineppo -> ppo", "learner.lr: 0.0001 -> 0.0002"]
    assert diff_configs(old, Config()) == []


# --- recipe files


@pytest.mark.parametrize("algorithm", BUILT_IN)
@pytest.mark.parametrize("name", [name for name in recipe_names() if not is_sft_recipe(name)])
def test_every_recipe_loads_for_every_algorithm(name: str, algorithm: str) -> None:
    config = build_config(load_recipe(name), algorithm, name=name)
    assert config.algorithm == algorithm
    assert load_recipe(name)["description"]


@pytest.mark.parametrize("name", [name for name in recipe_names() if is_sft_recipe(name)])
def test_every_sft_recipe_loads(name: str) -> None:
    recipe = {key: value for key, value in load_recipe(name).items() if key != "description"}
    assert config_from_dict(SFTConfig, {**recipe, "out": "somewhere"}, name).updates >= 1


def test_the_default_recipe_exists() -> None:
    assert "judgement" in recipe_names()


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("learner: {lr: 1e-4, decay: linear}\n", encoding="utf-8")
    assert build_config(load_recipe(path)).learner == LearnerConfig(lr=1e-4, decay="linear")
    assert (recipe_stem(path), recipe_stem("judgement")) == ("mine", "judgement")
    path.write_text("# nothing but the defaults\n", encoding="utf-8")
    assert load_recipe(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"learner: {lr: 1", "is not valid YAML in line 1"),
        (b"run:\n  seed: 1\n  seed: 2\n", "is not valid YAML in line 3: key seed is repeated"),
        (b"- a\n- b\n", "contains a list; it must contain keys"),
        (b"\xff\xfe\xfa", "is not UTF-8 text"),
        (b"description: 3\n", "description is 3 in recipe"),
        (b"a: \x00", "is not valid YAML"),
    ],
)
def test_invalid_recipe_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert message in error_message(load_recipe, path)


def test_an_unknown_recipe_is_an_error(tmp_path: Path) -> None:
    message = error_message(load_recipe, "judgment")
    assert "recipe 'judgment' is neither a recipe of the package nor a file; did you mean judgement?" in message
    assert "does not exist" in error_message(load_recipe, tmp_path / "absent.yaml")
    assert "is a directory" in error_message(load_recipe, tmp_path)
