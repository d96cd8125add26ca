"""Execution of a window on W ranks: cut it into units, and deal them in rounds (micro-steps).

Nothing here changes what a run is: the samples of a window, and their order, are the plan's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dsvlm.schedule.plan import Schedule, Window


class Unit(NamedTuple):
    """What one rank runs in one micro-step.

    places: [n] int64, places in the window; n = 0 is a filler.
    rows: [n] int64, ascending, the packed row of each sample; None = one row per sample.
    width: positions (images and text) that every row is padded to; 0 = those of the longest row.
    """

    places: np.ndarray
    rows: np.ndarray | None = None
    width: int = 0


@dataclass(frozen=True, eq=False)
class Cut:
    """Blocks of samples, each cut into consecutive near-equal pieces (sizes differ by at most 1, larger ones first).

    `starts, counts, pieces: [blocks] int64`. A block with fewer samples than pieces ends in empty pieces.
    """

    starts: np.ndarray
    counts: np.ndarray
    pieces: np.ndarray

    @cached_property
    def edges(self) -> np.ndarray:
        """First unit of every block, then the number of units; [blocks + 1] int64."""
        return np.append(0, np.cumsum(self.pieces))

    def blocks(self, first: int, last: int) -> slice:
        """Return the blocks that units first..last belong to, without those past the end."""
        last = min(last, int(self.edges[-1]) - 1)
        return slice(*(np.searchsorted(self.edges, [first, last], side="right") + [-1, 0]).tolist())

    def piece(self, block: int, number: int) -> tuple[int, int]:
        """Return the (start, stop) of one piece of a block."""
        size, larger = divmod(int(self.counts[block]), int(self.pieces[block]))
        start = int(self.starts[block]) + number * size + min(number, larger)
        return start, start + size + (number < larger)

    def unit(self, index: int) -> tuple[int, int]:
        """Return the (start, stop) of one unit; empty past the last one."""
        if index >= self.edges[-1]:
            stop = int(self.starts[-1] + self.counts[-1])
            return stop, stop
        block = int(np.searchsorted(self.edges, index, side="right")) - 1
        return self.piece(block, index - int(self.edges[block]))


@dataclass(frozen=True, eq=False)
class Round:
    """One micro-step: the units `first .. first + world_size - 1` of a cut, one on each rank.

    `task` is the one task of the round, or None where a round may hold several. Everything is computed on demand, so
    that a rank of a large job never builds the spans of the others.
    """

    cut: Cut
    first: int
    world_size: int
    task: int | None

    def span(self, rank: int) -> tuple[int, int]:
        """Return the slice (start, stop) of the window that `rank` runs; start == stop is a filler."""
        assert 0 <= rank < self.world_size
        return self.cut.unit(self.first + rank)

    def unit(self, rank: int) -> Unit:
        """Return what `rank` runs: its span, a row for each sample."""
        return Unit(np.arange(*self.span(rank), dtype=np.int64))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The spans of all ranks."""
        return tuple(self.span(rank) for rank in range(self.world_size))

    @property
    def samples(self) -> int:
        """Samples that all ranks run together."""
        return self.span(self.world_size - 1)[1] - self.span(0)[0]

    @property
    def largest(self) -> int:
        """Samples of the largest unit."""
        blocks, low, _ = self._runs()
        size, larger = np.divmod(self.cut.counts[blocks], self.cut.pieces[blocks])
        return int((size + (low < larger)).max())

    @property
    def work(self) -> tuple[int, int]:
        """What all ranks do, and what they could do in the time of the busiest: samples."""
        return self.samples, self.world_size * self.largest

    @property
    def units(self) -> int:
        """Units that hold samples; the remaining `world_size - units` are fillers, on the last ranks."""
        blocks, low, high = self._runs()
        return int(np.maximum(0, np.minimum(high, self.cut.counts[blocks]) - low).sum())

    def _runs(self) -> tuple[slice, np.ndarray, np.ndarray]:
        """Return the blocks of the round, and of each the first piece and the last piece + 1."""
        blocks = self.cut.blocks(self.first, self.first + self.world_size - 1)
        edges, pieces = self.cut.edges[blocks], self.cut.pieces[blocks]
        return blocks, np.maximum(0, self.first - edges), np.minimum(pieces, self.first + self.world_size - edges)


def deal(window: Window, schedule: Schedule, world_size: int, micro_batch: int) -> tuple[Round, ...]:
    """Deal a window to `world_size` ranks in units of at most `micro_batch` samples: round m, rank r runs unit m*W + r.

    The cut is balanced, better than one into full units and a remainder: with rounds = "task", each block of n samples
    becomes ceil(n / (micro_batch * W)) rounds of W near-equal units. Packed rounds (always for mixed and per_rank,
    whose rounds cannot hold one task) are as few as micro_batch allows; the last one is filled by cutting the largest
    units. Fillers appear only where a block (task) or the window (packed) has fewer samples than units, on a round's
    last ranks.
    """
    for field, value in (("world_size", world_size), ("micro_batch", micro_batch)):
        if value < 1:
            raise ValueError(f"{field} is {value}: use at least 1")
    if schedule.strategy == "mixed":
        counts = np.array([len(window)])
    else:
        counts = window.counts
    starts = np.cumsum(counts) - counts
    if schedule.mixes:
        cut = Cut(starts, counts, _packed_pieces(counts, world_size, micro_batch))
        return tuple(Round(cut, first, world_size, None) for first in range(0, int(cut.edges[-1]), world_size))
    rounds = -(-counts // (micro_batch * world_size))
    cut = Cut(starts, counts, rounds * world_size)
    tasks = np.repeat(window.table[:, 0], rounds).tolist()
    return tuple(Round(cut, index * world_size, world_size, task) for index, task in enumerate(tasks))


def idle_share(rounds: Sequence) -> Fraction:
    """Return the share of the work that ranks could do, but wait for the busiest of their round (for reports).

    Work is counted in samples, or in padded tokens where windows are dealt by length.
    """
    done, could = np.sum([part.work for part in rounds], axis=0).tolist()
    return 1 - Fraction(done, could)


def _packed_pieces(counts: np.ndarray, world_size: int, micro_batch: int) -> np.ndarray:
    """Return the pieces per block: the least that micro_batch allows, then more until the last round is full."""
    sizes, times = np.unique(counts, return_counts=True)  # chunks are many, and all alike
    fewest = int((-(-sizes // micro_batch) * times).sum())
    wanted = min(-(-fewest // world_size) * world_size, int(counts.sum()))
    low, high = 1, micro_batch  # the least size of the largest unit that needs no more than the wanted units
    while low < high:
        size = (low + high) // 2
        if (-(-sizes // size) * times).sum() <= wanted:
            high = size
        else:
            low = size + 1
    pieces = -(-counts // low)
    if low == 1:
        return pieces
    # Some blocks still have units of that size; cut those further, the first blocks first, until no rank is idle.
    more = -(-counts // (low - 1)) - pieces
    return pieces + np.clip(wanted - int(pieces.sum()) - (np.cumsum(more) - more), 0, more)
