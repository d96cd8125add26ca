"""Reading samples by number: index lookup, one pread, checksum; nothing is read in sequence."""

import hashlib
import json
import os
from functools import lru_cache, partial
from zlib import crc32

import numpy as np

from dsvlm.data.index import ShardIndex
from dsvlm.data.manifest import Manifest

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

    Shards are opened when first needed. Descriptors are only read with `pread`, so a forked process may keep using
    them; pickling carries the manifest alone. ValueError (the run cannot go on) when a shard or its index is missing or
    is not the one of the manifest; BadSample when only the sample is damaged.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._starts = np.concatenate([[0], np.cumsum(manifest.sizes, dtype=np.int64)])
        self._shard = lru_cache(OPEN_SHARDS)(partial(_Shard, manifest))

    def __len__(self) -> int:
        return self.manifest.samples

    def __reduce__(self):
        return ShardReader, (self.manifest,)

    def crc(self, sample: int) -> int:
        """The checksum of all members of the sample, as the index has it (uint32)."""
        shard, row = self._find(sample)
        return int(shard.index.column("crc")[row])

    def key(self, sample: int) -> str:
        """The key of the sample."""
        shard, row = self._find(sample)
        return shard.index.key(row)

    def where(self, sample: int) -> str:
        """`shard-000003.tar:KEY`, for messages and journals."""
        shard, row = self._find(sample)
        return f"{shard.name}:{shard.index.key(row)}"

    def record(self, sample: int) -> dict:
        """The sample's record (its `json` member), checked against its crc; BadSample when damaged or not an object."""
        shard, row = self._find(sample)
        data = shard.read(row, "json")
        try:
            record = json.loads(data)
        except ValueError as error:
            raise BadSample(f"the record is not JSON ({error})", shard.where(row)) from error
        if not isinstance(record, dict):
            raise BadSample(f"the record is a {type(record).__name__}, not an object", shard.where(row))
        return record

    def image(self, sample: int) -> bytes | None:
        """The encoded bytes of the first image, checked against their crc; None when the sample has no image."""
        shard, row = self._find(sample)
        extension = shard.index.image(row)
        return None if extension is None else shard.read(row, extension)

    def fetch(self, samples: np.ndarray, when: int) -> None:
        """Hint that these samples ([n] int64) are read at step `when`; nothing to do for local shards."""

    def read(self, sample: int, extension: str) -> bytes:
        """The bytes of one member, checked against their crc; BadSample when it is absent or damaged."""
        shard, row = self._find(sample)
        return shard.read(row, extension)

    def _find(self, sample: int) -> "tuple[_Shard, int]":
        assert 0 <= sample < self.manifest.samples, (sample, self.manifest.samples)
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self._shard(number), int(sample - self._starts[number])


class _Shard:
    """An open shard: its index and a descriptor, closed with the last reference."""

    def __init__(self, manifest: Manifest, number: int):
        self.name = manifest.names[number]
        path = manifest.path / self.name
        index = path.with_suffix(".arrow")
        self._fd = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = hashlib.sha256(index.read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"cannot open shard {path} with its index: {error}: copy it again") from error
        if found != manifest.index_sha256[number]:
            raise ValueError(f"index {index}: sha256 {manifest.index_sha256[number]} expected, {found} found: "
                             f"copy it again, and see `dsvlm data verify {manifest.path}`")
        self.index = ShardIndex(index)

    def __del__(self):
        if self._fd is not None:
            os.close(self._fd)

    def where(self, row: int) -> str:
        return f"{self.name}:{self.index.key(row)}"

    def read(self, row: int, extension: str) -> bytes:
        member = self.index.member(row, extension)
        if member is None:
            raise BadSample(f"no member {extension!r}", self.where(row))
        offset, size, crc = member
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise OSError(error.errno, f"{self.where(row)}: {error.strerror}") from error
        if len(data) != size:
            raise BadSample(f"{extension} is truncated: {len(data)} of {size} bytes", self.where(row))
        if crc32(data) != crc:
            raise BadSample(f"{extension} is damaged: crc32 {crc:08x} expected, {crc32(data):08x} found",
                            self.where(row))
        return data
