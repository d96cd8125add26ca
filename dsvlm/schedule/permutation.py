"""Keyed permutations with random access, and the order of a task's samples within one epoch."""

from typing import NamedTuple

import numpy as np

from dsvlm.schedule.keys import GOLDEN, as_uint64, hash64, mix

ROUNDS = 16  # with 8 or 12, the orders of 5 to 8 items are measurably uneven
_ONE = np.uint64(1)
_HALF = np.uint64(32)
_PIECE = 2**13  # indices that are permuted together: their halves and keys stay in the processor's cache
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


def permutations(n: int, keys: np.ndarray) -> np.ndarray:
    """Return `permute(np.arange(n), n, key)` for each of `keys: [k] uint64`; [k, n] int64, n < 2^31.

    Faster than index by index: there are few halves, and each is drawn for once.
    """
    bits, side = _sides(as_uint64(n))
    low_side, high_side = 1 << int(bits[0]), int(side[0])
    draws = mix(_turns(keys[:, None]) + np.arange(max(low_side, high_side), dtype=np.uint64) * _STRIDE)
    add_low = (draws[::2, :, :high_side] & _mask(bits)).astype(np.int32)  # [ROUNDS / 2, k, high_side]
    add_high = _below(draws[1::2, :, :low_side], side).astype(np.int32)
    high, low = (np.tile(half.ravel().astype(np.int32), (len(keys), 1)) for half in np.indices((high_side, low_side)))
    row = np.arange(len(keys))[:, None]
    for turn in range(ROUNDS // 2):
        low = (low + add_low[turn].take(row * high_side + high)) & np.int32(low_side - 1)
        high = high + add_high[turn].take(row * low_side + low)
        high -= np.int32(high_side) * (high >= high_side)
    domain = high * np.int64(low_side) + low  # [k, low_side * high_side], whose own table is the way back below n
    image = domain[:, :n]
    outside = image >= n
    while outside.any():
        image[outside] = domain[np.nonzero(outside)[0], image[outside]]
        outside = image >= n
    return image


def _walk(network, index, n, key) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(index), np.shape(n), np.shape(key))
    parts = [np.broadcast_to(as_uint64(part), shape or (1,)).reshape(-1) for part in (index, n, key)]
    image = np.empty(len(parts[0]), np.int64)
    for start in range(0, len(image), _PIECE):
        x, n, key = (part[start : start + _PIECE] for part in parts)
        x = network(x, n, key)
        outside = x >= n
        while outside.any():
            x[outside] = network(x[outside], n[outside], key[outside])
            outside = x >= n
        image[start : start + _PIECE] = x
    return image.reshape(shape)


def _forward(x, n, key) -> np.ndarray:
    bits, side = _sides(n)
    mask, turns = _mask(bits), _turns(key)
    low, high = _split(x, bits)
    for turn in range(0, ROUNDS, 2):
        low = (low + mix(turns[turn] + high * _STRIDE)) & mask
        high = _wrap(high + _below(mix(turns[turn + 1] + low * _STRIDE), side), side)
    return (high << bits) | low


def _backward(x, n, key) -> np.ndarray:
    bits, side = _sides(n)
    mask, turns = _mask(bits), _turns(key)
    low, high = _split(x, bits)
    for turn in range(ROUNDS - 2, -1, -2):
        high = _wrap(high + side - _below(mix(turns[turn + 1] + low * _STRIDE), side), side)
        low = (low - mix(turns[turn] + high * _STRIDE)) & mask
    return (high << bits) | low


def _sides(n) -> tuple[np.ndarray, np.ndarray]:
    """Return log2 of the low side, half of ceil(log2 n), and the high side."""
    bits = np.searchsorted(_POWERS, n).astype(np.uint64) >> _ONE
    return bits, (n + _mask(bits)) >> bits


def _mask(bits) -> np.ndarray:
    return (_ONE << bits) - _ONE


def _split(x, bits) -> tuple[np.ndarray, np.ndarray]:
    return x & _mask(bits), x >> bits


def _turns(key) -> np.ndarray:
    """Return what each turn adds: its draw for a half is splitmix64's number half * ROUNDS + turn, seeded by `key`."""
    return key + _TURNS.reshape(ROUNDS, *(1,) * key.ndim)


def _below(draw, limit) -> np.ndarray:
    """Return a draw below `limit` (at most 2^32), from the high bits."""
    return ((draw >> _HALF) * limit) >> _HALF


def _wrap(x, side) -> np.ndarray:
    """Return x mod side, x < 2 * side (a subtraction below 0 wraps to something large)."""
    return np.minimum(x, x - side)


class Slots(NamedTuple):
    """Where positions of an epoch lie: slot `index` of the `size` slots of their group, `offset` samples into a block.

    A group's blocks are permuted by its key: slot i holds block first + permute(i, size, key). All [n].
    """

    index: np.ndarray
    size: np.ndarray
    key: np.ndarray
    first: np.ndarray
    offset: np.ndarray

    def blocks(self) -> np.ndarray:
        """Return the number of each position's block in the epoch, [n] int64."""
        return self.first + permute(self.index, self.size, self.key)


class EpochOrder:
    """The order of one task's samples in one epoch, with random access: O(log shards) a sample, O(shards) memory.

    Shards are permuted and taken in groups of `group`. Each shard is cut into blocks of `block` consecutive samples,
    its last one possibly short; the blocks of a group are permuted. Every sample comes exactly once.
    """

    def __init__(self, shard_sizes: np.ndarray, block: int, group: int, key: int):
        self.block = block
        order = permutations(len(shard_sizes), hash64(key, 0))[0]
        self.shard_start = (np.cumsum(shard_sizes) - shard_sizes)[order]  # first sample id, by permuted rank
        self.shard_size = shard_sizes[order]
        self.block_start = _starts(-(-self.shard_size // block))  # [shards + 1]: first block of each permuted shard
        self.group_start = np.append(self.block_start[:-1:group], self.block_start[-1])  # [groups + 1]: in blocks
        self.group_size = np.diff(self.group_start)
        self.group_key = hash64(key, 1, np.arange(len(self.group_size)))

        # Pretend that every block is full: then slot j covers the virtual positions [j * block, (j + 1) * block), and a
        # position becomes virtual by adding what the short blocks that ended before it lack.
        tail = self.shard_size % block
        short = np.flatnonzero(tail)
        slot = self._slot_of(self.block_start[short + 1] - 1)
        rank = np.argsort(slot)
        slot, tail = slot[rank], tail[short][rank]
        self.lack = _starts(block - tail)
        self.short_slot = slot
        self.short_end = slot * block - self.lack[:-1] + tail

    def samples(self, position: np.ndarray) -> np.ndarray:
        """Return the sample ids at `position: [n] int64` of the epoch; [n] int64."""
        slots = self.slots(position)
        return self.samples_of(slots.blocks(), slots.offset)

    def slots(self, position: np.ndarray) -> Slots:
        """Return where `position: [n] int64` lie; many orders' slots may then be permuted in one pass."""
        virtual = position + self.lack[np.searchsorted(self.short_end, position, side="right")]
        slot, offset = np.divmod(virtual, self.block)
        group = np.searchsorted(self.group_start, slot, side="right") - 1
        first = self.group_start[group]
        return Slots(slot - first, self.group_size[group], self.group_key[group], first, offset)

    def samples_of(self, block: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Return the sample ids at an offset of a block of the epoch; [n] int64 each."""
        shard = np.searchsorted(self.block_start, block, side="right") - 1
        return self.shard_start[shard] + (block - self.block_start[shard]) * self.block + offset

    def positions(self, sample: np.ndarray) -> np.ndarray:
        """Invert `samples`: the positions in the epoch of `sample: [n] int64` ids; [n] int64."""
        by_start = np.lexsort((self.shard_size, self.shard_start))  # empty shards before the one that begins there
        shard = by_start[np.searchsorted(self.shard_start, sample, side="right", sorter=by_start) - 1]
        block, offset = np.divmod(sample - self.shard_start[shard], self.block)
        slot = self._slot_of(self.block_start[shard] + block)
        return slot * self.block + offset - self.lack[np.searchsorted(self.short_slot, slot)]

    def _slot_of(self, block: np.ndarray) -> np.ndarray:
        group = np.searchsorted(self.group_start, block, side="right") - 1
        first = self.group_start[group]
        return first + unpermute(block - first, self.group_size[group], self.group_key[group])


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Return the [n + 1] starts of consecutive pieces of the given sizes; the last entry is the total."""
    return np.append(0, np.cumsum(sizes)).astype(np.int64)
