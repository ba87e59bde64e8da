"""Apply the chat template of a tokenizer to conversations. Every error of a template is one line.

The token ids of a prompt are those that `apply_chat_template(..., tokenize=True)` of transformers returns. They are not
computed from the text of the prompt, because a tokenizer can add special tokens to a text, and because some tokenizers
cannot compute the ids from the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vineppo.objects import first_line
from vineppo.types import Chat, UserError

_PROBE = "VINEPPO-PROBE"
"""Text of a message that shows what the template writes around a message, and whether it uses the message."""


def chat_text(tokenizer: Any, chat: Chat) -> str:
    """Return the text of a prompt. It ends where the response starts.

    Raises:
        UserError: if the tokenizer has no chat template, if the template rejects the conversation or leaves out the
            last message of the user, or if it does not use the tools, the tool calls or a variable of
            `chat.template_kwargs`.
    """
    _check_template(tokenizer, chat)
    chat = _readable(tokenizer, chat)
    text = str(_apply(tokenizer, chat, tokenize=False))
    if _leaves_out_the_last_user_message(tokenizer, chat, text):
        raise UserError(
            "the chat template leaves out the text of the last user message; if it reads content only as a list of "
            'parts, give messages with content [{"type": "text", "text": ...}]'
        )
    return text


def chat_ids(tokenizer: Any, chat: Chat) -> tuple[int, ...]:
    """Return the token ids of a prompt: those of `apply_chat_template(..., tokenize=True)`.

    Raises:
        UserError: if the template rejects the conversation.
    """
    return tuple(_apply(tokenizer, _readable(tokenizer, chat), tokenize=True))


def response_ids(tokenizer: Any, chat: Chat, response: str) -> tuple[int, ...] | None:
    """Return the token ids that the template writes after the prompt for a complete message of the assistant.

    They contain the response and everything that the template writes around it, such as a space in front of it, the
    token that ends the turn, and a newline.

    Returns:
        The ids, or None if the template changes the response (some remove the reasoning of earlier messages), or does
        not write the prompt in front of it.
    Raises:
        UserError: if the template rejects the conversation.
    """
    chat = _readable(tokenizer, chat)
    complete = replace(chat, messages=_completed(chat.messages, response))
    prompt = str(_apply(tokenizer, chat, tokenize=False))
    text = str(_apply(tokenizer, complete, tokenize=False, complete=True))
    rest = text[len(prompt) :]
    if not text.startswith(prompt) or response.strip() not in rest:
        return None
    before = tuple(_apply(tokenizer, chat, tokenize=True))
    ids = tuple(_apply(tokenizer, complete, tokenize=True, complete=True))
    if ids[: len(before)] == before:
        return ids[len(before) :]
    # The last token of the prompt and the beginning of the response are one token in the complete conversation. The
    # sampler gives the model the prompt without a response, so the response is tokenized alone.
    return tuple(tokenizer(rest, add_special_tokens=False).input_ids)


def end_of_turn_id(tokenizer: Any) -> int | None:
    """Return the id of the token with which the chat template ends a message of the assistant.

    Returns:
        The id, or None if there is no chat template, or the template writes no added or special token there.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE})
    try:
        text = str(_apply(tokenizer, Chat(messages), tokenize=False, complete=True))
    except UserError:
        # A template that cannot be used is reported when a prompt is formatted, with the row of the prompt.
        return None
    _, probe, rest = text.rpartition(_PROBE)
    added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    for token in tokenizer(rest, add_special_tokens=False).input_ids if probe else ():
        if token in added:
            return int(token)
        if tokenizer.decode([token]).strip():
            return None
    return None


def _apply(tokenizer: Any, chat: Chat, *, tokenize: bool, complete: bool = False) -> Any:
    """Apply the chat template, and convert every error to a message of one line.

    Args:
        tokenize: whether to return token ids instead of text.
        complete: whether the last message is complete. If it is not, the result ends where the response starts.
    """
    continued = not complete and chat.messages[-1].get("role") == "assistant"
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            # Some templates describe the use of tools even if the list of tools is empty.
            tools=[dict(tool) for tool in chat.tools] or None,
            add_generation_prompt=not complete and not continued,
            continue_final_message=continued,
            tokenize=tokenize,
            return_dict=False,
            **chat.template_kwargs,
        )
    except Exception as error:  # a template is a program of the model's author, which can raise anything
        roles = ", ".join(str(message.get("role")) for message in chat.messages)
        message = f"the chat template rejects a conversation with the roles {roles}: {first_line(error)}"
        raise UserError(message) from error


def _check_template(tokenizer: Any, chat: Chat) -> None:
    """Raise UserError if there is no chat template, or if it does not use tools, tool calls or a variable of the chat.

    Jinja ignores variables that a template does not use, so a misspelt name would have no effect.
    """
    # Tokenizers of mistral-common format conversations without a template. They have no attribute `chat_template`.
    template = getattr(tokenizer, "chat_template", None)
    if hasattr(tokenizer, "chat_template") and not template:
        raise UserError(
            "the model's tokenizer has no chat template; set task.chat_template to false, and give prompts as text"
        )
    source = "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")
    if source and chat.tools and not _mentions(source, "tools"):
        raise UserError(
            "the column 'tools' describes tools, but the model's chat template does not use tools; remove or rename "
            "the column, or use a model whose template does"
        )
    called = next((i for i, message in enumerate(chat.messages) if message.get("tool_calls")), None)
    if source and called is not None and not _mentions(source, "tool_calls"):
        raise UserError(
            f"message {called} has tool_calls, but the model's chat template does not use tool_calls; write the calls "
            "into the content of the message, or use a model whose template does"
        )
    for name in chat.template_kwargs:
        if source and not _mentions(source, name):
            raise UserError(
                f"task.chat_template_kwargs has {name!r}, but the model's chat template has no variable {name!r}; "
                "remove it, or correct the name"
            )


def _mentions(source: str, name: str) -> bool:
    """Return whether a name occurs as a whole word in the source text of a template."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _readable(tokenizer: Any, chat: Chat) -> Chat:
    """Return the conversation in a form that the template reads.

    `content` may be a list of text parts. Templates of models that read only text often print such a list as Python
    code, or fail. For these templates, every list is replaced by the joined texts of its parts.
    """
    if not any(isinstance(message.get("content"), list | tuple) for message in chat.messages):
        return chat
    joined = replace(chat, messages=tuple({**m, **_joined_content(m)} for m in chat.messages))
    try:
        text = str(_apply(tokenizer, chat, tokenize=False))
    except UserError:
        return joined
    printed_as_code = re.search(r"""['"]type['"]: ['"]text['"]""", text)
    return joined if printed_as_code or not _contains(text, chat.messages[-1:]) else chat


def _joined_content(message: Mapping[str, Any]) -> dict[str, str]:
    """Return {"content": joined texts of the parts} if the content is a list of parts, or else an empty dictionary."""
    content = message.get("content")
    return {"content": "".join(part["text"] for part in content)} if isinstance(content, list | tuple) else {}


def _contains(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the texts of messages occur in a formatted conversation, apart from white space at both ends."""
    contents = [message.get("content") or "" for message in messages]
    texts = [
        part if isinstance(part, str) else part["text"]
        for content in contents
        for part in ([content] if isinstance(content, str) else content)
    ]
    return all(part.strip() in text for part in texts)


def _leaves_out_the_last_user_message(tokenizer: Any, chat: Chat, text: str) -> bool:
    """Return whether the formatted conversation `text` would be the same with another last message of the user."""
    last = max((i for i, message in enumerate(chat.messages) if message.get("role") == "user"), default=None)
    if last is None or _contains(text, chat.messages[last : last + 1]):
        return False
    # Some templates remove only a part of the message, such as `/no_think`, so a second text is compared.
    message = chat.messages[last]
    content = _PROBE if isinstance(message.get("content"), str) else [{"type": "text", "text": _PROBE}]
    other = (*chat.messages[:last], {**message, "content": content}, *chat.messages[last + 1 :])
    return str(_apply(tokenizer, replace(chat, messages=other), tokenize=False)) == text


def _completed(messages: Sequence[Mapping[str, Any]], response: str) -> tuple[Mapping[str, Any], ...]:
    """Return the messages with a response, which continues the last message if that is a message of the assistant."""
    last = messages[-1]
    if last.get("role") != "assistant":
        return (*messages, {"role": "assistant", "content": response})
    content = last["content"]
    more = [*content, {"type": "text", "text": response}] if isinstance(content, list | tuple) else content + response
    return (*messages[:-1], {**last, "content": more})
