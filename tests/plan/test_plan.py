"""Plans: figures worked out by hand, a calibration compared with the actual run, and error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import small_config
from vineppo.cli.common import training_config
from vineppo.cli.main import main
from vineppo.config.recipes import load_recipe, recipe_names
from vineppo.config.schema import Config, LearnerConfig, LoraConfig, ModelConfig, RolloutConfig
from vineppo.config.settings import replace
from vineppo.plan.amounts import guessed_amounts
from vineppo.plan.datasheet import separate_passes
from vineppo.plan.memory import memory_by_kind
from vineppo.plan.predict import plan
from vineppo.plan.shape import GIB, KNOWN
from vineppo.training.configure import build_config
from vineppo.training.loop import train
from vineppo.types import UserError


@pytest.mark.parametrize("name", ["microsoft/rho-math-1b-v0.1", "deepseek-ai/deepseek-math-7b-base"])
def test_sizes_of_the_papers_models_equal_those_of_transformers(name: str) -> None:
    shape = KNOWN[name]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_calibration_predicts_the_counts_of_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", rollouts=RolloutConfig(num_problems=8, group_size=4, max_new_tokens=40))
    prediction = plan(config, problems=8)
    assert prediction.iterations == 4 and prediction.amounts.updates == 4 and prediction.amounts.rollouts == 32
    summary = train(config)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    # The calibration runs a part of the first iteration; here all 8 problems.
    assert prediction.amounts.rollout_tokens == first["tokens/rollouts"]
    assert prediction.amounts.mc_tokens == first["tokens/mc"]
    assert prediction.amounts.steps_per_response == first["credit/steps_per_response"]
    assert 0.5 * summary["peak_memory_bytes"] < prediction.memory["peak"] < 2 * summary["peak_memory_bytes"]
    half = plan(config, problems=4).amounts
    assert half.rollout_tokens == pytest.approx(prediction.amounts.rollout_tokens, rel=0.2) and half.updates == 4
    others = {name: tokens for name, tokens, _ in prediction.variants}
    assert others["vineppo.num_mc_rollouts 18"] == pytest.approx(9 * prediction.amounts.mc_tokens)  # K is 2 here


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        # 8 of 32 rollouts are in the first minibatch. The old log-probabilities need a pass over all samples, because
        # the training pass of a minibatch leaves out tokens without credit.
        ({}, 1),
        ({"learner.kl.coefficient": "0.1"}, 0.75 + 1),
        ({"learner.kl.coefficient": "0.1", "learner.kl.share": "0.5"}, 0.875 + 0.5),
        ({"learner.kl.coefficient": "0.1", "learner.kl.place": "reward"}, 1 + 1),
        ({"learner.entropy_coefficient": "0.1"}, 0.75),
        ({"learner.entropy_coefficient": "0.1", "learner.minibatch_size": "32"}, 0),
        ({"learner.entropy_coefficient": "0.1", "model.lora.r": "4", "model.lora.dropout": "0.1"}, 1),
    ],
)
def test_forward_passes_before_the_first_update(changes: dict[str, str], passes: float) -> None:
    settings = {"learner.kl.coefficient": "0", "learner.minibatch_size": "8", **changes}
    config = training_config("judgement", settings, "rloo")
    assert separate_passes(config, 32) == pytest.approx(passes)


def test_memory_by_hand_with_and_without_adapters() -> None:
    config = Config(model=ModelConfig(path="microsoft/rho-math-1b-v0.1", dtype="bfloat16", device="cuda"))
    full = plan(config, gpu="h100").memory
    n = KNOWN["microsoft/rho-math-1b-v0.1"].parameters
    assert full["weights"] == 2 * n and full["optimizer"] == 12 * n and full["gradients"] == 2 * n + GIB
    assert full["reference"] == 0 and full["critic"] == 0
    with_kl = replace(config, learner=replace(config.learner, kl=replace(config.learner.kl, coefficient=1e-3)))
    assert plan(with_kl, gpu="h100").memory["reference"] == 2 * n
    assert plan(replace(config, algorithm="ppo"), gpu="h100").memory["critic"] == 16 * n + GIB
    lora = replace(with_kl, model=replace(config.model, lora=LoraConfig(r=16)))
    memory = plan(lora, gpu="h100").memory
    # Rank 16 on seven layers: q, k, v, o, gate, up, down of 22 layers.
    sides = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 5632)
    assert memory["optimizer"] == 8 * 16 * sides * 22 and memory["reference"] == 0


def test_plan_that_does_not_fit_is_refused_with_a_setting_that_fits() -> None:
    model = ModelConfig(path="microsoft/rho-math-1b-v0.1", dtype="bfloat16", device="cuda")
    config = Config(
        model=model,
        rollouts=RolloutConfig(num_problems=64, group_size=8, max_new_tokens=1024, kv_memory=40, max_rows=8192),
        learner=LearnerConfig(micro_batch_tokens=1 << 17),
    )
    fits = r"needs about .* GiB of memory and 80.0 GiB are available; it fits with learner.micro_batch_tokens (\d+)"
    with pytest.raises(UserError, match=fits) as caught:
        plan(config, gpu="h100")
    number = int(str(caught.value).split("micro_batch_tokens ")[1].split()[0])
    fitting = replace(config, learner=replace(config.learner, micro_batch_tokens=number))
    assert plan(fitting, gpu="h100").memory["peak"] <= 80 * GIB
    with pytest.raises(UserError, match=r"try model.lora.r 16, or a smaller model"):
        plan(replace(fitting, model=replace(model, path="deepseek-ai/deepseek-math-7b-base")), gpu="t4")
    assert plan(fitting, gpu="8xrtx4090").available == 8 * 24 * GIB
    for unknown in ("k80", "0xh100", "8xk80", "x"):
        with pytest.raises(UserError, match=f"unknown --gpu {unknown}; allowed: t4"):
            plan(config, gpu=unknown)


def test_run_that_cannot_fit_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vineppo.plan.calibration.available_memory", lambda device: 16 * GIB)
    monkeypatch.setattr("vineppo.plan.shape.KNOWN", {"org/large": KNOWN["deepseek-ai/deepseek-math-7b-base"]})
    config = Config(model=ModelConfig(path="org/large"))  # does not exist: loading it would raise another error
    message = r"needs about 1\d\d\.\d GiB of memory and 16.0 GiB are available; try model.lora.r 16, or model.dtype"
    with pytest.raises(UserError, match=message):
        plan(config)


def test_seconds_depend_on_the_algorithm_and_limit_a_run() -> None:
    model = ModelConfig(path="microsoft/rho-math-1b-v0.1", dtype="bfloat16", device="cuda")
    plans = {name: plan(Config(algorithm=name, model=model), gpu="h100") for name in ("grpo", "ppo")}
    assert plans["grpo"].seconds["credit"] == 0 < plans["ppo"].seconds["credit"]
    limited = replace(Config(model=model), run=replace(Config().run, max_seconds=20.0))
    prediction = plan(limited, gpu="h100")
    n, seconds = prediction.iterations, prediction.seconds_per_iteration
    assert (n - 1) * seconds < 20 <= n * seconds


def test_every_recipe_of_the_paper_can_be_planned() -> None:
    names = [name for name in recipe_names() if name.startswith("paper/")]
    assert len(names) == 20
    for name in names:
        if name.endswith("-sft"):
            continue
        config = build_config(load_recipe(name), name=name)
        updates = 16_000 if "-math-" in name else 10_400
        assert config.learner.warmup_updates == 0.03 * updates
        prediction = plan(config, gpu="h200" if "rho" in name else "8xh100")
        assert prediction.iterations * prediction.amounts.updates == updates and prediction.amounts.updates == 16


def test_command_prints_the_plan_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    assert main(["plan", "paper/rho1b-math-vineppo", "--gpu", "h100", "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "realtreetune/rho-1b-sft-MATH: 512 rollouts per iteration, 1,000 iterations, 16,000 updates" in out
    figures = json.loads(target.read_text())
    assert figures["seconds_per_iteration"] == pytest.approx(sum(figures["seconds"].values()))
    assert main(["plan", "sft-judgement"]) == 2
    assert main(["plan", "judgement", "--response_tokens", "40"]) == 2
    assert "--response_tokens is 40; it must be above 0 and needs --gpu" in capsys.readouterr().err
    assert main(["plan", "paper/rho1b-math-vineppo", "--gpu", "h100", "--response_tokens", "0"]) == 2
    assert "--response_tokens is 0; it must be above 0 and needs --gpu" in capsys.readouterr().err


def test_the_default_memory_of_keys_and_values_follows_from_the_gpu() -> None:
    """Many long responses of the 1.1B model: weights and optimizer take 2 + 12 bytes of each parameter."""
    model = ModelConfig(path="microsoft/rho-math-1b-v0.1", dtype="bfloat16", device="cuda")
    rollouts = RolloutConfig(num_problems=4096, group_size=8, max_new_tokens=3072, max_rows=1 << 15)
    config = Config(algorithm="grpo", model=model, rollouts=rollouts)
    shape = KNOWN["microsoft/rho-math-1b-v0.1"]
    n, amounts = shape.parameters, guessed_amounts(config, 3000)

    def keys_and_values(of: Config, gibibytes: int) -> float:
        return memory_by_kind(of, shape, amounts, n, gibibytes * GIB)["keys and values"] / GIB

    for total, expected in ((80, 32), (24, 4), (16, 1)):
        assert expected <= max(2, total - 14 * n / GIB) / 2 < 2 * expected
        assert keys_and_values(config, total) == expected
    assert keys_and_values(config, 0) == 4  # a CPU
    assert keys_and_values(replace(config, rollouts=replace(rollouts, kv_memory=3.0)), 80) == 3
