"""Sample with llama.cpp, for benchmarks/engines.py: a GGUF file of a Llama model, and continuations of many prefixes.

llama.cpp reads models from GGUF files, so `write_gguf` converts a model directory of transformers. `Continuations`
decodes many sequences in each call of llama.cpp. The keys and values of a prefix are computed once, and every sequence
that begins with this prefix refers to them.

The packages llama-cpp-python and gguf are needed (`make bench-vines` installs them in an environment of their own), but
neither PyTorch nor this package.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Name of a module in a layer of transformers' Llama -> name of its weight in a GGUF file."""
MODEL_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
"""The same for the modules outside the layers."""
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtype of the matrices -> name of the type in the package gguf."""
BLOCK = 256
"""Number of probabilities that are added up before the token is searched among them."""


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Read all tensors of the safetensors files in a folder.

    NumPy has no bfloat16, so these tensors are returned in float32, which holds the same numbers.

    Returns:
        Name of a tensor -> array.
    Raises:
        ValueError: if a tensor has another dtype than float32, float16 and bfloat16.
    """
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            weights[name] = _array(content[start:end], entry["dtype"]).reshape(entry["shape"])
    return weights


def _array(data: bytes, dtype: str) -> np.ndarray:
    """Return the numbers in `data`, whose dtype has its name in safetensors files."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("F32", "F16"):
        raise ValueError(f"a tensor has the dtype {dtype}; allowed: F32, F16, BF16")
    return np.frombuffer(data, np.float32 if dtype == "F32" else np.float16)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key matrix in the order that llama.cpp expects.

    Rotary positions rotate pairs of numbers of a head. In transformers, the pair i of a head of size D consists of the
    numbers i and i + D/2; in llama.cpp, of the numbers 2i and 2i + 1.

    Args:
        weight: the matrix, shape (heads * D, in).
        heads: number of heads in the matrix.
    """
    half = weight.reshape(heads, 2, -1, weight.shape[1])  # (heads, 2, D/2, in)
    return half.swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name in a GGUF file, array) of every tensor of a Llama model.

    Args:
        config: the content of config.json.
        weights: the tensors, with their names in transformers.
    Raises:
        ValueError: if a tensor is not one of a Llama model without biases.
    """
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module in MODEL_TENSORS and name != module:
            yield f"{MODEL_TENSORS[module]}.weight", weight
            continue
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        if inner not in LAYER_TENSORS or name == module:
            raise ValueError(f"the tensor {name} is not one of a Llama model without biases")
        ordered = interleaved(weight, heads[inner]) if inner in heads else weight
        yield f"blk.{layer}.{LAYER_TENSORS[inner]}.weight", ordered


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Convert a Llama model of transformers to a GGUF file without a tokenizer.

    Args:
        folder: the model directory, with config.json and safetensors files.
        path: the GGUF file to write.
        dtype: dtype of the matrices, one of GGUF_TYPES. Norms are in float32.
    Raises:
        ValueError: if the model is not a Llama model with rotary positions of the type default.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(
            "the GGUF file can be written only for models of type llama with rotary positions of type default"
        )
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, weight in gguf_tensors(config, read_weights(folder)):
        kind = GGMLQuantizationType[GGUF_TYPES[dtype] if weight.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(np.ascontiguousarray(weight, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sample_rows(logits: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Sample one token from each row of logits at temperature 1.

    The cumulative sum of the probabilities is searched for the uniform number: first over blocks of BLOCK tokens, then
    within one block. This takes a fraction of the time of a cumulative sum over all tokens.

    Args:
        logits: shape (B, V), float32. The array is overwritten.
        uniforms: random numbers in [0, 1), shape (B,).
    Returns:
        Token ids, shape (B,), int32.
    """
    vocabulary = logits.shape[1]
    logits -= logits.max(1, keepdims=True)
    weights = np.exp(logits, out=logits)  # (B, V)
    starts = np.arange(0, vocabulary, BLOCK)
    cumulative = np.add.reduceat(weights, starts, axis=1).astype(np.float64).cumsum(1)  # (B, blocks)
    targets = uniforms * cumulative[:, -1]  # (B,)
    block = np.minimum((cumulative <= targets[:, None]).sum(1), len(starts) - 1)  # (B,)
    rows = np.arange(len(logits))
    before = np.where(block > 0, cumulative[rows, block - 1], 0.0)
    columns = starts[block][:, None] + np.arange(BLOCK)  # (B, BLOCK)
    inside = np.where(
        columns < vocabulary, weights[rows[:, None], np.minimum(columns, vocabulary - 1)].astype(np.float64), 0.0
    )
    within = (inside.cumsum(1) <= (targets - before)[:, None]).sum(1)
    return np.minimum(columns[:, 0] + within, vocabulary - 1).astype(np.int32)


@dataclass(frozen=True)
class Trunk:
    """A prefix that is decoded once, and the continuations of all prefixes with which it begins."""

    token_ids: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    """(number of tokens of the prefix, number of tokens of the continuation) of each continuation."""

    def shortened(self, tokens: int) -> Trunk:
        """Return this trunk with continuations of at most `tokens` tokens."""
        return Trunk(self.token_ids, tuple((prefix, min(length, tokens)) for prefix, length in self.rows))


def trunks_of(prefixes: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]) -> list[Trunk]:
    """Return the trunks of a workload. A prefix with which a longer one begins belongs to the trunk of the longer one.

    Args:
        prefixes: token ids of each prefix.
        lengths: for each prefix, the number of tokens of each of its continuations.
    Returns:
        The trunks with the longest continuations first, so that a few short continuations are left at the end.
    """
    trunks: list[tuple[tuple[int, ...], list[tuple[int, int]]]] = []
    # In descending order, a prefix comes directly after the longer prefixes that begin with it.
    for prefix, lengths_K in sorted(zip(map(tuple, prefixes), lengths, strict=True), reverse=True):
        if not trunks or trunks[-1][0][: len(prefix)] != prefix:
            trunks.append((prefix, []))
        trunks[-1][1].extend((len(prefix), length) for length in lengths_K if length > 0)
    ordered = [Trunk(ids, tuple(sorted(rows, key=lambda row: -row[1]))) for ids, rows in trunks if rows]
    return sorted(ordered, key=lambda trunk: -trunk.rows[0][1])


@dataclass(frozen=True)
class Options:
    """How llama.cpp decodes."""

    sequences: int
    """Number of continuations that are decoded together."""
    unified: bool
    """Whether all sequences share one buffer of keys and values, so that a prefix is stored once. Otherwise every
    sequence has a copy of its prefix."""
    flash: bool = True
    """Whether attention is computed in one operation (flash attention)."""
    cache: str = "float16"
    """dtype of the keys and values: float32 or float16. llama.cpp's default is float16."""


class Batch:
    """Arrays for the tokens of one call of `llama_decode`.

    Args:
        size: maximum number of tokens.
    """

    def __init__(self, size: int):
        import llama_cpp

        self.token, self.position, self.sequence = (np.zeros(size, np.int32) for _ in range(3))
        self.wanted = np.zeros(size, np.int8)
        self._counts = np.ones(size, np.int32)
        # llama.cpp expects, for each token, a pointer to its list of sequences.
        self._pointers = (self.sequence.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        batch = llama_cpp.llama_batch()
        for name, array in (
            ("token", self.token),
            ("pos", self.position),
            ("n_seq_id", self._counts),
            ("seq_id", self._pointers),
            ("logits", self.wanted),
        ):
            kind = dict(llama_cpp.llama_batch._fields_)[name]
            setattr(batch, name, ctypes.cast(ctypes.c_void_p(array.ctypes.data), kind))
        self.batch = batch

    def fill(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> None:
        """Set the tokens, their positions and sequences, and whether the logits after each token are wanted."""
        count = len(tokens)
        self.batch.n_tokens = count
        self.token[:count], self.position[:count] = tokens, positions
        self.sequence[:count], self.wanted[:count] = sequences, wanted


class Continuations:
    """Samples continuations of fixed lengths with llama.cpp.

    Args:
        model: path of a GGUF file.
        trunks: the workload.
        options: how llama.cpp decodes.
        threads: number of threads.
    """

    def __init__(self, model: Path, trunks: Sequence[Trunk], options: Options, threads: int):
        import llama_cpp

        self.api, self.trunks, self.options = llama_cpp, trunks, options
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model.name}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        longest = max(len(trunk.token_ids) + trunk.rows[0][1] for trunk in trunks)
        cells = -(-longest // 256) * 256  # llama.cpp rounds the size of a sequence's buffer up to this number
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = options.sequences + 1  # one more for the trunk
        settings.n_ctx = (options.sequences + 1) * cells
        settings.n_batch = settings.n_ubatch = self.size = max(512, options.sequences)
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified, settings.flash_attn_type = options.unified, int(options.flash)
        settings.type_k = settings.type_v = {"float32": 0, "float16": 1}[self.options.cache]
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp cannot create a context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = Batch(self.size)
        self.random = np.random.default_rng(0)

    def close(self) -> None:
        """Free the context and the model."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def decode(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> np.ndarray:
        """Decode tokens, at most `size`, and return the logits after the wanted ones, shape (wanted, V).

        The array is memory of llama.cpp that the next call overwrites.
        """
        self.batch.fill(tokens, positions, sequences, wanted)
        code = self.api.llama_decode(self.context, self.batch.batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = int(self.batch.wanted[: len(tokens)].sum())
        if not rows:
            return np.zeros((0, self.vocabulary), np.float32)
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (rows, self.vocabulary))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits (T, V) after every token of a sequence."""
        self.api.llama_memory_clear(self.memory, True)
        count = len(token_ids)
        return self.decode(token_ids, np.arange(count), 0, 1).copy()

    def sample(self, logits: np.ndarray) -> np.ndarray:
        """Return one sampled token id per row of logits, which are overwritten."""
        return sample_rows(logits, self.random.random(len(logits)))

    def run(self) -> int:
        """Sample the whole workload once, and return the number of sampled tokens."""
        api, trunk_sequence = self.api, self.options.sequences
        api.llama_memory_clear(self.memory, False)
        free = list(range(self.options.sequences))
        waiting = self._first_tokens(trunk_sequence)
        upcoming = next(waiting, None)
        # Columns: sequence, last token, position of this token, number of tokens that are still to be sampled.
        rows = np.zeros((0, 4), np.int32)
        tokens = 0
        while True:
            started = []
            while free and upcoming is not None:
                prefix, token, length = upcoming
                tokens += 1
                if length > 1:
                    started.append((free.pop(), token, prefix, length - 1))
                    self._share(trunk_sequence, started[-1][0], prefix)
                upcoming = next(waiting, None)
            if started:
                rows = np.concatenate([rows, np.array(started, np.int32)])
            if not len(rows):
                return tokens
            rows[:, 1] = self.sample(self.decode(rows[:, 1], rows[:, 2], rows[:, 0], 1))
            tokens += len(rows)
            rows[:, 2] += 1
            rows[:, 3] -= 1
            ended = rows[:, 3] == 0
            if ended.any():
                for sequence in rows[ended, 0].tolist():
                    api.llama_memory_seq_rm(self.memory, sequence, -1, -1)
                    free.append(sequence)
                rows = rows[~ended]

    def _first_tokens(self, sequence: int) -> Iterator[tuple[int, int, int]]:
        """Decode one trunk after the other, and yield the continuations of each with their first tokens.

        A trunk is decoded when the continuations of the trunk before it have been yielded, so the caller must `_share`
        a prefix before it asks for the next continuation.

        Args:
            sequence: the sequence into which the trunks are decoded.
        Yields:
            (number of tokens of the prefix, first token of the continuation, number of tokens of the continuation).
        """
        for trunk in self.trunks:
            count = len(trunk.token_ids)
            ends = {prefix - 1 for prefix, _ in trunk.rows}
            wanted = np.array([position in ends for position in range(count)], np.int8)
            logits = {}
            for start in range(0, count, self.size):
                span = np.arange(start, min(start + self.size, count))
                out = self.decode(np.array(trunk.token_ids)[span], span, sequence, wanted[span])
                logits.update({int(end) + 1: row.copy() for end, row in zip(span[wanted[span] > 0], out, strict=True)})
            for prefix, length in trunk.rows:
                yield prefix, int(self.sample(logits[prefix][None].copy())[0]), length
            self.api.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def _share(self, source: int, target: int, tokens: int) -> None:
        """Let the sequence `target` begin with the first tokens of the sequence `source`."""
        if self.options.unified:
            self.api.llama_memory_seq_cp(self.memory, source, target, 0, tokens)
        else:
            # Between separate buffers, llama.cpp copies only whole sequences.
            self.api.llama_memory_seq_cp(self.memory, source, target, -1, -1)
            self.api.llama_memory_seq_rm(self.memory, target, tokens, -1)
