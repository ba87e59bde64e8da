"""Text to token ids and back: the tokenizer with its templates, and what a model's files say of sequences; no weights.

Rollout, credit and record take a codec and never a model. A codec can be pickled, so that a process without a model can
encode and decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vineppo.types import UserError

_UNLIMITED = 1 << 30


@dataclass(frozen=True, eq=False)
class Codec:
    """A tokenizer with its chat template, and the limits of the model that it belongs to."""

    tokenizer: Any
    """A tokenizer of transformers."""
    eos_ids: tuple[int, ...]
    """Every token that ends a response, ascending."""
    max_length: int = _UNLIMITED
    """Longest sequence in tokens that the model was made for."""
    _token_texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any) -> Codec:
        """The codec of a transformers model, of which it reads the configurations only.

        A token ends a response if the generation config, the model's config or the tokenizer says so: the three often
        disagree, and a chat model's end of turn may stand in one of them only.
        """
        eos_ids: set[int] = set()
        for owner in (model.generation_config, model.config, tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            eos_ids.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        max_length = getattr(model.config, "max_position_embeddings", 0) or _UNLIMITED
        return cls(tokenizer, tuple(sorted(eos_ids)), int(max_length))

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
            UserError: when the tokenizer has no chat template, or the template refuses the conversation.
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
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each token as it stands inside of a text; special tokens are empty. For boundaries, not to join."""
        for token in token_ids:
            if token not in self._token_texts:
                self._token_texts[token] = self._text_inside(token)
        return [self._token_texts[token] for token in token_ids]

    def save(self, path: Path | str) -> None:
        """Write the tokenizer so that `AutoTokenizer.from_pretrained` loads it."""
        self.tokenizer.save_pretrained(path)

    def _text_inside(self, token: int) -> str:
        """A token's text behind another one: at the beginning of a text, decoders of SentencePiece drop the space."""
        alone, twice = self.decode([token]), self.decode([token, token])
        # What the second of two adds to the first; half a character may melt into one with itself.
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone
