"""Prompts and demonstrations in the forms of chat templates (cases 6 to 9), from the table to the token ids."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig

from tests.model.chat_templates import ADDED, BOS, END, EOS, TEXT, WITHOUT_SYSTEM, build_tokenizer
from vineppo.config.schema import TaskConfig
from vineppo.model.codec import Codec
from vineppo.tasks import build_task
from vineppo.training.sft import encode_demonstration
from vineppo.types import Problem, UserError

USER = [{"role": "user", "content": "the 42"}]
BEFORE = {"thinking": "<think>\n\n</think>\n\n", "eos at the end": "assistant: "}
"""What a template writes between the prompt and an answer without reasoning."""


class Configured:
    """What a codec reads of a model whose configuration names only the tokenizer's EOS token."""

    config = LlamaConfig(eos_token_id=2)
    generation_config = GenerationConfig(eos_token_id=2)


def codec_of(tokenizer: Any) -> Codec:
    return Codec.for_model(Configured(), tokenizer)


def problem_of(tokenizer: Any, prompt: Any, columns: dict[str, Any] | None = None, **config: Any) -> Problem:
    """Return the problem of a row, as the task `dataset` builds it."""
    rows = [{"prompt": prompt, "answer": "1", **(columns or {})}]
    task = build_task(TaskConfig(name="dataset", **config), codec_of(tokenizer).chat_prompt, tables={"train": rows})
    return task.problem("train", 0)


def prompt_ids(tokenizer: Any, prompt: Any, columns: dict[str, Any] | None = None, **config: Any) -> list[int]:
    return list(codec_of(tokenizer).prompt_ids(problem_of(tokenizer, prompt, columns, **config)))


def template_ids(tokenizer: Any, messages: Any, *, complete: bool = False, **options: Any) -> list[int]:
    """Return the ids that transformers gives for a conversation. The last message is continued or answered."""
    continued = not complete and messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not (complete or continued), "continue_final_message": continued, **options}
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return ids


TOKENIZERS = [*((added, "bytes") for added in ADDED), ("BOS", "pieces")]
"""What a tokenizer adds to a text, and its kind: the last two arguments of `build_tokenizer`."""
CONTENT = st.lists(st.sampled_from([*"ab42 \n.:é", "the "]), min_size=1, max_size=8).map("".join).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, system: bool, prefilled: bool) -> list[dict[str, str]]:
    """A conversation that ends with a message of the user, or with the beginning of the assistant's if `prefilled`."""
    count = 2 * draw(st.integers(0, 2)) + 1 + prefilled
    roles = ["user", "assistant"] * 3
    first = [{"role": "system", "content": draw(CONTENT)}] if system and draw(st.booleans()) else []
    return first + [{"role": role, "content": draw(CONTENT)} for role in roles[:count]]


@pytest.mark.parametrize("name", TEXT)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_case_6_the_ids_of_a_prompt_are_those_of_the_template(name: str, data: st.DataObject) -> None:
    """Whatever the tokenizer adds to a text, and whatever the template writes at either end."""
    tokenizer = build_tokenizer(TEXT[name], *data.draw(st.sampled_from(TOKENIZERS)))
    messages = data.draw(conversations(name not in WITHOUT_SYSTEM, prefilled=False))
    assert prompt_ids(tokenizer, messages) == template_ids(tokenizer, messages)
    if len(messages) == 1:
        assert prompt_ids(tokenizer, messages[0]["content"], chat_template=True) == template_ids(tokenizer, messages)


@pytest.mark.parametrize("added", ADDED)
def test_case_6_no_token_stands_in_front_of_a_template_without_bos(added: str) -> None:
    """TinyLlama's form. The EOS token in the middle remains; the ids are worked out by hand."""
    tokenizer = build_tokenizer(TEXT["zephyr"], added)
    pieces = ["<|user|>\n42", EOS, "\n<|assistant|>\n"]
    expected = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False).input_ids]
    assert prompt_ids(tokenizer, "42", chat_template=True) == expected
    # Plain text is encoded as the tokenizer does it, apart from an EOS token at the end.
    start = [tokenizer.bos_token_id] if "BOS" in added else []
    plain = problem_of(tokenizer, "42")
    assert plain.chat is None
    assert list(codec_of(tokenizer).prompt_ids(plain)) == start + tokenizer("42", add_special_tokens=False).input_ids


def test_case_6_ids_come_from_the_tokenizer_and_not_from_the_text() -> None:
    """Tokenizers of mistral-common write special tokens in a conversation that its text does not contain as such."""
    tokenizer = build_tokenizer("{{ messages[0].content }}")
    own = tokenizer.apply_chat_template

    def other_ids(*arguments: Any, tokenize: bool, **options: Any) -> Any:
        result = own(*arguments, tokenize=tokenize, **options)
        return [tokenizer.bos_token_id, 5, *result, 6] if tokenize else result

    tokenizer.apply_chat_template = other_ids
    inner = tokenizer("42", add_special_tokens=False).input_ids
    assert prompt_ids(tokenizer, "42", chat_template=True) == [tokenizer.bos_token_id, 5, *inner, 6]


@pytest.mark.parametrize("name", TEXT)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_case_7_a_last_message_of_the_assistant_is_continued(name: str, data: st.DataObject) -> None:
    tokenizer = build_tokenizer(TEXT[name], *data.draw(st.sampled_from(TOKENIZERS)))
    messages = data.draw(conversations(name not in WITHOUT_SYSTEM, prefilled=True))
    assert prompt_ids(tokenizer, messages) == template_ids(tokenizer, messages, continue_final_message=True)


@pytest.mark.parametrize("name", TEXT)
def test_case_7_the_prompt_ends_with_the_beginning_of_the_answer(name: str) -> None:
    tokenizer = build_tokenizer(TEXT[name], "BOS")
    started = [*USER, {"role": "assistant", "content": "Let me think.\n<think>"}]
    assert problem_of(tokenizer, started).prompt.endswith("Let me think.\n<think>")


TOOLS = (
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}{{ m.role + ': ' }}"
    "{% if m.name %}{{ '(' + m.name + ') ' }}{% endif %}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WITH_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?", "name": "Kim"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "5 degrees", "name": "weather", "tool_call_id": "c1"},
]


@pytest.mark.parametrize("tools", [[WEATHER], (WEATHER,), json.dumps([WEATHER])])
def test_case_8_tools_and_tool_calls_reach_the_template(tools: Any) -> None:
    tokenizer = build_tokenizer(TOOLS)
    problem = problem_of(tokenizer, WITH_CALL, {"tools": tools})
    assert problem.messages == tuple(WITH_CALL)  # for the reward functions
    assert problem.prompt == (
        f"Tools: {json.dumps([WEATHER])}\nuser: (Kim) Weather?</s>assistant: {json.dumps(CALL['function'])}</s>"
        "tool: (weather) 5 degrees</s>assistant: "
    )
    expected = template_ids(tokenizer, WITH_CALL, tools=[WEATHER])
    assert list(codec_of(tokenizer).prompt_ids(problem)) == expected
    text = problem_of(tokenizer, "Weather?", {"tools": tools}, chat_template=True)
    assert text.prompt.startswith("Tools: [") and text.messages == ()


ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.mark.parametrize("kind", ["parquet", "datasets", "disk"])
def test_tools_and_tool_calls_of_an_arrow_table_are_those_of_json_lines(tmp_path: Path, kind: str) -> None:
    """Arrow gives every struct of a column all keys, with null for those that it did not have."""
    add = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = [WITH_CALL[0], {**WITH_CALL[1], "tool_calls": [add]}, WITH_CALL[2]]
    rows = [
        {"prompt": USER, "answer": "1", "tools": [WEATHER, ADD]},
        {"prompt": WITH_CALL, "answer": "2", "tools": [WEATHER]},
        {"prompt": other, "answer": "3", "tools": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pa.Table.from_pylist(rows)
    source, tables = "", {}
    if kind == "parquet":
        source = str(tmp_path / "a.parquet")
        pa.parquet.write_table(table, source)
    else:
        datasets = pytest.importorskip("datasets")
        tables = {"train": datasets.Dataset(table)}
        if kind == "disk":
            source = str(tmp_path / "saved")
            tables.pop("train").save_to_disk(source)
    template = codec_of(build_tokenizer(TOOLS)).chat_prompt

    def chats(path: str, tables: Any = None) -> list[Any]:
        config = TaskConfig(name="dataset", train_path=path, validation_path=path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the validation problems are those of the training
            task = build_task(config, template, tables=tables)
        found = [task.problem("train", i) for i in range(3)]
        return [(problem.prompt, problem.messages, problem.chat and problem.chat.tools) for problem in found]

    found = chats(source, tables or None)
    assert found == chats(str(tmp_path / "a.jsonl"))
    assert '"properties": {"city": {"type": "string"}}' in found[0][0] and "null" not in found[0][0]
    assert set(found[1][1][1]) == {"role", "content", "tool_calls"}


def test_null_in_tools_of_json_lines_reaches_the_template() -> None:
    tool = {**ADD, "default": None}
    assert '"default": null' in problem_of(build_tokenizer(TOOLS), USER, {"tools": [tool]}).prompt


def test_tool_calls_that_the_template_does_not_use_are_refused() -> None:
    tokenizer = build_tokenizer("{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}")
    for content in (None, "ok"):
        messages = [WITH_CALL[0], {**WITH_CALL[1], "content": content}, WITH_CALL[2]]
        with pytest.raises(UserError) as caught:
            problem_of(tokenizer, messages)
        assert str(caught.value) == (
            "the train data row 0: message 1 has tool_calls, but the model's chat template does not use tool_calls; "
            "write the calls into the content of the message, or use a model whose template does"
        )
    assert problem_of(tokenizer, [{**USER[0], "tool_calls": []}]).prompt == "user:the 42"


@pytest.mark.parametrize("tools", [None, [], "", float("nan"), "[]"])
def test_case_8_an_empty_cell_means_no_tools(tools: Any) -> None:
    problem = problem_of(build_tokenizer(TOOLS), USER, {"tools": tools})
    assert problem.prompt == "user: the 42</s>assistant: "


def test_case_8_a_table_of_pandas_has_arrays_in_place_of_lists() -> None:
    tokenizer = build_tokenizer(TOOLS)
    messages = np.array([WITH_CALL[0], {**WITH_CALL[1], "tool_calls": np.array([CALL])}, WITH_CALL[2]])
    problem = problem_of(tokenizer, messages, {"tools": np.array([WEATHER])})
    assert problem.chat == problem_of(tokenizer, WITH_CALL, {"tools": [WEATHER]}).chat
    assert problem.messages == tuple(WITH_CALL)


def test_case_8_unknown_keys_of_a_message_reach_the_template() -> None:
    template = "{% for m in messages %}{{ m.content + '|' + m.mood }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi", "mood": "calm"}]
    assert problem_of(build_tokenizer(template), messages).prompt == "Hi|calm"


@pytest.mark.parametrize(("value", "end"), [(True, ""), (False, "<think>\n\n</think>\n\n"), (None, "")])
def test_case_8_chat_template_kwargs_reach_the_template(value: bool | None, end: str) -> None:
    tokenizer = build_tokenizer(TEXT["thinking"], "BOS")
    kwargs = {} if value is None else {"enable_thinking": value}
    for prompt in ("the 42", USER):
        problem = problem_of(tokenizer, prompt, chat_template=prompt != USER, chat_template_kwargs=kwargs)
        assert problem.prompt == f"<|im_start|>user\nthe 42<|im_end|>\n<|im_start|>assistant\n{end}"
        assert list(codec_of(tokenizer).prompt_ids(problem)) == template_ids(tokenizer, USER, **kwargs)


PARTS = [{"type": "text", "text": "Add "}, {"type": "text", "text": "42."}]
ONLY_PARTS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("name", TEXT)
def test_parts_are_joined_for_a_template_that_reads_text(name: str) -> None:
    tokenizer = build_tokenizer(TEXT[name])
    messages = [{"role": "user", "content": PARTS}]
    assert prompt_ids(tokenizer, messages) == template_ids(tokenizer, [{"role": "user", "content": "Add 42."}])
    assert problem_of(tokenizer, messages).messages == tuple(messages)


def test_parts_are_joined_where_a_template_prints_them_as_code() -> None:
    tokenizer = build_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    assert problem_of(tokenizer, [{"role": "user", "content": PARTS}]).prompt == "user: Add 42."


def test_parts_are_passed_unchanged_to_a_template_that_reads_them() -> None:
    tokenizer = build_tokenizer(ONLY_PARTS)
    messages = [{"role": "user", "content": PARTS}]
    assert problem_of(tokenizer, messages).prompt == "user: Add 42."
    assert prompt_ids(tokenizer, messages) == template_ids(tokenizer, messages)
    with pytest.raises(UserError, match=r"^the train data row 0: the chat template leaves out the text of the last"):
        problem_of(tokenizer, "Add 42.", chat_template=True)


def test_a_template_may_remove_a_part_of_a_message() -> None:
    tokenizer = build_tokenizer("{% for m in messages %}{{ m.content.replace('/no_think', '') | trim }}{% endfor %}")
    assert problem_of(tokenizer, [{"role": "user", "content": "the /no_think 42"}]).prompt == "the  42"


ROW = "the train data row 0: "
COLUMN = ROW + "column 'prompt' "
REJECTS = ROW + "the chat template rejects a conversation with the roles user: "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only for tools.\nSecond line') }}", REJECTS + "TemplateError: Only for tools."),
        ("{{ messages[0].content.parts.text }}", REJECTS + "UndefinedError: 'str object' has no attribute 'parts'"),
        ("{% for m in messages %}{{ m.content }}", REJECTS + "TemplateSyntaxError: Unexpected end of template."),
        ("{{ 1 / 0 }}", REJECTS + "ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", REJECTS + "TypeError: "),
        ("{{ bos_token }}", ROW + "the chat template leaves out the text of the last user message; "),
        (None, ROW + "the model's tokenizer has no chat template; set task.chat_template to false"),
    ],
)
def test_broken_templates_raise_one_line_with_the_row(template: str | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        problem_of(build_tokenizer(template), USER)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


IMAGE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("prompt", "columns", "message"),
    [
        ([], {}, COLUMN + "is a list; allowed: text, or messages with role and content"),
        ([{"content": "x"}], {}, COLUMN + "is a list; allowed: text, or messages with role and content"),
        (
            [{"role": "user", "content": [IMAGE]}],
            {},
            COLUMN + 'message 0 (role user) has a part of type \'image\'; allowed: {"type": "text", "text": ...}',
        ),
        ([{"role": "user", "content": ["a"]}], {}, COLUMN + "message 0 (role user) has a part of type 'str'; allowed"),
        ([{"role": "user", "content": None}], {}, COLUMN + "message 0 (role user) has no content; allowed: text, a li"),
        ([*USER, {"role": "tool", "content": 3}], {}, COLUMN + "message 1 (role tool) has content of type int; allowe"),
        ([*USER, {"role": "assistant", "content": None}], {}, COLUMN + "message 1 (role assistant) has no content; "),
        (WITH_CALL[:2], {}, COLUMN + "ends with a message of the assistant without content, which a response cannot"),
        ([{"role": "user", "content": "\ud800"}], {}, COLUMN + "contains an unpaired surrogate; it must be valid"),
        (
            USER,
            {"tools": "hammer"},
            ROW + "column 'tools' is passed to the chat template, so it must be a list of JSON",
        ),
        (USER, {"tools": ["hammer"]}, ROW + "column 'tools' is passed to the chat template, so it must be a list of "),
    ],
)
def test_mistakes_in_a_conversation_raise_one_line(prompt: Any, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        problem_of(build_tokenizer(TOOLS), prompt, columns)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_a_template_would_ignore_is_refused() -> None:
    tokenizer = build_tokenizer(TEXT["chatml"])
    with pytest.raises(UserError, match=r"row 0: the column 'tools' describes tools, but the model's chat template do"):
        problem_of(tokenizer, USER, {"tools": [WEATHER]})
    with pytest.raises(UserError, match=r"row 0: task.chat_template_kwargs has 'enable_thinkin', but the model's chat"):
        problem_of(build_tokenizer(TEXT["thinking"]), USER, chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(UserError, match=r"^task.chat_template_kwargs is set, but the train data row 0 has a prompt of"):
        problem_of(tokenizer, "the 42", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(UserError, match=r"row 0: column 'prompt' is a conversation, to which task.prompt_template can"):
        problem_of(tokenizer, USER, prompt_template="Q: {prompt}")


# ---- The end of a turn


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_case_9_the_token_that_ends_a_turn_ends_responses_of_the_sampler(name: str, kind: str) -> None:
    """The configuration of the model names only the tokenizer's EOS token."""
    tokenizer = build_tokenizer(TEXT[name], "BOS", kind)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END[name])}
    assert codec_of(tokenizer).eos_ids == tuple(sorted(ends))


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(("added", "kind"), TOKENIZERS)
def test_case_9_a_demonstration_ends_with_what_ends_a_turn(name: str, added: str, kind: str) -> None:
    tokenizer = build_tokenizer(TEXT[name], added, kind)
    codec, problem = codec_of(tokenizer), problem_of(tokenizer, USER)
    ids, start = encode_demonstration(codec, problem, "42 is\nthe answer.")
    end = tokenizer.convert_tokens_to_ids(END[name])
    assert list(ids[:start]) == template_ids(tokenizer, USER)
    assert ids[-1] == end and not set(ids[start:-1]) & {end, tokenizer.eos_token_id, tokenizer.bos_token_id}
    assert tokenizer.decode(ids[start:-1]).strip().removeprefix(BEFORE.get(name, "")) == "42 is\nthe answer."
    # Where no token contains the end of the prompt and the beginning of the response, the ids are the template's.
    whole = template_ids(tokenizer, [*USER, {"role": "assistant", "content": "42 is\nthe answer."}], complete=True)
    if whole[:start] == list(ids[:start]) and end in whole[start:]:
        assert list(ids) == whole[: len(ids)]


def test_case_9_exact_ends_of_demonstrations() -> None:
    def response(name: str, text: str, **config: Any) -> str:
        tokenizer = build_tokenizer(TEXT[name], "BOS and EOS")
        ids, start = encode_demonstration(codec_of(tokenizer), problem_of(tokenizer, USER, **config), text)
        return str(tokenizer.decode(ids[start:]))

    assert response("gemma", "42") == "42<end_of_turn>"
    assert response("llama2", "42") == " 42 </s>"
    assert response("vicuna", "42") == " 42</s>"
    assert response("phi3", "42") == "42<|end|>"
    assert response("instruction", "42") == "42</s>"
    # The template would remove the reasoning, which the demonstration keeps.
    assert response("deepseek", "so\n</think>\n42") == "so\n</think>\n42</s>"
    assert response("chatml without reasoning", "so\n</think>\n42") == "so\n</think>\n42<|im_end|>"
    # Without reasoning, the template of a complete message writes an empty one.
    assert response("thinking", "42") == "<think>\n\n</think>\n\n42<|im_end|>"
    assert response("thinking", "<think>\nso\n</think>\n\n42") == "<think>\nso\n</think>\n\n42<|im_end|>"
    assert response("thinking", "42", chat_template_kwargs={"enable_thinking": False}) == "42<|im_end|>"


def test_case_9_a_demonstration_continues_the_message_of_the_assistant() -> None:
    tokenizer = build_tokenizer(TEXT["chatml"])
    codec = codec_of(tokenizer)
    for content in ("Let me think. ", [{"type": "text", "text": "Let me think. "}]):
        problem = problem_of(tokenizer, [*USER, {"role": "assistant", "content": content}])
        ids, start = encode_demonstration(codec, problem, "42")
        assert tokenizer.decode(ids[start:]) == "42<|im_end|>"
        assert tokenizer.decode(ids[:start]).endswith("<|im_start|>assistant\nLet me think. ")


def test_case_9_a_plain_prompt_ends_with_the_eos_token() -> None:
    tokenizer = build_tokenizer(TEXT["gemma"], "BOS and EOS")
    ids, start = encode_demonstration(codec_of(tokenizer), problem_of(tokenizer, "the 42"), "42")
    assert tokenizer.decode(ids[:start]) == f"{BOS}the 42" and tokenizer.decode(ids[start:]) == f"42{EOS}"
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"^the model's tokenizer has no EOS token, so a response cannot be ended"):
        encode_demonstration(codec_of(tokenizer), problem_of(tokenizer, "the 42"), "42")


def test_an_end_token_that_is_not_special_is_no_part_of_the_text() -> None:
    tokenizer = build_tokenizer("{% for m in messages %}{{ m.content + '<stop>' }}{% endfor %}")
    tokenizer.add_tokens(["<stop>", "<other>"])
    codec = codec_of(tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    assert stop in codec.eos_ids
    ids = tokenizer("42<other><stop>", add_special_tokens=False).input_ids
    assert codec.decode(ids) == "42<other>"
    assert codec.token_texts(ids)[-2:] == ["<other>", ""]


def test_a_template_that_cannot_be_used_does_not_prevent_loading() -> None:
    """The embedded models have no template; a model with a broken one can be trained on plain text."""
    for template in (None, "{% if %}", "{{ raise_exception('no') }}"):
        assert codec_of(build_tokenizer(template)).eos_ids == (2,)
