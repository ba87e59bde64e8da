"""Encoding and decoding of text without a model."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig, MambaConfig

from vineppo.model.codec import Codec
from vineppo.model.tiny import build_model, build_tokenizer
from vineppo.tasks.chain import LEVELS, ChainTask
from vineppo.types import Chat, UserError

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def build_codec() -> Codec:
    tokenizer = build_tokenizer()
    return Codec(tokenizer, eos_ids=(tokenizer.eos_token_id,), max_length=99)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return build_codec()


def test_a_prompt_keeps_its_bos_and_loses_its_eos() -> None:
    tokenizer = build_tokenizer()
    plain = Codec(tokenizer, eos_ids=(tokenizer.eos_token_id,))
    body = plain.encode_prompt("a=7;a?\n")
    bos, eos = tokenizer.unk_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s> </s>", special_tokens=[("<unk>", bos), ("</s>", eos)]
    )
    assert tokenizer("a=7;a?\n").input_ids == [bos, *body, eos, eos]
    assert plain.encode_prompt("a=7;a?\n") == (bos, *body)
    assert eos not in body


def test_an_empty_prompt_is_an_error(codec: Codec) -> None:
    with pytest.raises(UserError, match="a prompt is empty"):
        codec.encode_prompt("")


@pytest.mark.parametrize("level", LEVELS)
def test_chain_texts_are_encoded_and_decoded_without_loss(codec: Codec, level: str) -> None:
    task = ChainTask(level, 10)
    unknown = codec.tokenizer.unk_token_id
    for index in range(50):
        prompt, response = task.demonstration("train", index)
        for text in (prompt, response, prompt + response):
            ids = codec.encode_prompt(text)
            assert unknown not in ids
            assert codec.decode(ids) == text
            assert "".join(codec.token_texts(ids)) == text
        # Tokenizing prompt and response separately or together gives the same tokens.
        assert codec.encode_prompt(prompt) + codec.encode_prompt(response) == codec.encode_prompt(prompt + response)


def test_special_tokens_have_no_text(codec: Codec) -> None:
    a, newline, marks = codec.encode_prompt("a\n####")
    eos = codec.tokenizer.eos_token_id
    assert codec.token_texts([a, eos, newline, marks, a]) == ["a", "", "\n", "####", "a"]
    assert codec.decode([a, newline, marks, eos]) == "a\n####"
    assert codec.decode([]) == ""
    assert codec.token_texts([]) == []


def test_decoding_gives_the_text_of_transformers(codec: Codec) -> None:
    tokenizer = build_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # must not be applied: "a ." would become "a."
    unusual = Codec(tokenizer, eos_ids=codec.eos_ids)
    rng = random.Random(0)
    for length in (0, 1, 2, 30):
        for _ in range(50):
            ids = [rng.randrange(len(tokenizer)) for _ in range(length)]
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert unusual.decode(ids) == unusual.decode(tuple(ids)) == text


def test_a_tokenizer_that_decodes_in_its_own_way_is_called() -> None:
    class Loud(type(build_tokenizer())):  # type: ignore[misc]
        def _decode(self, *arguments: Any, **named: Any) -> str:
            return str(super()._decode(*arguments, **named)).upper()

    usual, loud, patched = build_tokenizer(), build_tokenizer(), build_tokenizer()
    loud.__class__ = Loud
    patched.decode = lambda ids, **_: f"{len(ids)} tokens"
    ids = usual("a=7;a?").input_ids
    decoded = [Codec(tokenizer, eos_ids=(0,)).decode(ids) for tokenizer in (usual, loud, patched)]
    assert decoded == ["a=7;a?", "A=7;A?", f"{len(ids)} tokens"]


def test_eos_ids_combine_tokenizer_and_both_configs(codec: Codec) -> None:
    tokenizer_eos = codec.tokenizer.eos_token_id
    model = build_model(codec.tokenizer, seed=0)
    assert Codec.for_model(model, codec.tokenizer).eos_ids == (tokenizer_eos,)
    model.config.eos_token_id, model.generation_config.eos_token_id = [7, 9], 11
    assert Codec.for_model(model, codec.tokenizer).eos_ids == (tokenizer_eos, 7, 9, 11)


def test_max_length_is_that_of_the_model(codec: Codec) -> None:
    model = build_model(codec.tokenizer, seed=0)
    assert Codec.for_model(model, codec.tokenizer).max_length == 512
    without_positions = SimpleNamespace(config=MambaConfig(), generation_config=GenerationConfig())
    assert Codec.for_model(without_positions, codec.tokenizer).max_length == 1 << 30


def test_a_codec_can_be_pickled(codec: Codec) -> None:
    chat = build_codec()
    chat.tokenizer.chat_template = CHAT
    loaded = pickle.loads(pickle.dumps(chat))
    prompt, response = ChainTask("judgement", 10).demonstration("train", 0)
    ids = chat.encode_prompt(prompt + response)
    assert loaded.encode_prompt(prompt + response) == ids
    assert loaded.decode(ids) == chat.decode(ids) == prompt + response
    assert loaded.token_texts(ids) == chat.token_texts(ids)
    assert loaded.chat_prompt(Chat.of_user("2+3?")) == chat.chat_prompt(Chat.of_user("2+3?"))
    assert (loaded.eos_ids, loaded.max_length) == (chat.eos_ids, chat.max_length) == ((1,), 99)


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, vineppo.model.codec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_saved_codec_loads_as_a_transformers_tokenizer(codec: Codec, tmp_path: Path) -> None:
    codec.save(tmp_path)
    text = "a=7;b=a*3;b?\n"
    assert tuple(AutoTokenizer.from_pretrained(tmp_path)(text).input_ids) == codec.encode_prompt(text)


def test_chat_prompt_ends_at_the_start_of_the_answer() -> None:
    codec = build_codec()
    with pytest.raises(
        UserError, match=r"the model's tokenizer has no chat template; set task\.chat_template to false"
    ):
        codec.chat_prompt(Chat.of_user("2+3?"))
    codec.tokenizer.chat_template = CHAT
    assert codec.chat_prompt(Chat.of_user("2+3?")) == "user: 2+3?\nassistant: "
