"""Converts text to token ids and back: the tokenizer, its chat template, and the sequence limits of the model.

Functions that need no weights take a codec instead of a model. A codec can be pickled, so that processes without a
model can encode and decode.
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
    """A tokenizer with its chat template, and the sequence limits of its model."""

    tokenizer: Any
    """A transformers tokenizer."""
    eos_ids: tuple[int, ...]
    """All tokens that end a response, in ascending order."""
    max_length: int = _UNLIMITED
    """Maximum sequence length of the model in tokens."""
    _token_texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any) -> Codec:
        """Create the codec of a transformers model. Only the model's configurations are read.

        `eos_ids` combines the EOS ids of the generation config, the model's config and the tokenizer. The three often
        disagree, and a chat model's end-of-turn token may be in only one of them.
        """
        eos_ids: set[int] = set()
        for source in (model.generation_config, model.config, tokenizer):
            ids = getattr(source, "eos_token_id", None)
            eos_ids.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        max_length = getattr(model.config, "max_position_embeddings", 0) or _UNLIMITED
        return cls(tokenizer, tuple(sorted(eos_ids)), int(max_length))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Encode a prompt, with the tokens that the tokenizer puts first (BOS) and without EOS tokens at the end.

        Raises:
            UserError: if the text has no tokens.
        """
        bos = self.tokenizer.bos_token
        # If a chat template has already written the BOS, the tokenizer must not add a second one.
        ids = list(self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids)
        while ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
            ids.pop()
        if not ids:
            raise UserError("a prompt is empty: it has no tokens; check task.prompt_column and task.prompt_template")
        return tuple(ids)

    def chat_prompt(self, text: str | Sequence[Mapping[str, str]]) -> str:
        """Format a user's message or a conversation with the chat template, up to the start of the answer.

        Raises:
            UserError: if the tokenizer has no chat template, or the template does not accept the conversation.
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
            raise UserError(f"the chat template rejects a conversation with the roles {roles}: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token inside a text, and "" for special tokens.

        Use them to find boundaries. Joined, they can differ from the decoded text.
        """
        for token in token_ids:
            if token not in self._token_texts:
                self._token_texts[token] = self._text_inside(token)
        return [self._token_texts[token] for token in token_ids]

    def save(self, path: Path | str) -> None:
        """Save the tokenizer in the format of `AutoTokenizer.from_pretrained`."""
        self.tokenizer.save_pretrained(path)

    def _text_inside(self, token: int) -> str:
        """Return a token's text after another token. SentencePiece decoders drop a space at the start of a text."""
        alone, twice = self.decode([token]), self.decode([token, token])
        # The text that a second copy of the token adds. Two copies of an incomplete character can merge.
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone
