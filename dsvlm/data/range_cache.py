"""A directory on the node that holds ranges of remote shards, shared by all processes of the node.

`ranges/SHARD/REGION/START-STOP` holds the bytes START to STOP of a shard (the first half of its sha256), which begin in
its region number REGION, so that no directory grows with the shard. A file's time of change tells all processes when it
is used: its seconds are the training step of the next use, its nanoseconds that of the one after. `START-STOP.part` is
both the file being written and the lock of its writer. `ranges/total`, 8 bytes, is the size of all files; its lock is
held by who changes it.
"""

import os
import re
import threading
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from dsvlm.data.locks import lock, release, remove_if_left, wait_for
from dsvlm.data.stream import LocalFile

OPEN_RANGES = 8                   # per reader: the disk keeps the bytes of a file that is removed while it is open
IN_USE = 2                        # steps: windows that are read while a later one is fetched
REGION = 2**23                    # bytes; no range but a long one reaches beyond the region after its own
LONG = "long"                     # region of the long ones
NEVER = 10**9 - 1                 # a step that no run reaches: not used again, or nobody knows when
REMEMBERED = 2**13                # regions whose ranges a process remembers
PIECE = 2**18                     # bytes of one write: for megabytes Linux looks for huge pages, seven times the work
KEPT = 0.9                        # share of the limit that stays when room is made: to look at all files takes its time
PART, TOTAL = ".part", "total"
OURS = re.compile(r"\d+-\d+(\.part)?")    # nothing else is ever removed, whatever directory we were given


class Entry(NamedTuple):
    """A cached range on disk; step: at which it was hinted to be used; after: step of the use after that."""

    step: int
    after: int
    size: int
    path: str

    def next_use(self, now: int) -> int:
        """Seen from step `now`; NEVER when nobody has said."""
        first = now - IN_USE
        return self.step if self.step >= first else self.after if self.after >= first else NEVER


class Part(NamedTuple):
    """A range that this process has reserved; handle: the descriptor that holds the lock."""

    shard: str
    start: int
    stop: int
    step: int
    after: int
    handle: int


class RangeCache:
    """Ranges by shard; safe between threads and processes; a file in it may vanish or be damaged at any time.

    limit: bytes of all files that every process can read; those being written come on top of it. Trainings that are at
    different steps should not share a directory: each takes the other's files for those needed last.
    """

    def __init__(self, directory: Path, limit: int):
        self.given, self.limit = Path(directory), limit
        self.directory = self.given / "ranges"
        self._known: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._lock = threading.Lock()
        self._open = lru_cache(OPEN_RANGES)(partial(_opened, self.directory))    # no method: that would hold the cache
        self._last = ("", 0, 0, None)             # the range read last, for the next sample is mostly in it too

    def __reduce__(self):
        return RangeCache, (self.given, self.limit)

    def read(self, shard: str, offset: int, size: int) -> bytes | None:
        """Bytes of a cached range that covers them, waiting for one that is being fetched; None when there is none."""
        data = self.at_hand(shard, offset, size)
        if data is None and self._look(shard, offset, size):
            data = self.at_hand(shard, offset, size)
        return data

    def at_hand(self, shard: str, offset: int, size: int) -> bytes | None:
        """Bytes of a range that this process knows to be here; None when there is none: nobody is waited for."""
        known, start, stop, file = self._last     # once: threads
        if known == shard and start <= offset and offset + size <= stop:
            try:
                data = file.read(offset - start, size)
            except OSError:
                data = b""
            if len(data) == size:
                return data
        while covering := self._covering(shard, offset, offset + size):
            try:
                file = self._open(shard, *covering)
                data = file.read(offset - covering[0], size)
                if len(data) == size:
                    self._last = (shard, *covering, file)
                    return data
                self._open.cache_clear()          # or what comes in its place would be taken for this one
            except OSError:
                pass
            self._path(shard, *covering).unlink(missing_ok=True)       # cut short, or gone already
            self._unlearn(shard, covering)
        return None

    def put(self, shard: str, start: int, stop: int, load: Callable[[int, int], bytes], step: int,
            after: int = NEVER) -> bytes | None:
        """Fetch a range by `load(offset, size)` unless it is here; it is used at `step`, and next at step `after`.

        Returns the bytes when this call loaded them. A disk that is full or gone costs speed, never the run.
        """
        try:
            part = self.reserve(shard, start, stop, step, after)
        except OSError:
            return load(start, stop - start)
        return None if part is None else self.fill(part, load)

    def reserve(self, shard: str, start: int, stop: int, step: int, after: int = NEVER, wait: bool = True
                ) -> "Part | None":
        """The right to fetch a range, which others wait for from now on; None when it is here.

        wait: for another process that is fetching it; None also when that takes it too long, or else at once.
        """
        covering = self._covering(shard, start, stop) or (self._look(shard, start, stop - start, wait)
                                                          and self._covering(shard, start, stop))
        if covering and _touch(self._path(shard, *covering), step, after):
            return None
        path = self._path(shard, start, stop)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = lock(path.with_name(path.name + PART), wait)
        if handle is None:
            return None
        if _touch(path, step, after):               # another process was faster
            os.unlink(f"{path}{PART}")
            release(handle)
            self._learn(shard, start, stop)
            return None
        return Part(shard, start, stop, step, after, handle)

    def fill(self, part: "Part", load: Callable[[int, int], bytes]) -> bytes:
        """Fetch a reserved range; the reservation ends, whatever happens."""
        path = self._path(part.shard, part.start, part.stop)
        try:
            return self._write(path, part, load(part.start, part.stop - part.start))
        except BaseException:
            Path(f"{path}{PART}").unlink(missing_ok=True)
            raise
        finally:
            release(part.handle)

    def forget(self, shard: str, offset: int, size: int) -> None:
        """Remove the ranges that cover these bytes: they are damaged."""
        while self._look(shard, offset, size) and (covering := self._covering(shard, offset, offset + size)):
            self._path(shard, *covering).unlink(missing_ok=True)
            self._unlearn(shard, covering)
        self._open.cache_clear()
        self._last = ("", 0, 0, None)

    def _write(self, path: Path, part: "Part", data: bytes) -> bytes:
        try:
            os.ftruncate(part.handle, 0)
            with suppress(OSError):               # room for all at once: the file system need not find it page by page
                os.posix_fallocate(part.handle, 0, len(data))
            with open(part.handle, "wb", closefd=False) as file:
                for start in range(0, len(data), PIECE):
                    file.write(memoryview(data)[start : start + PIECE])
            _set_uses(f"{path}{PART}", part.step, part.after)
            self._publish(path, len(data), part.step)
        except OSError:
            Path(f"{path}{PART}").unlink(missing_ok=True)
            return data
        self._learn(part.shard, part.start, part.stop)
        return data

    def _publish(self, path: Path, size: int, step: int) -> None:
        """Give what was written its name, and make room once all processes together have written too much."""
        handle = lock(self.directory / TOTAL)
        if handle is None:
            raise OSError(f"{self.directory / TOTAL} is held by another process")
        try:
            os.rename(f"{path}{PART}", path)
            counted = os.pread(handle, 8, 0)
            total = int.from_bytes(counted, "little") + size
            if len(counted) < 8 or total > self.limit:
                total = self._evict(step)
            os.pwrite(handle, total.to_bytes(8, "little"), 0)
        finally:
            release(handle)

    def _evict(self, step: int) -> int:
        """Remove files until the limit holds, those first that are used last, seen from `step` (Belady 1966).

        Returns the bytes that stay.
        """
        entries = self._entries()
        total = sum(entry.size for entry in entries)
        if total <= self.limit:
            return total
        for entry in sorted(entries, key=lambda entry: (-entry.next_use(step), entry.step)):
            try:
                os.unlink(entry.path)
            except FileNotFoundError:
                pass
            except OSError:
                continue
            total -= entry.size
            with suppress(OSError):               # not empty: only regions of which nothing is left go
                os.rmdir(os.path.dirname(entry.path))
            if total <= KEPT * self.limit:
                break
        return total

    def _covering(self, shard: str, start: int, stop: int) -> tuple[int, int] | None:
        with self._lock:
            for region in _regions(start):
                ranges = self._known.get((shard, region), ())
                at = bisect_left(ranges, (start + 1,))
                if at and ranges[at - 1][1] >= stop:
                    return ranges[at - 1]
        return None

    def _look(self, shard: str, offset: int, size: int, wait: bool = True) -> bool:
        """Learn what other processes fetched, and wait for what they are fetching; whether these bytes are among it."""
        for region in _regions(offset):
            found = self._ranges(shard, region)
            for start, stop, name in found:
                if wait and name.endswith(PART) and start <= offset and offset + size <= stop:
                    wait_for(self.directory / shard / region / name)
                    found = self._ranges(shard, region)
                    break
            known: list[tuple[int, int]] = []
            for start, stop, name in sorted(found):
                if not name.endswith(PART):
                    _insert(known, start, stop)
            with self._lock:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                self._known[shard, region] = known
        return self._covering(shard, offset, offset + size) is not None

    def _ranges(self, shard: str, region: str) -> list[tuple[int, int, str]]:
        try:
            names = os.listdir(self.directory / shard / region)
        except OSError:
            return []
        ends = [(name.removesuffix(PART).partition("-"), name) for name in names]
        return [(int(a), int(b), name) for (a, _, b), name in ends if a.isdigit() and b.isdigit()]

    def _entries(self) -> list[Entry]:
        """All files; what writers that died have left is removed."""
        entries = []
        for shard in _scan(self.directory):
            for region in _scan(shard):
                for file in _scan(region):
                    if not OURS.fullmatch(file.name):
                        continue
                    try:
                        if file.name.endswith(PART):
                            remove_if_left(file.path)
                        else:
                            status = file.stat()
                            entries.append(Entry(*_uses(status), status.st_size, file.path))
                    except OSError:
                        continue                  # removed by another process meanwhile
        return entries

    def _path(self, shard: str, start: int, stop: int) -> Path:
        return _path(self.directory, shard, start, stop)

    def _learn(self, shard: str, start: int, stop: int) -> None:
        with self._lock:
            _insert(self._known.setdefault((shard, _region(start, stop)), []), start, stop)

    def _unlearn(self, shard: str, covering: tuple[int, int]) -> None:
        with self._lock:
            ranges = self._known.get((shard, _region(*covering)), [])
            if covering in ranges:
                ranges.remove(covering)


def _path(directory: Path, shard: str, start: int, stop: int) -> Path:
    return directory / shard / _region(start, stop) / f"{start}-{stop}"


def _opened(directory: Path, shard: str, start: int, stop: int) -> LocalFile:
    return LocalFile(_path(directory, shard, start, stop))


def _uses(status: os.stat_result) -> tuple[int, int]:
    return divmod(status.st_mtime_ns, 10**9)


def _set_uses(path, step: int, after: int) -> None:
    time = step * 10**9 + min(after, NEVER)
    os.utime(path, ns=(time, time))


def _touch(path: Path, step: int, after: int) -> bool:
    """Note the uses of a file that somebody else may have noted uses of; whether it is there."""
    try:
        known = _uses(path.stat())
        latest = max(step, known[0])
        _set_uses(path, latest, min((use for use in (known[1], after) if use > latest), default=NEVER))
    except OSError:
        return False
    return True


def _scan(directory) -> list[os.DirEntry]:
    try:
        with os.scandir(directory) as found:
            return list(found)
    except OSError:                               # no directory, or none any more
        return []


def _region(start: int, stop: int) -> str:
    """Where a range lies."""
    return str(start // REGION) if stop - start <= REGION else LONG


def _regions(start: int) -> tuple[str, str, str]:
    """Where ranges may lie that cover the byte at `start`."""
    return str(start // REGION), str(start // REGION - 1), LONG


def _insert(ranges: list[tuple[int, int]], start: int, stop: int) -> None:
    """Keep ranges in order and none inside another: of all that begin before a byte, the last reaches farthest."""
    first = last = bisect_left(ranges, (start,))
    if first and ranges[first - 1][1] >= stop:
        return
    if first < len(ranges) and ranges[first][0] == start and ranges[first][1] >= stop:
        return
    while last < len(ranges) and ranges[last][1] <= stop:
        last += 1
    ranges[first:last] = [(start, stop)]
