"""Short chat templates in the forms of well-known models, and tokenizers that read them.

The templates are written for these tests. Each has the structure of the model family that it is named after.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
SPECIAL = (
    *("<unk>", BOS, EOS, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|end|>", "<|START|>", "<|END|>", "<|User|>", "<|Assistant|>"),
)
TEXT = {
    # TinyLlama, Zephyr: no BOS in the template, the EOS token after every message.
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    # Llama 2: the template writes the BOS token; a space before the EOS token; no generation prompt.
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "chatml with a default system message": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Gemma: `<end_of_turn>` closes a turn, `<eos>` is the tokenizer's; no system messages.
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
        "{{ '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # DeepSeek-R1: removes the reasoning of earlier messages, and starts the reasoning of the new one.
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
    "command-r": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START|>' + m.role + ': ' + m.content | trim + '<|END|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|START|>assistant: ' }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # Qwen 3: an empty reasoning is part of the prompt if thinking is off, and of an answer without reasoning.
    "thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' and '</think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    ),
    # Qwen 3 in earlier turns: the reasoning of every message is removed.
    "chatml without reasoning": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The prompt ends with a space, with which the first word of a response can be one token.
    "space at the end": (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    # No special token ends a turn.
    "instruction": (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    ),
    # Every prompt ends with the EOS token.
    "eos at the end": "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
}
"""Name -> template."""
END = {
    **dict.fromkeys(TEXT, EOS),
    **dict.fromkeys(("chatml", "chatml with a default system message", "chatml without reasoning"), "<|im_end|>"),
    **{
        "thinking": "<|im_end|>",
        "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "phi3": "<|end|>",
        "command-r": "<|END|>",
    },
}
"""Name of a template -> token with which it ends a message of the assistant; the EOS token if it writes none."""
WITHOUT_SYSTEM = ("mistral", "gemma")
"""Templates that reject system messages."""
ADDED = {"nothing": ("", ""), "BOS": (f"{BOS} ", ""), "EOS": ("", f" {EOS}"), "BOS and EOS": (f"{BOS} ", f" {EOS}")}
"""What a tokenizer adds to a text -> (text before, text after) in the template of its post-processor."""


def build_tokenizer(template: str | None = None, added: str = "nothing", kind: str = "bytes") -> Any:
    """Build a tokenizer with the tokens of all templates.

    Args:
        template: the chat template.
        added: a key of `ADDED`.
        kind: "bytes" for byte-level BPE with the merges of a few words, as in Llama 3 and Qwen; "pieces" for a
            vocabulary of characters with a mark in place of a space and in front of a text, as in Llama 2.
    """
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "4"), ("4", "2"), ("Ċ", "Ċ"), (":", "Ġ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "pieces":
        merges, alphabet = [("▁", "4"), ("4", "2")], ["▁", *map(chr, range(32, 127)), "\n"]
    vocabulary = {
        token: number
        for number, token in enumerate([*SPECIAL, *alphabet, *(first + second for first, second in merges)])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if kind == "pieces":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        # The words of a text with the white space in front of them.
        words = pre_tokenizers.Split(Regex(r"\s?\w+|\s?[^\s\w]+|\s+"), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
    before, after = ADDED[added]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}", special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        additional_special_tokens=[token for token in SPECIAL if token not in (BOS, EOS, "<unk>")],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast
