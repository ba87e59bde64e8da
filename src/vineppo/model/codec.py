"""Convert text to token ids and token ids to text with a codec.

A codec combines a tokenizer with what is known about its model without the weights: the end-of-sequence (EOS) tokens
and the maximum sequence length. Functions that need no weights take a codec instead of a model. A codec can be pickled,
so that processes without a model can encode and decode.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vineppo.model.chat import chat_ids, chat_text, end_of_turn_id, response_ids
from vineppo.types import Chat, Problem, UserError

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
    _ends_with_text: frozenset[int] = field(default=frozenset(), init=False, repr=False)
    """Ids in `eos_ids` of added tokens that are not special. The tokenizer does not remove them from a text."""
    _decodes_directly: bool = field(default=False, init=False, repr=False)
    """Whether `decode` calls the Rust tokenizer behind the tokenizer of transformers."""

    def __post_init__(self) -> None:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        with_text = frozenset(token for token in self.eos_ids if token in added and not added[token].special)
        object.__setattr__(self, "_ends_with_text", with_text)
        object.__setattr__(self, "_decodes_directly", _decodes_directly(self.tokenizer))

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any) -> Codec:
        """Create the codec of a transformers model. Only the configurations of the model are read, not its weights.

        `eos_ids` contains the EOS ids of the generation config, of the model config and of the tokenizer, and the token
        with which the chat template ends a message of the assistant. These often differ, and the end-of-turn token of a
        chat model may be in only one of the four places.

        Warns if the maximum length is less than the configuration of the model says (see `_constant_length`).
        """
        end_of_turn = end_of_turn_id(tokenizer)
        eos_ids: set[int] = set() if end_of_turn is None else {end_of_turn}
        for source in (model.generation_config, model.config, tokenizer):
            ids = getattr(source, "eos_token_id", None)
            eos_ids.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        return cls(tokenizer, tuple(sorted(eos_ids)), _max_length(model.config.get_text_config()))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a prompt that was written without a chat template.

        They start with the BOS token if the tokenizer adds one. Some tokenizers also add an EOS token at the end. EOS
        tokens at the end are removed, because the response follows the prompt. For the prompt of a problem, use
        `prompt_ids`: if a chat template wrote the prompt, this method can return other ids than the template.

        Raises:
            UserError: if the prompt has no tokens.
        """
        bos = self.tokenizer.bos_token
        # If the text already starts with the BOS token, the tokenizer must not add a second one.
        ids = list(self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids)
        while ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
            ids.pop()
        return _not_empty(ids)

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the token ids of the prompt of a problem.

        If the chat template wrote the prompt, the ids are those of `apply_chat_template(..., tokenize=True)` of
        transformers.

        Raises:
            UserError: if the prompt has no tokens, or the chat template rejects the conversation.
        """
        if problem.chat is None:
            return self.encode_prompt(problem.prompt)
        return _not_empty(chat_ids(self.tokenizer, problem.chat))

    def chat_prompt(self, chat: Chat) -> str:
        """Format a prompt with the chat template. The returned text ends where the response of the model starts.

        The text is for people and reward functions. `prompt_ids` returns the token ids.

        Raises:
            UserError: if the tokenizer has no chat template, if the template rejects the conversation or leaves out the
                last message of the user, or if it does not use the tools, the tool calls or a variable of
                `chat.template_kwargs`.
        """
        return chat_text(self.tokenizer, chat)

    def response_ids(self, problem: Problem, response: str) -> tuple[int, ...]:
        """Return the token ids of a complete response to a problem. The last one is the token that ends the response.

        If the chat template wrote the prompt, the ids are those that the template writes after the prompt, up to the
        token with which it ends a turn. Otherwise they are the ids of the response and the tokenizer's EOS token.
        Prompt and response are tokenized separately. Tokenized together, a token could contain the end of the prompt
        and the beginning of the response, but the sampler gives the policy prompts without a response.

        Raises:
            UserError: if the tokenizer has no EOS token and the chat template ends turns with no special token, or if
                the template rejects the conversation.
        """
        turn = response_ids(self.tokenizer, problem.chat, response) if problem.chat is not None else None
        end = next((index for index, token in enumerate(turn or ()) if token in self.eos_ids), None)
        if turn is not None and end is not None:
            return turn[: end + 1]
        last = end_of_turn_id(self.tokenizer) if problem.chat is not None else None
        last = self.tokenizer.eos_token_id if last is None else last
        if last is None:
            raise UserError("the model's tokenizer has no EOS token, so a response cannot be ended; set its eos_token")
        return (*self.tokenizer(response, add_special_tokens=False).input_ids, last)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens and without added tokens that end a sequence (`eos_ids`)."""
        ids = list(token_ids)
        if self._ends_with_text:
            ids = [token for token in ids if token not in self._ends_with_text]
        if self._decodes_directly:
            return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

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


def _decodes_directly(tokenizer: Any) -> bool:
    """Return whether a tokenizer of transformers passes token ids to its Rust tokenizer and returns the text unchanged.

    This is so if its class does not replace the methods that decode; `Codec.decode` asks for no clean-up of spaces. The
    Rust tokenizer can then be called directly. transformers checks every token id in Python first, which takes several
    times as long as decoding.
    """
    from transformers import PreTrainedTokenizerFast  # imported here, because the import is slow

    methods = [
        (getattr(tokenizer, name, None), getattr(PreTrainedTokenizerFast, name)) for name in ("decode", "_decode")
    ]
    return all(getattr(method, "__func__", None) is usual for method, usual in methods)


def _not_empty(ids: Sequence[int]) -> tuple[int, ...]:
    """Return the token ids of a prompt as a tuple. Raise UserError if there are none."""
    if not ids:
        raise UserError("a prompt is empty, so it has no tokens; check task.prompt_column and task.prompt_template")
    return tuple(ids)


def _max_length(config: Any) -> int:
    """Return the maximum sequence length of a model, from its configuration. Warn if it is limited."""
    stated = int(getattr(config, "max_position_embeddings", 0) or _UNLIMITED)
    limit = _constant_length(config)
    if limit >= stated:
        return stated
    warnings.warn(
        f"sequences are limited to {limit} tokens, although the model allows {stated}: in longer sequences its rotary "
        "position embedding (dynamic or longrope) changes with the length, so that the probability of a token would "
        "depend on later tokens",
        stacklevel=3,
    )
    return limit


def _constant_length(config: Any) -> int:
    """Return the largest length up to which the rotary position embeddings of a model do not depend on the length.

    The frequencies of the types `dynamic` and `longrope` change for all positions when a sequence becomes longer than
    the original context. A response that crosses this length was sampled with other frequencies than the learner uses
    for it.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    # A model with several kinds of layers has one dictionary of parameters for each kind.
    parts = [parameters] if "rope_type" in parameters else [part for part in parameters.values() if part]
    limits = [_UNLIMITED]
    for part in parts:
        kind = part.get("rope_type", "default") if isinstance(part, Mapping) else "default"
        if kind == "longrope":
            original = part.get("original_max_position_embeddings")
            limits.append(int(original or getattr(config, "original_max_position_embeddings", 0) or _UNLIMITED))
        elif "dynamic" in kind:
            limits.append(int(config.max_position_embeddings))
    return min(limits)
