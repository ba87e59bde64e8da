"""Plans of clusters: memory and seconds worked out by hand, properties that must hold, proposals that fit, messages."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import ROOT
from vineppo.cli.main import main
from vineppo.config.recipes import load_recipe, recipe_names
from vineppo.config.schema import (
    Config,
    KLConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    SamplerConfig,
)
from vineppo.config.settings import replace
from vineppo.plan import cluster_seconds as rates
from vineppo.plan.amounts import Amounts
from vineppo.plan.cluster import ClusterPlan, cluster_plan
from vineppo.plan.cluster_memory import RUNTIME, memory_per_gpu
from vineppo.plan.job import Job
from vineppo.plan.machines import cluster_of
from vineppo.plan.shape import GIB, KNOWN, Shape
from vineppo.training.configure import build_config
from vineppo.types import UserError

SEVEN = KNOWN["Qwen/Qwen2.5-7B-Instruct"]
TINY = Shape(parameters=1000, layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocabulary=10)


def settings(**changes: Any) -> Config:
    """Return the settings of a GRPO run with 7B: 64 rollouts, minibatches of 16, micro-batches of 4,096 tokens."""
    parts: dict[str, Any] = {
        "algorithm": "grpo",
        "model": ModelConfig(
            path="Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", device="cuda", gradient_checkpointing=True
        ),
        "rollouts": RolloutConfig(num_problems=8, group_size=8, max_new_tokens=600, max_rows=512, kv_memory=8),
        "learner": LearnerConfig(minibatch_size=16, epochs=1, micro_batch_tokens=4096, kl=KLConfig(coefficient=1e-3)),
    }
    return Config(**(parts | changes))


def planned(config: Config, cluster: str, links: str | None = None, **options: Any) -> ClusterPlan:
    return cluster_plan(config, cluster_of(cluster, links), **options)


@pytest.mark.parametrize(
    ("name", "kind", "tied"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2", True),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2", False),
        ("meta-llama/Llama-3.1-70B-Instruct", "llama", False),
    ],
)
def test_sizes_of_the_recipes_models_equal_those_of_transformers(name: str, kind: str, tied: bool) -> None:
    shape = KNOWN[name]
    config = AutoConfig.for_model(
        kind,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert shape.head_dim * shape.heads == shape.hidden


def test_memory_of_a_7b_model_on_eight_gpus_by_hand() -> None:
    memory = planned(settings(), "1x8xh100-80gb", response_tokens=200).memory
    n = 7_615_616_512
    assert memory["weights"] == 2 * n / 8  # bfloat16
    assert memory["optimizer"] == 12 * n / 8  # two moments and a master copy in float32
    # In bfloat16, and a float32 copy of those of the embeddings, which are more than 2^28.
    assert memory["gradients"] == (2 * n + 4 * 152_064 * 3584) / 8
    assert memory["reference"] == 2 * n / 8
    assert memory["critic"] == 0
    assert memory["whole policy"] == 2 * n and memory["engine weights"] == 0
    # Eight sequences of 120 tokens and a budget of 600; a token has 2 x 28 layers x 4 heads x 128 numbers of 2 bytes.
    assert memory["keys and values"] == 8 * 720 * (2 * 28 * 4 * 128 * 2)
    assert memory["next-token logits"] == 8 * 152_064 * 4
    # A block has q and o (3584 x 3584), k and v (3584 x 512), and three matrices of 3584 x 18944.
    block = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944
    assert memory["gathered layers"] == 2 * 2 * (2 * block + n - 28 * block)
    # Two sequences of a minibatch of 16 are a GPU's. The input of 28 layers is kept, and one layer whole.
    layer = (10 * 3584 + 4 * 18_944 + 4 * 28 * 128) * 2
    assert memory["activations"] == 2 * 320 * (3584 * 2 * 28 + layer)
    assert memory["logits"] == (1 << 23) * 18  # in chunks, because 400 x 152,064 logits are more than a chunk
    assert memory["peak update"] == pytest.approx(
        RUNTIME
        + ((2 + 12 + 2 + 2) * n + 4 * 152_064 * 3584) / 8
        + 2 * n
        + memory["gathered layers"]
        + memory["activations"]
        + memory["logits"]
    )
    assert memory["peak"] == max(memory["peak update"], memory["peak sampling"])


def test_memory_on_one_gpu_with_adapters_a_critic_and_float32() -> None:
    amounts = Amounts(4, 80, 10.0, 0.0, 1.0, 1)
    model = ModelConfig(path="x/tiny", dtype="float32", device="cuda")
    config = Config(algorithm="ppo", model=model, learner=LearnerConfig(minibatch_size=4, micro_batch_tokens=60))
    one = memory_per_gpu(Job(config, TINY, amounts, cluster_of("1x1xt4")))
    assert one["weights"] == 4000 and one["optimizer"] == 8000 and one["gradients"] == 2 * 4000
    assert one["critic"] == 4000 + 8000 and one["reference"] == 0
    # The sampler computes with the policy's weights.
    assert one["whole policy"] == one["engine weights"] == one["gathered layers"] == 0
    assert one["activations"] == 60 * 2 * (10 * 8 + 4 * 16 + 4 * 8) * 4
    assert one["logits"] == 60 * (80 / 4 / 30) * 10 * 20  # 2/3 of the tokens are trained; few logits, no chunks
    lora = replace(config, algorithm="grpo", model=replace(model, lora=LoraConfig(r=2)))
    two = memory_per_gpu(Job(lora, TINY, amounts, cluster_of("1x2xt4")))
    adapters = 2 * 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))  # rank x layers x widths
    assert two["optimizer"] == 8 * adapters / 2 and two["gradients"] == 4 * adapters / 2
    assert two["weights"] == 2000 and two["whole policy"] == 4000
    vllm = replace(config, sampler=SamplerConfig(engine="vllm"))  # It has its own weights, besides the trainer's.
    for cluster, whole in (("1x1xt4", 0), ("1x2xt4", 4000)):
        memory = memory_per_gpu(Job(vllm, TINY, amounts, cluster_of(cluster)))
        assert memory["whole policy"] == whole and memory["engine weights"] == 4000


def test_a_split_sampler_shares_weights_and_keys() -> None:
    """Training cannot do this yet, which the plan says."""
    whole, split = (planned(settings(), "1x8xh100", tensor_parallel=n) for n in (1, 4))
    assert split.memory["engine weights"] == whole.memory["whole policy"] / 4 and split.memory["whole policy"] == 0
    # Four times the sequences, a quarter of each. vLLM needs memory for 120 tokens and a third of 600.
    assert split.memory["keys and values"] / (120 + 200) == whole.memory["keys and values"] / (120 + 600)
    assert split.memory["weights"] == whole.memory["weights"]
    assert split.limits[0].startswith("not possible yet: training keeps the whole policy on every GPU")
    assert not any("not possible" in limit for limit in whole.limits)


def test_a_split_sampler_is_vllm_and_reads_its_weights_in_parallel() -> None:
    plan = planned(settings(), "1x8xh100", tensor_parallel=4, response_tokens=200)
    # 600 steps read the weights of a quarter of the model at 70% of 3.35 TB/s, and 32 sequences their keys and values.
    token = 2 * 28 * 4 * 128 * 2
    read = 600 * 2 * SEVEN.parameters + 32 * 200 * (120 + 100) * token
    assert plan.seconds["sample"]["rollouts"] == pytest.approx(read / 4 / (0.7 * 3.35e12))
    assert any("the sampler is vLLM, which splits its weights over 4 GPUs" in a.text for a in plan.assumptions)


def test_seconds_by_hand() -> None:
    plan = planned(settings(), "1x8xh100-80gb", response_tokens=200)
    # docs/results/gpu: 0.317 s for 16 x 512 tokens of the 0.5B model. Four updates; a GPU has two sequences of each.
    per_token = 0.317 / (494_032_768 * 16 * 512)
    assert plan.seconds["update"]["training passes"] == pytest.approx(4 * 2 * 320 * per_token * SEVEN.parameters)
    # Before the first update: old log-probabilities of 3 of 4 minibatches, and the reference, each a third of an update
    # without checkpointing.
    forward = 0.206 / 3 / (494_032_768 * 16 * 512) * SEVEN.parameters
    assert plan.seconds["update"]["forward passes"] == pytest.approx(1.75 * 64 * 320 * forward / 8)
    # 450 GB/s in one direction, 70% of it, 7/8 of the weights; twice in every update, and 1.75 times 4 micro-batches.
    gather = 2 * SEVEN.parameters * 7 / 8 / (0.7 * 450e9)
    assert plan.seconds["update"]["all-gather"] == pytest.approx(gather * (2 * 4 + 1.75 * 64 * 320 / 8 / 640))
    assert plan.seconds["update"]["reduce-scatter"] == pytest.approx(4 * 2 * gather)
    assert plan.seconds["transfer"]["weights to samplers"] == pytest.approx(gather)
    # 600 decode steps, that of the longest response, wait for the launches of 28 layers.
    assert plan.seconds["sample"]["rollouts"] == pytest.approx(600 * 28 * 0.03854 / 22)
    assert plan.seconds["credit"]["continuations"] == 0
    assert plan.seconds_per_iteration == pytest.approx(sum(plan.phases.values()))


def test_rates_are_those_of_the_measured_files() -> None:
    first = json.loads((ROOT / "docs/results/gpu/gpu.json").read_text())["parts"]["update"]["tables"]["updates"]
    for row in first:
        assert rates.UPDATE_SECONDS[row["dtype"], row["gradient checkpointing"]] == row["seconds, second"]
        assert (row["sequences"], row["tokens"]) == (16, 512)
    second = json.loads((ROOT / "docs/results/gpu/second/gpu.json").read_text())["parts"]["speed"]["tables"]
    steps = [
        row["ms per token step"]
        for row in second["tokens per second"]
        if row["engine"] == "sampler" and row["model"].startswith("1.1B") and row["rows"] == 2048
    ]
    assert [step / 1000 / 22 for step in steps] == pytest.approx([rates.LAUNCH_SECONDS])
    assert pytest.approx(2 * 1.1e9 * 2048 / (steps[0] / 1000) / 989e12, rel=1e-3) == rates.DECODING
    [calls] = [row for row in second["calls per token step"] if row["engine"] == "sampler"]
    assert calls["share of time on the GPU"] == rates.WORKING


def test_what_no_gpu_has_run_is_an_assumption_where_it_is_used() -> None:
    for sampler, used in (
        (SamplerConfig(graph=True), 1),
        (SamplerConfig(), 0),
        (SamplerConfig(graph=True, engine="vllm"), 0),
    ):
        found = planned(settings(sampler=sampler), "1x8xh100-80gb").assumptions
        graphs = [a for a in found if a.text.startswith("CUDA graphs (sampler.graph)")]
        assert [a.source for a in graphs] == ["assumed"] * used
        assert all("without them the GPU works for 24% of a decode step" in a.text for a in graphs)


def test_several_nodes_are_as_fast_as_the_slower_link() -> None:
    assert rates.link_speed(cluster_of("1x8xh100")) == 450e9
    assert rates.link_speed(cluster_of("2x8xh100")) == 400e9  # eight adapters of 400 Gbit/s
    assert rates.link_speed(cluster_of("2x8xh100", "network=100")) == 12.5e9
    assert rates.link_speed(cluster_of("2x8xh100", "nvlink=100gb,network=1tbit")) == 50e9
    assert cluster_of("1x4xl4").links.network == 25e9 / 8
    assert cluster_of("1x4xa100-40gb").gpu.memory == 40 * GIB and cluster_of("1x8xH100-80GB") == cluster_of(
        "1x8xh100-80gb"
    )


@pytest.mark.parametrize("algorithm", ["vineppo", "ppo", "grpo"])
def test_more_gpus_never_need_more_memory_or_more_time_for_the_computation(algorithm: str) -> None:
    config = settings(algorithm=algorithm)
    plans = [planned(config, f"{nodes}x8xh200") for nodes in (1, 2, 4, 8)]
    for few, many in itertools.pairwise(plans):
        assert many.memory["peak"] <= few.memory["peak"]
        for phase, part in (("update", "training passes"), ("sample", "rollouts"), ("credit", "continuations")):
            assert many.seconds[phase][part] <= few.seconds[phase][part]
    assert plans[-1].limits  # 16 sequences of a minibatch for 64 GPUs
    assert "a minibatch has 16 sequences for 64 GPUs, so 75% of their time in updates is not used" in plans[-1].limits


def test_faster_links_and_shorter_responses_never_take_longer() -> None:
    slow, fast = (planned(settings(), "2x8xh200", f"network={speed}") for speed in (100, 3200))
    assert slow.phases["update"] > fast.phases["update"] and slow.phases["sample"] == fast.phases["sample"]
    short, long = (planned(settings(), "2x8xh200", response_tokens=tokens) for tokens in (100, 500))
    assert short.seconds_per_iteration < long.seconds_per_iteration and short.memory["peak"] < long.memory["peak"]


def proposed(message: str, config: Config, cluster: str) -> ClusterPlan:
    """Return the plan with the first settings that a message proposes."""
    words = message.partition("it fits with ")[2].partition(", or with ")[0].partition(" (")[0]
    overrides = dict[str, str]()
    for change in words.split(" and "):
        key, value = change.removeprefix("--").split(" ")
        if key == "cluster":
            cluster = value
        else:
            overrides[key] = value
    return planned(build_config(config_dict(config), None, overrides), cluster)


def config_dict(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("cluster", "changes", "proposal"),
    [
        ("1x8xa100-40gb", {}, "--cluster 2x8xa100-40gb, or with model.lora.r 16"),
        ("1x1xh100-80gb", {}, "--cluster 1x4xh100-80gb, or with model.lora.r 16"),
        (
            "1x8xh100-80gb",
            {
                "rollouts": RolloutConfig(
                    num_problems=512, group_size=8, max_new_tokens=16_384, max_rows=4096, kv_memory=64
                )
            },
            "rollouts.kv_memory 32 (the result is the same)",
        ),
        (
            "1x8xa100-80gb",
            {"learner": LearnerConfig(minibatch_size=4096, epochs=1, micro_batch_tokens=1 << 20)},
            "learner.micro_batch_tokens",
        ),
    ],
)
def test_a_proposal_fits(cluster: str, changes: dict[str, Any], proposal: str) -> None:
    config = settings(**changes)
    if "learner" in changes:
        config = replace(config, rollouts=replace(config.rollouts, num_problems=512))
    with pytest.raises(UserError) as caught:
        planned(config, cluster)
    message = str(caught.value)
    assert "\n" not in message and f"it fits with {proposal}" in message
    plan = proposed(message, config, cluster)
    assert plan.memory["peak"] <= plan.available


def test_a_model_that_no_setting_makes_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = Shape(10**14, 100, 1 << 16, 1 << 18, 128, 8, 512, 100_000)
    monkeypatch.setattr("vineppo.plan.shape.KNOWN", {"org/huge": huge})
    with pytest.raises(UserError, match="no setting that plan knows makes it fit: take a smaller model"):
        planned(settings(model=ModelConfig(path="org/huge", dtype="bfloat16")), "1x8xh100")


def test_70b_does_not_fit_because_every_gpu_has_the_whole_policy() -> None:
    seventy = ModelConfig(path="meta-llama/Llama-3.1-70B-Instruct", dtype="bfloat16")
    with pytest.raises(UserError, match=r"\(whole policy 131\.\d, .* and 76\.0 of its 80 GiB .*; no setting that plan"):
        planned(settings(model=seventy), "8x8xh100-80gb")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "8xh100"], "--cluster is '8xh100'; give NODESxGPUSxKIND"),
        (["--cluster", "0x8xh100"], "--cluster is '0x8xh100'; give NODESxGPUSxKIND"),
        (["--cluster", "1x8xk80"], "unknown GPU k80 in --cluster 1x8xk80; "),
        (["--cluster", "1x8xh100", "--links", "nvlink"], "--links has the entry 'nvlink'; give nvlink=NUMBER"),
        (["--cluster", "1x8xh100", "--links", "nvlink=0"], "--links has the entry 'nvlink=0'"),
        (["--cluster", "1x8xh100", "--links", "network=4parsec"], "--links has the entry 'network=4parsec'"),
        (["--cluster", "1x8xh100", "--links", "network=4,network=5"], "--links has the entry 'network=5'"),
        (["--cluster", "1x8xh100", "--tensor_parallel", "3"], "--tensor_parallel is 3; it must divide the 8 GPUs"),
        (["--cluster", "1x8xh100", "--tensor_parallel", "0"], "--tensor_parallel is 0; it must be at least 1"),
        (["--cluster", "1x8xh100", "--gpu", "h100"], "--gpu and --cluster are both given"),
        (["--cluster", "1x8xh100", "--response_tokens", "0"], "--response_tokens is 0; it must be above 0"),
        (["--cluster", "1x8xh100", "--response_tokens", "513"], "a response has at most 512 tokens (rollouts.max_new"),
        (["--links", "nvlink=900"], "--links is nvlink=900; it needs --cluster"),
    ],
)
def test_bad_options_get_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpu/qwen7b-gsm8k", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_recipes_for_gpus_fit_the_machines_that_they_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"gpu/qwen05b-gsm8k": "1x1xh100-80gb", "gpu/qwen7b-gsm8k": "1x8xh100-80gb"}
    assert set(names) == {name for name in recipe_names() if name.startswith("gpu/")}
    for name, cluster in names.items():
        config = build_config(load_recipe(name), name=name)
        assert config.model.path in KNOWN and config.algorithm == "vineppo"
        target = tmp_path / "plan.json"
        assert main(["plan", name, "--cluster", cluster, "--json", str(target)]) == 0
        out = capsys.readouterr().out
        assert f"cluster {cluster}: " in out and "GiB of a GPU" in out
        figures = json.loads(target.read_text())
        assert figures["memory"]["peak"] < figures["available"]
        assert figures["seconds_per_iteration"] == pytest.approx(sum(figures["phases"].values()))
        assert {entry["source"] for entry in figures["assumptions"]} == {"datasheet", "measured", "assumed"}
        assert all(entry["text"] in out for entry in figures["assumptions"])


def test_given_links_are_listed_as_given() -> None:
    plan = planned(settings(), "2x8xh100", "network=100gbit")
    sources = {assumption.text.partition(" ")[0]: assumption.source for assumption in plan.assumptions}
    assert sources["100"] == "given" and sources["900"] == "datasheet"
