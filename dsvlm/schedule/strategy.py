"""Execution of a window on W ranks: cut it into units, and deal them in rounds (micro-steps).

Nothing here changes what a run is: the samples of a window, and their order, are the plan's.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
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


class Run(NamedTuple):
    """Consecutive blocks of `count` samples, each cut into `pieces`; start: the first sample, unit: the first unit."""

    start: int
    unit: int
    blocks: int
    count: int
    pieces: int

    def piece(self, index: int) -> tuple[int, int]:
        """Return the (start, stop) of a piece, counted from the run's first."""
        block, number = divmod(index, self.pieces)
        size, larger = divmod(self.count, self.pieces)
        start = self.start + block * self.count + number * size + min(number, larger)
        return start, start + size + (number < larger)

    def filled(self, pieces: int) -> int:
        """Return how many of the run's first pieces hold samples."""
        blocks, rest = divmod(pieces, self.pieces)
        return blocks * min(self.count, self.pieces) + min(rest, self.count)

    def largest(self, low: int, high: int) -> int:
        """Return the samples of the largest of the pieces low..high-1."""
        size, larger = divmod(self.count, self.pieces)
        first = low if low % self.pieces < larger else low + -low % self.pieces  # of the larger ones
        return size + (larger > 0 and first < high)


class Cut:
    """Blocks of samples, each cut into consecutive near-equal pieces (sizes differ by at most 1, larger ones first).

    sizes: (blocks, samples of each, pieces of each), run after run. A block with fewer samples than pieces ends in
    empty pieces. Nothing here is O(blocks): a window may hold half a million of a few kinds.
    """

    def __init__(self, sizes: Iterable[tuple[int, int, int]]):
        self.runs, self.samples, self.units = [], 0, 0
        for blocks, count, pieces in sizes:
            self.runs.append(Run(self.samples, self.units, blocks, count, pieces))
            self.samples += blocks * count
            self.units += blocks * pieces
        self._edges = [run.unit for run in self.runs]

    def unit(self, index: int) -> tuple[int, int]:
        """Return the (start, stop) of one unit; empty past the last one."""
        if index >= self.units:
            return self.samples, self.samples
        run = self.runs[bisect_right(self._edges, index) - 1]
        return run.piece(index - run.unit)

    def parts(self, first: int, stop: int) -> list[tuple[Run, int, int]]:
        """Return the runs that units first..stop-1 belong to, and of each the first piece and the last piece + 1."""
        stop = min(stop, self.units)
        low, high = bisect_right(self._edges, first) - 1, bisect_left(self._edges, stop)
        runs = self.runs[low:high]
        return [(run, max(0, first - run.unit), min(run.blocks * run.pieces, stop - run.unit)) for run in runs]


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
        return max(run.largest(low, high) for run, low, high in self._parts())

    @property
    def work(self) -> tuple[int, int]:
        """What all ranks do, and what they could do in the time of the busiest: samples."""
        return self.samples, self.world_size * self.largest

    @property
    def units(self) -> int:
        """Units that hold samples; the remaining `world_size - units` are fillers, on the last ranks."""
        return sum(run.filled(high) - run.filled(low) for run, low, high in self._parts())

    def _parts(self) -> list[tuple[Run, int, int]]:
        return self.cut.parts(self.first, self.first + self.world_size)


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
    if schedule.mixes:
        sizes = [(1, len(window))] if schedule.strategy == "mixed" else window.sizes
        cut = Cut(_packed_sizes(sizes, world_size, micro_batch))
        return tuple(Round(cut, first, world_size, None) for first in range(0, cut.units, world_size))
    rounds = [(task, count, -(-count // (micro_batch * world_size))) for task, _, count in window.table.tolist()]
    cut = Cut((1, count, each * world_size) for _, count, each in rounds)
    tasks = [task for task, _, each in rounds for _ in range(each)]
    return tuple(Round(cut, index * world_size, world_size, task) for index, task in enumerate(tasks))


def idle_share(rounds: Sequence) -> Fraction:
    """Return the share of the work that ranks could do, but wait for the busiest of their round (for reports).

    Work is counted in samples, or in padded tokens where windows are dealt by length.
    """
    done, could = np.sum([part.work for part in rounds], axis=0).tolist()
    return 1 - Fraction(done, could)


def _packed_sizes(sizes: list[tuple[int, int]], world_size: int, micro_batch: int) -> Iterator[tuple[int, int, int]]:
    """Give blocks their pieces: the least that micro_batch allows, then more until the last round is full."""

    def units(size: int) -> int:
        return sum(blocks * -(-count // size) for blocks, count in sizes)

    wanted = min(-(-units(micro_batch) // world_size) * world_size, sum(blocks * count for blocks, count in sizes))
    low, high = 1, micro_batch  # the least size of the largest unit that needs no more than the wanted units
    while low < high:
        size = (low + high) // 2
        if units(size) <= wanted:
            high = size
        else:
            low = size + 1
    left = wanted - units(low)
    for blocks, count in sizes:
        pieces = -(-count // low)
        # Some blocks still have units of that size; cut those further, the first blocks first, until no rank is idle.
        more = -(-count // (low - 1)) - pieces if low > 1 else 0
        whole, part = divmod(min(left, blocks * more), more) if more else (0, 0)
        left -= whole * more + part
        for times, extra in ((whole, more), (part > 0, part), (blocks - whole - (part > 0), 0)):
            if times:
                yield int(times), count, pieces + extra
