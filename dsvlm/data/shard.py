"""Writing shards: deterministic ustar tars that WebDataset reads, with index and manifest, complete or absent."""

import hashlib
import os
import re
import shutil
import tarfile
from contextlib import ExitStack, suppress
from pathlib import Path

from dsvlm.data.files import named, sync, write_file
from dsvlm.data.index import Row, index_row, index_table
from dsvlm.data.locks import another, is_written, writing
from dsvlm.data.manifest import MANIFEST, SHARDS, arrow_bytes, manifest_bytes
from dsvlm.data.tar import BLOCK

KEY = re.compile(r"[A-Za-z0-9_-]+")
EXTENSION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
PARTIAL = ".partial"


class ShardWriter:
    """Context manager that writes one shard set; the files get their names at the end, `manifest.json` last.

    The same samples in the same order give the same bytes. An exception leaves nothing behind. ValueError when the
    directory already holds shards, another process writes there, a key or extension is not allowed, a key comes twice,
    or no sample came.
    """

    def __init__(self, directory, task_type: str, preprocessing: dict | None = None, shard_bytes: int = 256 * 2**20):
        self.directory = Path(directory)
        self.task_type = task_type
        self.preprocessing = preprocessing or {}
        self.shard_bytes = shard_bytes
        self._partial = self.directory / PARTIAL
        self._keys: set[str] = set()
        self._members: set[str] = set()
        self._shards: list[dict] = []
        self._file = None

    def __enter__(self) -> "ShardWriter":
        check_free(self.directory)
        with ExitStack() as held:
            held.enter_context(writing(self.directory))
            _check_empty(self.directory)                          # another writer may have ended since
            shutil.rmtree(self._partial, ignore_errors=True)      # left by a writer that was killed
            self._partial.mkdir()
            self._held = held.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._held:
            try:
                if kind is None:
                    self._publish()
            finally:
                if self._file is not None:
                    with suppress(OSError):                       # a full disk: what made it known is under way
                        self._file.close()
                shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample; `members`: extension -> payload, `json` (the record) among them."""
        self._check(key, members)
        need = sum(BLOCK + len(data) + -len(data) % BLOCK for data in members.values())
        if self._file is not None and self._size + need > self.shard_bytes:
            self._end_shard()
        if self._file is None:
            self._begin_shard()
        placed = {}
        for ext, data in sorted(members.items()):
            info = tarfile.TarInfo(f"{key}.{ext}")                # mtime, uid and gid are 0, mode is 0644
            info.size = len(data)
            self._append(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
            placed[ext] = (self._size, data)
            self._append(data + bytes(-len(data) % BLOCK))
        self._rows.append(index_row(key, placed))
        self._keys.add(key)
        self._members.update(members)

    def _check(self, key: str, members: dict[str, bytes]) -> None:
        if not KEY.fullmatch(key):
            raise ValueError(f"{self.directory}: sample key {key!r}: only letters, digits, _ and - are allowed")
        if key in self._keys:
            raise ValueError(f"{self.directory}: sample key {key!r} comes twice: keys must be unique in a shard set")
        if "json" not in members:
            raise ValueError(f"{self.directory}: sample {key!r} has no member 'json' (found {sorted(members)})")
        for ext, data in members.items():
            if not EXTENSION.fullmatch(ext) or len(key) + 1 + len(ext) > 100:
                raise ValueError(f"{self.directory}: member name {key}.{ext}: at most 100 characters, "
                                 f"extension in lower case letters, digits and _")
            if not 0 < len(data) < 2**32:
                raise ValueError(f"{self.directory}: member {key}.{ext} has {len(data)} bytes: 1 to 2^32-1 allowed")

    def _begin_shard(self) -> None:
        self._file = (self._partial / f"shard-{len(self._shards):06d}.tar").open("wb")
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._rows: list[Row] = []

    def _append(self, data: bytes) -> None:
        with named(self._file.name):
            self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)

    def _end_shard(self) -> None:
        self._append(bytes(2 * BLOCK))
        with named(self._file.name):
            sync(self._file)
            self._file.close()
        self._file = None
        name = f"shard-{len(self._shards):06d}"
        index = arrow_bytes(index_table(self._rows))
        write_file(self._partial / f"{name}.arrow", index)
        self._shards.append({"name": f"{name}.tar", "samples": len(self._rows), "bytes": self._size,
                             "sha256": self._sha256.hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest()})

    def _publish(self) -> None:
        """Give all files their final names; on failure take back those that have one."""
        if self._file is None:
            raise ValueError(f"{self.directory}: no sample was written: an empty shard set cannot be trained on")
        self._end_shard()
        table, header = manifest_bytes(self.task_type, self._shards, self._members, self.preprocessing)
        write_file(self._partial / SHARDS, table)
        write_file(self._partial / MANIFEST, header)
        shards = [shard["name"] for shard in self._shards]
        names = [name for shard in shards for name in (shard, shard.replace(".tar", ".arrow"))] + [SHARDS, MANIFEST]
        renamed = []
        try:
            for name in names:
                if name == MANIFEST:
                    _sync_directory(self.directory)               # the shards are on disk before the manifest is
                os.rename(self._partial / name, self.directory / name)
                renamed.append(name)
            _sync_directory(self.directory)
        except BaseException:
            for name in reversed(renamed):                        # the others may be somebody else's
                (self.directory / name).unlink(missing_ok=True)
            raise


def check_free(directory) -> None:
    """ValueError when a process writes a set there, or the directory holds one, or shards of a killed writer."""
    if is_written(Path(directory)):
        raise ValueError(another(directory))
    _check_empty(Path(directory))


def check_no_set(directory: Path) -> None:
    """ValueError when the directory already holds a shard set, or is a file."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: --out is the directory of a shard set; choose another")
    if (directory / MANIFEST).exists():
        raise ValueError(f"{directory} already holds a shard set ({MANIFEST}): remove it or choose another --out")


def _check_empty(directory: Path) -> None:
    check_no_set(directory)
    left = next(iter(sorted(directory.glob("shard-*"))), None) or next(iter(directory.glob(SHARDS)), None)
    if left is not None:
        raise ValueError(f"{directory} already holds {left.name}, without {MANIFEST}: choose another --out, or remove "
                         f"shard-* and {SHARDS} if a conversion that was interrupted left them")


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
