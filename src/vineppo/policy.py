"""The language models: policy, frozen reference and value network, with the two numbers we ask of them per token."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from vineppo.config import LoraConfig, ModelConfig
from vineppo.hardware import cpu_multiplies
from vineppo.types import UserError

EMBEDDED = "embedded:"


def resolve_model_path(path: str) -> str:
    """Directory or hub id of a model; `embedded:NAME` is a directory inside the package.

    Raises:
        UserError: for an unknown embedded name, or a path that looks local and is no model directory.
    """
    if path.startswith(EMBEDDED):
        root = Path(str(importlib.resources.files("vineppo") / "models"))
        names = sorted(p.name for p in root.glob("*/") if (p / "config.json").exists())
        name = path[len(EMBEDDED) :]
        if name not in names:
            known = ", ".join(EMBEDDED + n for n in names) or "none is installed"
            raise UserError(f"model.path is {path!r}; no such embedded model (known: {known})")
        return str(root / name)
    local = Path(path).expanduser()
    if path and local.is_dir():
        if not (local / "config.json").exists():
            raise UserError(f"model.path {path!r} has no config.json; give a directory saved by save_pretrained")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise UserError(f"model.path {path!r} does not exist; give a model directory or a hub id such as org/name")
    return str(local) if local.is_dir() else path


def load_pretrained(config: ModelConfig) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory or hub id, in the dtype and on the device asked for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    _warn_of_slow_numbers(config)
    path = resolve_model_path(config.path)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **options, **attention)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path {config.path!r} could not be loaded: {reason}") from error
    with told_of_device(config.device):
        model = model.to(config.device)
    return with_checkpointing(model) if config.gradient_checkpointing else model, tokenizer


def with_checkpointing(model: Any) -> Any:
    """The same model, which recomputes its activations in the backward pass."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"{type(model).__name__} cannot recompute activations; set gradient_checkpointing to false")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextlib.contextmanager
def told_of_device(device: str) -> Iterator[None]:
    """A device that PyTorch does not have is told in one line."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or "not available").splitlines()[0]
        raise UserError(f"model.device is {device!r}: {reason}; `vineppo doctor` lists what there is") from error


def _warn_of_slow_numbers(config: ModelConfig) -> None:
    dtype = getattr(torch, config.dtype)
    if dtype.itemsize == 2 and config.device.startswith("cpu") and not cpu_multiplies(dtype):
        warnings.warn(
            f"model.dtype {config.dtype}: this CPU has no instructions for it and multiplies several times slower than "
            "with float32; use model.dtype float32 unless memory is short",
            stacklevel=3,
        )


def without_dropout(model: Any) -> Any:
    """Evaluation mode, but for layers that recompute their activations: transformers does so in training mode only."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # some families read their own flag
    return model


class Policy:
    """A causal language model with its tokenizer. Deterministic: dropout is never active outside of `dropout()`.

    With adapters, `model` is the model that they sit in, and `adapters` the peft model around it.
    """

    def __init__(self, model: Any, tokenizer: Any, adapters: Any = None):
        self.model = without_dropout(model)
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.eos_ids = _eos_ids(model, tokenizer)
        self._token_texts: dict[int, str] = {}

    @classmethod
    def load(cls, config: ModelConfig) -> Policy:
        """The model at `config.path`, with fresh adapters where they are asked for."""
        model, tokenizer = load_pretrained(config)
        return cls(model, tokenizer, with_adapters(model, config.lora) if config.lora.r else None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the model was made for."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30)

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with whatever the tokenizer puts in front (BOS) and nothing behind.

        Raises:
            UserError: when the text has no tokens.
        """
        bos = self.tokenizer.bos_token
        # A chat template may have written the BOS itself; the tokenizer would put a second one in front.
        ids = list(self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids)
        while ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
            ids.pop()
        if not ids:
            raise UserError("a prompt is empty: it has no tokens; check task.prompt_column and task.prompt_template")
        return tuple(ids)

    def chat_prompt(self, text: str | Sequence[Mapping[str, str]]) -> str:
        """A user's message, or a whole conversation, in the tokenizer's chat template, up to where the answer begins.

        Raises:
            UserError: when the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template; set task.chat_template to false, and give prompts as text"
            )
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise UserError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens removed."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each token as it stands inside of a text; special tokens are empty. For boundaries, not to join."""
        for token in token_ids:
            if token not in self._token_texts:
                self._token_texts[token] = self._text_inside(token)
        return [self._token_texts[token] for token in token_ids]

    def _text_inside(self, token: int) -> str:
        """A token's text behind another one: at the beginning of a text, decoders of SentencePiece drop the space."""
        alone, twice = self.decode([token]), self.decode([token, token])
        # What the second of two adds to the first; half a character may melt into one with itself.
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    def frozen_copy(self) -> Policy:
        """The same policy, for ever."""
        model = copy.deepcopy(self.model)
        model.requires_grad_(False)
        return Policy(model, self.tokenizer)

    @contextlib.contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Adapters' dropout is active inside the block, with random numbers from this seed."""
        if self.adapters is None:
            yield
            return
        layers = [module for name, module in self.model.named_modules() if "lora_dropout" in name]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for layer in layers:
                layer.train()
            try:
                yield
            finally:
                for layer in layers:
                    layer.eval()

    def save(self, path: Path | str) -> None:
        """Write weights, configuration and tokenizer so that `AutoModelForCausalLM.from_pretrained` loads them.

        With adapters, the weights are merged with them; the adapters alone go into the folder `adapter`, for peft.
        """
        model = self.model
        if self.adapters is not None:
            self.adapters.save_pretrained(Path(path) / "adapter")
            model = copy.deepcopy(self.adapters).merge_and_unload()
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


class Reference:
    """The starting policy for ever: a copy, or the same weights without their adapters."""

    def __init__(self, policy: Policy):
        self._policy = policy if policy.adapters is not None else policy.frozen_copy()

    @contextlib.contextmanager
    def active(self) -> Iterator[Policy]:
        """The policy as it was at the start, inside the block."""
        with self._policy.adapters.disable_adapter() if self._policy.adapters is not None else contextlib.nullcontext():
            yield self._policy


def with_adapters(model: Any, config: LoraConfig) -> Any:
    """Put fresh adapters into a model, which changes it, and freeze its other weights; the peft model around it.

    Raises:
        UserError: where peft is not installed, or the model has no layers of those names.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("model.lora needs peft: pip install 'vineppo[lora]'") from error
    targets: Any = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # every run starts from the same adapters, whatever was drawn before
        try:
            return peft.get_peft_model(model, settings)
        except ValueError as error:
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(
                f"model.lora.targets {', '.join(config.targets)} are not in this model; its layers: {', '.join(linear)}"
            ) from error


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of a module: everything, or where some weights are frozen only the others."""
    state, frozen = module.state_dict(), _has_frozen(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained} if frozen else state


def load_trained_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Take over what `trained_state` returned."""
    module.load_state_dict(state, strict=not _has_frozen(module))


def _has_frozen(module: nn.Module) -> bool:
    return not all(p.requires_grad for p in module.parameters())


class ValueNetwork(nn.Module):
    """A full language model body with a linear head: the value of the state before each token.

    The body starts as a copy of the policy's, the head with standard deviation head_scale / sqrt(hidden + 1) and no
    bias, as in the reference settings of PPO in the VinePPO paper (scale 1). Where the policy has adapters, the body
    has its own of the same kind, and shares the frozen weights.
    """

    def __init__(self, policy: Policy, seed: int, head_scale: float = 1.0):
        super().__init__()
        frozen = [p for p in policy.model.parameters() if not p.requires_grad] if policy.adapters is not None else []
        # What adapters leave alone is shared with the policy: a second copy of it would only cost memory.
        self.body = copy.deepcopy(policy.model.base_model, {id(p): p for p in frozen})
        if policy.adapters is None:
            self.body.requires_grad_(True)
        hidden = policy.model.config.get_text_config().hidden_size
        weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))  # (1, H)
        self.head = nn.Linear(hidden, 1, bias=False)
        self.head.weight.data.copy_(weight * (head_scale / (hidden + 1) ** 0.5))
        self.to(policy.device)
        without_dropout(self)

    def forward(self, token_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """Values of the states before the masked tokens, shape (N,) in row-major order, float32, in reward units."""
        hidden = self.body(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, H)
        select = F.pad(loss_mask[:, 1:], (0, 1))  # (B, T)
        return self.head(hidden[select].float()).squeeze(-1)  # (N,)


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found: set[int] = set()
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return tuple(sorted(found))
