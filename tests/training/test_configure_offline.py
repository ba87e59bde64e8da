"""The configuration of `vineppo offline`: what it takes from a recipe, and the recipes of the package."""

from __future__ import annotations

from typing import Any

import pytest

from vineppo.config.offline import METHODS
from vineppo.config.recipes import is_sft_recipe, load_recipe, recipe_names
from vineppo.training.configure import build_config
from vineppo.training.configure_offline import build_offline_config, with_offline_dir
from vineppo.types import UserError


def test_sources_and_their_priority() -> None:
    """The learner, the interval of evaluations and the shape of an iteration are not taken from the recipe."""
    recipe = {
        "task": {"num_steps": 4},
        "rollouts": {"num_problems": 5, "group_size": 3, "temperature": 0.6, "max_new_tokens": 50, "stop": ["x"]},
        "learner": {"lr": 0.5, "minibatch_size": 15},
        "eval": {"every": 7, "num_samples": 3},
        "run": {"seed": 9},
        "offline": {"restem": {"lr": 2e-4, "restem": {"rounds": 6}, "rollouts.group_size": 12}, "dpo_positive": None},
    }
    config = build_offline_config(recipe, "restem", {"restem.rounds": "5", "eval.num_samples": "2"})
    assert (config.task.num_steps, config.rollouts.temperature, config.rollouts.max_new_tokens) == (4, 0.6, 50)
    assert config.rollouts.stop == ("x",)
    assert (config.rollouts.num_problems, config.rollouts.group_size) == (256, 12)
    assert (config.lr, config.restem.rounds, config.iterations, config.epochs) == (2e-4, 5, 5, 8)
    assert (config.eval.every, config.eval.num_samples, config.run.seed) == (1, 2, 0)
    other = build_offline_config(recipe, None, {"method": "dpo_positive"})
    assert (other.method, other.lr, other.rollouts.group_size, other.iterations) == ("dpo_positive", 1e-4, 8, 3)
    assert build_config(recipe).learner.lr == 0.5
    assert with_offline_dir(config, "mine").run.dir == "runs/mine-restem-seed0"


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        ([], None),
        (["restem"], "offline is ['restem'] in recipe r.yaml; it must be a mapping from methods to settings"),
        ({"resten": {}}, "unknown method 'resten' under offline in recipe r.yaml; did you mean restem?"),
        ({"dpo_positive": 3}, "offline.dpo_positive is 3 in recipe r.yaml; it must be a mapping from keys to values"),
        ({"restem": {"rounds": 3}}, "unknown key rounds under offline.restem in recipe r.yaml; did you mean"),
        ({"restem": {"lr": -1}}, "lr is -1 under offline.restem in recipe r.yaml; it must be above 0"),
    ],
)
def test_mistakes_in_the_section_of_a_recipe(offline: Any, message: str | None) -> None:
    if message is None:
        build_offline_config({"offline": offline}, "restem")
        return
    with pytest.raises(UserError) as error:
        build_offline_config({"offline": offline}, "restem", name="r.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in recipe_names() if not is_sft_recipe(name)])
def test_every_recipe_loads_for_every_method(name: str, method: str) -> None:
    config = build_offline_config(load_recipe(name), method, name=name)
    training = build_config(load_recipe(name), name=name)
    assert (config.model, config.task) == (training.model, training.task)
    assert config.rollouts.max_new_tokens == training.rollouts.max_new_tokens


@pytest.mark.parametrize("model", ["rho1b", "deepseekmath7b"])
@pytest.mark.parametrize(("task", "problems", "beta"), [("math", 11_500, 0.1), ("gsm8k", 7_100, 0.3)])
def test_the_settings_of_the_paper(model: str, task: str, problems: int, beta: float) -> None:
    recipe = load_recipe(f"paper/{model}-{task}-vineppo")
    restem, dpo = (build_offline_config(recipe, method) for method in METHODS)
    for config in (restem, dpo):
        assert (config.lr, config.batch_size, config.warmup_fraction, config.weight_decay) == (1e-6, 64, 0.03, 0)
        assert (config.betas, config.max_grad_norm) == ((0.9, 0.999), 1.0)
        assert (config.rollouts.num_problems, config.rollouts.temperature) == (problems, 0.6)
    assert (restem.restem.rounds, restem.restem.epochs, restem.restem.max_kept) == (10, 8, 10)
    assert (restem.rollouts.group_size, restem.restem.reduction) == (8, "sequence_mean")
    assert (dpo.rollouts.group_size, dpo.dpo_positive.epochs, dpo.dpo_positive.max_pairs) == (64, 3, 64)
    assert (dpo.dpo_positive.beta, dpo.dpo_positive.penalty, dpo.reward_threshold) == (beta, 50.0, 0.5)
