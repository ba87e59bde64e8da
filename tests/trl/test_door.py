"""What a script for TRL expects of VinePPOTrainer: callbacks, logs, resuming, losses, messages. Cases 19 and 20."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers import ROOT, weights_hash
from tests.trl.test_trainer import MODEL, arguments, chains, right
from vineppo import VinePPOConfig, VinePPOTrainer
from vineppo.cli.main import main
from vineppo.config.load import config_to_dict
from vineppo.run import peers
from vineppo.run.directory import RunDirectory
from vineppo.trl import fields
from vineppo.trl.callbacks import Listener, Schedule
from vineppo.trl.names import FIELD_OF
from vineppo.types import UserError

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class AllEvents(TrainerCallback):
    """Records the name of every method that is called, with the step."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in EVENTS:
            return super().__getattribute__(name)

        def record(args: Any, state: Any, control: Any, **more: Any) -> None:
            assert {"model", "processing_class"} <= set(more)
            kind = "".join(" eval" for logs in [more.get("logs") or {}] if "eval_reward" in logs)
            self.events.append(f"{name.removeprefix('on_')} {state.global_step}{kind}")

        return record


def trainer_of(path: Path, *, callbacks: Any = (), rows: int = 8, **more: Any) -> VinePPOTrainer:
    return VinePPOTrainer(
        MODEL,
        right,
        arguments(path, **more),
        chains(rows),
        eval_dataset=chains(4) if "eval_strategy" in more else None,
        callbacks=callbacks,
    )


def test_errors_of_callbacks_are_raised_and_those_of_the_log_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uploads(TrainerCallback):
        def on_train_begin(self, *_: Any, **more: Any) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    def closed(*_: Any, **more: Any) -> None:
        raise OSError(5, "Input/output error")

    listener = Listener((), VinePPOConfig(), {}, lambda: Schedule(2, 1, 1, 1.0))
    listener.start("")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", closed)
        listener.iteration({"iteration": 1, "updates": 1, "reward/mean": 0.5})
    assert [log["reward"] for log in listener.state.log_history] == [0.5]
    listener.add(Uploads)
    with pytest.raises(BrokenPipeError):
        listener.start("")


def test_callbacks_are_called_in_the_order_of_transformers(tmp_path: Path) -> None:
    """Case 19. The list is that of transformers 5.23 and TRL 1.16 for two updates that are one epoch, with
    logging_steps, eval_steps and save_steps 1 and eval_on_start, without these calls: `pre_optimizer_step` and
    `optimizer_step` before `step_end`, `prediction_step` in evaluations, and the last `log`.
    """
    recorder = AllEvents()
    trainer_of(
        tmp_path / "a", callbacks=[recorder], eval_strategy="steps", eval_steps=1, save_steps=1, eval_on_start=True
    ).train()
    assert recorder.events == [
        "init_end 0",
        "train_begin 0",
        "log 0 eval",
        "evaluate 0",
        "epoch_begin 0",
        "step_begin 0",
        "step_end 1",
        "log 1",
        "log 1 eval",
        "evaluate 1",
        "save 1",
        "step_begin 1",
        "step_end 2",
        "log 2",
        "log 2 eval",
        "evaluate 2",
        "save 2",
        "epoch_end 2",
        "train_end 2",
    ]


def test_logs_contain_means_over_the_updates_since_the_last_log(tmp_path: Path) -> None:
    """Case 19: `logging_steps`. Four rows of which an iteration takes four, so that an epoch is one iteration."""
    recorder = AllEvents()
    seen: list[list[str]] = []

    def counted(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("number", len(seen))
        seen.append(completions)
        return [float(len(text) % 2) for text in completions]

    args = arguments(tmp_path / "a", max_steps=4, logging_steps=2, algorithm="grpo", save_strategy="no")
    trainer = VinePPOTrainer(MODEL, counted, args, chains(4), callbacks=[recorder])
    output = trainer.train()
    lines = RunDirectory.open(tmp_path / "a").read_metrics()[1:]
    first, second = trainer.state.log_history
    assert (first["step"], second["step"], len(lines)) == (2, 4, 4)
    assert first["reward"] == pytest.approx((lines[0]["reward/mean"] + lines[1]["reward/mean"]) / 2)
    assert second["loss"] == pytest.approx((lines[2]["policy/objective"] + lines[3]["policy/objective"]) / 2)
    assert (
        first["learning_rate"] == lines[1]["policy/lr"] and second["tokens/generated"] == lines[3]["tokens/generated"]
    )
    assert output.training_loss == pytest.approx(sum(line["policy/objective"] for line in lines) / 4)
    half = len(seen) // 2
    assert first["number"] == (half - 1) / 2 and second["number"] == half + (half - 1) / 2
    assert [event for event in recorder.events if event.startswith(("log", "epoch", "save"))] == [
        *("epoch_begin 0", "epoch_end 1", "epoch_begin 1", "log 2", "epoch_end 2", "epoch_begin 2", "epoch_end 3"),
        *("epoch_begin 3", "log 4", "save 4", "epoch_end 4"),
    ]


def test_strategies_of_logs_and_checkpoints(tmp_path: Path) -> None:
    def of(**more: Any) -> tuple[int, int]:
        args = VinePPOConfig(num_generations=8, gradient_accumulation_steps=2, **more)  # 2 problems per iteration
        return args.to_config(num_train=20).run.checkpoint_every, args.logging_interval(20)

    assert of(save_strategy="no", logging_strategy="no") == (0, 0)
    assert of(save_strategy="epoch", logging_strategy="epoch") == (10, 10)
    assert of(save_steps=3, logging_steps=0.5) == (3, 15)  # 30 updates in three epochs
    trainer = trainer_of(tmp_path / "a", logging_steps=10, logging_first_step=True)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history] == [1]


def test_a_callback_with_a_method_that_is_not_called_gives_a_warning(tmp_path: Path) -> None:
    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None: ...

    with pytest.warns(UserWarning, match="^on_pre_optimizer_step of the callback Gradients will not be called"):
        trainer_of(tmp_path / "a", callbacks=[Gradients])


def test_resume_from_checkpoint_takes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 19: a path that does not exist is an error; one that exists is used; `max_steps` may become larger."""
    monkeypatch.chdir(tmp_path)
    more: dict[str, Any] = {"save_steps": 1, "save_total_limit": 9, "lr_scheduler_type": "constant"}
    whole = trainer_of(Path("whole"), max_steps=4, **more)
    assert whole.train().global_step == 4
    trainer_of(Path("out"), **more).train()
    with pytest.raises(UserError) as caught:
        trainer_of(Path("out"), **more).train(resume_from_checkpoint="out/checkpoint-17")
    assert str(caught.value) == (
        "resume_from_checkpoint is 'out/checkpoint-17', which does not exist; allowed: True (the newest checkpoint of "
        "the run in output_dir), out/checkpoints/000000, out/checkpoints/000001, out/checkpoints/000002"
    )
    with pytest.raises(UserError, match="'whole/checkpoints/000001', which is not a checkpoint of the run in output_d"):
        trainer_of(Path("out"), **more).train(resume_from_checkpoint="whole/checkpoints/000001")
    with pytest.raises(
        UserError, match=r"^run out is finished .* raise its limit with max_steps N, or start a new run"
    ):
        trainer_of(Path("out"), **more).train(resume_from_checkpoint=True)
    recorder = AllEvents()
    with pytest.warns(UserWarning, match="changed settings from iteration 2 on: run.iterations: 2 -> 4; run.max_updat"):
        output = trainer_of(Path("out"), max_steps=4, callbacks=[recorder], **more).train("out/checkpoints/000001")
    assert output.global_step == 4 and output.metrics["iterations"] == 4
    assert [event for event in recorder.events if event.startswith("step")] == [
        f"step_{when}" for step in (1, 2, 3) for when in (f"begin {step}", f"end {step + 1}")
    ]
    assert weights_hash(Path("out/final")) == weights_hash(Path("whole/final"))
    assert RunDirectory.open("out").config["run"]["max_updates"] == 4


def test_losses_and_decay_become_settings_of_the_learner() -> None:
    def learner(**more: Any) -> dict[str, Any]:
        return dict(config_to_dict(VinePPOConfig(beta=0.1, **more).to_config(num_train=40))["learner"])

    for loss_type, reduction, kl in (
        ("dapo", "token_mean", "token_mean"),
        ("bnpo", "token_mean", "token_mean"),
        (None, "token_mean", "token_mean"),
        ("grpo", "sequence_mean", "as_policy"),
        ("dr_grpo", "constant", "as_policy"),
    ):
        values = learner(loss_type=loss_type)
        assert (values["reduction"], values["kl"]["reduction"]) == (reduction, kl), loss_type
    assert learner()["mask_truncated"] is False and learner(mask_truncated_completions=True)["mask_truncated"] is True
    assert learner(lr_scheduler_type="cosine")["decay"] == "cosine"


def test_truncated_completions_are_left_out_of_the_loss(tmp_path: Path) -> None:
    """Case 19: with one token per completion, all are truncated, so no weight changes."""
    args = arguments(
        tmp_path / "a", algorithm="grpo", max_completion_length=1, mask_truncated_completions=True, loss_type="grpo"
    )
    trainer = VinePPOTrainer(MODEL, lambda completions, **_: [float(len(c)) for c in completions], args, chains(8))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": "fast"}, "^learning_rate is 'fast' in VinePPOConfig; it must be a number$"),
        ({"temperature": -1}, "^temperature is -1 in VinePPOConfig; "),
        ({"epsilon": 2.0}, "^epsilon is 2.0 in VinePPOConfig; "),
        ({"adam_beta2": 1.0}, r"^adam_beta1, adam_beta2 is \[0.9, 1.0\]; each value must be at least 0 and below 1$"),
        ({"max_completion_length": 0}, "^max_completion_length is 0 in VinePPOConfig; it must be at least 1$"),
        ({"num_mc_rollouts": 0}, "^num_mc_rollouts is 0 in VinePPOConfig; it must be at least 1$"),
        ({"report_to": "mlflow"}, "^report_to has mlflow; allowed: "),
        ({"warmup_steps": -1}, "^warmup_steps is -1; it must be a number of updates, at least 0$"),
        (
            {"algorithm": "grpo", "num_generations": 1},
            "^num_generations is 1; grpo compares .*; raise num_generations$",
        ),
        ({"settings": {"learner.lr": -1}}, "^learner.lr is -1 in VinePPOConfig; it must be at least 0$"),
    ],
)
def test_messages_name_the_fields_of_the_trainer(fields: dict[str, Any], message: str) -> None:
    """Case 19. A setting that was given by its dotted key keeps its name."""
    with pytest.raises(UserError, match=message):
        VinePPOConfig(**fields).to_config(num_train=40)


def test_messages_of_training_name_the_fields_too(tmp_path: Path) -> None:
    trainer_of(tmp_path / "a", max_steps=1).train()
    with pytest.raises(
        UserError, match=r"give another output_dir, or continue that run with resume_from_checkpoint=Tr"
    ):
        trainer_of(tmp_path / "a", max_steps=1).train()
    with pytest.raises(
        UserError, match=r"of 90000 \(max_completion_length\) that is .*, lower max_completion_length, or"
    ):
        trainer_of(tmp_path / "b", max_completion_length=90000).train()


def test_every_setting_that_a_field_determines_has_a_name() -> None:
    """`FIELD_OF` has an entry for every setting that `to_config` sets, except those with a constant value."""
    constant = {"task.name", "task.grading.truncated", "learner.kl.reduction"}
    constant |= {"eval.num_problems", "eval.final_num_problems"}
    args = VinePPOConfig(eval_strategy="steps")
    plan = args._plan(40)
    keys = {**args._renamed(), **args._lengths(plan), **args._evaluation(8, plan)}
    assert set(keys) - set(args.names.field_of) - constant == set()
    assert set(keys) <= {*FIELD_OF, *constant}


def test_fields_without_effect_are_documented() -> None:
    text = (ROOT / "docs/from-trl.md").read_text()
    documented, beginnings = set(re.findall(r"`(\w+)`", text)), tuple(re.findall(r"`(\w+)[*]`", text))
    names = {*fields.WITHOUT_EFFECT, *fields.WITHOUT_EFFECT_OF_TRANSFORMERS}
    assert {name for name in names - documented if not name.startswith(beginnings)} == set()
    assert set(EVENTS) - documented == set()


@pytest.mark.parametrize("command", ["train", "sft", "trainer"])
def test_several_processes_that_cannot_connect_are_refused(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 20: nothing is written. `vineppo sft` trains in one process, also with a launcher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(peers, "_reports", False)  # `main` asks whether it reports, and stores the answer
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    arguments_of = {
        "train": ["train", "judgement", "--run.dir", "out"],
        "sft": ["sft", "--out", "out", "--model.path", MODEL],
    }
    if command == "trainer":
        with pytest.raises(UserError) as caught:
            VinePPOTrainer(MODEL, "hash", VinePPOConfig(output_dir="out"), [{"prompt": "a", "answer": "1"}])
        message = str(caught.value)
    else:
        assert main(arguments_of[command]) != 0
        message = capsys.readouterr().err.splitlines()[-1]
    several = (
        "WORLD_SIZE is 2: a launcher (torchrun, accelerate launch) started 2 processes, but only `vineppo train` and "
        "VinePPOTrainer work with several; start one process without a launcher, or unset WORLD_SIZE"
    )
    alone = (
        "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT of the environment is not set, so the processes of the run "
        "cannot connect; start them with torchrun or accelerate launch, or unset WORLD_SIZE"
    )
    assert (several if command == "sft" else alone) in message
    assert not list(tmp_path.iterdir())
