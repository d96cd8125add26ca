"""Reading samples by number: index lookup, one pread, checksum; nothing is read in sequence."""

import json
import os
import threading
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from os import pread

import numpy as np

from dsvlm.data.checksum import crc32
from dsvlm.data.fields import is_unicode, make_record
from dsvlm.data.files import sha256_of
from dsvlm.data.index import ShardIndex
from dsvlm.data.manifest import Manifest, is_url
from dsvlm.data.stream import LocalFile

OPEN_SHARDS = 64          # per shard set and process: well below the usual limit of 1024 descriptors


class BadSample(ValueError):
    """One sample is damaged: it is masked and journalled, and the run goes on. `reason`: what is wrong with it."""

    def __init__(self, reason: str, where: str = ""):
        super().__init__(reason, where)
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


class ShardReader:
    """Reads the samples of one shard set by number (0 .. samples-1 over the concatenated shards).

    cache: directory on the node for parts of remote shards, default below the temporary directory; cache_mb: its size
    in MiB, 0 = no cache. Shards are opened when first needed. Descriptors are only read with `pread`, so a forked
    process may keep using them; pickling carries the arguments alone. ValueError (the run cannot go on) when a shard or
    its index is missing or is not the one of the manifest; BadSample when only the sample is damaged; OSError when a
    disk or, after several attempts, a store does not answer.
    """

    def __init__(self, manifest: Manifest, cache: str = "", cache_mb: int = 10_000):
        self.manifest, self.cache, self.cache_mb = manifest, cache, cache_mb
        self._starts = [0, *accumulate(manifest.sizes)]
        self.is_remote = any(is_url(manifest.shard(number)) for number in range(len(manifest.names)))
        self._shared = _Shared(manifest, self.is_remote, cache, cache_mb)
        self._shift, self._near = _near(self._starts)
        self._open: dict[int, _Shard] = {}        # by number
        self._plain: dict[str, dict[int, tuple]] = {}     # of open shards, by extension and number: see `_Shard.plain`

    def __len__(self) -> int:
        return self.manifest.samples

    def __reduce__(self):
        return ShardReader, (self.manifest, self.cache, self.cache_mb)

    def crc(self, sample: int) -> int:
        """The checksum of all members of the sample, as the index has it (uint32)."""
        shard, row = self._find(sample)
        return shard.index.crc[row]

    def key(self, sample: int) -> str:
        """The key of the sample."""
        shard, row = self._find(sample)
        return shard.index.key(row)

    def where(self, sample: int) -> str:
        """`shard-000003.tar:KEY`, for messages and journals."""
        shard, row = self._find(sample)
        return shard.where(row)

    def record(self, sample: int) -> dict:
        """The sample's record, checked against its crc; BadSample when damaged or not an object."""
        shard, row = self._find(sample)
        return shard.record(row)

    def image(self, sample: int) -> bytes | None:
        """The encoded bytes of the image, checked against their crc; None when the sample has no image."""
        shard, row = self._find(sample)
        extension = shard.index.image(row)
        return None if extension is None else shard.read(row, extension)

    def read(self, sample: int, extension: str, check: bool = True) -> bytes:
        """The bytes of one member; BadSample when it is absent or damaged.

        check: compare the checksum, at the price of a pass over the bytes (`checksum.py`).
        """
        starts = self._starts
        try:
            number = self._near[sample >> self._shift]            # as `_find` does, at half the cost
            while sample >= starts[number + 1]:
                number += 1
            file, descriptor, offsets, sizes, crcs = self._plain[extension][number]   # who holds a file keeps it open
            row = sample - starts[number]
            data = pread(descriptor, size := sizes[row], offset := offsets[row])
            if offset and len(data) == size and sample >= 0 and (not check or crc32(data) == crcs[row]):
                return data
        except (LookupError, OSError, OverflowError, MemoryError):      # the last two: an index that lies
            pass
        shard, row = self._find(sample)
        return shard.read(row, extension, check)                  # knows what to do, or says what is wrong

    def fetch(self, samples: np.ndarray, when: int, after: np.ndarray | None = None) -> list[Future]:
        """Hint that these samples ([n] int64) are read at step `when`; nothing to do for local shards.

        Their parts of remote shards come into the node's cache, neighbours in one request, several requests at a time,
        in the background: reading one of them waits for it.
        after: step at which each is read next, [n] int64 (`Plan.next_use`): what is read last makes room; None =
        nobody knows, so these make room first.
        Returns what is under way, for who would rather wait before reading; what fails there is read, or fails, then.
        """
        if not self.is_remote or not len(samples):
            return []
        from dsvlm.data.cached import coalesce
        from dsvlm.data.range_cache import NEVER

        after = np.full(len(samples), NEVER) if after is None else np.asarray(after)
        asked = []
        for shard, rows, where in self._groups(samples):
            if shard.is_remote:
                for start, stop, again in coalesce(shard.extents(rows, after[where])):
                    asked.append(shard.file.fetch(start, stop, when, again, self._shared.later))
        return [request for request in asked if request is not None]

    @property
    def is_asking(self) -> bool:
        """Whether a store has been asked for something and has not answered yet."""
        return self._shared.stores is not None and self._shared.stores.asked > 0

    def _find(self, sample: int) -> "tuple[_Shard, int]":
        sample = int(sample)
        number = bisect_right(self._starts, sample) - 1
        return self._shard(number), sample - self._starts[number]

    def _shard(self, number: int) -> "_Shard":
        """An open shard; of too many, the one opened first is closed."""
        if (shard := self._open.get(number)) is None:
            assert 0 <= number < len(self.manifest.names), f"no sample of {len(self)}"
            shard = _Shard(self._shared, number)
            for extension, found in shard.plain().items():
                self._plain.setdefault(extension, {})[number] = found
            self._open[number] = shard
            while len(self._open) > OPEN_SHARDS:                  # other threads may do the same
                self._close(list(self._open)[0])
        return shard

    def _close(self, number: int) -> None:
        self._open.pop(number, None)
        for shards in list(self._plain.values()):
            shards.pop(number, None)

    def _groups(self, samples: np.ndarray):
        """(shard, rows in it, which of the samples these are: [n] bool) for each shard that holds some of them."""
        samples = np.asarray(samples, np.int64)
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(numbers).tolist():
            yield self._shard(number), samples[numbers == number] - self._starts[number], numbers == number


class _Shared:
    """What the shards of one reader share: the manifest, stores, the node's cache and which indexes were checked."""

    def __init__(self, manifest: Manifest, remote: bool, cache: str, cache_mb: int):
        self.manifest = manifest
        self.checked: set[int] = set()
        self._background: dict[int, tuple] = {}   # by process: threads do not survive a fork
        self.cache = self.stores = None
        if remote:
            from dsvlm.data.remote import Stores

            self.stores = Stores()
        if remote and cache_mb:
            from dsvlm.data.range_cache import RangeCache
            from dsvlm.data.remote import cache_directory

            self.cache = RangeCache(cache_directory(cache), cache_mb * 2**20)
        self.groups = None
        if manifest.is_parquet:
            from dsvlm.data.parquet import RowGroups

            self.groups = RowGroups()

    def later(self, request) -> Future:
        """Run a request in the background, a few at a time; more are waited for, so that few files are open."""
        from dsvlm.data.remote import CONCURRENT

        # Several threads may come at once: the first to set it has set it for all.
        if (found := self._background.get(os.getpid())) is None:
            made = ThreadPoolExecutor(CONCURRENT), threading.BoundedSemaphore(2 * CONCURRENT)
            found = self._background.setdefault(os.getpid(), made)
        pool, places = found
        places.acquire()
        running = pool.submit(request)
        running.add_done_callback(lambda done: places.release())
        return running


class _Shard:
    """An open shard: its index and its file, closed with the last reference."""

    def __init__(self, shared: _Shared, number: int):
        manifest = shared.manifest
        self.name, self.mapping = manifest.names[number], manifest.mapping
        path = manifest.shard(number)
        self.is_remote = is_url(path)
        _check_index(shared, number)
        self.index = ShardIndex(manifest.index(number), manifest.image)
        try:
            self.file = _cached(shared, number) if self.is_remote else LocalFile(path)
        except OSError as error:
            raise ValueError(f"cannot open shard {path}: {error}: copy it again") from error
        self._read, self._again = self.file.read, getattr(self.file, "read_again", None)
        self._members, self._size = self.index.members, self.file.size
        self.parquet = None
        if shared.groups is not None:
            from dsvlm.data.parquet import ParquetFile

            self.parquet = ParquetFile(path, self.file, self.mapping, shared.groups)
            self._size = -1                       # its offsets are none of the file's: `_elsewhere` reads

    def plain(self) -> dict[str, tuple]:
        """Of members that one pread gives, by extension: the file, its descriptor, offsets, sizes, crcs."""
        if self.is_remote or self.parquet is not None:
            return {}
        return {name: (self.file, self.file.descriptor, *columns) for name, columns in self._members.items()}

    def where(self, row: int) -> str:
        return f"{self.name}:{self.index.key(row)}"

    def record(self, row: int) -> dict:
        if self.mapping is not None and self.parquet is None:
            try:
                return make_record(self.mapping["fields"], partial(self.read, row))
            except ValueError as error:
                if isinstance(error, BadSample):
                    raise
                raise BadSample(str(error), self.where(row)) from error
        data = self.read(row, "json")
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"the record is not JSON ({error})", self.where(row)) from error
        if not isinstance(record, dict):
            raise BadSample(f"the record is a {type(record).__name__}, not an object", self.where(row))
        if (b"\\" in data or not data.isascii()) and not is_unicode(record):
            raise BadSample("the record holds half a character, which UTF-8 cannot write", self.where(row))
        return record

    def read(self, row: int, extension: str, check: bool = True) -> bytes:
        columns = self._members.get(extension)
        offset = columns[0][row] if columns else 0
        if not offset:
            raise BadSample(f"no member {extension!r}", self.where(row))
        size = columns[1][row]
        if offset + size > self._size:
            data = self._elsewhere(row, extension, offset, size)
        else:
            try:
                data = self._read(offset, size)
            except OSError as error:
                if error.errno is None:           # a store's
                    raise type(error)(f"{self.where(row)}: {error}") from error
                raise OSError(error.errno, f"{self.where(row)}: {error.strerror}") from error
        if check and (len(data) != size or crc32(data) != columns[2][row]):
            data = self._repaired(row, extension, data)
        return data

    def extents(self, rows: np.ndarray, after: np.ndarray) -> list[tuple[int, int, int]]:
        """(start, stop, next use) of each member that training reads; after: step at which each row is used next."""
        if self.parquet is not None:
            return self.parquet.extents(rows, after)
        places = [] if self.mapping is None else list(self.mapping["fields"].values())
        wanted = {*self.index.images, *(place.partition(":")[0] for place in places or ["json"])}
        found = []
        for extension in wanted & set(self.index.extensions):  # one by one: they may lie far apart
            start = self.index.column(f"{extension}.offset")[rows].astype(np.int64)
            stop = np.minimum(start + self.index.column(f"{extension}.size")[rows], self.file.size)
            found += zip(start.tolist(), stop.tolist(), after.tolist(), strict=True)
        return [(start, stop, again) for start, stop, again in found if 0 < start < stop]

    def _elsewhere(self, row: int, extension: str, offset: int, size: int, again: bool = False) -> bytes:
        if self.parquet is None:
            found = max(0, self.file.size - offset)
            raise BadSample(f"{extension} is truncated: {found} of {size} bytes", self.where(row))
        try:
            return self.parquet.read(offset - 1, extension, again)
        except ValueError as error:
            raise BadSample(str(error), self.where(row)) from error

    def _repaired(self, row: int, extension: str, data: bytes) -> bytes:
        """The bytes read again past a damaged cache; BadSample when they are not what the index says either."""
        offset, size, crc = self.index.member(row, extension)
        if self._again is not None and self.parquet is None:
            data = self._again(offset, size)
        elif self._again is not None:
            data = self._elsewhere(row, extension, offset, size, again=True)
        if len(data) != size:
            raise BadSample(f"{extension} is truncated: {len(data)} of {size} bytes", self.where(row))
        if crc32(data) != crc:
            raise BadSample(f"{extension} is damaged: crc32 {crc:08x} expected, {crc32(data):08x} found",
                            self.where(row))
        return data


def _near(starts: list[int]) -> tuple[int, list[int]]:
    """(shift, shards): the shard of a sample is `shards[sample >> shift]` or one after it: the next, if sizes are even.

    starts: first sample of each shard, and their number at the end.
    """
    shift = max(1, starts[-1] // len(starts)).bit_length() - 1            # one or two cells to an average shard
    return shift, [bisect_right(starts, first) - 1 for first in range(0, starts[-1], 1 << shift)]


def _cached(shared: _Shared, number: int):
    from dsvlm.data.cached import CachedFile
    from dsvlm.data.remote import RemoteFile

    manifest = shared.manifest
    url, name = manifest.shard(number), manifest.names[number]
    file = RemoteFile(url, manifest.bytes[number], name, shared.stores)
    return CachedFile(file, shared.cache, manifest.sha256[number][:32])


def _check_index(shared: _Shared, number: int) -> None:
    """The index is the one of the manifest; it is copied first when the set lies at a URL."""
    if number in shared.checked:
        return
    manifest = shared.manifest
    path, expected = manifest.index(number), manifest.index_sha256[number]
    if manifest.url is not None:
        from dsvlm.data.remote import download

        download(f"{manifest.url}/{path.name}", path, expected)  # which checks what it leaves there
        shared.checked.add(number)
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        shard = manifest.shard(number)
        raise ValueError(f"cannot open shard {shard} with its index: {error}: copy it again") from error
    if found != expected:
        raise ValueError(f"index {path}: sha256 {expected} expected, {found} found: "
                         f"copy it again, and see `dsvlm data verify {manifest.path}`")
    shared.checked.add(number)
