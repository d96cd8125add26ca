"""What one node reads in each step, from the plan and the manifests alone: only the node's own samples are located."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsvlm.data.cached import GAP, LONGEST
from dsvlm.data.lengths import Lengths
from dsvlm.data.manifest import Manifest
from dsvlm.schedule.plan import Plan


@dataclass(frozen=True)
class NodeReads:
    """The samples of one node over some steps, in the order of steps, ranks and their place in the shards; arrays [n].

    task, sample: as the plan locates them; item: number of the sample over all tasks; shard: over the shards of all
    tasks; start, stop: bytes in the shard, as if all samples of a shard were of one size; unit: number of the unit,
    over all ranks and steps. widths, packed: [units], as in Unit.
    """

    steps: range
    step: np.ndarray
    rank: np.ndarray
    task: np.ndarray
    sample: np.ndarray
    item: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    unit: np.ndarray
    widths: np.ndarray
    packed: np.ndarray

    @property
    def bytes(self) -> np.ndarray:
        return self.stop - self.start

    def per_step(self, step: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """How often each step of `steps` stands in `step: [m]`, or the sum of its weights; [steps]."""
        return np.bincount(step - self.steps.start, weights, len(self.steps))

    def shards_open(self) -> np.ndarray:
        """Shards that each step reads from, [steps]."""
        return self.per_step(distinct(self.step, self.shard)[0])

    def requests(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(requests, bytes) of each step, [steps] each, when the `wanted: [n] bool` samples are read from the store.

        Every rank asks for its own, neighbours in a shard together, with what lies between them if that is little.
        """
        step, start, stop = self.step[wanted], self.start[wanted], self.stop[wanted]
        if not len(step):
            return np.zeros(len(self.steps)), np.zeros(len(self.steps))
        place = np.stack([step, self.rank[wanted], self.shard[wanted]])
        gap = start[1:] - stop[:-1]
        far = np.append(True, (np.diff(place, axis=1) != 0).any(axis=0) | (gap > GAP))
        run = np.cumsum(far) - 1
        parts = ((start - start[far][run]) // LONGEST).astype(np.int64)  # long runs are asked for in parts
        first = far | np.append(True, np.diff(parts) != 0)
        between = np.append(0.0, np.where(first[1:], 0.0, np.maximum(gap, 0.0)))
        return self.per_step(step[first]).astype(float), self.per_step(step, stop - start + between)

    def positions(self, tables: Sequence[Lengths], image_tokens: int) -> np.ndarray:
        """Positions of each sample in its row, images and text, [n] int64; tables: lengths of each task."""
        found = np.zeros(len(self.task), np.int64)
        for task, table in enumerate(tables):
            here = self.task == task
            found[here] = table.positions(self.sample[here], image_tokens)
        return found

    def padding(self, lengths: np.ndarray) -> tuple[int, int]:
        """(useful, computed) positions of all units. lengths: [n] int64, positions of each sample."""
        samples = np.bincount(self.unit, minlength=len(self.widths))
        filled = np.bincount(self.unit, lengths, minlength=len(self.widths)).astype(np.int64)
        longest = np.zeros(len(self.widths), np.int64)
        np.maximum.at(longest, self.unit, lengths)
        rows, row = np.where(self.packed, samples > 0, samples), np.where(self.packed, filled, longest)
        return int(lengths.sum()), int((rows * np.maximum(self.widths, row)).sum())


def node_reads(plan: Plan, manifests: Iterable[Manifest], dealt: Iterable, ranks: range, steps: range) -> NodeReads:
    """Locate what `ranks` read in `steps`; dealt: (window, rounds of all ranks) of each step."""
    step, rank, task, ordinal, counts, widths, packed = [], [], [], [], [], [], []
    for window, rounds in dealt:
        units = [(number, round_.unit(number)) for number in ranks for round_ in rounds]
        sizes = [len(unit.places) for _, unit in units]
        tasks, ordinals = window.take(np.concatenate([unit.places for _, unit in units]))
        step.append(np.full(len(tasks), window.step))
        rank.append(np.repeat([number for number, _ in units], sizes))
        task.append(tasks)
        ordinal.append(ordinals)
        counts += sizes
        widths += [unit.width for _, unit in units]
        packed += [unit.rows is not None for _, unit in units]
    step, rank, task, ordinal = (np.concatenate(column) for column in (step, rank, task, ordinal))
    _, sample = plan.locate_all(task, ordinal)
    item, shard, start, stop = ShardTable(tuple(manifests)).find(task, sample)
    order = np.lexsort((start, shard, rank, step))
    columns = (step, rank, task, sample, item, shard, start, stop, np.repeat(np.arange(len(counts)), counts))
    return NodeReads(steps, *(column[order] for column in columns), np.array(widths), np.array(packed))


def distinct(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (first field, how often) of the different rows that columns of whole numbers, [n] each, make; [m] each."""
    low = [int(column.min()) if len(column) else 0 for column in columns]
    row, size = columns[0] - low[0], 1
    for column, least in zip(columns[1:], low[1:], strict=True):  # rows as one number: compared in a tenth of the time
        width = int(column.max(initial=least)) - least + 1
        row, size = row * width + column - least, size * width
    row, counts = np.unique(row, return_counts=True)
    return row // size + low[0], counts


class ShardTable:
    """The shards of all tasks, one after the other."""

    def __init__(self, manifests: tuple[Manifest, ...]):
        sizes = np.array([size for manifest in manifests for size in manifest.sizes], np.int64)
        length = np.array([size for manifest in manifests for size in manifest.bytes], np.float64)
        self.first_sample = np.append(0, np.cumsum(sizes))
        self.mean = length / np.maximum(sizes, 1)  # bytes of a sample, of each shard
        self.task_first = np.cumsum([0] + [manifest.samples for manifest in manifests])

    def find(self, task: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, ...]:
        """(number over all tasks, shard, first byte, end) of samples of tasks, [n] each."""
        number = self.task_first[task] + sample
        shard = np.searchsorted(self.first_sample, number, side="right") - 1
        row, mean = number - self.first_sample[shard], self.mean[shard]
        return number, shard, row * mean, (row + 1) * mean
