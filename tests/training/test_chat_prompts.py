"""Chat prompts in sampling, supervised fine-tuning, the commands and VinePPOTrainer (cases 6 to 9)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from vineppo import VinePPOConfig, VinePPOTrainer, build_config
from vineppo.cli.main import main
from vineppo.config.schema import ModelConfig, TaskConfig
from vineppo.model.loading import load_pretrained
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.tasks import build_task
from vineppo.training.rollouts import problem_range, sample_groups
from vineppo.types import UserError

# The token `<pad>` ends a turn. The tokenizer adds `<unk>` in front of a text.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ '<pad>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and mark is defined %}{{ mark }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model with a chat template, as a directory."""
    path = tmp_path_factory.mktemp("model")
    network, tokenizer = load_pretrained(ModelConfig())
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", tokenizer.unk_token_id)]
    )
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    assert AutoTokenizer.from_pretrained(path)("a").input_ids[0] == tokenizer.unk_token_id
    return str(path)


def test_case_6_rollouts_start_with_the_ids_of_the_template(model: str) -> None:
    policy = Policy.load(ModelConfig(path=model))
    rows = [{"prompt": [{"role": "user", "content": f"a={n};a?\n"}], "answer": str(n)} for n in range(2)]
    config = TaskConfig(name="dataset", chat_template_kwargs={"mark": "####"})
    task = build_task(config, policy.codec.chat_prompt, tables={"train": rows})
    problems = problem_range(task, "train", 2)
    groups = sample_groups(
        problems,
        policy.codec,
        TorchSampler(policy),
        task,
        group_size=1,
        max_new_tokens=4,
        temperature=1.0,
        address=(0,),
    )
    tokenizer = policy.codec.tokenizer
    expected = [
        tuple(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False, mark="####"))
        for row in rows
    ]
    assert [group.rollouts[0].prompt_ids for group in groups] == expected
    assert [tokenizer.convert_ids_to_tokens(ids[:2]) for ids in expected] == [["a", "="], ["a", "="]]


def test_cases_8_and_9_sft_on_the_command_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained tokens are those of the answers and one end of a turn each."""
    demos = tmp_path / "demos.jsonl"
    demos.write_text("".join(json.dumps({"prompt": "a=7;a?\n", "answer": "7"}) + "\n" for _ in range(4)))
    command = ["sft", "--model.path", model, "--task.name", "dataset", "--task.train_path", str(demos)]
    command += ["--task.chat_template", "true", "--updates", "1", "--batch_size", "2"]
    kwargs = ["--task.chat_template_kwargs", "{mark: '####'}"]
    assert main([*command, *kwargs, "--out", str(tmp_path / "out")]) == 0
    assert "tokens     4\n" in capsys.readouterr().out
    wrong = ["--task.chat_template_kwargs", "{makr: '####'}", "--out", str(tmp_path / "wrong")]
    assert main([*command, *wrong]) == 2
    error = capsys.readouterr().err
    assert "demos.jsonl line 1: task.chat_template_kwargs has 'makr', but the model's chat template has no var" in error
    assert error.count("\n") == 1


def test_case_8_the_trainer_passes_chat_template_kwargs(model: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [float(n % 2) for n in range(len(completions))]

    messages = [{"role": "user", "content": "a=7;a?\n"}, {"role": "assistant", "content": "a=", "name": "Kim"}]
    args = VinePPOConfig(
        output_dir=str(tmp_path / "run"),
        chat_template_kwargs={"mark": "####"},
        algorithm="grpo",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
    )
    trainer = VinePPOTrainer(model, reward, args, [{"prompt": messages}])
    assert trainer.config.task.chat_template_kwargs == {"mark": "####"} and trainer.args is args
    trainer.train()
    assert seen[0][0] == messages and seen[0][1][0]["role"] == "assistant"
    row = pq.read_table(tmp_path / "run/rollouts/000001.parquet").to_pylist()[0]
    assert row["prompt"] == "a=7;a?\na="  # the message is continued, so the template writes no mark


def test_case_8_settings_of_the_template() -> None:
    config = build_config({"task": {"name": "dataset", "chat_template_kwargs": {"enable_thinking": False}}}, "grpo")
    assert config.task.chat_template_kwargs == {"enable_thinking": False}
    text = {"task.name": "dataset", "task.chat_template_kwargs": "{enable_thinking: false}"}
    assert build_config({}, "grpo", text).task.chat_template_kwargs == {"enable_thinking": False}
    for settings, message in (
        (
            {"name": "dataset", "chat_template_kwargs": {"tools": []}},
            "task.chat_template_kwargs has tools, which the ta",
        ),
        ({"name": "dataset", "chat_template_kwargs": "x"}, "task.chat_template_kwargs is 'x' .*; it must map names to"),
        ({"chat_template_kwargs": {"a": 1}}, "task.chat_template_kwargs is set, but no chat template is applied to"),
        ({"name": "reasoning_gym:maze", "chat_template_kwargs": {"a": 1}}, "task.chat_template_kwargs is set, but no"),
        ({"chat_template": True}, "task.chat_template is true, but task.name is chain, whose prompts are plain text"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            build_config({"task": settings}, "grpo")
    with pytest.raises(UserError, match=r"^chat_template_kwargs is 'x' in VinePPOConfig; it must map names to"):
        VinePPOConfig(chat_template_kwargs="x").to_config(num_train=8)  # type: ignore[arg-type]
