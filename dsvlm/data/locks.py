"""Files that processes of a node lock; OSError on a file system without locks."""

import fcntl
import os
import time
from pathlib import Path

PATIENCE = 60.0                   # seconds: who holds a lock for longer may have been stopped
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.02                                # seconds, doubled each time


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
