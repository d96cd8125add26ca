"""The plan: which samples each optimizer update uses, as a pure function of (schedule, step).

Nothing here knows the world size or the micro-batch: those are settings of execution (see `strategy`).
"""

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dsvlm.schedule.controller import Controlled, Controller
from dsvlm.schedule.keys import hash64, key64
from dsvlm.schedule.mixture import Chunks, Drawn, Phase, Taken
from dsvlm.schedule.permutation import EpochOrder, permute, samples_of

SCHEDULE_VERSION = 1  # of the order that a schedule stands for: any change to the order must raise it
STRATEGIES = ("accumulate", "mixed", "unified", "per_rank")
ROUND_KINDS = ("task", "packed")
SMALL = 1024  # chunks: windows of more draw them when they are asked for


@dataclass(frozen=True)
class Stream:
    """The samples of one task: `samples` per window (accumulate, mixed) or `quota` per cycle (unified, per_rank).

    Both are the task's own share: phases of the schedule, where there are any, say what it gets instead.
    """

    name: str
    shard_sizes: tuple[int, ...]
    samples: int
    quota: int

    @property
    def size(self) -> int:
        """Samples in one epoch."""
        return sum(self.shard_sizes)


@dataclass(frozen=True)
class Schedule:
    """What a run trains on, in global quantities only; ValueError names the field, its value and what to change.

    `samples` (per window) and `chunk` (samples that draw one task) are for unified and per_rank; unified has one chunk.
    `phases`: shares that change during the run; none = the streams' own throughout.
    """

    seed: int
    strategy: str
    streams: tuple[Stream, ...]
    rounds: str = "task"
    block: int = 1
    group: int = 16
    samples: int = 0
    chunk: int = 0
    phases: tuple[Phase, ...] = ()

    @property
    def table(self) -> tuple[Phase, ...]:
        """The shares of all tasks, phase after phase."""
        own = tuple(stream.quota if self.cyclic else stream.samples for stream in self.streams)
        return self.phases or (Phase(0, own),)

    @property
    def cyclic(self) -> bool:
        """Whether tasks are drawn through cycles of quotas."""
        return self.strategy in ("unified", "per_rank")

    @property
    def mixes(self) -> bool:
        """Whether a round may hold several tasks."""
        return self.rounds == "packed" or self.strategy in ("mixed", "per_rank")

    def __post_init__(self):
        _one_of("schedule.strategy", self.strategy, STRATEGIES)
        _one_of("schedule.rounds", self.rounds, ROUND_KINDS)
        _at_least(0, "schedule.seed", self.seed)
        _at_least(1, "schedule.block", self.block)
        _at_least(1, "schedule.group", self.group)
        if not self.streams:
            raise ValueError("schedule.streams is empty: name at least one task")
        names = [stream.name for stream in self.streams]
        for stream in self.streams:
            if names.count(stream.name) > 1:
                raise ValueError(f"task {stream.name!r} is given twice: give each task its own name")
            for shard, size in enumerate(stream.shard_sizes):
                _at_least(0, f"task {stream.name!r}: samples of shard {shard}", size)
            if stream.size == 0:
                raise ValueError(f"task {stream.name!r} has 0 samples: check its shard set, or remove the task")
            field = "quota" if self.cyclic else "samples"
            _at_least(1, f"task {stream.name!r}: {field}", getattr(stream, field))
        if self.cyclic:
            _at_least(1, "schedule.samples", self.samples)
        if self.strategy == "unified" and self.chunk not in (0, self.samples):
            raise ValueError(
                f"schedule.chunk is {self.chunk}, but a unified window is one chunk: "
                f"set it to schedule.samples = {self.samples} or leave it out"
            )
        if self.strategy == "per_rank":
            _at_least(1, "schedule.chunk", self.chunk)
            if self.samples % self.chunk:
                raise ValueError(
                    f"schedule.chunk is {self.chunk}, which does not divide schedule.samples = {self.samples}: "
                    f"use samples = {self.samples - self.samples % self.chunk or self.chunk} or another chunk"
                )
        self._check_phases()

    def _check_phases(self) -> None:
        starts = [phase.start for phase in self.phases]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"schedule.phases start at {starts}: begin at step 0 and ascend")
        for start, shares in self.phases:
            if len(shares) != len(self.streams):
                raise ValueError(
                    f"schedule.phases: {len(shares)} shares from step {start} on for {len(self.streams)} tasks: "
                    "give one of each, 0 for those that pause"
                )
            for stream, share in zip(self.streams, shares, strict=True):
                _at_least(0, f"task {stream.name!r}: share from step {start} on", share)
            if not any(shares):
                raise ValueError(f"schedule.phases: every share is 0 from step {start} on: raise one of them")


class Block(NamedTuple):
    """Consecutive ordinals of one task; ordinal o is position o % size of epoch o // size of the task's stream."""

    task: int
    first_ordinal: int
    count: int


@dataclass(frozen=True, eq=False)
class Window:
    """The samples of one optimizer update, in order: block after block, then permuted by `order_key` if not None.

    source: the `table`, or what draws it: a window may hold half a million blocks, of which a rank needs its own only.
    `chunk`: samples of each block; 0 where they may differ.
    """

    step: int
    source: np.ndarray | Chunks
    order_key: int | None = None
    chunk: int = 0

    def __len__(self) -> int:
        return len(self.source) * self.chunk if self.chunk else int(self._edges[-1])

    @cached_property
    def table(self) -> np.ndarray:
        """The fields of each `Block`, [blocks, 3] int64; O(blocks)."""
        return self.source.table() if isinstance(self.source, Chunks) else self.source

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Runs of blocks of one size: (blocks, samples of each), in order."""
        return [(len(self.source), self.chunk)] if self.chunk else [(1, count) for count in self.counts.tolist()]

    @property
    def counts(self) -> np.ndarray:
        """Samples of each block, [blocks] int64."""
        return self.table[:, 2]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks one by one."""
        return tuple(map(Block._make, self.table.tolist()))

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (task: [n] int32, ordinal: [n] int64) of places start..stop-1, n = stop - start; O(n)."""
        return self.take(np.arange(start, stop))

    def take(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (task: [n] int32, ordinal: [n] int64) of `places: [n] int64` of the window, in any order; O(n)."""
        place = np.asarray(places, np.int64)
        if self.order_key is not None:
            place = permute(place, len(self), self.order_key)
        if self.chunk:
            block, place = np.divmod(place, self.chunk)
        else:
            block = self._edges.searchsorted(place, side="right") - 1
            place = place - self._edges[block]
        task, first = self._rows(block)
        return task.astype(np.int32), first + place

    @property
    def task(self) -> np.ndarray:
        """Task index of every sample, [n] int32."""
        return self.span(0, len(self))[0]

    @property
    def ordinal(self) -> np.ndarray:
        """Ordinal of every sample within its task, [n] int64."""
        return self.span(0, len(self))[1]

    def _rows(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (task, first ordinal) of `block: [n] int64`, [n] int64 each."""
        if isinstance(self.source, Chunks) and "table" not in vars(self) and len(block) < len(self.source):
            return self.source.rows(block)
        return self.table[block, 0], self.table[block, 1]  # of as many places as blocks: looking up is cheaper

    @cached_property
    def _edges(self) -> np.ndarray:
        edges = np.zeros(len(self.table) + 1, np.int64)
        np.cumsum(self.counts, out=edges[1:])
        return edges


class Plan:
    """The pure function from a step to its window, and from ordinals to samples; no I/O, any order of calls.

    With a controller it is a pure function of the controller's state too, which `control` holds.
    """

    def __init__(self, schedule: Schedule, controller: Controller | None = None):
        assert controller is None or not schedule.cyclic, "controllers leave tasks out of windows that hold all of them"
        self.schedule = schedule
        self._sizes = [np.array(stream.shard_sizes, np.int64) for stream in schedule.streams]
        self._epoch_sizes = np.array([stream.size for stream in schedule.streams], np.int64)
        self._keys = [key64("task", schedule.seed, stream.name) for stream in schedule.streams]
        self.control = Controlled(schedule.table, controller) if controller else None
        self._blocks = self.control or _blocks_of(schedule)
        self._recent = {task: () for task in range(len(schedule.streams))}  # latest three (epoch, EpochOrder)

    def window(self, step: int) -> Window:
        """Return the window of update `step` (>= 0)."""
        assert step >= 0
        schedule = self.schedule
        key = key64("mixed", schedule.seed, step) if schedule.strategy == "mixed" else None
        many = isinstance(self._blocks, Drawn) and self._blocks.chunks > SMALL
        source = Chunks(self._blocks, step) if many else self._blocks.table(step)
        return Window(step, source, key, self._blocks.chunk)

    def cursors(self, step: int) -> np.ndarray:
        """Return how many samples of each task come before a step, [tasks] int64: the ordinals that it begins with."""
        return self._blocks.cursors(step)

    def locate(self, task: int, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch: [n] int64, sample id: [n] int64) of `ordinals: [n] int64` of one task."""
        return self.locate_all(np.full(len(ordinals), task), ordinals)

    def locate_all(self, tasks: np.ndarray, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch: [n] int64, sample id: [n] int64) of samples of any tasks; `tasks: [n]`, `ordinals: [n]`."""
        if not len(tasks):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        tasks = np.asarray(tasks)
        epoch, position = np.divmod(np.asarray(ordinals, np.int64), self._epoch_sizes[tasks])
        by_order = np.lexsort((epoch, tasks))
        task, number, position = tasks[by_order], epoch[by_order], position[by_order]
        changes = (np.flatnonzero((task[1:] != task[:-1]) | (number[1:] != number[:-1])) + 1).tolist()
        starts, stops = [0, *changes], [*changes, len(task)]
        orders = [self._order(*pair) for pair in zip(task[starts].tolist(), number[starts].tolist(), strict=True)]
        sample = np.empty_like(epoch)
        sample[by_order] = samples_of(orders, [position[a:b] for a, b in zip(starts, stops, strict=True)])
        return epoch, sample

    def next_use(self, tasks: np.ndarray, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the step at which samples, used in an epoch, come next, [n] int64; NEVER where their task has ended.

        `tasks, epochs, samples: [n]`. Exact for accumulate and mixed without a controller, else to about a cycle or
        decision: for caches, not for training.
        """
        steps = np.empty(len(samples), np.int64)
        for task, epoch in sorted(set(zip(tasks.tolist(), epochs.tolist(), strict=True))):
            here = (tasks == task) & (epochs == epoch)
            position = self._order(task, epoch + 1).positions(np.asarray(samples)[here])
            steps[here] = self._blocks.steps_of(task, (epoch + 1) * self._epoch_sizes[task] + position)
        return steps

    def _order(self, task: int, epoch: int) -> EpochOrder:
        recent = self._recent[task]
        for number, order in recent:
            if number == epoch:
                return order
        key = int(hash64(self._keys[task], epoch)[0])
        order = EpochOrder(self._sizes[task], self.schedule.block, self.schedule.group, key)
        self._recent[task] = ((epoch, order), *recent[:2])
        return order


def _blocks_of(schedule: Schedule) -> Drawn | Taken:
    if not schedule.cyclic:
        return Taken(schedule.table)
    chunk = schedule.samples if schedule.strategy == "unified" else schedule.chunk
    return Drawn(schedule.table, schedule.seed, schedule.samples // chunk, chunk)


def _at_least(low: int, field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{field} is {value!r}: use an integer of at least {low}")


def _one_of(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0)
        raise ValueError(f"{field} is {value!r}: did you mean {near[0]!r}? Valid: {', '.join(names)}")
