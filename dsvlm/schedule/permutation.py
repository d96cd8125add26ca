"""Keyed permutations with random access, and the order of a task's samples within one epoch."""

import numpy as np

from dsvlm.schedule.keys import GOLDEN, as_uint64, hash64, mix

ROUNDS = 16  # with 8 or 12, the orders of 5 to 8 items are measurably uneven
_ONE = np.uint64(1)
_HALF = np.uint64(32)
_POWERS = _ONE << np.arange(64, dtype=np.uint64)
_TURNS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN
_STRIDE = (np.full(1, ROUNDS, np.uint64) * GOLDEN)[0]


def permute(index: np.ndarray, n: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Map `index: [...] < n` to its place in the permutation of 0..n-1 named by `key`.

    Generalised Feistel network on Z_a x Z_b, a*b >= n, with cycle walking (Black & Rogaway 2002). a is the power of two
    near sqrt(n), so that a*b - n < sqrt(n) and walking is rare. n (1 to 2^63) and key broadcast with index; int64.
    """
    return _walk(_forward, index, n, key)


def unpermute(index: np.ndarray, n: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Invert `permute`: `unpermute(permute(i, n, key), n, key) == i`."""
    return _walk(_backward, index, n, key)


def _walk(network, index, n, key) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(index), np.shape(n), np.shape(key))
    x, n, key = (np.broadcast_to(as_uint64(part), shape or (1,)) for part in (index, n, key))
    bits = np.searchsorted(_POWERS, n).astype(np.uint64) >> _ONE  # half of ceil(log2 n)
    side = (n + (_ONE << bits) - _ONE) >> bits
    x = network(x, bits, side, key)
    outside = x >= n
    while outside.any():
        x[outside] = network(x[outside], bits[outside], side[outside], key[outside])
        outside = x >= n
    return x.astype(np.int64).reshape(shape)


def _forward(x, bits, side, key) -> np.ndarray:
    mask = (_ONE << bits) - _ONE
    low, high = x & mask, x >> bits
    for turn in range(0, ROUNDS, 2):
        low = (low + _draw(key, high, turn)) & mask
        high = (high + _below(key, low, turn + 1, side)) % side
    return (high << bits) | low


def _backward(x, bits, side, key) -> np.ndarray:
    mask = (_ONE << bits) - _ONE
    low, high = x & mask, x >> bits
    for turn in range(ROUNDS - 2, -1, -2):
        high = (high + side - _below(key, low, turn + 1, side)) % side
        low = (low - _draw(key, high, turn)) & mask
    return (high << bits) | low


def _draw(key, half, turn: int) -> np.ndarray:
    """Return the splitmix64 draw of (half, turn): number half * ROUNDS + turn of the sequence seeded by `key`."""
    return mix(key + _TURNS[turn] + half * _STRIDE)


def _below(key, half, turn: int, limit) -> np.ndarray:
    """Return a draw below `limit` (at most 2^32), from the high bits."""
    return ((_draw(key, half, turn) >> _HALF) * limit) >> _HALF


class EpochOrder:
    """The order of one task's samples in one epoch, with random access: O(log shards) a sample, O(shards) memory.

    Shards are permuted and taken in groups of `group`. Each shard is cut into blocks of `block` consecutive samples,
    its last one possibly short; the blocks of a group are permuted. Every sample comes exactly once.
    """

    def __init__(self, shard_sizes: np.ndarray, block: int, group: int, key: int):
        shards = len(shard_sizes)
        self.block = block
        self.key = key
        order = permute(np.arange(shards), shards, hash64(key, 0))
        self.shard_start = (np.cumsum(shard_sizes) - shard_sizes)[order]  # first sample id, by permuted rank
        self.shard_size = shard_sizes[order]
        self.block_start = _starts(-(-self.shard_size // block))  # [shards + 1]: first block of each permuted shard
        self.group_start = np.append(self.block_start[:-1:group], self.block_start[-1])  # [groups + 1]: in blocks

        # Pretend that every block is full: then slot j covers the virtual positions [j * block, (j + 1) * block), and a
        # position becomes virtual by adding what the short blocks that ended before it lack.
        tail = self.shard_size % block
        short = np.flatnonzero(tail)
        slot = self._slot_of(self.block_start[short + 1] - 1)
        rank = np.argsort(slot)
        slot, tail = slot[rank], tail[short][rank]
        self.lack = _starts(block - tail)
        self.short_end = slot * block - self.lack[:-1] + tail

    def samples(self, position: np.ndarray) -> np.ndarray:
        """Return the sample ids at `position: [n] int64` of the epoch; [n] int64."""
        virtual = position + self.lack[np.searchsorted(self.short_end, position, side="right")]
        slot, offset = np.divmod(virtual, self.block)
        first, size, key = self._group_of(slot)
        block = first + permute(slot - first, size, key)
        shard = np.searchsorted(self.block_start, block, side="right") - 1
        return self.shard_start[shard] + (block - self.block_start[shard]) * self.block + offset

    def _slot_of(self, block: np.ndarray) -> np.ndarray:
        first, size, key = self._group_of(block)
        return first + unpermute(block - first, size, key)

    def _group_of(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first block, the number of blocks and the key of the group that each block (or slot) lies in."""
        group = np.searchsorted(self.group_start, block, side="right") - 1
        first = self.group_start[group]
        return first, self.group_start[group + 1] - first, hash64(self.key, 1, group)


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Return the [n + 1] starts of consecutive pieces of the given sizes; the last entry is the total."""
    return np.append(0, np.cumsum(sizes)).astype(np.int64)
