"""A directory on the node that holds ranges of remote shards, shared by all processes of the node.

`ranges/SHARD/START-STOP` holds the bytes START to STOP of a shard (the first half of its sha256). A file's time of
change is the training step of its next use, so that every process evicts by the same order. `START-STOP.part` is both
the file being written and the lock of its writer.
"""

import fcntl
import os
import re
import threading
from bisect import bisect_right, insort
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dsvlm.data.stream import LocalFile

OPEN_RANGES = 64                  # per process
IN_USE = 2                        # steps: windows that are read while a later one is fetched
PART = ".part"
OURS = re.compile(r"\d+-\d+(\.part)?")    # nothing else is ever removed, whatever directory we were given


class Entry(NamedTuple):
    """A cached range on disk; step: of its next use."""

    step: int
    size: int
    path: Path


class Part(NamedTuple):
    """A range that this process has reserved; handle: the descriptor that holds the lock."""

    shard: str
    start: int
    stop: int
    step: int
    handle: int


class RangeCache:
    """Ranges by shard; safe between threads and processes; a file in it may vanish or be damaged at any time.

    limit: bytes of all files, kept by every process within a few percent.
    """

    def __init__(self, directory: Path, limit: int):
        self.given, self.limit = Path(directory), limit
        self.directory = self.given / "ranges"
        self._known: dict[str, list[tuple[int, int]]] = {}
        self._lock = threading.Lock()
        self._open = lru_cache(OPEN_RANGES)(LocalFile)
        # Bytes written since the directory was last looked at, and how many may be before it is again.
        self._unseen, self._room = 0, 0

    def __reduce__(self):
        return RangeCache, (self.given, self.limit)

    def read(self, shard: str, offset: int, size: int) -> bytes | None:
        """Bytes of a cached range that covers them, waiting for one that is being fetched; None when there is none."""
        data = self._read_known(shard, offset, size)
        if data is None and self._look(shard, offset, size):
            data = self._read_known(shard, offset, size)
        return data

    def put(self, shard: str, start: int, stop: int, load: Callable[[int, int], bytes], step: int) -> bytes | None:
        """Fetch a range by `load(offset, size)` unless it is here; `step`: when it is used.

        Returns the bytes when this call loaded them. A disk that is full or gone costs speed, never the run.
        """
        try:
            part = self.reserve(shard, start, stop, step)
        except OSError:
            return load(start, stop - start)
        return None if part is None else self.fill(part, load)

    def reserve(self, shard: str, start: int, stop: int, step: int, wait: bool = True) -> "Part | None":
        """The right to fetch a range, which others wait for from now on; None when it is here.

        wait: for another process that is fetching it; else None then too.
        """
        covering = self._covering(shard, start, stop) or (self._look(shard, start, stop - start, wait)
                                                          and self._covering(shard, start, stop))
        if covering and self._touch(self._path(shard, *covering), step):
            return None
        path = self._path(shard, start, stop)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = _locked(path.with_name(path.name + PART), wait)
        if handle is None:
            return None
        if self._touch(path, step):               # another process was faster
            os.unlink(f"{path}{PART}")
            _release(handle)
            self._learn(shard, start, stop)
            return None
        return Part(shard, start, stop, step, handle)

    def fill(self, part: "Part", load: Callable[[int, int], bytes]) -> bytes:
        """Fetch a reserved range; the reservation ends, whatever happens."""
        path = self._path(part.shard, part.start, part.stop)
        try:
            return self._write(path, part, load(part.start, part.stop - part.start))
        except BaseException:
            Path(f"{path}{PART}").unlink(missing_ok=True)
            raise
        finally:
            _release(part.handle)

    def forget(self, shard: str, offset: int, size: int) -> None:
        """Remove the ranges that cover these bytes: they are damaged."""
        self._look(shard, offset, size)
        while covering := self._covering(shard, offset, offset + size):
            self._path(shard, *covering).unlink(missing_ok=True)
            self._unlearn(shard, covering)
        self._open.cache_clear()

    def evict(self, step: int) -> None:
        """Remove files until the limit holds: used ones first, then those whose next use is farthest from `step`."""
        entries = self._entries()
        total = sum(entry.size for entry in entries)
        if total > self.limit:
            used = [entry for entry in entries if entry.step < step - IN_USE]
            ahead = [entry for entry in entries if entry.step >= step - IN_USE]
            for entry in sorted(used) + sorted(ahead, reverse=True):
                try:
                    entry.path.unlink(missing_ok=True)
                except OSError:
                    continue
                total -= entry.size
                if total <= 0.9 * self.limit:
                    break
        self._unseen, self._room = 0, (self.limit - total) // 16

    def _read_known(self, shard: str, offset: int, size: int) -> bytes | None:
        while covering := self._covering(shard, offset, offset + size):
            try:
                data = self._open(self._path(shard, *covering)).read(offset - covering[0], size)
            except OSError:
                data = b""
            if len(data) == size:
                return data
            self._path(shard, *covering).unlink(missing_ok=True)       # cut short, or gone already
            self._unlearn(shard, covering)
        return None

    def _write(self, path: Path, part: "Part", data: bytes) -> bytes:
        try:
            os.ftruncate(part.handle, 0)
            with open(part.handle, "wb", closefd=False) as file:
                file.write(data)
            os.utime(f"{path}{PART}", (part.step, part.step))
            os.rename(f"{path}{PART}", path)
        except OSError:
            Path(f"{path}{PART}").unlink(missing_ok=True)
            return data
        self._learn(part.shard, part.start, part.stop)
        with self._lock:
            self._unseen += len(data)
            full = self._unseen > self._room
        if full:
            self.evict(part.step)
        return data

    def _covering(self, shard: str, start: int, stop: int) -> tuple[int, int] | None:
        with self._lock:
            ranges = self._known.get(shard, [])
            for at in range(bisect_right(ranges, (start, 2**63)) - 1, -1, -1):
                if ranges[at][1] >= stop:
                    return ranges[at]
        return None

    def _look(self, shard: str, offset: int, size: int, wait: bool = True) -> bool:
        """Learn what other processes fetched, and wait for what they are fetching; whether these bytes are among it."""
        found = self._ranges(shard)
        for start, stop, name in found:
            if wait and name.endswith(PART) and start <= offset and offset + size <= stop:
                _wait(self.directory / shard / name)
                found = self._ranges(shard)
                break
        with self._lock:
            self._known[shard] = sorted((start, stop) for start, stop, name in found if not name.endswith(PART))
        return self._covering(shard, offset, offset + size) is not None

    def _ranges(self, shard: str) -> list[tuple[int, int, str]]:
        try:
            names = os.listdir(self.directory / shard)
        except OSError:
            return []
        ends = [(name.removesuffix(PART).partition("-"), name) for name in names]
        return [(int(a), int(b), name) for (a, _, b), name in ends if a.isdigit() and b.isdigit()]

    def _entries(self) -> list[Entry]:
        """All files; what writers that died have left is removed."""
        entries = []
        for path in self.directory.glob("*/*-*"):
            if not OURS.fullmatch(path.name):
                continue
            try:
                if path.name.endswith(PART):
                    _remove_if_left(path)
                else:
                    status = path.stat()
                    entries.append(Entry(int(status.st_mtime), status.st_size, path))
            except OSError:
                continue                          # removed by another process meanwhile
        return entries

    def _touch(self, path: Path, step: int) -> bool:
        """Note the next use of a file; whether it is there."""
        try:
            latest = max(step, int(path.stat().st_mtime))
            os.utime(path, (latest, latest))
        except OSError:
            return False
        return True

    def _path(self, shard: str, start: int, stop: int) -> Path:
        return self.directory / shard / f"{start}-{stop}"

    def _learn(self, shard: str, start: int, stop: int) -> None:
        with self._lock:
            ranges = self._known.setdefault(shard, [])
            if (start, stop) not in ranges:
                insort(ranges, (start, stop))

    def _unlearn(self, shard: str, covering: tuple[int, int]) -> None:
        with self._lock:
            if covering in self._known.get(shard, []):
                self._known[shard].remove(covering)


def _locked(path: Path, wait: bool) -> int | None:
    """A descriptor of the file, locked, made anew while others take it away under us; None when it is theirs."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:                           # a file system without locks: the caller does without a cache
            os.close(handle)
            raise
        os.close(handle)


def _release(handle: int) -> None:
    """Unlock before closing: a forked process may hold the same open file."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _wait(path: Path) -> None:
    """Until the writer of a part has let go of it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:
        pass                                      # a file system without locks: nobody writes there either
    finally:
        os.close(handle)


def _remove_if_left(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)
