"""Which accesses a cache of limited size misses, when it forgets by next use (the best possible) or by last use."""

import heapq
from collections import OrderedDict

import numpy as np


def misses_by_next_use(items: np.ndarray, capacity: int) -> np.ndarray:
    """Return which accesses miss when the item needed last, or never again, makes room: no policy misses less.

    items: [n] int64, what is accessed, in order; all items take the same space; capacity: items kept, 0 and up. An
    item that is needed later than all others is not kept at all (Belady 1966, with bypass). Returns [n] bool.
    """
    following = next_use(items).tolist()
    missed = np.zeros(len(items), bool)
    kept: dict[int, int] = {}  # item -> its next use
    furthest: list[tuple[int, int]] = []  # (-next use, item): entries that are not in `kept` so are out of date
    for index, item in enumerate(items.tolist()):
        missed[index] = item not in kept
        kept[item] = following[index]
        heapq.heappush(furthest, (-following[index], item))
        while len(kept) > capacity:
            use, candidate = heapq.heappop(furthest)
            if kept.get(candidate) == -use:
                del kept[candidate]
    return missed


def misses_by_last_use(items: np.ndarray, capacity: int) -> np.ndarray:
    """Return which accesses miss when the least recently used item makes room; arguments as `misses_by_next_use`."""
    missed = np.zeros(len(items), bool)
    kept: OrderedDict[int, None] = OrderedDict()
    for index, item in enumerate(items.tolist()):
        missed[index] = item not in kept
        kept[item] = None
        kept.move_to_end(item)
        if len(kept) > capacity:
            kept.popitem(last=False)
    return missed


def next_use(items: np.ndarray) -> np.ndarray:
    """Return the index of the next access to each access's item, [n] int64; n where there is none."""
    order = np.argsort(items, kind="stable")
    following = np.full(len(items), len(items), np.int64)
    same = items[order[1:]] == items[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following
