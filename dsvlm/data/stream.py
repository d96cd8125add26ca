"""Reading a file once from its start to its end, whatever it lies on, with its sha256 on the way."""

import hashlib
import os
from pathlib import Path

PIECE = 4 * 2**20  # bytes read at once


class Stream:
    """A forward reader over `pread(offset, size) -> bytes`; `size` in bytes; `sha256()` reads what is left."""

    def __init__(self, pread, size: int):
        self.size = size
        self._pread, self._hash = pread, hashlib.sha256()
        self._start, self._buffer = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on, fewer at the end of the file; never before an earlier call's offset."""
        assert offset >= self._start, (offset, self._start)
        stop = min(offset + size, self.size)
        while self._start + len(self._buffer) < stop and self._advance(offset):
            pass
        return self._buffer[offset - self._start:stop - self._start]

    def sha256(self) -> str:
        while self._advance(self.size):
            pass
        return self._hash.hexdigest()

    def _advance(self, keep_from: int) -> bool:
        """Read the next piece, forget what lies before `keep_from`; False at the end of the file."""
        at = self._start + len(self._buffer)
        piece = self._pread(at, min(PIECE, self.size - at)) if at < self.size else b""
        self._hash.update(piece)
        drop = min(keep_from - self._start, len(self._buffer))
        self._buffer = self._buffer[drop:] + piece
        self._start += drop
        return bool(piece)


class LocalFile:
    """A local file read with `pread`; closed with the last reference. OSError when it cannot be opened."""

    def __init__(self, path: Path):
        self.descriptor = None
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self):
        if self.descriptor is not None:
            os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on, fewer at the end of the file."""
        return os.pread(self.descriptor, size, offset)
