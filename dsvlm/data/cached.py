"""A remote shard behind the node's cache: fetched ahead in long ranges, read in short ones."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial

from dsvlm.data.range_cache import Part, RangeCache
from dsvlm.data.remote import RemoteFile

GAP = 64 * 2**10                  # bytes between two samples that cost less to read than another request
LONGEST = 8 * 2**20               # bytes of one request: longer ones go side by side


class CachedFile:
    """`read` as a local file's; `cache` None = every read is a request.

    shard: what the cache calls the file. step: until the first `fetch` says better, what is read is needed now.
    """

    def __init__(self, file: RemoteFile, cache: RangeCache | None, shard: str):
        self.file, self.cache, self.shard = file, cache, shard
        self.size, self.step = file.size, 0

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on, fewer at the end; from the cache, or by a request of their own."""
        size = max(0, min(size, self.size - offset))
        if self.cache is None or not size:
            return self.file.read(offset, size)
        if (data := self.cache.at_hand(self.shard, offset, size)) is not None:
            return data
        for _ in range(2):                # evicted between the two calls, in the worst case
            with self.file.stores.asking():           # if only by another process that we wait for
                data = self.cache.read(self.shard, offset, size)
                if data is None:
                    data = self.cache.put(self.shard, offset, offset + size, self.file.read, self.step)
            if data is not None:
                return data
        return self.file.read(offset, size)

    def read_again(self, offset: int, size: int) -> bytes:
        """The bytes from the store: those in the cache are damaged, so they are dropped."""
        if self.cache is not None:
            self.cache.forget(self.shard, offset, size)
        return self.file.read(offset, size)

    def fetch(self, start: int, stop: int, step: int, after: int, later: Callable[[Callable[[], object]], Future]
              ) -> Future | None:
        """Bring one range into the cache, which is used at `step`, and next at step `after`; None = nothing to do.

        later: runs a function in the background. Whoever reads the range meanwhile waits for it; should it fail, the
        reader asks, and fails, itself.
        """
        self.step = max(self.step, step)
        if self.cache is None:
            return None
        try:
            part = self.cache.reserve(self.shard, start, stop, step, after, wait=False)
        except OSError:
            return None
        return None if part is None else later(partial(self._bring, part))

    def _bring(self, part: Part) -> None:
        """Gives no bytes: they would stay for as long as somebody holds the request."""
        self.cache.fill(part, self.file.read)


def coalesce(extents: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Extents (start, stop, next use) as few, long ranges; none is cut, so that a sample lies in one range."""
    ranges: list[tuple[int, int, int]] = []
    for start, stop, after in sorted(extents):
        first, end, least = ranges[-1] if ranges else (0, -GAP - 1, 0)
        if start - end <= GAP and max(stop, end) - first <= LONGEST:
            ranges[-1] = first, max(stop, end), min(after, least)
        else:
            ranges.append((start, stop, after))
    return ranges
