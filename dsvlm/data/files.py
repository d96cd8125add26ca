"""Files that are complete or absent, whatever happens while they are written, and what is in them."""

import hashlib
import mmap
import os
import random
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a file; it is on disk before it has its name. OSError names it, and nothing is left then."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{random.getrandbits(32):08x}.partial")  # one for each writer
    try:
        with named(path), partial.open("wb") as file:
            file.write(data)
            sync(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(file) -> None:
    """Everything that was written to an open file is on disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def named(path):
    """An error of a disk, such as a full one, says nothing of the file: here it does."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sha256_of(path) -> str:
    """Of a mapped file: its pages are the page cache's, which the node's processes share."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return hashlib.sha256(b"").hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return hashlib.sha256(data).hexdigest()
