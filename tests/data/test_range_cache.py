"""The node's cache of ranges: what it keeps, what it removes, and that it costs the same however much it holds."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvlm.data import locks
from dsvlm.data.range_cache import NEVER, REGION, RangeCache
from dsvlm.preflight.eviction import misses_by_last_use, misses_by_next_use, next_use

ROOT = Path(__file__).resolve().parents[2]


def zeros(offset: int, size: int) -> bytes:
    return bytes(size)


def size_of(cache: RangeCache) -> int:
    return sum(path.stat().st_size for path in cache.directory.glob("*/*/*-*"))


def cache_files(cache: RangeCache) -> dict[str, int]:
    return {path.name: int(path.stat().st_mtime) for path in cache.directory.glob("s/*/*")}


def test_eviction_keeps_what_is_used_next(tmp_path):
    cache = RangeCache(tmp_path, 1000)

    def load(offset: int, size: int) -> bytes:
        return bytes(size)

    for step, start in ((1, 0), (9, 300), (8, 600)):
        cache.put("s", start, start + 300, load, step)
    assert cache_files(cache) == {"0-300": 1, "300-600": 9, "600-900": 8}
    cache.put("s", 900, 1200, load, 8)                        # step 1 is over: it goes first
    assert cache_files(cache) == {"300-600": 9, "600-900": 8, "900-1200": 8}
    cache.put("s", 600, 900, load, 10)                        # needed again, later than the others
    cache.put("s", 1200, 1500, load, 9)
    assert set(cache_files(cache)) == {"300-600", "900-1200", "1200-1500"}
    assert cache.read("s", 310, 50) == bytes(50) and cache.read("s", 0, 10) is None


@pytest.mark.parametrize("known", [True, False])
def test_misses_are_the_fewest_possible(tmp_path, known):
    """400 ranges in a new order each epoch, room for half: as Belady's, where the plan says what comes when."""
    count, room, batch = 400, 200, 8
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(count) for _ in range(5)])
    again = next_use(items) // batch
    cache, asked = RangeCache(tmp_path, room * 10), []

    def load(offset: int, size: int) -> bytes:
        asked.append(offset)
        return bytes(size)

    for access, item in enumerate(items.tolist()):
        after = int(again[access]) if known and access + batch < len(items) else NEVER
        cache.put("s", item * 20, item * 20 + 10, load, access // batch, after)
    misses, least = len(asked) / len(items), misses_by_next_use(items, room).mean()
    least_recent = misses_by_last_use(items, room).mean()
    assert least < 0.65 and least_recent > 0.85
    assert least <= misses < least + 0.05 if known else misses > least_recent - 0.1


def test_hints_of_several_about_one_range(tmp_path):
    """Ranks of a node hint in any order; the next uses that are not over are kept."""
    cache = RangeCache(tmp_path, 10**6)
    for step, after in ((10, 40), (11, 30), (9, 25), (11, 11)):
        cache.put("s", 0, 100, zeros, step, after)
    (path,) = cache.directory.glob("s/0/0-100")
    assert divmod(path.stat().st_mtime_ns, 10**9) == (11, 25)
    cache.put("s", 0, 100, zeros, 25, 2**31 - 1)
    assert divmod(path.stat().st_mtime_ns, 10**9) == (25, NEVER)


def test_eviction_leaves_files_of_others_alone(tmp_path):
    """data.remote_cache may be a directory that holds other things."""
    others = [tmp_path / "project/my-thesis.tex", tmp_path / "ranges/s/0/notes-old", tmp_path / "ranges/s/0/dir-1/x"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
    (tmp_path / "ranges/s/0/7-8").mkdir()                     # not ours either, though it is named so
    cache = RangeCache(tmp_path, 1000)
    for start in range(0, 3000, 300):
        cache.put("s", start, start + 300, lambda offset, size: bytes(size), start)
    assert all(path.stat().st_size == 5000 for path in others) and (tmp_path / "ranges/s/0/7-8").is_dir()
    assert sum(p.stat().st_size for p in (tmp_path / "ranges/s/0").glob("*00-*00")) <= 1000


def test_what_a_dead_writer_left_is_taken_over(tmp_path):
    cache = RangeCache(tmp_path, 10_000)
    (tmp_path / "ranges/s/0").mkdir(parents=True)
    (tmp_path / "ranges/s/0/0-100.part").write_bytes(b"half")
    (tmp_path / "ranges/s/0/500-600.part").write_bytes(b"half of another")
    assert cache.read("s", 0, 10) is None                     # nobody writes it: no waiting
    assert cache.put("s", 0, 100, lambda offset, size: b"x" * size, 0) == b"x" * 100
    assert sorted(p.name for p in (tmp_path / "ranges/s/0").iterdir()) == ["0-100"] and cache.read("s", 99, 1) == b"x"


def test_a_file_system_without_locks_costs_the_cache_only(tmp_path, monkeypatch):
    cache = RangeCache(tmp_path, 10_000)
    monkeypatch.setattr(fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(37, "No locks available")))
    assert cache.put("s", 0, 100, lambda offset, size: b"x" * size, 0) == b"x" * 100
    assert cache.read("s", 0, 10) is None


def test_a_full_disk_costs_speed_only(tmp_path, monkeypatch):
    cache = RangeCache(tmp_path, 10_000)
    monkeypatch.setattr(os, "ftruncate", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert cache.put("s", 0, 100, lambda offset, size: b"x" * size, 0) == b"x" * 100
    assert cache.read("s", 0, 10) is None and list((tmp_path / "ranges/s/0").iterdir()) == []


def test_all_that_share_a_directory_keep_one_limit(tmp_path):
    """As ranks, workers and tasks do, each with a cache of its own; from files on, that were there before."""
    caches = [RangeCache(tmp_path, 100_000) for _ in range(40)]
    for number in range(1200):
        caches[number % 40].put(f"s{number % 7}", number * 1000, number * 1000 + 700, zeros, number // 40)
        assert size_of(caches[0]) <= 100_000
    assert size_of(caches[0]) > 80_000
    small = RangeCache(tmp_path, 30_000)
    for damage in (b"", b"12", None):             # a count that was lost is taken again
        total = tmp_path / "ranges/total"
        total.unlink() if damage is None else total.write_bytes(damage)
        small.put("t", len(str(damage)), 900, zeros, 40)
        assert size_of(small) <= 30_000


def test_processes_that_write_at_once_keep_one_limit(tmp_path):
    code = (
        "import sys; from dsvlm.data.range_cache import RangeCache; cache = RangeCache(sys.argv[1], 200_000)\n"
        "for i in range(150): cache.put(sys.argv[2], i * 5000, i * 5000 + 4000, lambda at, size: bytes(size), i)"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"s{rank}"], cwd=ROOT) for rank in range(4)]
    cache, most = RangeCache(tmp_path, 200_000), 0
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.001)                         # the ranks want the lock, too
        if not (tmp_path / "ranges/total").exists():
            continue
        handle = locks.lock(tmp_path / "ranges/total")    # nothing comes or goes while we count
        try:
            most = max(most, size_of(cache))
        except OSError:
            continue                              # what was being written has got its name
        finally:
            locks.release(handle)
    assert all(rank.returncode == 0 for rank in ranks) and 100_000 < size_of(cache) <= 200_000
    assert 100_000 < most <= 200_000 + 4 * 4000   # and what is being written
    assert int.from_bytes((tmp_path / "ranges/total").read_bytes(), "little") == size_of(cache)


def test_the_cost_of_a_range_does_not_grow_with_the_shard(tmp_path, monkeypatch):
    cache, other, listed = RangeCache(tmp_path, 10**9), RangeCache(tmp_path, 10**9), [0]
    original = os.listdir

    def counted(path):
        names = original(path)
        listed[0] += len(names)
        return names

    monkeypatch.setattr(os, "listdir", counted)
    step = REGION // 50
    for number in range(1000):
        at = number * 7 % 1000 * step
        listed[0] = 0
        cache.put("s", at, at + 10, zeros, 0)
        assert other.read("s", at + 1, 2) == bytes(2)
        assert listed[0] <= 4 * 51
    assert len(list(cache.directory.glob("s/*"))) == 20


def test_ranges_across_regions_and_long_ones(tmp_path):
    def load(offset: int, size: int) -> bytes:
        return b"".join(((offset + at) // 1000 % 256).to_bytes(1, "little") * 1000 for at in range(0, size, 1000))

    cache = RangeCache(tmp_path, 10**9)
    for start, stop in ((REGION - 3000 - REGION % 1000, REGION + 5000 - REGION % 1000), (0, 2 * REGION // 1000 * 1000)):
        cache.put("s", start, stop, load, 0)
        for at in (start, REGION - 1, REGION, stop - 50):
            assert RangeCache(tmp_path, 10**9).read("s", at, 50) == (load(at // 1000 * 1000, 2000)[at % 1000:])[:50]
    assert RangeCache(tmp_path, 10**9).read("s", 2 * REGION, 50) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 40)), max_size=12),
       st.tuples(st.integers(0, 60), st.integers(1, 30)))
def test_a_range_is_found_if_and_only_if_one_covers_it(tmp_path_factory, steps, wanted):
    """Ranges come, some inside others, and go; what is known never says less than the files nor more."""
    cache = RangeCache(tmp_path_factory.mktemp("cache"), 10**6)
    kept: set[tuple[int, int]] = set()
    for kind, start, size in steps:
        if kind:
            if cache.put("s", start, start + size, zeros, 0) is not None:
                kept.add((start, start + size))
        else:
            cache.forget("s", start, size)
            kept = {(a, b) for a, b in kept if not (a <= start and start + size <= b)}
    at, size = wanted
    expected = any(a <= at and at + size <= b for a, b in kept)
    assert (cache.read("s", at, size) is not None) is expected
    assert (RangeCache(cache.given, 10**6).read("s", at, size) is not None) is expected


def test_regions_of_which_nothing_is_left_are_removed(tmp_path):
    cache = RangeCache(tmp_path, 1000)
    for number in range(50):
        cache.put("s", number * REGION, number * REGION + 100, zeros, number)
    assert len(list(cache.directory.glob("s/*"))) <= 10


def test_who_holds_a_lock_for_too_long_is_not_waited_for(tmp_path, monkeypatch):
    """A stopped process may hold a range, or the total, for good."""
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    cache = RangeCache(tmp_path, 10**6)
    part = cache.reserve("s", 0, 100, 0)
    other = RangeCache(tmp_path, 10**6)
    assert other.read("s", 10, 10) is None and other.put("s", 0, 100, zeros, 0) is None
    assert other.put("s", 10, 20, zeros, 0) == bytes(10)
    cache.fill(part, zeros)
    assert other.read("s", 30, 10) == bytes(10)
    handle = locks.lock(tmp_path / "ranges/total")
    assert other.put("s", 500, 600, zeros, 0) == bytes(100) and other.read("s", 500, 10) is None
    locks.release(handle)
    assert sorted(path.name for path in tmp_path.glob("ranges/s/0/*")) == ["0-100", "10-20"]


def test_a_file_that_was_cut_short_is_fetched_once_more_only(tmp_path):
    cache, loads = RangeCache(tmp_path, 1000), []

    def load(offset, size):
        loads.append(offset)
        return bytes(size)

    cache.put("s", 0, 100, load, 0)
    os.truncate(tmp_path / "ranges/s/0/0-100", 10)
    assert cache.read("s", 20, 30) is None
    cache.put("s", 0, 100, load, 0)
    assert cache.read("s", 20, 30) == cache.read("s", 50, 30) == bytes(30) and len(loads) == 2


def test_few_removed_files_stay_open(tmp_path):
    """The disk keeps what is open: it would come on top of the limit."""
    cache = RangeCache(tmp_path, 1000)
    for number in range(40):
        cache.put("s", number * 100, number * 100 + 100, zeros, number)
        assert cache.read("s", number * 100, 100) == bytes(100)
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert len([path for path in opened if path.startswith(str(tmp_path))]) <= 8
    del cache                                     # closed at once, not when Python looks for cycles
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
