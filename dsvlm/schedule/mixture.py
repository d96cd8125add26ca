"""Integer mixtures: the shares of tasks over phases of a run, and exact cursors of every task at any step."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dsvlm.schedule.keys import hash64, key64
from dsvlm.schedule.permutation import permutations

AHEAD = 8192  # slots that are drawn together
SAMPLED, LOOKED = 8, 1024  # cycles that stand for a large window, fewer where they would have more slots than this
NEVER = 2**31 - 1  # a step that no run reaches


class Phase(NamedTuple):
    """Shares of all tasks from one step on: samples of each window, or quotas of a cycle; 0 pauses a task."""

    start: int
    shares: tuple[int, ...]


class Mixture:
    """An endless sequence of slots, in cycles of Q = sum of quotas; a cycle is a permutation of the quotas' multiset.

    `quotas: [tasks] int >= 0`. Random access: a slot needs its own cycle only, O(Q). The last cycles are kept, and some
    are drawn ahead where a call goes on from the last one: the time of a few is that of one.
    start: step at which the sequence begins in the run; sequences that begin elsewhere are shuffled otherwise.
    """

    def __init__(self, quotas: Sequence[int], seed: int, start: int = 0):
        self.quotas = np.array(quotas, np.int64)
        self.tasks = np.repeat(np.arange(len(quotas)), self.quotas)  # [Q] the multiset, in task order
        self.rank = np.arange(len(self.tasks)) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        self._sorted = self.tasks * len(self.tasks)
        self.key = key64("mixture", seed, start) if start else key64("mixture", seed)
        self._held = (0, 0, self.tasks, self.rank)  # first cycle, last + 1, task and occurrence of their slots

    def slots(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (task, occurrence) of slots start..stop-1, [n] int64 each; occurrence counts a task's slots from 0."""
        length = len(self.tasks)
        first, last = start // length, -(-stop // length)
        held = self._held  # once: another thread may draw other cycles meanwhile
        if not held[0] <= first <= last <= held[1]:
            if held[0] <= first <= held[1]:
                last = max(last, first + AHEAD // length)
            task, occurrence = self.draw(np.arange(first, last))
            held = self._held = (first, last, task.ravel(), occurrence.ravel())
        own = slice(start - held[0] * length, stop - held[0] * length)
        return held[2][own], held[3][own]

    def before(self, slot: int) -> np.ndarray:
        """Slots of each task among the first `slot` ones, [tasks] int64."""
        cycles, rest = divmod(slot, len(self.tasks))
        part = self.slots(slot - rest, slot)[0] if rest else self.tasks[:0]
        return cycles * self.quotas + np.bincount(part, minlength=len(self.quotas))

    def draw(self, cycle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (task, occurrence) of the slots of whole cycles `cycle: [k] int64`, [k, Q] int64 each."""
        length = len(self.tasks)
        image = permutations(length, hash64(self.key, cycle))  # [cycles, Q]
        task = self.tasks[image]
        # Sorted by task, slots in order: numbers of both sort in half the time of an argsort.
        slot = np.sort(self._sorted[image] + np.arange(length), axis=1) - self._sorted
        earlier = np.empty_like(task)  # occurrences of the slot's task earlier in its cycle
        earlier.reshape(-1)[slot + np.arange(len(cycle))[:, None] * length] = self.rank
        return task, cycle[:, None] * self.quotas[task] + earlier


class Cycles:
    """Cycles of a mixture here and there, as windows ask for them one after the other.

    Those of the next windows are drawn ahead: the time of a few is that of one.
    """

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self._held = (np.array([-1]), mixture.tasks[None], mixture.rank[None])  # ascending, task and occurrence of each

    def find(self, asked: Callable[[np.ndarray], np.ndarray], step: int) -> tuple[np.ndarray, ...]:
        """Return (row: [n], place: [n], task: [k, Q], occurrence: [k, Q]): slot i is at [row[i], place[i]] of both.

        asked: maps steps [steps, 1] to slots [steps, n]; those of `step` are looked up.
        """
        length = len(self.mixture.tasks)
        wanted, place = np.divmod(asked(np.array([[step]]))[0], length)
        cycles, task, occurrence = self._held  # once: another thread may draw other cycles meanwhile
        row = cycles.searchsorted(wanted)
        if (cycles.take(row, mode="clip") != wanted).any():
            windows = max(1, AHEAD // max(len(wanted), length * len(np.unique(wanted))))
            cycles = np.unique(asked(step + np.arange(windows)[:, None]) // length)
            task, occurrence = self.mixture.draw(cycles)
            self._held = (cycles, task, occurrence)
            row = cycles.searchsorted(wanted)
        return row, place, task, occurrence


class Drawn:
    """Blocks of windows whose chunks draw their tasks (unified, per_rank), over phases of quotas."""

    def __init__(self, phases: Sequence[Phase], seed: int, chunks: int, chunk: int):
        self.phases, self.seed, self.chunks, self.chunk = phases, seed, chunks, chunk
        self.starts = [phase.start for phase in phases]
        self._current = self._drawing(0)
        self.before = [np.zeros(len(phases[0].shares), np.int64)]  # chunks of each task before each phase
        for index, stop in enumerate(self.starts[1:]):
            drawn = self._mixture(index).before((stop - self.starts[index]) * chunks)
            self.before.append(self.before[-1] + drawn)

    def table(self, step: int) -> np.ndarray:
        """Rows (task, first ordinal, count) of a window, [chunks, 3] int64."""
        index, mixture, *_ = self._at(step)
        slot = (step - self.starts[index]) * self.chunks
        task, occurrence = mixture.slots(slot, slot + self.chunks)
        ordinal = (self.before[index][task] + occurrence) * self.chunk
        table = np.empty((self.chunks, 3), np.int64)
        table[:, 0], table[:, 1], table[:, 2] = task, ordinal, self.chunk
        return table

    def rows(self, step: int, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (task, first ordinal) of chunks `chunk: [n] int64` of a window, [n] int64; draws their cycles only."""
        index, _, own, _ = self._at(step)
        start = self.starts[index]
        row, place, task, occurrence = own.find(lambda steps: (steps - start) * self.chunks + chunk, step)
        task = task[row, place]
        return task, (self.before[index][task] + occurrence[row, place]) * self.chunk

    def sample(self, step: int) -> np.ndarray:
        """What tells one large window from another in the time of a small one, [n] int64; the same on all ranks.

        The chunks of each task before the window and after it, and tasks and occurrences of some of its cycles, at
        places that change with the step: an order that differs is seen in this step or one of the next.
        """
        index, mixture, _, some = self._at(step)
        start, length, tasks = self.starts[index], len(mixture.tasks), len(mixture.quotas)
        number = min(SAMPLED, max(1, LOOKED // length))

        def asked(steps: np.ndarray) -> np.ndarray:
            first = (steps - start) * self.chunks
            inside = (hash64(steps, np.arange(number)) % np.uint64(self.chunks)).astype(np.int64)
            return np.concatenate([first, first + self.chunks, first + inside], axis=1)

        row, place, task, occurrence = some.find(asked, step)
        first = (step - start) * self.chunks
        cursors = [
            self.before[index] + slot // length * mixture.quotas + np.bincount(task[at, :rest], minlength=tasks)
            for slot, at, rest in zip((first, first + self.chunks), row, place, strict=False)
        ]
        seen = np.stack([task[row[2:], :LOOKED], occurrence[row[2:], :LOOKED]])
        return np.concatenate([*cursors, seen.ravel()])

    def cursors(self, step: int) -> np.ndarray:
        """Samples of each task before a step, [tasks] int64."""
        index, mixture, *_ = self._at(step)
        return (self.before[index] + mixture.before((step - self.starts[index]) * self.chunks)) * self.chunk

    def steps_of(self, task: int, ordinals: np.ndarray) -> np.ndarray:
        """Steps of samples of a task, to about a cycle, [n] int64; NEVER after its last phase."""
        before = np.array([phase[task] for phase in self.before])
        drawn = ordinals // self.chunk
        index = np.searchsorted(before, drawn, side="right") - 1
        quota = np.array([phase.shares[task] for phase in self.phases])[index]
        cycle = np.array([sum(phase.shares) for phase in self.phases])[index]
        slot = (drawn - before[index]) * cycle // np.maximum(quota, 1)
        return np.where(quota > 0, np.array(self.starts)[index] + slot // self.chunks, NEVER)

    def _at(self, step: int) -> tuple[int, Mixture, Cycles, Cycles]:
        index = bisect_right(self.starts, step) - 1
        current = self._current
        if current[0] != index:
            current = self._current = self._drawing(index)
        return current

    def _drawing(self, index: int) -> tuple[int, Mixture, Cycles, Cycles]:
        """A phase, its mixture, and what is kept of it for a rank's own chunks and for samples of windows."""
        mixture = self._mixture(index)
        return index, mixture, Cycles(mixture), Cycles(mixture)

    def _mixture(self, index: int) -> Mixture:
        return Mixture(self.phases[index].shares, self.seed, self.starts[index])


class Chunks:
    """The blocks of one window of many chunks, drawn when they are asked for."""

    def __init__(self, drawn: Drawn, step: int):
        self.drawn, self.step = drawn, step

    def __len__(self) -> int:
        return self.drawn.chunks

    def table(self) -> np.ndarray:
        """Rows (task, first ordinal, count) of all, [chunks, 3] int64; O(chunks)."""
        return self.drawn.table(self.step)

    def rows(self, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (task, first ordinal) of chunks `chunk: [n] int64`, [n] int64 each; O(n + Q * cycles of theirs)."""
        return self.drawn.rows(self.step, chunk)

    def sample(self) -> np.ndarray:
        """What tells this window from others, [n] int64; O(Q)."""
        return self.drawn.sample(self.step)


class Taken:
    """Blocks of windows that hold samples of all tasks (accumulate, mixed), over phases of samples per window."""

    chunk = 0  # blocks differ in size

    def __init__(self, phases: Sequence[Phase]):
        self.starts = np.array([phase.start for phase in phases], np.int64)
        self.shares = np.array([phase.shares for phase in phases], np.int64)  # [phases, tasks]
        grown = np.cumsum(np.diff(self.starts)[:, None] * self.shares[:-1], axis=0)
        self.before = np.concatenate([np.zeros_like(self.shares[:1]), grown])  # samples before each phase

    def table(self, step: int) -> np.ndarray:
        """Rows (task, first ordinal, count) of a window, [blocks, 3] int64."""
        return rows(self.cursors(step), self.shares[self.phase(step)])

    def cursors(self, step: int) -> np.ndarray:
        """Samples of each task before a step, [tasks] int64."""
        index = self.phase(step)
        return self.before[index] + (step - self.starts[index]) * self.shares[index]

    def steps_of(self, task: int, ordinals: np.ndarray) -> np.ndarray:
        """Steps of samples of a task, [n] int64; NEVER after its last phase."""
        index = np.searchsorted(self.before[:, task], ordinals, side="right") - 1
        share = self.shares[index, task]
        steps = self.starts[index] + (ordinals - self.before[index, task]) // np.maximum(share, 1)
        return np.where(share > 0, steps, NEVER)

    def phase(self, step: int) -> int:
        return int(np.searchsorted(self.starts, step, side="right")) - 1


def rows(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows (task, first ordinal, count) of the tasks that have samples, in the order of tasks; [blocks, 3] int64."""
    task = np.flatnonzero(counts)
    return np.stack([task, first[task], counts[task]], axis=1)
