"""Integer hashing: the only source of randomness in a schedule.

Owned code with golden vectors: numpy, torch and `random` do not promise that their streams stay equal across versions.
"""

import hashlib

import numpy as np

# Arrays without axes: as operands they cost half of what numpy scalars do.
GOLDEN = np.array(0x9E3779B97F4A7C15, np.uint64)
_SHIFTS = tuple(np.array(bits, np.uint64) for bits in (30, 27, 31))
_FACTORS = tuple(np.array(factor, np.uint64) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ONE = np.array(1, np.uint64)


def key64(*parts: int | str) -> int:
    """Return a 64-bit key for a path of names and integers (blake2b; `("a", "bc")` and `("ab", "c")` differ)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{'s' if isinstance(part, str) else 'i'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble `x: [...] uint64` by a bijection (the finaliser of splitmix64, Steele et al. 2014; wraps mod 2^64)."""
    x = x ^ (x >> _SHIFTS[0])
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers in order: words are taken mod 2^64 and broadcast to [...] (at least one axis) uint64."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix(state + (as_uint64(word) + _ONE) * GOLDEN)
    return state


def as_uint64(word: int | np.ndarray) -> np.ndarray:
    """Return integers as a uint64 array of at least one axis (numpy wraps silently in arrays, but warns in scalars)."""
    if isinstance(word, int):
        return np.array([word % 2**64], np.uint64)
    array = np.asarray(word).astype(np.uint64, copy=False)
    return array if array.ndim else array.reshape(1)
