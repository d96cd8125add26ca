"""Files that processes of a node lock; OSError on a file system without locks."""

import errno
import fcntl
import os
import time
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60.0                   # seconds: who holds a lock for longer may have been stopped
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.02                                # seconds, doubled each time
LOCK = ".lock"                    # in a directory that one process writes to
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without them answer


def lock(path: Path, wait: bool = True) -> int | None:
    """A descriptor of the file, made when absent, locked until `release`; None when others hold it for too long.

    wait: for others, else None at once. The file may be renamed or removed by whoever holds it: then it is made anew.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _take(handle, fcntl.LOCK_EX, PATIENCE if wait else 0):
                os.close(handle)
                return None
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def release(handle: int) -> None:
    """Unlock before closing: a forked process may hold the same open file."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def wait_for(path: Path) -> None:
    """Until nobody holds the file, or for too long; at once when there is none, or no locks."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _take(handle, fcntl.LOCK_SH, PATIENCE)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove_if_left(path: Path | str) -> None:
    """Remove a file unless somebody holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if _take(handle, fcntl.LOCK_EX, 0):
            os.unlink(path)
    except FileNotFoundError:
        pass
    finally:
        os.close(handle)


@contextmanager
def writing(directory: Path):
    """Holds a directory, made when absent, for the one process that writes a set there; ValueError if another does."""
    path = directory / LOCK
    try:
        handle = _lock_in(directory)
        if handle is None:
            raise ValueError(another(directory))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        handle = None                 # nothing can be known about other processes
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if handle is not None:
            release(handle)


def is_written(directory: Path) -> bool:
    """Whether a process holds the directory with `writing`."""
    try:
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _take(handle, fcntl.LOCK_SH, 0)
    except OSError:
        return False
    finally:
        os.close(handle)


def another(directory: Path) -> str:
    return f"another process is writing {directory}: wait for its end, or choose another --out"


def _lock_in(directory: Path) -> int | None:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            return lock(directory / LOCK, wait=False)
        except FileNotFoundError:
            pass                      # another process has ended and removed the directory, which was empty


def _take(handle: int, kind: int, patience: float) -> bool:
    """Asks again and again: a call that blocks would do so for ever behind a process that was stopped."""
    end, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
