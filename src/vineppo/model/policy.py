"""The language model that is trained, and its frozen reference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from vineppo.config.schema import ModelConfig
from vineppo.model.loading import load_pretrained, without_dropout
from vineppo.model.lora import with_adapters
from vineppo.types import UserError


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


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found: set[int] = set()
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return tuple(sorted(found))
