"""Convert text to token ids and token ids to text with a codec.

A codec combines a tokenizer with what is known about its model without the weights: the end-of-sequence (EOS) tokens
and the maximum sequence length. Functions that need no weights take a codec instead of a model. A codec can be pickled,
so that processes without a model can encode and decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vineppo.types import UserError

_UNLIMITED = 1 << 30
"""Maximum sequence length of a model whose configuration states none."""


@dataclass(frozen=True, eq=False)
class Codec:
    """A tokenizer with its chat template, and the end-of-sequence tokens and maximum sequence length of a model."""

    tokenizer: Any
    """A transformers tokenizer."""
    eos_ids: tuple[int, ...]
    """Ids of all end-of-sequence tokens, each of which ends a response, in ascending order."""
    max_length: int = _UNLIMITED
    """Maximum sequence length of the model in tokens."""
    _token_texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    """Cache of the method `token_texts`: token id -> text."""

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any) -> Codec:
        """Create the codec of a transformers model. Only the configurations of the model are read, not its weights.

        `eos_ids` contains the EOS ids of the generation config, of the model config and of the tokenizer. These often
        differ, and the end-of-turn token of a chat model may occur in only one of the three.
        """
        eos_ids: set[int] = set()
        for source in (model.generation_config, model.config, tokenizer):
            ids = getattr(source, "eos_token_id", None)
            eos_ids.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        max_length = getattr(model.config, "max_position_embeddings", 0) or _UNLIMITED
        return cls(tokenizer, tuple(sorted(eos_ids)), int(max_length))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a prompt.

        They start with the BOS token if the tokenizer adds one. Some tokenizers also add an EOS token at the end. EOS
        tokens at the end are removed, because the response follows the prompt.

        Raises:
            UserError: if the prompt has no tokens.
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
        """Format a prompt with the chat template. The returned text ends where the response of the model starts.

        Args:
            text: a user message, or a conversation as a list of messages with `role` and `content`.
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
        """Return one text per token: the text of the token when it is decoded after another token.

        The text of a special token is "". The texts are meant for finding the ends of reasoning steps. Concatenated,
        they can differ from the decoded text, for example if a character consists of several tokens.
        """
        for token in token_ids:
            if token not in self._token_texts:
                self._token_texts[token] = self._text_inside(token)
        return [self._token_texts[token] for token in token_ids]

    def save(self, path: Path | str) -> None:
        """Save the tokenizer in the format of `AutoTokenizer.from_pretrained`."""
        self.tokenizer.save_pretrained(path)

    def _text_inside(self, token: int) -> str:
        """Return the text of a token when it is decoded after another token.

        The token is not simply decoded alone, because SentencePiece decoders drop a space at the start of a text.
        """
        alone, twice = self.decode([token]), self.decode([token, token])
        # The result is the text that a second copy of the token adds. If the token is only a part of a character, two
        # copies can be decoded to one character. The result is then the text of one copy.
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone
