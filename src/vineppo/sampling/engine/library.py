"""Find and call the compiled engine.

There is one library per instruction set and number type. `load` chooses the fastest one that the processor can run. The
functions are called with ctypes, which releases Python's global lock during a call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from vineppo.sampling.engine.build import library_name

FOLDER = Path(__file__).parent / "libraries"
"""Folder of the compiled libraries."""
INSTRUCTIONS = ("avx512", "avx2", "generic")
"""The instruction sets with weights, keys and values in float32, the fastest first."""
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""The instruction sets that multiply bfloat16 numbers, the fastest first. Their libraries store weights, keys and
values in bfloat16, and add products up in float32."""
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
"""The matrices of a layer, in the order of `place_of` in native/interface.cpp."""
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "query", "key")
"""The norms of a layer, in the order of `norm_of` in native/interface.cpp."""
_EVENTS = 4096
"""Maximum number of events that are read at once."""
_WAIT_MS = 100
"""Longest time of a call of the library that waits, in milliseconds. Python handles signals such as Ctrl-C between two
calls."""


class EngineError(RuntimeError):
    """Error: the compiled engine reported a failure."""


class Shape(ctypes.Structure):
    """Shape of a model, with the fields of `Shape` in native/model.h."""

    _fields_ = [
        *[(name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")],
        *[(name, c_int32) for name in ("vocabulary", "rope_tables", "tied", "activation")],
        *[(name, c_float) for name in ("epsilon", "attention_scale", "attention_softcap", "logit_softcap")],
        ("embedding_scale", c_float),
    ]


class DraftTable(ctypes.Structure):
    """Drafts, with the fields of `DraftTable` in native/interface.cpp. Make one with `draft_table`."""

    _fields_ = [
        ("count", c_int32),
        *[(name, c_void_p) for name in ("trunks", "context_lengths", "starts", "token_starts", "tokens", "logprobs")],
        ("draft_of", c_void_p),
    ]
    arrays: dict[str, np.ndarray]
    """The arrays that the pointers lead to."""


def draft_table(
    places: Sequence[tuple[int, int, int]],
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    draft_of: Sequence[int],
) -> DraftTable:
    """Return a table of D drafts.

    Args:
        places: for each draft, the index of the trunk with its own context, the number of tokens before it there, and
            its position in the completion, shape (D, 3).
        tokens, logprobs: for each draft, its token ids and their log-probabilities, at least one.
        draft_of: for each sample, the index of its draft, or -1.
    """
    columns = np.array(places, np.int32).T
    arrays = {
        **dict(zip(("trunks", "context_lengths", "starts"), map(np.ascontiguousarray, columns), strict=True)),
        "token_starts": np.cumsum([0, *map(len, tokens)], dtype=np.int32),
        "tokens": np.array([token for ids in tokens for token in ids], np.int32),
        "logprobs": np.array([logprob for row in logprobs for logprob in row], np.float32),
        "draft_of": np.array(draft_of, np.int32),
    }
    table = DraftTable(len(places), **{name: array.ctypes.data for name, array in arrays.items()})
    table.arrays = arrays
    return table


class Library:
    """A compiled library."""

    def __init__(self, path: Path, instructions: str):
        self.path, self.instructions = path, instructions
        self.bf16 = instructions in BF16_INSTRUCTIONS
        self._functions = ctypes.CDLL(str(path))
        for name in ("vineppo_model_new", "vineppo_job_new"):
            getattr(self._functions, name).restype = c_void_p
        self._functions.vineppo_kv_bytes.restype = c_int64
        self._functions.vineppo_error.restype = c_char_p

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function of the library, and return its result, which may be a pointer.

        Raises:
            EngineError: if the function reports a failure (-1 or a null pointer).
        """
        result = getattr(self._functions, f"vineppo_{name}")(*map(_argument, arguments))
        if result is None or result == -1:
            raise EngineError(self._functions.vineppo_error().decode(errors="replace"))
        return int(result)

    def free(self, kind: str, pointer: int) -> None:
        """Free a model or a job."""
        function = getattr(self._functions, f"vineppo_{kind}_free")
        function.restype = None
        function(c_void_p(pointer))

    def can_run(self, instructions: str) -> bool:
        """Return whether this processor can run a library for an instruction set."""
        return bool(self._functions.vineppo_can_run(instructions.encode()))


def _argument(value: Any) -> Any:
    """Return a value in the form in which ctypes passes it. Arrays become pointers, None a null pointer."""
    if isinstance(value, np.ndarray):
        return value.ctypes.data_as(c_void_p)
    return value


@functools.cache
def load(instructions: str | None = None, *, bf16: bool = False) -> Library | None:
    """Return the fastest library that this processor can run, or None if there is none.

    `why_not_loaded` returns why there is none with float32.

    Args:
        instructions: an instruction set; None: the fastest one.
        bf16: whether the fastest one is chosen from `BF16_INSTRUCTIONS` or from `INSTRUCTIONS`.
    """
    base = _open("generic")
    if isinstance(base, str):
        return None
    names = BF16_INSTRUCTIONS if bf16 else INSTRUCTIONS
    for name in names if instructions is None else (instructions,):
        if base.can_run(name):
            library = _open(name)
            if isinstance(library, Library):
                return library
    return None


def why_not_loaded() -> str:
    """Return why `load` returns None."""
    base = _open("generic")
    return base if isinstance(base, str) else "no library fits this processor"


@functools.cache
def _open(instructions: str) -> Library | str:
    """Return the library for an instruction set, or why it cannot be used."""
    try:
        path = FOLDER / library_name(instructions)
        if not path.exists():
            return "the compiled engine is not built (it needs a C++ compiler: make engine)"
        return Library(path, instructions)
    except (OSError, AttributeError) as error:
        return f"the compiled engine cannot be loaded ({error})"


class CompiledModel:
    """A model in the memory of a library. Arrays are float32 and contiguous."""

    def __init__(self, library: Library, shape: Shape):
        self.library, self.shape = library, shape
        self.pointer = c_void_p(library.call("model_new", byref(shape)))

    def __del__(self) -> None:
        if pointer := getattr(self, "pointer", None):
            self.library.free("model", pointer.value or 0)

    def set_matrix(self, layer: int, name: str, values: np.ndarray, bias: np.ndarray | None) -> None:
        """Set a matrix of a layer (out, in) and its bias (out,). Layer -1: the output matrix of the model."""
        number = MATRICES.index(name) if layer >= 0 else 0
        self.library.call("set_matrix", self.pointer, layer, number, values, *values.shape, bias)

    def set_norm(self, layer: int, name: str, weight: np.ndarray) -> None:
        """Set the weight of a norm. Layer -1: the final norm."""
        self.library.call("set_norm", self.pointer, layer, NORMS.index(name) if layer >= 0 else 0, weight, weight.size)

    def set_embedding(self, values: np.ndarray) -> None:
        """Set the embeddings (vocabulary, hidden) of a model that does not tie them to the output matrix."""
        self.library.call("set_embedding", self.pointer, values, *values.shape)

    def set_rope(self, table: int, cosines: np.ndarray, sines: np.ndarray) -> None:
        """Set a table of rotary positions (positions, head size)."""
        self.library.call("set_rope", self.pointer, table, len(cosines), cosines, sines)

    def set_layer(self, layer: int, rope_table: int, window: int) -> None:
        """Set the table of positions of a layer, and the number of positions that a token attends to (0: all)."""
        self.library.call("set_layer", self.pointer, layer, rope_table, window)

    def kv_bytes(self, tokens: int) -> int:
        """Return the number of bytes of the keys and values of a sequence."""
        return self.library.call("kv_bytes", self.pointer, tokens)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits (tokens, vocabulary) after every token of a sequence."""
        out = np.empty((len(token_ids), self.shape.vocabulary), np.float32)
        self.library.call("logits", self.pointer, np.asarray(token_ids, np.int32), len(token_ids), out)
        return out


class Job:
    """Samples that are being decoded by the threads of a library. Use it as a context manager."""

    def __init__(self, library: Library, pointer: int, arrays: Sequence[np.ndarray]):
        self.library, self.pointer = library, c_void_p(pointer)
        self._arrays = arrays  # the library reads them
        # Where the library writes what `result` returns.
        self._tokens, self._logprobs = POINTER(c_int32)(), POINTER(c_float)()
        self._finish, self._accepted = c_int(), c_int()
        self._places = byref(self._tokens), byref(self._logprobs), byref(self._finish), byref(self._accepted)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and free the job. Later calls do nothing."""
        if pointer := self.pointer.value:
            self.pointer.value = None
            self.library.free("job", pointer)

    def events(self, at_once: bool = True) -> Iterator[list[tuple[bool, int]]]:
        """Yield lists of pairs (whether the sample asks about a stop string, index of the sample).

        The iteration ends when all samples are finished. A list may be empty. A sample that does not ask is finished.

        Args:
            at_once: whether a list is yielded as soon as there is a pair. Otherwise pairs are collected for up to
                `_WAIT_MS`, which disturbs the threads of the engine less; samples must then not ask.
        """
        least = 1 if at_once else _EVENTS
        pairs = np.empty((_EVENTS, 2), np.int32)
        while (count := self.library.call("job_wait", self.pointer, _WAIT_MS, pairs, _EVENTS, least)) != -2:
            yield [(bool(kind), int(sample)) for kind, sample in pairs[:count]]

    def answer(self, sample: int, stops: bool) -> None:
        """Say whether the last token of a sample that asks completed a stop string."""
        self.library.call("job_answer", self.pointer, sample, int(stops))

    def result(self, sample: int) -> tuple[list[int], list[float], bool, int]:
        """Return (token ids, log-probabilities, whether it ended before its budget, accepted tokens) of a sample."""
        count = self.library.call("job_result", self.pointer, sample, *self._places)
        return self._tokens[:count], self._logprobs[:count], self._finish.value == 1, self._accepted.value


def start_job(
    model: CompiledModel,
    trunks: Sequence[Sequence[int]],
    samples: dict[str, np.ndarray],
    excluded: Sequence[Sequence[int]],
    asks: np.ndarray,
    end_tokens: Sequence[int],
    threads: int,
    batch: int,
    memory: int,
    drafts: DraftTable | None = None,
) -> Job:
    """Start sampling.

    Args:
        trunks: token ids of each trunk.
        samples: arrays with one entry per sample, in the order of the trunks: `trunk` (index), `prefix_length`,
            `budget`, `key`, `temperature`, and `ask_kind` (row of `asks`, or -1 without stop strings).
        excluded: for each sample, the token ids that its first token must not be.
        asks: for each set of stop strings and each token id, whether the token may complete a stop string; (kinds, V).
        threads: number of threads.
        batch: maximum number of samples that a thread decodes together.
        memory: maximum number of bytes of keys and values.
        drafts: the drafts of the samples.
    """
    starts = np.cumsum([0, *map(len, trunks)], dtype=np.int32)
    tokens = np.array([token for trunk in trunks for token in trunk], np.int32)
    excluded_starts = np.cumsum([0, *map(len, excluded)], dtype=np.int32)
    excluded_tokens = np.array([token for tokens in excluded for token in tokens], np.int32)
    numbers = [
        np.ascontiguousarray(samples[name], dtype)
        for name, dtype in (
            ("trunk", np.int32),
            ("prefix_length", np.int32),
            ("budget", np.int32),
            ("key", np.uint64),
            ("temperature", np.float32),
        )
    ]
    kinds = np.ascontiguousarray(samples["ask_kind"], np.int32)
    asks = np.ascontiguousarray(asks, np.uint8)
    ends = np.array(end_tokens, np.int32)
    pointer = model.library.call(
        "job_new", model.pointer, len(trunks), starts, tokens, len(kinds), *numbers, excluded_starts, excluded_tokens,
        kinds, asks, ends, len(ends), threads, batch, c_uint64(memory), byref(drafts) if drafts else None,
    )  # fmt: skip
    return Job(model.library, pointer, [asks])
