"""Eviction by next use is the best there is; eviction by last use is LRU."""

from functools import cache

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsvlm.preflight.eviction import misses_by_last_use, misses_by_next_use, next_use

ACCESSES = st.lists(st.integers(0, 5), max_size=9)


def fewest_misses(items: list[int], capacity: int) -> int:
    """Over all choices of what is kept after each access, by trying them."""

    @cache
    def best(index: int, kept: frozenset) -> int:
        if index == len(items):
            return 0
        missed, now = items[index] not in kept, kept | {items[index]}
        choices = [now] if len(now) <= capacity else [now - {item} for item in now]
        return missed + min(best(index + 1, choice) for choice in choices)

    return best(0, frozenset())


@given(ACCESSES, st.integers(0, 4))
def test_next_use_is_optimal(items, capacity):
    missed = misses_by_next_use(np.array(items, np.int64), capacity)
    assert missed.dtype == bool and missed.shape == (len(items),)
    assert missed.sum() == fewest_misses(items, capacity)


@given(st.lists(st.integers(0, 30), max_size=300), st.integers(0, 12))
def test_next_use_never_misses_more(items, capacity):
    items = np.array(items, np.int64)
    best, last = misses_by_next_use(items, capacity), misses_by_last_use(items, capacity)
    assert best.sum() <= last.sum()
    assert best.sum() >= len(np.unique(items))
    assert (misses_by_next_use(items, capacity + 1).sum()) <= best.sum()


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 5))
def test_last_use_is_lru(items, capacity):
    """An access hits when fewer than `capacity` different items came since the item's last one."""
    missed = misses_by_last_use(np.array(items, np.int64), capacity)
    for index, item in enumerate(items):
        before = items[:index]
        since = before[len(before) - before[::-1].index(item) :] if item in before else None
        assert missed[index] == (since is None or len(set(since)) >= capacity)


def test_known_traces():
    items = np.array([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5])
    assert misses_by_last_use(items, 3).sum() == 10  # the trace of Belady's anomaly, under LRU
    assert misses_by_next_use(items, 3).sum() == 7
    assert misses_by_next_use(items, 0).all() and misses_by_last_use(items, 0).all()
    cycle = np.tile(np.arange(10), 5)
    assert misses_by_last_use(cycle, 9).all()  # LRU's worst case: epochs a little larger than the cache
    assert misses_by_next_use(cycle, 9).sum() == 14
    assert next_use(np.array([7, 8, 7])).tolist() == [2, 3, 3]
