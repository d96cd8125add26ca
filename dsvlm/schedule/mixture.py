"""Integer mixtures: which task each slot draws, exactly in proportion to its quota in every cycle."""

import numpy as np

from dsvlm.schedule.keys import hash64, key64
from dsvlm.schedule.permutation import permute


class Mixture:
    """An endless sequence of slots, in cycles of Q = sum of quotas; a cycle is a permutation of the quotas' multiset.

    `quotas: [tasks] int >= 1`. Random access: a slot needs its own cycle only, O(Q).
    """

    def __init__(self, quotas: tuple[int, ...], seed: int):
        self.quotas = np.array(quotas, np.int64)
        self.tasks = np.repeat(np.arange(len(quotas)), self.quotas)  # [Q] the multiset, in task order
        self.rank = np.arange(len(self.tasks)) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        self.key = key64("mixture", seed)

    def slots(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (task, occurrence) of slots start..stop-1, [n] int64 each; occurrence counts a task's slots from 0."""
        length = len(self.tasks)
        cycle = np.arange(start // length, -(-stop // length))[:, None]
        place = np.arange(length)[None, :]
        task = self.tasks[permute(place, length, hash64(self.key, cycle))]  # [cycles, Q]
        before = np.empty_like(task)  # occurrences of the slot's task earlier in its cycle
        np.put_along_axis(before, np.argsort(task, axis=1, kind="stable"), self.rank[None, :], axis=1)
        occurrence = cycle * self.quotas[task] + before
        own = slice(start - int(cycle[0, 0]) * length, stop - int(cycle[0, 0]) * length)
        return task.ravel()[own], occurrence.ravel()[own]
