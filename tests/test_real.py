"""Tests with a real pretrained model, SmolLM2-135M-Instruct."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import data_directory
from vineppo import VinePPOConfig
from vineppo.config.schema import (
    Config,
    EvalConfig,
    GradingConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
)
from vineppo.credit.vineppo import VinePPOSettings
from vineppo.model.batch import pad
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.steps import build_splitter
from vineppo.training.configure import config_class
from vineppo.training.loop import train
from vineppo.types import Chat, Problem, SampleRequest

pytestmark = pytest.mark.real

TEMPLATE = (
    "Solve the problem step by step, one short line per step. End with a line `#### ` and the number.\n\n{prompt}"
)
FALLBACK_PROBLEMS = [
    {
        "question": f"Ann has {a} apples and buys {b} bags of {c}. How many apples has she?",
        "answer": f"#### {a + b * c}",
    }
    for a in range(2, 6)
    for b in range(2, 4)
    for c in range(2, 4)
]


def problems_file(tmp_path: Path) -> Path:
    """Return the file of GSM8K's training problems if it exists, or else a file of simple problems in the same form."""
    data = data_directory()
    if data is not None and (data / "gsm8k/train.jsonl").exists():
        return data / "gsm8k/train.jsonl"
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps(problem) for problem in FALLBACK_PROBLEMS))
    return path


def share_of_lines_with_digits(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that an untrained model earns sometimes."""
    return [sum(any(c.isdigit() for c in line) for line in t.split("\n")) / (1 + t.count("\n")) for t in completions]


def real_config(model: Path, problems: Path, run_dir: Path) -> Config:
    config_type: Any = config_class("vineppo")
    config: Config = config_type(
        model=ModelConfig(path=str(model), dtype="bfloat16"),
        task=TaskConfig(
            name="dataset",
            train_path=str(problems),
            prompt_column="question",
            answer_column="answer",
            rewards=("hash",),
            prompt_template=TEMPLATE,
            chat_template=True,
            grading=GradingConfig(truncated=False),
        ),
        rollouts=RolloutConfig(num_problems=2, group_size=2, max_new_tokens=48),
        vineppo=VinePPOSettings(num_mc_rollouts=2, max_states=4),
        learner=LearnerConfig(lr=1e-5, epochs=1, minibatch_size=4, micro_batch_tokens=1024),
        eval=EvalConfig(every=0, num_problems=2, final_num_problems=2),
        run=RunConfig(dir=str(run_dir), iterations=2, checkpoint_every=0),
    )
    return config


def user_prompt(policy: Policy, text: str) -> tuple[int, ...]:
    """Return the token ids of a message of the user, formatted with the chat template."""
    return policy.codec.prompt_ids(Problem("p", text, chat=Chat.of_user(text)))


def test_sampler_equals_trainer_on_a_real_model(smollm2: Path) -> None:
    """For prompts and for states, in float32, with grouped-query attention and a vocabulary of 49,152."""
    policy = Policy.load(ModelConfig(path=str(smollm2)))
    prompt = user_prompt(policy, "What is 12 + 30? Think in steps.")
    for temperature in (1.0, 0.6):
        sampler = TorchSampler(policy)
        first = sampler.sample([SampleRequest(prompt, 4, 24, seed=1, temperature=temperature)])[0]
        stem = prompt + first[0].token_ids
        states = [
            SampleRequest(stem[: len(prompt) + cut], 2, 12, seed=2 + cut, temperature=temperature)
            for cut in (0, 5, 11, 20)
        ]
        completions = [(prompt, c) for c in first]
        completions += [(s.prompt_ids, c) for s, cs in zip(states, sampler.sample(states), strict=True) for c in cs]
        token_ids = pad([p + c.token_ids for p, c in completions], torch.int64)
        mask = pad([[0] * len(p) + [1] * len(c.token_ids) for p, c in completions], torch.bool)
        with torch.no_grad():
            expected, _ = token_logprobs(policy.model, token_ids, mask, temperature)
        sampled = torch.tensor([x for _, c in completions for x in c.logprobs])
        assert float((sampled - expected).abs().max()) < 1e-4


def test_greedy_equals_generate_on_a_real_model(smollm2: Path) -> None:
    policy = Policy.load(ModelConfig(path=str(smollm2)))
    prompt = user_prompt(policy, "Name three primes.")
    request = SampleRequest(prompt, 1, 24, seed=0, temperature=0.0)
    sampled = TorchSampler(policy).sample([request])[0][0].token_ids
    expected = policy.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
    assert list(sampled) == expected.tolist()


def test_vineppo_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """Two iterations in bfloat16. The columns of the Parquet files are consistent with each other."""
    run = tmp_path / "run"
    config = real_config(smollm2, problems_file(tmp_path), run)
    summary = train(config, reward_fn=share_of_lines_with_digits)
    assert summary["updates"] == 2 and summary["tokens"]["mc"] > 0

    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    splitter = build_splitter("newline")
    rows = [row for i in (1, 2) for row in pq.read_table(run / f"rollouts/{i:06d}.parquet").to_pylist()]
    assert len(rows) == 8
    for row in rows:
        texts = [tokenizer.decode([i], skip_special_tokens=True) for i in row["response_ids"]]
        ends = splitter(texts)
        assert set(row["step_ends"]) <= set(ends) and row["step_ends"][-1] == len(row["response_ids"])
        assert "".join(row["step_texts"]) == row["response"]
        after = [*row["values"][1:], row["reward"]]
        for i, (value, advantage) in enumerate(zip(row["values"], row["step_advantages"], strict=True)):
            assert advantage == pytest.approx(after[i] - value, abs=1e-12)
            assert row["num_mc_rollouts"][i] == 2
        starts = [0, *row["step_ends"][:-1]]
        for start, end, advantage in zip(starts, row["step_ends"], row["step_advantages"], strict=True):
            assert row["token_advantages"][start:end] == pytest.approx([advantage] * (end - start), abs=1e-6)
        assert row["reward"] == 0.0 if row["finish_reason"] == "length" else row["reward"] >= 0.0
        assert math.isclose(row["values"][0] + sum(row["step_advantages"]), row["reward"], abs_tol=1e-12)

    before = AutoModelForCausalLM.from_pretrained(smollm2)
    after_model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert type(before) is type(after_model) and after_model.dtype == torch.bfloat16


SCRIPT = """
import json, sys
from datasets import Dataset
from LIBRARY import CONFIG, TRAINER

model, out = sys.argv[1:]

def brief(completions, longest, **kwargs):
    return [max(0.0, 1 - len(text) / most) for text, most in zip(completions, longest)]

async def has_digit(prompts, completions, completion_ids, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids)
    return [float(any(c.isdigit() for c in text)) if ids else None for text, ids in zip(completions, completion_ids)]

trainer = TRAINER(
    model=model,
    reward_funcs=[brief, has_digit],
    args=CONFIG(
        output_dir=out, learning_rate=1e-4, per_device_train_batch_size=8, num_generations=4, max_completion_length=24,
        max_steps=2, beta=0.04, temperature=0.9, num_iterations=1, reward_weights=[1.0, 0.5], logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, seed=3,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"Count to {n}.", "longest": 80} for n in range(12)]),
)
trainer.train()
logs = [line for line in trainer.state.log_history if "reward" in line]
names = ["reward", "rewards/brief/mean", "rewards/has_digit/mean", "completions/mean_length"]
names += ["completions/clipped_ratio", "learning_rate", "grad_norm", "entropy"]
print("LOGS" + json.dumps([[line[name] for name in names] for line in logs]))
"""


def test_defaults_equal_those_of_trl_except_for_the_documented_ones() -> None:
    trl = pytest.importorskip("trl")
    expected = {f.name: f for f in dataclasses.fields(trl.GRPOConfig)}
    different = {
        f.name
        for f in dataclasses.fields(VinePPOConfig)
        if f.name in expected and f.default != expected[f.name].default
    }
    assert different == {"output_dir", "bf16"}
    for name, field in expected.items():  # every field of TRL is accepted with TRL's default
        if field.default is not dataclasses.MISSING:
            VinePPOConfig(**{name: field.default})


@pytest.mark.parametrize(
    ("library", "config", "trainer"),
    [("trl", "GRPOConfig", "GRPOTrainer"), ("vineppo", "VinePPOConfig", "VinePPOTrainer")],
)
def test_the_same_script_runs_with_trl_and_with_vineppo(
    smollm2: Path, tmp_path: Path, library: str, config: str, trainer: str
) -> None:
    pytest.importorskip("trl")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("LIBRARY", library).replace("CONFIG", config).replace("TRAINER", trainer))
    done = subprocess.run(
        [sys.executable, str(script), str(smollm2), str(tmp_path / "out")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("LOGS")]
    logs = json.loads(line[4:])
    assert len(logs) == 2
    for reward, brief, digit, length, clipped, rate, norm, entropy in logs:
        assert 0 <= brief <= 1 and 0 <= digit <= 1 and 0 <= clipped <= 1
        assert reward == pytest.approx(brief + 0.5 * digit, abs=1e-5)
        assert 1 <= length <= 24 and 0 <= rate <= 1e-4 and norm > 0 and entropy > 0
