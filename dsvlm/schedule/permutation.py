"""Keyed permutations with random access, and the order of a task's samples within one epoch."""

import itertools
from collections.abc import Sequence

import numpy as np

from dsvlm.schedule.keys import GOLDEN, as_uint64, hash64, mix

ROUNDS = 16  # with 8 or 12, the orders of 5 to 8 items are measurably uneven
_ONE = np.array(1, np.uint64)
_HALF = np.array(32, np.uint64)
_PIECE = 2**13  # indices that are permuted together: their halves and keys stay in the processor's cache
_POWERS = _ONE << np.arange(64, dtype=np.uint64)
_TURNS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN
_STRIDE = np.array(ROUNDS * int(GOLDEN) % 2**64, np.uint64)


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
    halves = np.arange(max(low_side, high_side), dtype=np.uint64) * _STRIDE
    every_high, every_low = (half.reshape(1, -1) for half in np.indices((high_side, low_side)))
    image, together = np.empty((len(keys), n), np.int64), max(1, 4 * _PIECE // n)
    for start in range(0, len(keys), together):
        part = keys[start : start + together, None]
        turns = _turns(part)
        add_low = (mix(turns[::2] + halves[:high_side]) & _mask(bits)).view(np.int64)  # [ROUNDS / 2, part, high_side]
        add_high = _below(mix(turns[1::2] + halves[:low_side]), side).view(np.int64)
        row = np.arange(len(part))[:, None]
        low_row, high_row, low, high = row * low_side, row * high_side, every_low, every_high
        for turn in range(ROUNDS // 2):
            low = (low + add_low[turn].take(high_row + high)) & (low_side - 1)
            high = high + add_high[turn].take(low_row + low)
            high -= high_side * (high >= high_side)
        domain = high * low_side + low  # [part, low_side * high_side], whose own table is the way back below n
        inside = domain[:, :n]
        outside = inside >= n
        while outside.any():
            rows, columns = outside.nonzero()
            inside[rows, columns] = domain[rows, inside[rows, columns]]
            outside = inside >= n
        image[start : start + together] = inside
    return image


def _walk(network, index, n, key) -> np.ndarray:
    shape = np.broadcast(index, n, key).shape
    parts = [_filled(as_uint64(part), shape or (1,)) for part in (index, n, key)]
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


def _filled(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array repeated to a shape, its axes joined to one."""
    if part.shape != shape:
        whole = np.empty(shape, np.uint64)
        whole[...] = part
        part = whole
    return part.reshape(-1)


def _forward(x, n, key) -> np.ndarray:
    bits, side = _sides(n)
    mask, turns = _mask(bits), _turns(key)
    low, high = _split(x, bits)
    for turn in range(0, ROUNDS, 2):
        low += mix(turns[turn] + high * _STRIDE)
        low &= mask
        high += _below(mix(turns[turn + 1] + low * _STRIDE), side)
        high = _wrap(high, side)
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
    draw = draw >> _HALF
    draw *= limit
    draw >>= _HALF
    return draw


def _wrap(x, side) -> np.ndarray:
    """Return x mod side, x < 2 * side (a subtraction below 0 wraps to something large)."""
    return np.minimum(x, x - side)


class EpochOrder:
    """The order of one task's samples in one epoch, with random access: O(log shards) a sample, O(shards) memory.

    Shards are permuted and taken in groups of `group`. Each shard is cut into blocks of `block` consecutive samples,
    its last one possibly short; the blocks of a group are permuted. Every sample comes exactly once.
    """

    def __init__(self, shard_sizes: np.ndarray, block: int, group: int, key: int):
        assert 1 <= block <= 2**31 and len(shard_sizes) < 2**31, "virtual positions must stay below 2^63"
        self.block = block
        order = permutations(len(shard_sizes), hash64(key, 0))[0]
        self.shard_start = (np.cumsum(shard_sizes) - shard_sizes)[order]  # first sample id, by permuted rank
        self.shard_size = shard_sizes[order]
        self.block_start = _starts(-(-self.shard_size // block))  # [shards + 1]: first block of each permuted shard
        self.group_start = np.append(self.block_start[:-1:group], self.block_start[-1])  # [groups + 1]: in blocks
        self.group_size = np.diff(self.group_start)
        self.group_key = hash64(key, 1, np.arange(len(self.group_size)))

        # As `samples_of` looks them up: of each group its first block, size and key; of each shard the sample id from
        # which its blocks count, as if all before them were full.
        self.group = np.stack([self.group_start[:-1], self.group_size, self.group_key.view(np.int64)])
        self.group_stop, self.block_stop = self.group_start[1:], self.block_start[1:]
        self.shard_base = self.shard_start - self.block_start[:-1] * block

        # Pretend that every block is full: then slot j covers the virtual positions [j * block, (j + 1) * block), and a
        # position becomes virtual by adding what the short blocks that ended before it lack.
        tail = self.shard_size % block
        short = np.flatnonzero(tail)
        slot = self._slot_of(self.block_start[short + 1] - 1) if len(short) else short
        rank = np.argsort(slot)
        slot, tail = slot[rank], tail[short][rank]
        self.lack = _starts(block - tail)
        self.short_slot = slot
        self.short_end = slot * block - self.lack[:-1] + tail

    def samples(self, position: np.ndarray) -> np.ndarray:
        """Return the sample ids at `position: [n] int64` of the epoch; [n] int64."""
        return samples_of([self], [position])

    def virtual(self, position: np.ndarray) -> np.ndarray:
        """Return positions as they were if every block were full; [n] int64."""
        if not len(self.short_end):
            return position
        return position + self.lack[self.short_end.searchsorted(position, side="right")]

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


def samples_of(orders: Sequence[EpochOrder], positions: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sample ids at `positions: [n] int64` of each of some orders of one block size, one after the other.

    All are permuted in one pass, and what can be is computed for all: the time is in the number of calls.
    """
    block = orders[0].block
    stops = list(itertools.accumulate(map(len, positions)))
    runs = [slice(stop - len(position), stop) for position, stop in zip(positions, stops, strict=True)]
    slot, offset = _joined([order.virtual(position) for order, position in zip(orders, positions, strict=True)]), 0
    if block > 1:
        slot, offset = np.divmod(slot, block)
    first, size, key = _joined([
        order.group.take(order.group_stop.searchsorted(slot[run], side="right"), axis=1)
        for order, run in zip(orders, runs, strict=True)
    ])  # fmt: skip
    blocks = first + permute(slot - first, size, key)
    start = _joined([
        order.shard_base.take(order.block_stop.searchsorted(blocks[run], side="right"))
        for order, run in zip(orders, runs, strict=True)
    ])  # fmt: skip
    return start + blocks * block + offset


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Return the [n + 1] starts of consecutive pieces of the given sizes; the last entry is the total."""
    return np.append(0, np.cumsum(sizes)).astype(np.int64)
