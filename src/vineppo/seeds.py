"""Random numbers that depend only on an address, such as (run seed, iteration, problem id), and not on earlier ones."""

from __future__ import annotations

import functools
import hashlib
import random

import numpy as np


def derive_seed(*address: int | str) -> int:
    """Return the 63-bit seed of an address such as (run seed, iteration, problem id, "rollouts").

    The seed is a cryptographic hash of the address, so the seeds of similar addresses are unrelated. The same address
    gives the same seed on every machine and in every process.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def shuffled_index(position: int, size: int, *address: int | str) -> int:
    """Return the element at a position of an endless sequence of shuffled passes over the numbers 0 to size - 1.

    Every pass contains each number once and has its order from a new shuffle. The shuffles depend only on `address`.
    """
    return _shuffled(size, derive_seed(*address, position // size))[position % size]


@functools.lru_cache(maxsize=2)  # the positions of one batch are in one pass or in two adjacent passes
def _shuffled(size: int, seed: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014), a bijection of 64-bit words, to each element of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_keys(seeds: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return a 64-bit key for each of B pairs (seed, sample index), shape (B,), dtype uint64."""
    with np.errstate(over="ignore"):
        offsets = np.uint64(0x9E3779B97F4A7C15) * samples.astype(np.uint64)
        return _splitmix64(_splitmix64(seeds.astype(np.uint64)) + offsets)


def uniforms(keys: np.ndarray, positions: int | np.ndarray) -> np.ndarray:
    """Return a uniform random number in [0, 1) for each key and token position, as float64 with 53 random bits.

    Keys of shape (B,) and one position give the shape (B,). Keys of shape (B, 1) and positions of shape (T,) give the
    shape (B, T).
    """
    with np.errstate(over="ignore"):
        offset = (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return (_splitmix64(keys + offset) >> np.uint64(11)).astype(np.float64) * 2.0**-53
