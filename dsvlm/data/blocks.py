"""Memory that a process shares with its workers: images are written where the batch has them, and copied by nobody."""

import mmap
import os
import weakref

import numpy as np

HEAD = mmap.PAGESIZE  # bytes before the first block: a word for each worker


def as_images(memory: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 3, P, P] over uint8 [N * 3 * P * P], P = size; colours innermost in memory."""
    return memory.reshape(-1, size, size, 3).transpose(0, 3, 1, 2)


class Blocks:
    """An anonymous file cut into blocks; a block is used again when the last array that shows it is gone.

    It needs no name and no room in /dev/shm, and the kernel drops it with the last process that holds it.
    """

    def __init__(self):
        self.file = os.memfd_create("dsvlm-images")
        os.ftruncate(self.file, HEAD)
        self.words = np.frombuffer(mmap.mmap(self.file, HEAD), np.int64)
        self.size = HEAD
        self.free: dict[int, list[tuple[int, mmap.mmap]]] = {}  # by size

    def take(self, count: int) -> tuple[int, np.ndarray]:
        """A block of at least `count` bytes: where it begins in the file, and its memory as uint8 [count]."""
        size = max(mmap.PAGESIZE, 1 << (count - 1).bit_length())  # pages that nobody touches cost nothing
        spare = self.free.setdefault(size, [])
        if spare:
            start, memory = spare.pop()
        else:
            start, self.size = self.size, self.size + size
            os.ftruncate(self.file, self.size)
            memory = mmap.mmap(self.file, size, offset=start)
        array = np.frombuffer(memory, np.uint8, count)
        weakref.finalize(array, spare.append, (start, memory)).atexit = False
        return start, array

    def close(self) -> None:
        """Gives up the file and all blocks but those that arrays still show."""
        self.free.clear()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class BlockView:
    """A worker's view of the same file."""

    def __init__(self, file: int):
        self.file, self.map = file, mmap.mmap(file, 0)
        self.words = np.frombuffer(self.map, np.int64, HEAD // 8)

    def show(self, start: int, count: int) -> np.ndarray:
        """uint8 [count], the bytes of the file from `start`."""
        if start + count > len(self.map):
            self.map = mmap.mmap(self.file, 0)  # it has grown
        return np.frombuffer(self.map, np.uint8, count, start)
