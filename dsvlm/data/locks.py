"""Files that processes of a node lock; OSError on a file system without locks."""

import fcntl
import os
from pathlib import Path


def lock(path: Path, wait: bool = True) -> int | None:
    """A descriptor of the file, made when absent, locked until `release`; None when it is others' and not waited for.

    The file may be renamed or removed by whoever holds it: then it is made anew.
    """
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
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def release(handle: int) -> None:
    """Unlock before closing: a forked process may hold the same open file."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def wait_for(path: Path) -> None:
    """Until nobody holds the file; at once when there is none, or no locks."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove_if_left(path: Path | str) -> None:
    """Remove a file unless somebody holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        os.close(handle)
