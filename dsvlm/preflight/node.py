"""What one node reads in each step, from the plan and the manifests alone: only the node's own samples are located."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dsvlm.data.manifest import Manifest
from dsvlm.schedule.plan import Plan


@dataclass(frozen=True)
class NodeReads:
    """The samples of one node over some steps, sorted by step and place on the store; arrays are [n].

    step, task: of each sample; shard: number over the shards of all tasks; start, stop: its bytes in the shard, as if
    all samples of a shard were of one size.
    """

    steps: range
    step: np.ndarray
    task: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def requests(self) -> np.ndarray:
        """First sample of each request, indices into the arrays: neighbours in a shard are read together."""
        apart = (np.diff(self.step) != 0) | (np.diff(self.shard) != 0) | (self.start[1:] > self.stop[:-1] + 0.5)
        return np.flatnonzero(np.append(True, apart)) if len(self.step) else np.zeros(0, np.int64)

    def per_step(self, step: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """How often each step of `steps` stands in `step: [m]`, or the sum of its weights; [steps]."""
        return np.bincount(step - self.steps.start, weights, len(self.steps))

    def shards_open(self) -> np.ndarray:
        """Shards that each step reads from, [steps]."""
        pairs = np.unique(np.stack([self.step, self.shard]), axis=1)
        return self.per_step(pairs[0])

    def parts(self, size: float) -> tuple[np.ndarray, np.ndarray]:
        """(step, part) of the parts of `size` bytes that each step touches, [m] each: parts are equal pieces of shards.

        A part is a number that is unique over all shards.
        """
        first, last = (self.start // size).astype(np.int64), ((self.stop - 0.5) // size).astype(np.int64)
        lengths = last - first + 1
        part = np.repeat(first, lengths) + np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        wide = int(last.max(initial=0)) + 1
        pairs = np.stack([np.repeat(self.step, lengths), np.repeat(self.shard, lengths) * wide + part])
        return tuple(np.unique(pairs, axis=1))


def node_reads(plan: Plan, manifests: Iterable[Manifest], dealt: Iterable, ranks: range, steps: range) -> NodeReads:
    """Locate what `ranks` read in `steps`; dealt: (window, rounds of all ranks) of each step."""
    step, task, ordinal = [], [], []
    for window, rounds in dealt:
        places = np.concatenate([round_.unit(rank).places for round_ in rounds for rank in ranks])
        tasks, ordinals = window.take(places)
        step.append(np.full(len(places), window.step))
        task.append(tasks)
        ordinal.append(ordinals)
    step, task, ordinal = (np.concatenate(column) for column in (step, task, ordinal))
    _, sample = plan.locate_all(task, ordinal)
    shard, start, stop = ShardTable(tuple(manifests)).find(task, sample)
    order = np.lexsort((start, shard, step))
    return NodeReads(steps, step[order], task[order], shard[order], start[order], stop[order])


class ShardTable:
    """The shards of all tasks, one after the other."""

    def __init__(self, manifests: tuple[Manifest, ...]):
        sizes = np.array([size for manifest in manifests for size in manifest.sizes], np.int64)
        length = np.array([size for manifest in manifests for size in manifest.bytes], np.float64)
        self.first_sample = np.append(0, np.cumsum(sizes))
        self.mean = length / np.maximum(sizes, 1)  # bytes of a sample, of each shard
        self.task_first = np.cumsum([0] + [manifest.samples for manifest in manifests])

    def find(self, task: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (shard, first byte, end) of samples of tasks, [n] each."""
        number = self.task_first[task] + sample
        shard = np.searchsorted(self.first_sample, number, side="right") - 1
        row, mean = number - self.first_sample[shard], self.mean[shard]
        return shard, row * mean, (row + 1) * mean
