"""VinePPOTrainer: TRL's names and meanings, callbacks, training, evaluation and resuming."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tests.helpers import ROOT, weights_hash
from vineppo import VinePPOConfig, VinePPOTrainer
from vineppo.config.load import config_to_dict, settings_of
from vineppo.config.schema import TaskConfig
from vineppo.model.location import resolve_model_path
from vineppo.run.trl_names import TRL_NAMES, with_trl_names
from vineppo.tasks import build_task
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError

MODEL = resolve_model_path("embedded:judgement")


def chains(count: int) -> list[dict[str, Any]]:
    task = build_task(TaskConfig(num_steps=3))
    problems = [task.problem("train", n) for n in range(count)]
    return [{"prompt": p.prompt, "solution": p.answer, "number": n} for n, p in enumerate(problems)]


def right(completions: list[str], solution: list[str], **_: Any) -> list[float]:
    return [float(text.strip().endswith(f"#### {s}")) for text, s in zip(completions, solution, strict=True)]


def arguments(path: Path, **more: Any) -> VinePPOConfig:
    small: dict[str, Any] = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 40}
    small["logging_steps"] = 1
    return VinePPOConfig(
        output_dir=str(path), **{**small, "max_steps": 2, "learning_rate": 1e-4, "num_mc_rollouts": 2, **more}
    )


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(f"step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.events.append("log reward" if "reward" in logs else "log")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("end")


def test_a_short_script_trains_and_calls_the_callbacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    trainer = VinePPOTrainer(
        model=MODEL, reward_funcs=right, args=arguments(tmp_path / "a"), train_dataset=chains(20), callbacks=[recorder]
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    output = trainer.train()
    assert output.global_step == 2 and output.metrics["finish_reason"] in ("updates", "iterations")
    assert recorder.events == ["begin", "step 1", "log reward", "step 2", "log reward", "end"]
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    last = trainer.state.log_history[-1]
    assert last["reward"] == last["reward/mean"] == last["rewards/right/mean"]
    assert last["completions/mean_length"] == last["response/length_mean"]
    assert last["completions/min_length"] <= last["completions/mean_length"] <= last["completions/max_length"]
    assert last["epoch"] == 8 / 20 and last["learning_rate"] < 1e-4  # linear decay, as TRL's default
    assert "![Time of each phase](plots/seconds.png)" in (tmp_path / "a" / "report.md").read_text()
    trainer.save_model(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert weights_hash(tmp_path / "saved") == weights_hash(tmp_path / "a/final")


def test_a_callback_can_stop_a_run_which_is_then_finished(tmp_path: Path) -> None:
    class StopAfterFour(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert state.max_steps == 8
            control.should_training_stop = state.global_step >= 4

    small = arguments(tmp_path / "a", max_steps=8, num_iterations=2)  # two updates per iteration
    output = VinePPOTrainer(MODEL, right, small, chains(20), callbacks=[StopAfterFour]).train()
    assert output.global_step == 4 and output.metrics["iterations"] == 2
    assert output.metrics["finish_reason"] == "callback" and (tmp_path / "a/final").is_dir()


def test_model_in_memory_evaluation_and_resume(tmp_path: Path) -> None:
    def trainer(path: Path, **more: Any) -> VinePPOTrainer:
        return VinePPOTrainer(
            AutoModelForCausalLM.from_pretrained(MODEL),
            [right, "exact"],
            arguments(path, reward_weights=[1.0, 0.5], eval_strategy="steps", eval_steps=1, save_steps=1, **more),
            chains(20),
            eval_dataset=chains(30)[20:],
            processing_class=AutoTokenizer.from_pretrained(MODEL),
        )

    whole = trainer(tmp_path / "whole", max_steps=3, lr_scheduler_type="constant")
    summary = whole.train().metrics
    assert summary["accuracy_before"]["mean"] is not None
    assert [line["eval_reward"] is not None for line in whole.state.log_history if "eval_reward" in line] == [True] * 4
    assert set(whole.evaluate()) == {"eval_reward", "eval_reward_low", "eval_reward_high"}
    cut = trainer(tmp_path / "cut", max_steps=3, lr_scheduler_type="constant")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    cut.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tmp_path / "cut", max_steps=3, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert weights_hash(tmp_path / "cut/final") == weights_hash(tmp_path / "whole/final")


def test_peft_config_adds_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = VinePPOTrainer(MODEL, right, arguments(tmp_path / "a", max_steps=1), chains(8), peft_config=lora)
    assert sum(p.requires_grad for p in trainer.model.parameters()) == 2 * len(trainer.policy.model.model.layers)
    trainer.train()
    assert json.loads((tmp_path / "a/final/adapter/adapter_config.json").read_text())["r"] == 4
    args = arguments(tmp_path / "b")
    with pytest.raises(UserError, match="already has adapters"):
        tokenizer = trainer.processing_class
        VinePPOTrainer(trainer.model, right, args, chains(8), processing_class=tokenizer, peft_config=lora)


def test_fields_have_the_same_meaning_as_in_trl() -> None:
    args = VinePPOConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_generations=8,
        num_iterations=3,
        num_train_epochs=2,
        epsilon=0.1,
        epsilon_high=0.3,
        beta=0.04,
        temperature=0.7,
        scale_rewards=False,
        warmup_ratio=0.1,
        adam_beta2=0.95,
        save_steps=12,
        seed=7,
        settings={"vineppo.alternatives": True},
    )
    config = args.to_config(num_train=40)
    assert (config.rollouts.num_problems, config.rollouts.group_size) == (2, 8)  # 16 responses of 2 prompts
    assert (config.learner.minibatch_size, config.learner.epochs) == (8, 3)  # 6 updates per iteration
    assert config.run.iterations == 40 and config.learner.warmup_updates == 24  # 240 updates
    assert (config.learner.clip_low, config.learner.clip_high) == (0.1, 0.3)
    assert config.learner.kl.coefficient == 0.04 and config.learner.kl.reduction == "token_mean"
    assert config.rollouts.temperature == 0.7 and config.learner.betas == (0.9, 0.95)
    assert config.run.checkpoint_every == 2 and config.run.seed == 7
    assert (
        config_to_dict(config)["vineppo"]["alternatives"]
        and config.eval.every == 0
        and config.eval.final_num_problems == 0
    )
    ratios = {0.0: 0, 0.001: 1, 0.0126: 4, 1.0: 240}  # rounded up, as in transformers
    for ratio, updates in ratios.items():
        changed = dataclasses.replace(args, warmup_ratio=ratio).to_config(num_train=40)
        assert changed.learner.warmup_updates == updates
    assert config.learner.kl.importance_weighted and config.rollouts.max_new_tokens == 512  # TRL's defaults
    grpo = VinePPOConfig(num_generations=8, algorithm="grpo", scale_rewards=False).to_config(num_train=40)
    assert config_to_dict(grpo)["grpo"] == {"scale_by_std": False}
    with pytest.raises(
        UserError, match=r"vineppo.reuse in settings is a setting of vineppo, but the algorithm is grpo"
    ):
        VinePPOConfig(algorithm="grpo", settings={"vineppo.reuse": False}).to_config(num_train=40)
    short = VinePPOConfig(num_generations=8, max_steps=5).to_config(num_train=1000, num_eval=300)
    assert short.run.iterations == 5 and short.eval.final_num_problems == 0  # eval_strategy is "no"
    often: Any = {"eval_strategy": "steps", "temperature": 0.6, "gradient_accumulation_steps": 2, "num_iterations": 3}
    measured = VinePPOConfig(**often).to_config(num_train=1000, num_eval=300).eval
    assert (measured.num_problems, measured.final_num_problems, measured.num_samples) == (300, 300, 8)
    assert measured.temperature == 0.6 and measured.every == 4  # 10 updates (logging_steps), 3 per iteration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generation": 4}, r"VinePPOConfig has no field num_generation; did you mean num_generations"),
        ({"top_p": 0.9}, r"top_p is 0.9; allowed: 1.0"),
        ({"use_vllm": True}, r"use_vllm is True; allowed: False; settings=.*'vllm'"),
        ({"loss_type": "cispo"}, r"loss_type is 'cispo'; allowed: 'dapo', 'bnpo', 'grpo', 'dr_grpo', None"),
        ({"lr_scheduler_type": "polynomial"}, r"lr_scheduler_type is 'polynomial'; allowed: 'linear', 'cosine', "),
        ({"save_strategy": "best"}, r"save_strategy is 'best'; allowed: 'steps', 'epoch', 'no'"),
        ({"shuffle_dataset": False}, r"shuffle_dataset is False, .* has a new random order"),
        ({"num_generations": "8"}, r"num_generations is '8'; it must be at least 1, and a whole number"),
        ({"max_steps": "many"}, r"max_steps is 'many'; it must be a number of updates"),
        ({"logging_steps": 0}, r"logging_steps is 0; it must be a number above 0"),
        ({"save_steps": -1}, r"save_steps is -1; it must be a number above 0"),
        ({"num_train_epochs": -1}, r"num_train_epochs is -1; it must be a number above 0"),
        ({"warmup_ratio": 2}, r"warmup_ratio is 2; it must be a fraction of all updates, from 0 to 1"),
        ({"per_device_train_batch_size": 3}, r"has 3 responses .* not a multiple of num_generations 8"),
        ({"num_generations": 0}, r"num_generations is 0; it must be at least 1"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 1},
            r"takes 32 .* has 8; increase steps_per_generation",
        ),
        ({"generation_kwargs": {"top_p": 0.5}}, r"generation_kwargs is .*, which is not supported; allowed: None"),
        (
            {"push_to_hub": True},
            r"push_to_hub is True, which is not supported; allowed: False; after training, call tr",
        ),
        ({"adam_epsilon": 1e-6}, r"adam_epsilon is 1e-06, which is not supported; allowed: 1e-08"),
        ({"optim": "adafactor"}, r"optim is 'adafactor'; allowed: 'adamw_torch_fused'"),
        ({"settings": {"model.dtype": "bfloat16"}}, r"settings has a key of the section model; pass the model to"),
    ],
)
def test_mistakes_in_the_config_raise_one_line_messages(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        VinePPOConfig(**settings)
    assert "\n" not in str(caught.value)


def test_mistakes_in_trainer_arguments_raise_user_errors(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for changes, message in (
        ({"reward_funcs": None}, "reward_funcs is empty"),
        ({"reward_funcs": torch.nn.Linear(1, 1)}, "reward_funcs has a Linear"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": None}, "train_dataset is missing"),
        # case 19
        (
            {"args": arguments(tmp_path, learning_rate=-1.0)},
            "^learning_rate is -1.0 in VinePPOConfig; it must be at least 0$",
        ),
        ({"args": arguments(tmp_path, model_init_kwargs={"device_map": "auto"})}, "model_init_kwargs has device_map"),
    ):
        parts: dict[str, Any] = {"reward_funcs": right, "args": args, "train_dataset": chains(4), **changes}
        with pytest.raises(UserError, match=message):
            VinePPOTrainer(MODEL, **parts)


def test_graders_given_by_name_run_in_separate_processes(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "answer": row["solution"]} for row in chains(8)]
    trainer = VinePPOTrainer(MODEL, ["exact", "hash"], arguments(tmp_path / "a", reward_weights=[1.0, 0.0]), rows)
    assert trainer.reward_funcs == [] and trainer.config.task.rewards == ("exact", "hash")
    with pytest.raises(UserError, match="grader hash: the reference answer"):
        trainer.train()
    with pytest.raises(UserError, match="unknown grader 'exat'"):
        VinePPOTrainer(MODEL, "exat", arguments(tmp_path / "b"), rows).train()


def test_fields_without_effect_are_accepted(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "log_completions": True,
        "remove_unused_columns": False,
        "vllm_mode": "server",
        "push_to_hub": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "generation_kwargs": None,
        "dataloader_num_workers": 4,
        "adam_epsilon": 1e-8,
    }
    config: Any = VinePPOConfig(output_dir="x", **fields)
    assert config.output_dir == "x" and {name: getattr(config, name) for name in fields} == fields
    assert config.load_best_model_at_end is False and config.shuffle_dataset is True  # defaults, for callbacks
    assert not hasattr(config, "no_such_field")
    assert config.to_config(num_train=8) == VinePPOConfig(output_dir="x").to_config(num_train=8)


def test_reward_functions_get_the_extra_arguments_of_trl(tmp_path: Path) -> None:
    seen: list[Any] = []

    def counting(completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        log_metric("letters", len(completions[0]))
        log_extra("texts", completions)
        return [float(len(text) > 20) for text in completions]

    def plain(
        prompts: list[str], completions: list[str], completion_ids: Any, solution: Any, number: Any, answer: Any
    ) -> list[float]:
        return [0.0] * len(completions)

    trainer = VinePPOTrainer(MODEL, [counting, plain], arguments(tmp_path / "a"), chains(8))
    trainer.train()
    assert set(seen) == {0, 1}  # the second iteration comes after one update
    last = trainer.state.log_history[-1]
    assert last["letters"] > 1 and last["rewards/counting/mean"] == last["reward"] and last["rewards/plain/mean"] == 0


def test_a_model_in_memory_is_prepared_as_in_trl(tmp_path: Path) -> None:
    def trainer(**more: Any) -> VinePPOTrainer:
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        return VinePPOTrainer(model, right, arguments(tmp_path / "a", **more), chains(8), processing_class=tokenizer)

    assert (
        trainer().model.is_gradient_checkpointing
        and not trainer(gradient_checkpointing=False).model.is_gradient_checkpointing
    )
    built = trainer(temperature=0.5, settings={"rollouts.stop": "####"})
    assert built.config.model.path == MODEL and built.config.model.dtype == "float32"
    assert built.config.model.lora.r == 0 and built.config.rollouts.stop == ("####",)


def test_dtype_auto_is_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(MODEL).bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "half")
    for path, dtype in ((str(tmp_path / "half"), torch.bfloat16), (MODEL, torch.float32)):
        args = arguments(tmp_path / "a", model_init_kwargs={"dtype": "auto"})
        assert VinePPOTrainer(path, right, args, chains(8)).model.dtype == dtype


def test_equal_seeds_give_equal_initial_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapters(seed: int) -> torch.Tensor:
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = VinePPOTrainer(MODEL, right, arguments(tmp_path / "a", seed=seed), chains(8), peft_config=lora)
        assert (trainer.config.model.lora.r, trainer.config.model.lora.targets) == (4, ("q_proj",))
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    first = adapters(1)
    torch.rand(7)
    assert torch.equal(first, adapters(1)) and not torch.equal(first, adapters(2))
    wrong = peft.LoraConfig(r=4, target_modules=["no_such_layer"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="peft_config does not fit the model: Target modules"):
        VinePPOTrainer(MODEL, right, arguments(tmp_path / "a"), chains(8), peft_config=wrong)


def test_a_model_with_trained_adapters_and_beta_raises(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), lora)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    VinePPOTrainer(model, right, arguments(tmp_path / "a"), chains(8), processing_class=tokenizer)
    with pytest.raises(UserError, match="model has trained adapters, but the reference model"):
        VinePPOTrainer(model, right, arguments(tmp_path / "a", beta=0.1), chains(8), processing_class=tokenizer)


def test_resuming_with_other_settings_or_a_trained_model_raises(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    def trainer(**more: Any) -> VinePPOTrainer:
        return VinePPOTrainer(MODEL, right, arguments(tmp_path / "a", beta=0.01, **more), chains(8))

    first = trainer()
    first.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    first._listener.callbacks.clear()
    with pytest.raises(UserError, match="is already trained, but beta needs the model that the run started from"):
        first.train(resume_from_checkpoint=True)
    with pytest.raises(
        UserError, match=r"^resume_from_checkpoint=True cannot change the settings of the run \(seed: 42 -> 43\)"
    ):
        trainer(seed=43).train(resume_from_checkpoint=True)
    assert trainer().train(resume_from_checkpoint=True).global_step == 2


def test_the_table_of_names_in_the_docs_is_complete() -> None:
    text = (ROOT / "docs/from-trl.md").read_text()
    documented = set(re.findall(r"`([A-Za-z_0-9]+)`", text))
    fields = {field.name for field in dataclasses.fields(VinePPOConfig)}
    assert fields - documented - {"fp16"} == set()
    settings = set(re.findall(r"`((?:rollouts|learner|vineppo|grpo|task|run|eval|model)\.[a-z_.]+)`", text))
    assert settings and all(
        any(key.startswith(name) for key in settings_of(config_class_with_all_sections())) for name in settings
    )


def test_trl_names_of_metrics_are_documented_and_added() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    documented = set(re.findall(r"`([A-Za-z_/]+)`", text))
    for name, trl_name in TRL_NAMES.items():
        assert name in documented
        assert trl_name in documented or trl_name.split("/")[-1] in documented, (name, trl_name)
    assert with_trl_names({"reward/mean": 1.0, "x": 2}) == {"reward/mean": 1.0, "x": 2, "reward": 1.0}
