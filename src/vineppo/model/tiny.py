"""Build a tiny Llama model with random weights, and a tokenizer for the task `chain`.

`vineppo sft` trained the small models that are included in the package from such a model.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vineppo.tasks import chain

WORDS = ("<pad>", "</s>", "<unk>", "\n", "####", " ", "=", ";", "?", "+", "-", "*")
"""Special tokens and signs of the vocabulary. The vocabulary also has digits, letters, and the fixed phrases of the
task `chain`."""
_PATTERN = r"####| by [a-z]+| in [a-z]+| with [a-z]+| is | -> | = |\n|."
"""Regular expression whose matches are the tokens of a text."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer for the texts of `vineppo.tasks.chain`.

    Each letter, digit and sign is one token. Each way of writing a step, such as " by rote", is one token, and so is
    each text between the way and the result of a step, such as " is ".
    """
    ways = [way for level in chain.LEVELS for way in chain.WAYS[level]]
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*WORDS, *map(str, range(10)), *letters, *ways, *chain.LINKS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build a randomly initialised two-layer Llama with about 0.23 million parameters (0.9 MB in float32).

    Args:
        seed: seed of the initial weights.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
