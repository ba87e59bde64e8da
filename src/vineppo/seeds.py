"""Derive seeds and random numbers that do not depend on which other random numbers were drawn before.

A seed is derived from an *address*: a few values that say what the seed is for, such as (run seed, iteration, problem
id).
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence

import numpy as np


def derive_seed(*address: int | str) -> int:
    """Return a 63-bit seed for an address such as (run seed, iteration, problem id, "rollouts").

    The seed is a cryptographic hash of the address, so the seeds of similar addresses are unrelated. The same address
    gives the same seed on every machine and in every process.
    """
    return _seed_of(hashlib.blake2b("\x1f".join(map(_written, address)).encode(), digest_size=8))


def seeds_of_prefixes(address: Sequence[int | str]) -> list[int]:
    """Return `derive_seed(*address[:n])` for n from 0 to the length of an address.

    The hash is continued from one prefix to the next, so that the time is proportional to the length.
    """
    hashed = hashlib.blake2b(digest_size=8)
    seeds = [_seed_of(hashed)]
    for position, part in enumerate(address):
        hashed.update(("\x1f" * (position > 0) + _written(part)).encode())
        seeds.append(_seed_of(hashed))
    return seeds


def _written(part: int | str) -> str:
    """Return the text of a part of an address. It contains the type, so 1 and "1" are different."""
    return f"{type(part).__name__}:{part}"


def _seed_of(hashed: hashlib.blake2b) -> int:
    return int.from_bytes(hashed.digest(), "little") >> 1


def shuffled_index(position: int, size: int, *address: int | str) -> int:
    """Return one element of an endless sequence of indices from 0 to size - 1.

    The sequence consists of passes. Every pass contains each index once, in an order that is shuffled anew. The orders
    depend only on `address`.

    Args:
        position: position of the element in the sequence, counted from 0.
        size: number of different indices.
    """
    return _shuffled(size, derive_seed(*address, position // size))[position % size]


# Two results are cached, because the positions of one batch are usually in one pass or in two adjacent passes.
@functools.lru_cache(maxsize=2)
def _shuffled(size: int, seed: int) -> tuple[int, ...]:
    """Return the numbers from 0 to size - 1 in an order that depends only on the seed."""
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014), a bijection of 64-bit words, to each element of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_keys(seeds: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return one key per sample, from which `uniforms` computes the random numbers of the sample.

    Args:
        seeds: seed of each of B samples, shape (B,).
        samples: index of each sample among the samples with the same seed, shape (B,).
    Returns:
        64-bit keys, shape (B,), dtype uint64. With other shapes, the arguments are broadcast as usual.
    """
    with np.errstate(over="ignore"):
        offsets = np.uint64(0x9E3779B97F4A7C15) * samples.astype(np.uint64)
        return _splitmix64(_splitmix64(seeds.astype(np.uint64)) + offsets)


def uniforms(keys: np.ndarray, positions: int | np.ndarray) -> np.ndarray:
    """Return a uniform random number in [0, 1) for each pair of a key and a token position.

    The number depends only on the key and the position. It is a float64 with 53 random bits.

    Args:
        keys: keys from `stream_keys`, shape (B,) or (B, 1).
        positions: one token position, or a position for each key of shape (B,), or T positions of shape (T,), or T
            positions for each key of shape (B, T).
    Returns:
        Shape (B,) for keys of shape (B,) and one position, or one position each; shape (B, T) for keys of shape (B, 1)
        and T positions.
    """
    with np.errstate(over="ignore"):
        offset = (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return (_splitmix64(keys + offset) >> np.uint64(11)).astype(np.float64) * 2.0**-53
