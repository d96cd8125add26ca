"""Execution of a window by length: units of at most so many padded tokens, or packed rows, of like cost on all ranks.

As in `strategy`, nothing here changes what a run is: samples are sorted and cut inside a block of their window. Every
window keeps its samples, and a gradient that sums over them does not depend on the cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np

from dsvlm.schedule.plan import Schedule, Window
from dsvlm.schedule.strategy import Unit

ROW_MULTIPLE = 8  # positions: packed rows are padded to a multiple of it


def optimal_edges(histogram: np.ndarray, buckets: int, multiple: int) -> np.ndarray:
    """Return the row lengths (ascending, at most `buckets`, multiples of `multiple`) that pad the fewest tokens.

    `histogram: [longest + 1] int64`, samples of each length. Exact, by dynamic programming over the last edge;
    [<= buckets] int64. Every sample fits the last edge.
    """
    assert buckets >= 1 and multiple >= 1
    histogram = np.asarray(histogram, np.int64)
    assert histogram.any(), "an empty task is refused before"
    bins = np.maximum(1, -(-np.arange(len(histogram)) // multiple))  # length l fits edge bins[l] * multiple
    counts = np.zeros(int(bins[-1]) + 1, np.int64)
    np.add.at(counts, bins, histogram)
    filled = np.flatnonzero(counts)
    edge = filled * multiple
    upto = np.append(0, np.cumsum(counts[filled]))  # samples that fit candidate edge j - 1, [candidates + 1]
    best = edge * upto[1:]  # padded tokens of all samples up to candidate j with one edge, the candidate itself
    cuts = []
    for _ in range(1, min(buckets, len(edge))):
        # total[i, j]: candidate i is the edge before j
        total = best[:, None] + edge[None] * (upto[None, 1:] - upto[1:, None])
        total[np.tri(len(edge), dtype=bool)] = np.iinfo(np.int64).max
        before = total.argmin(axis=0)
        cheaper = total[before, np.arange(len(edge))]
        cuts.append(np.where(cheaper < best, before, -1))
        best = np.minimum(best, cheaper)
    last, chosen = len(edge) - 1, [len(edge) - 1]
    for before in reversed(cuts):
        if before[last] >= 0:
            last = int(before[last])
            chosen.append(last)
    return edge[chosen[::-1]]


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a dealt window, in order of rounds.

    places: [n] int64, places in the window, unit after unit; bounds: [units + 1] int64, where each unit begins in it;
    widths: [units] int64, positions of a row; tokens: [units] int64, useful ones; packed: [units] bool, one row each.
    """

    places: np.ndarray
    bounds: np.ndarray
    widths: np.ndarray
    tokens: np.ndarray
    packed: np.ndarray

    @property
    def samples(self) -> np.ndarray:
        """[units] int64; 0 = filler."""
        return np.diff(self.bounds)

    @property
    def padded(self) -> np.ndarray:
        """Tokens that each unit computes, padding included, [units] int64; a filler's are 0."""
        return np.where(self.packed, self.samples > 0, self.samples) * self.widths


@dataclass(frozen=True, eq=False)
class LengthRound:
    """One micro-step: the units `first .. first + world_size - 1`, one on each rank.

    `task` is the one task of the round, or None where a round may hold several.
    """

    table: Units
    first: int
    world_size: int
    task: int | None

    def unit(self, rank: int) -> Unit:
        """Return what `rank` runs."""
        assert 0 <= rank < self.world_size
        index = self.first + rank
        places = self.table.places[self.table.bounds[index] : self.table.bounds[index + 1]]
        packed = len(places) and self.table.packed[index]
        return Unit(places, np.zeros(len(places), np.int64) if packed else None, int(self.table.widths[index]))

    def _mine(self, values: np.ndarray) -> np.ndarray:
        return values[self.first : self.first + self.world_size]

    @property
    def tokens(self) -> np.ndarray:
        """Useful tokens on each rank, [world_size] int64."""
        return self._mine(self.table.tokens)

    @property
    def padded(self) -> np.ndarray:
        """Tokens that each rank computes, [world_size] int64."""
        return self._mine(self.table.padded)

    @property
    def samples(self) -> int:
        """Samples that all ranks run together."""
        return int(self._mine(self.table.samples).sum())

    @property
    def largest(self) -> int:
        """Samples of the largest unit."""
        return int(self._mine(self.table.samples).max())

    @property
    def work(self) -> tuple[int, int]:
        """What all ranks do, and what they could do in the time of the busiest: padded tokens."""
        return int(self.padded.sum()), self.world_size * int(self.padded.max())

    @property
    def units(self) -> int:
        """Units that hold samples; the others are fillers, on the last ranks."""
        return int((self._mine(self.table.samples) > 0).sum())


def deal_by_length(
    window: Window,
    schedule: Schedule,
    world_size: int,
    *,
    micro_tokens: int,
    lengths: np.ndarray,
    edges: Sequence[np.ndarray],
    pack: Sequence[bool],
) -> tuple[LengthRound, ...]:
    """Deal a window to `world_size` ranks in units of like length and at most `micro_tokens` padded tokens.

    A block is one task's samples, or the whole window where rounds are packed (always for mixed and per_rank). Its
    samples are sorted by bucket and cut into the fewest rounds that micro_tokens allows, and such that the costliest
    unit is as cheap as that number of units allows. Fillers appear only where a block has fewer samples than units.
    lengths: [len(window)] int64, positions of each sample, images and text; edges: ascending row lengths of each task;
    pack: tasks whose units are one row of several samples each. ValueError when a sample is longer than micro_tokens.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: use at least 1")
    lengths = np.asarray(lengths, np.int64)
    assert lengths.shape == (len(window),), (lengths.shape, len(window))
    task = window.task if window.order_key is not None else np.repeat(window.table[:, 0], window.counts)
    check_lengths(lengths, task, schedule, micro_tokens)
    counts = np.array([len(window)]) if schedule.mixes else window.counts
    parts, rounds = [], []
    for start, count in zip((np.cumsum(counts) - counts).tolist(), counts.tolist(), strict=True):
        if not count:
            continue
        here = slice(start, start + count)
        flags = {bool(pack[one]) for one in np.unique(task[here])}
        assert len(flags) == 1, "tasks that share units are all packed or none; the recipe is checked for it"
        if flags.pop():
            part = _packed(lengths[here], world_size, micro_tokens)
        else:
            widths = np.minimum(_bucketed(lengths[here], task[here], edges), micro_tokens)
            part = _bucket_units(lengths[here], widths, world_size, micro_tokens)
        rounds += [None if schedule.mixes else int(task[start])] * (len(part.widths) // world_size)
        parts.append((start, part))
    table = _joined(parts)
    return tuple(LengthRound(table, index * world_size, world_size, one) for index, one in enumerate(rounds))


def token_shares(rounds: Sequence, lengths: np.ndarray) -> tuple[int, int, int]:
    """Return (useful, padded, waited) tokens of dealt rounds, of `deal` or `deal_by_length`, all ranks together.

    padded: what is computed; waited: what could have been, were every rank as long at work as the busiest of its round.
    useful / padded is the padding efficiency, padded / waited the step efficiency. O(units).
    """
    useful = padded = waited = 0
    for part in rounds:
        if isinstance(part, LengthRound):
            tokens, costs = int(part.tokens.sum()), part.padded
        else:
            units = [lengths[part.unit(rank).places] for rank in range(part.world_size)]
            tokens = sum(int(unit.sum()) for unit in units)
            costs = np.array([len(unit) * unit.max(initial=0) for unit in units])
        useful, padded = useful + tokens, padded + int(costs.sum())
        waited += part.world_size * int(costs.max())
    return useful, padded, waited


def check_lengths(lengths: np.ndarray, task: np.ndarray, schedule: Schedule, micro_tokens: int) -> None:
    """ValueError when a sample is too long for a unit of its own."""
    longest = int(lengths.argmax())
    if lengths[longest] > micro_tokens:
        raise ValueError(
            f"task {schedule.streams[int(task[longest])].name!r}: a sample has {int(lengths[longest])} tokens, images "
            f"and text, which is more than train.micro_tokens ({micro_tokens}); raise train.micro_tokens, or lower "
            "text.max_length"
        )


def _bucketed(lengths: np.ndarray, task: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    """Return the least edge of its task that each sample fits, [n] int64."""
    widths = np.empty_like(lengths)
    for one in np.unique(task).tolist():
        here = task == one
        bucket = np.searchsorted(edges[one], lengths[here])
        assert bucket.max() < len(edges[one]), "edges come from the lengths of all samples"
        widths[here] = edges[one][bucket]
    return widths


def _bucket_units(lengths: np.ndarray, widths: np.ndarray, world_size: int, micro_tokens: int) -> Units:
    """Cut a block, longest samples first, into rounds of `world_size` units that pad to the edge of their longest."""
    order = np.argsort(-widths, kind="stable")
    changes = np.flatnonzero(np.diff(widths[order], prepend=-1))
    runs = list(zip(widths[order][changes].tolist(), np.diff(changes, append=len(order)).tolist(), strict=True))
    fewest = sum(times for _, times in _filled(runs, micro_tokens))
    wanted = -(-fewest // world_size) * world_size
    low, high = runs[0][0], micro_tokens  # the least budget that needs no more than the wanted units
    while low < high:
        budget = (low + high) // 2
        if sum(times for _, times in _filled(runs, budget)) <= wanted:
            high = budget
        else:
            low = budget + 1
    sizes = np.repeat(*np.array(_filled(runs, low)).T)
    sizes = _halved(sizes, min(wanted, len(order)) - len(sizes))
    bounds = np.append(0, np.cumsum(np.pad(sizes, (0, wanted - len(sizes)))))
    # A sum over the samples of each unit; a filler's is 0, and its width, too.
    useful = np.diff(np.append(0, np.cumsum(lengths[order]))[bounds])
    longest = widths[order[np.minimum(bounds[:-1], len(order) - 1)]]
    return Units(order, bounds, np.where(np.diff(bounds) > 0, longest, 0), useful, np.zeros(wanted, bool))


def _filled(runs: list[tuple[int, int]], budget: int) -> list[tuple[int, int]]:
    """Return (samples, times) of units filled one after the other up to `budget` padded tokens; O(runs).

    runs: (edge, samples), edges descending. No cut has fewer units.
    """
    units, room = [], 0
    for edge, count in runs:
        if room:
            more = min(room, count)
            units[-1] = (units[-1][0] + more, 1)
            room, count = room - more, count - more
        if count:
            each = budget // edge
            full, rest = divmod(count, each)
            units += [(each, full)] * (full > 0) + [(rest, 1)] * (rest > 0)
            room = each - rest if rest else 0
    return units


def _halved(sizes: np.ndarray, more: int) -> np.ndarray:
    """Cut as many units in two as there are idle ranks for, the last ones first."""
    while more > 0:
        split = np.flatnonzero(sizes > 1)[-more:]
        more -= len(split)
        times = np.ones(len(sizes), np.int64)
        times[split] = 2
        first = np.cumsum(times) - times
        halves = sizes[split] // 2
        sizes = np.repeat(sizes, times)
        sizes[first[split]] -= halves
        sizes[first[split] + 1] = halves
    return sizes


def _packed(lengths: np.ndarray, world_size: int, micro_tokens: int) -> Units:
    """Pack a block into rounds of `world_size` rows, the fewest that micro_tokens allows, of like length."""
    rounds = -(-int(lengths.sum()) // (micro_tokens * world_size))
    while True:
        row, sums = balanced_rows(lengths, rounds * world_size)
        if sums.max() <= micro_tokens:
            break
        rounds += 1
    rank = np.argsort(-sums, kind="stable")  # longest rows first: rounds of like rows, empty ones last
    place = np.empty_like(rank)
    place[rank] = np.arange(len(rank))
    order = np.argsort(place[row], kind="stable")
    bounds = np.append(0, np.cumsum(np.bincount(place[row], minlength=len(sums))))
    widths = np.minimum(-(-sums[rank] // ROW_MULTIPLE) * ROW_MULTIPLE, micro_tokens)
    return Units(order, bounds, widths, sums[rank], np.ones(len(sums), bool))


def balanced_rows(lengths: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each sample, [n] int64, and the tokens of each row, [rows] int64, these as equal as can be.

    The longest sample first, each to the row with the fewest tokens so far (LPT: Graham 1969; at most 4/3 of the best).
    """
    row = np.empty(len(lengths), np.int64)
    heap = [(0, index) for index in range(rows)]
    for sample in np.argsort(-lengths, kind="stable").tolist():
        tokens, index = heap[0]
        row[sample] = index
        heapreplace(heap, (tokens + int(lengths[sample]), index))
    return row, np.bincount(row, weights=lengths, minlength=rows).astype(np.int64)


def _joined(parts: list[tuple[int, Units]]) -> Units:
    places, bounds, done = [], [np.zeros(1, np.int64)], 0
    for start, part in parts:
        places.append(part.places + start)
        bounds.append(part.bounds[1:] + done)
        done += len(part.places)
    columns = (np.concatenate([getattr(p, name) for _, p in parts]) for name in ("widths", "tokens", "packed"))
    return Units(np.concatenate(places), np.concatenate(bounds), *columns)
