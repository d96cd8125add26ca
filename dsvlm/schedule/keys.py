"""Integer hashing: the only source of randomness in a schedule.

Owned code with golden vectors: numpy, torch and `random` do not promise that their streams stay equal across versions.
"""

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key64(*parts: int | str) -> int:
    """Return a 64-bit key for a path of names and integers (blake2b; `("a", "bc")` and `("ab", "c")` differ)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{'s' if isinstance(part, str) else 'i'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble `x: [...] uint64` by a bijection (the finaliser of splitmix64, Steele et al. 2014; wraps mod 2^64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers in order: words are taken mod 2^64 and broadcast to [...] (at least one axis) uint64."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix(state + (as_uint64(word) + np.uint64(1)) * GOLDEN)
    return state


def as_uint64(word: int | np.ndarray) -> np.ndarray:
    """Return integers as a uint64 array of at least one axis (numpy wraps silently in arrays, but warns in scalars)."""
    if isinstance(word, int):
        return np.array([word % 2**64], np.uint64)
    return np.atleast_1d(np.asarray(word)).astype(np.uint64)
