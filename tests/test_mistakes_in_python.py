"""Mistakes in Python: each raises UserError with one line that names the culprit, and no model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import vineppo
from vineppo.config.schema import (
    Config,
    CriticConfig,
    EvalConfig,
    EvalSpec,
    GradingConfig,
    KLConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
    TaskConfig,
)
from vineppo.model.hardware import check_device
from vineppo.model.location import resolve_model_path
from vineppo.run.directory import RunDirectory
from vineppo.steps import build_splitter
from vineppo.tasks.build import check_task
from vineppo.training.configure import build_config, config_from_dict
from vineppo.training.rollouts import warn_of_few_problems
from vineppo.trl.arguments import check_model, check_object_settings
from vineppo.trl.config import VinePPOConfig
from vineppo.trl.trainer import VinePPOTrainer
from vineppo.types import TrainingWarning, UserError

Fields = dict[str, Any]


def dataset(**fields: Any) -> Callable[[], Any]:
    return lambda: check_task(TaskConfig(name="dataset", **fields))


def unknown(name: str) -> dict[str, Any]:
    return {name: 4}


ROWS = [{"prompt": "1+1", "answer": "2"}]


class GRPOConfig:
    """Stands for the class of TRL."""


class Tokenizer:
    """Stands for a tokenizer of transformers."""

    all_special_ids = ()

    def decode(self) -> None: ...
    def apply_chat_template(self) -> None: ...


class Stopper:
    """A callback."""

    def on_step_end(self, *_: Any, **__: Any) -> None: ...


def trainer(**changes: Any) -> Callable[[], Any]:
    """Return a function that creates a trainer of the model `absent`, which does not exist, with these arguments."""
    arguments = {"model": "./absent", "reward_funcs": "exact", "train_dataset": ROWS, **changes}
    return lambda: VinePPOTrainer(**arguments)


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: LearnerConfig(**unknown("learning_rate")), "LearnerConfig has no field 'learning_rate'"),
    (lambda: LearnerConfig(lr=-1), "LearnerConfig.lr is -1; it must be at least 0"),
    (lambda: LearnerConfig(lr=True), "LearnerConfig.lr is True; it must be a number"),
    (lambda: LearnerConfig(lr=None), "LearnerConfig.lr is None"),
    (lambda: LearnerConfig(lr=float("nan")), "LearnerConfig.lr is nan"),
    (lambda: LearnerConfig(betas=(0.9, 0.99, 0.9)), "LearnerConfig.betas"),
    (lambda: KLConfig(clamp=0), "KLConfig.clamp is 0; it must be above 0"),
    (lambda: RolloutConfig(stop=3), "RolloutConfig.stop is 3; it must be a list"),
    (lambda: RolloutConfig(group_size=2.5), "RolloutConfig.group_size is 2.5; it must be a whole number"),
    (lambda: RunConfig(dir=Path("runs")), "RunConfig.dir"),
    (lambda: RunConfig(report_to="mlflow"), "run.report_to has mlflow"),
    (lambda: EvalConfig(split="train"), "EvalConfig.split is 'train'; allowed: validation, test"),
    (lambda: EvalSpec(num_samples=2, k=(4,)), "pass@k needs 1 <= k <= num_samples"),
    (lambda: SFTConfig(), "out is empty"),
    (lambda: CriticConfig(value_lr=-1), "CriticConfig.value_lr is -1"),
    (lambda: ModelConfig(device="gpu"), "model.device is 'gpu'; did you mean cuda?"),
    (lambda: ModelConfig(dtype="fp32"), "ModelConfig.dtype is 'fp32'; allowed: float32, bfloat16"),
    (lambda: LoraConfig(dropout=1), "LoraConfig.dropout is 1; allowed: at least 0, below 1"),
    (lambda: LoraConfig(targets=()), "model.lora.targets is empty"),
    (lambda: GradingConfig(workers=0), "GradingConfig.workers is 0; it must be at least 1"),
    (lambda: TaskConfig(name="dataset", options={"a": 1}), "task.options is only for reasoning_gym tasks"),
    (dataset(), "task.train_path is empty"),
    (dataset(train_path="absent.csv"), "task.train_path: no such file: absent.csv"),
    (dataset(train_path="absent.csv", rewards=("exacd",)), "'exacd'"),
    (lambda: build_config({}, "vinepo"), "algorithm is 'vinepo'; did you mean vineppo?"),
    (lambda: build_config({"learner": 3}), "learner is 3 in the recipe; it is a section"),
    (lambda: build_config({}, "grpo", {"rollouts.group_size": 1}), "rollouts.group_size is 1; grpo"),
    (lambda: build_config({}, None, {"num_generations": 8}), "did you mean rollouts.group_size?"),
    (lambda: build_config({}, None, {"vineppo.splitter": "line"}), "unknown splitter 'line'"),
    (lambda: config_from_dict(Config, {"run": {"sed": 1}}), "unknown key run.sed in the configuration; did you mean"),
    (lambda: vineppo.load_recipe("judgment"), "recipe 'judgment' is neither"),
    (lambda: vineppo.load_recipe("mine.yaml"), "recipe 'mine.yaml' does not exist"),
    (lambda: resolve_model_path("runs/mine"), "model.path 'runs/mine' does not exist"),
    (lambda: build_splitter("tokens:ten"), "unknown splitter 'tokens:ten'"),
    (lambda: build_splitter("math:sqrt"), "unknown splitter 'math:sqrt'"),
    (lambda: RunDirectory.check_new("/dev/null/run"), "run directory /dev/null/run cannot be written"),
    (lambda: RunDirectory.open("absent"), "no run directory at absent"),
    (lambda: VinePPOConfig(**unknown("num_generation")), "VinePPOConfig has no field num_generation; did you mean"),
    (lambda: VinePPOConfig(num_generations=3), "not a multiple of num_generations 3"),
    # names that only begin like a field
    (lambda: VinePPOConfig(**unknown("log_steps")), "has no field log_steps; did you mean logging_steps?"),
    (lambda: VinePPOConfig(**unknown("hub_foo")), "VinePPOConfig has no field hub_foo"),
    (lambda: VinePPOConfig(**unknown("dataloader_workers")), "did you mean dataloader_num_workers?"),
    (lambda: VinePPOConfig(**unknown("vllm_gpu")), "did you mean vllm_gpu_memory_utilization?"),
    (lambda: VinePPOConfig(**unknown("entropy_coef_x")), "VinePPOConfig has no field entropy_coef_x"),
    (lambda: VinePPOConfig(**unknown("log_completions_hub_repo")), "log_completions_hub_repo is 4, which is not supp"),
    (lambda: VinePPOConfig(settings=cast(Any, ["a"])), "settings is ['a']; it must be a dictionary from dotted keys"),
    # wrong types of arguments
    (
        lambda: vineppo.train(cast(Any, "judgement")),
        "config is 'judgement'; it must be a vineppo.Config, as in train(b",
    ),
    (lambda: vineppo.train(cast(Any, {"run.seed": 1})), "config is a dict; it must be a vineppo.Config"),
    (
        lambda: build_config(cast(Any, "judgement")),
        "recipe is 'judgement'; it must be a dictionary of settings, as in ",
    ),
    (lambda: build_config({}, None, cast(Any, ["lr"])), "overrides is a list; it must be a dictionary"),
    (
        trainer(args=GRPOConfig()),
        "args is a GRPOConfig; it must be a VinePPOConfig (VinePPOConfig has the same fields;",
    ),
    (trainer(args={"seed": 1}), "args is a dict; it must be a VinePPOConfig (pass VinePPOConfig(**args))"),
    (trainer(model=None), "model is None; it must be a path, a Hugging Face Hub id, or a causal language model"),
    (trainer(model=torch.nn.Linear(2, 2)), "model is a Linear; it must be a path"),
    (
        trainer(model=Tokenizer()),
        "model is a Tokenizer; it must be a path, a Hugging Face Hub id, or a causal language",
    ),
    (trainer(model=Tokenizer()), "peft; pass a tokenizer as processing_class"),
    (trainer(processing_class="judgement"), "processing_class is 'judgement'; it must be a tokenizer, for example Aut"),
    (
        trainer(peft_config={"r": 4}),
        "peft_config is {'r': 4}; it must be a configuration of peft, such as peft.LoraCon",
    ),
    (trainer(peft_config="lora"), "peft_config is 'lora'"),
    (trainer(train_dataset="train.jsonl"), "train_dataset is 'train.jsonl'; it must be a datasets.Dataset or a list"),
    (trainer(train_dataset=Path("a.csv")), "train_dataset is 'a.csv'; it must be a datasets.Dataset or a list of dict"),
    (trainer(train_dataset={"train": ROWS}), "train_dataset is a dict with train; it must be"),
    (trainer(train_dataset={"train": ROWS}), 'pass one split, such as ["train"]'),
    (trainer(eval_dataset=3), "eval_dataset is 3; it must be a datasets.Dataset or a list of dictionaries"),
    (trainer(callbacks=Stopper()), "callbacks is a Stopper; it must be a list: callbacks=[...]"),
    (trainer(callbacks=[print]), "callbacks has a builtin_function_or_method; allowed: objects and classes with"),
    (trainer(reward_funcs="org/reward-model"), "reward_funcs has 'org/reward-model'; allowed: functions and names of"),
    (trainer(reward_funcs="org/reward-model"), "a reward model is not supported directly: pass a function that calls"),
    (trainer(reward_funcs=[3]), "reward_funcs has 3; allowed: functions and names of graders (exact, hash, boxed, mod"),
    (trainer(reward_funcs="exat"), "unknown grader 'exat'"),
    (trainer(reward_funcs=lambda prompts, completions: [1.0]), "has the signature (prompts, completions), which does"),
    # fields that would have no effect
    (trainer(args=VinePPOConfig(eval_strategy="steps")), "eval_strategy is 'steps', but eval_dataset is missing"),
    (
        lambda: check_object_settings(torch.nn.Linear(1, 1), VinePPOConfig(bf16=True)),
        "bf16 is True, but model is an object in float32, whose dtype is not changed; load it with dtype=torch.b",
    ),
    (
        lambda: check_object_settings(torch.nn.Linear(1, 1), VinePPOConfig(model_init_kwargs={"dtype": "auto"})),
        "model_init_kwargs is {'dtype': 'auto'}, but model is an object, which is already loaded",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message[:50] for _, message in MISTAKES])
def test_a_mistake_raises_one_line(
    call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_arguments_of_the_right_types_are_accepted() -> None:
    check_model("org/name", Tokenizer(), None)
    check_object_settings(torch.nn.Linear(1, 1).bfloat16(), VinePPOConfig(bf16=True))
    check_object_settings("org/name", VinePPOConfig(bf16=True, model_init_kwargs={"dtype": "auto"}))
    for field in ("vllm_mode", "dataloader_num_workers", "hub_token", "log_level", "entropy_coef_max"):
        VinePPOConfig(**unknown(field))


def test_there_are_many_mistakes() -> None:
    assert len(MISTAKES) >= 30


def test_the_directory_of_a_run_is_checked_before_its_model(tmp_path: Path) -> None:
    """Case 23. A model that does not exist is not reported, because the directory comes first."""
    (tmp_path / "note").write_text("text")
    config = build_config({}, None, {"run.dir": str(tmp_path), "model.path": "./absent"})
    with pytest.raises(UserError, match="already exists and is not empty"):
        vineppo.train(config)


def test_a_gpu_is_refused_if_pytorch_supports_only_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vineppo.model.hardware.version_of", lambda name: "2.9.0+cpu")
    with pytest.raises(UserError, match=r"model.device is 'cuda:1', but the installed PyTorch \(2.9.0\+cpu\)"):
        check_device("cuda:1")
    check_device("cpu")
    monkeypatch.setattr("vineppo.model.hardware.version_of", lambda name: "2.9.0+cu128")
    check_device("cuda:1")


class FewProblems:
    """A source of four problems."""

    def size(self, split: str) -> int:
        return 4


def test_more_problems_per_iteration_than_there_are_give_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Case 22."""
    warn_of_few_problems(FewProblems(), 4)  # type: ignore[arg-type]
    assert not recwarn
    with pytest.warns(TrainingWarning, match="rollouts.num_problems is 64, but the task has only 4 training problems"):
        warn_of_few_problems(FewProblems(), 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "graded"),
    [
        ({"name": "dataset"}, True),
        ({"name": "gsm8k"}, False),
        ({"name": "chain"}, False),
        ({"name": "dataset", "grading": GradingConfig(truncated=False)}, False),
        ({"name": "gsm8k", "grading": GradingConfig(truncated=True)}, True),
    ],
)
def test_truncated_responses_are_graded_alike(fields: Fields, graded: bool) -> None:
    """Case 22: `vineppo train` with a table of the user grades them as VinePPOTrainer does."""
    assert TaskConfig(**fields).grades_truncated is graded
    assert VinePPOConfig().to_config(8).task.grades_truncated is TaskConfig(name="dataset").grades_truncated
