"""Addressed randomness: every random number is a function of its purpose, independent of earlier random numbers."""

from __future__ import annotations

import functools
import hashlib
import random

import numpy as np


def derive_seed(*address: int | str) -> int:
    """63-bit seed of an address such as (run seed, iteration, problem id, "rollouts").

    The seed is a cryptographic hash, so seeds of similar addresses are unrelated. The same address gives the same seed
    on every machine and in every process.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def shuffled_index(position: int, size: int, *address: int | str) -> int:
    """Element at a position of an infinite sequence of passes over `size` elements; every pass is shuffled anew."""
    return _shuffled(size, derive_seed(*address, position // size))[position % size]


@functools.lru_cache(maxsize=2)  # the positions of a batch are in one pass or in two adjacent ones
def _shuffled(size: int, seed: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014), a bijection of 64-bit words whose outputs pass BigCrush."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_keys(seeds: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """64-bit keys of (seed, sample index) pairs, shape (B,), dtype uint64."""
    with np.errstate(over="ignore"):
        offsets = np.uint64(0x9E3779B97F4A7C15) * samples.astype(np.uint64)
        return _splitmix64(_splitmix64(seeds.astype(np.uint64)) + offsets)


def uniforms(keys: np.ndarray, positions: int | np.ndarray) -> np.ndarray:
    """One uniform random number in [0, 1) per key and token position, float64 with 53 random bits.

    Keys (B,) and one position give shape (B,); keys (B, 1) and positions (T,) give shape (B, T).
    """
    with np.errstate(over="ignore"):
        offset = (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return (_splitmix64(keys + offset) >> np.uint64(11)).astype(np.float64) * 2.0**-53
