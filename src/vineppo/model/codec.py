"""Convert text to token ids and token ids to text.

A codec combines the tokenizer, its chat template, the end-of-sequence tokens and the maximum sequence length of the
model. Functions that need no weights take a codec instead of a model. A codec can be pickled, so that processes without
a model can encode and decode.
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
    """A tokenizer with its chat template, and the end-of-sequence tokens and maximum sequence length of a model."""

    tokenizer: Any
    """A transformers tokenizer."""
    eos_ids: tuple[int, ...]
    """Ids of all tokens that end a response, in ascending order."""
    max_length: int = _UNLIMITED
    """Maximum sequence length of the model in tokens."""
    _token_texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any) -> Codec:
        """Create the codec of a transformers model. Only the configurations of the model are read, not its weights.

        `eos_ids` combines the EOS ids of the generation config, the model config and the tokenizer. These three often
        differ, and the end-of-turn token of a chat model may occur in only one of them.
        """
        eos_ids: set[int] = set()
        for source in (model.generation_config, model.config, tokenizer):
            ids = getattr(source, "eos_token_id", None)
            eos_ids.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        max_length = getattr(model.config, "max_position_embeddings", 0) or _UNLIMITED
        return cls(tokenizer, tuple(sorted(eos_ids)), int(max_length))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Encode a prompt.

        The result starts with the BOS token if the tokenizer adds one. EOS tokens at the end are removed.

        Raises:
            UserError: if the text is encoded to no tokens.
        """
        bos = self.tokenizer.bos_token
        # If a chat template has already written the BOS token, the tokenizer must not add a second one.
        ids = list(self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids)
        while ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
            ids.pop()
        if not ids:
            raise UserError("a prompt is empty, so it has no tokens; check task.prompt_column and task.prompt_template")
        return tuple(ids)

    def chat_prompt(self, text: str | Sequence[Mapping[str, str]]) -> str:
        """Format a user message or a conversation with the chat template. The result ends where the answer starts.

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
        """Return the text of each token as it is decoded after another token, and "" for special tokens.

        The texts are meant for finding boundaries. The concatenated texts can differ from the decoded text.
        """
        for token in token_ids:
            if token not in self._token_texts:
                self._token_texts[token] = self._text_inside(token)
        return [self._token_texts[token] for token in token_ids]

    def save(self, path: Path | str) -> None:
        """Save the tokenizer in the format of `AutoTokenizer.from_pretrained`."""
        self.tokenizer.save_pretrained(path)

    def _text_inside(self, token: int) -> str:
        """Return the text of a token as it is decoded after another token.

        A token is not decoded alone, because SentencePiece decoders drop a space at the start of a text.
        """
        alone, twice = self.decode([token]), self.decode([token, token])
        # Return the text that a second copy of the token adds. If the token is an incomplete character, two copies can
        # merge to one character; then return the text of one copy.
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone
