"""Parquet files with image bytes (as Hugging Face writes them), read where they lie, one row group at a time.

In the index of such a shard `EXT.offset` is the row's number in the file plus 1 (0 = absent, as in a tar). `image` is
the image's bytes, `json` the record that the fields give, as JSON with sorted keys: `size` and `crc` are of these.
"""

import io
import json
import threading
from collections import OrderedDict
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from dsvlm.data.fields import OPTIONAL, checked, follow, shortened
from dsvlm.data.footer import Chunk, RowGroup, row_groups
from dsvlm.data.index import Row, index_row, index_table

CACHED = 256 * 2**20              # bytes of row groups that a reader keeps, all its files together
LARGEST = 2**30                   # bytes of a row group's images or records: a random sample needs all of them


class RowGroups:
    """Least recently used columns of row groups; safe between threads."""

    def __init__(self, limit: int = CACHED):
        self.limit, self.used = limit, 0
        self.columns: OrderedDict[tuple, pa.Table] = OrderedDict()
        self.footers: dict[str, list[RowGroup]] = {}                # of files that were checked: they are opened again
        self.lock = threading.Lock()

    def get(self, key: tuple, load) -> pa.Table:
        """The table of a key, by `load()` when it is not here; one is always kept."""
        with self.lock:
            if key in self.columns:
                self.columns.move_to_end(key)
                return self.columns[key]
        table = load()
        with self.lock:
            if key not in self.columns:
                self.columns[key] = table
                self.used += table.nbytes
            while self.used > self.limit and len(self.columns) > 1:
                self.used -= self.columns.popitem(last=False)[1].nbytes
        return table

    def drop(self, key: tuple) -> None:
        with self.lock:
            if key in self.columns:
                self.used -= self.columns.pop(key).nbytes


class ParquetFile:
    """One file, read by row: `image` or `json`.

    file: `size` and `read(offset, size)`, and `read_again` too where there is a cache, which may be damaged; mapping:
    `fields` (record key -> COLUMN or COLUMN:PATH) and `image`.
    ValueError when it is no parquet file, a column is missing or a row group is too large for random access.
    """

    def __init__(self, path: str, file, mapping: dict, groups: RowGroups):
        self.path, self.mapping, self.groups = path, mapping, groups
        self._lock = threading.Lock()             # one reader of pyarrow's is not for several threads
        self._cached = hasattr(file, "read_again")
        self.columns = {"image": [mapping["image"].partition(":")[0]] if mapping["image"] else [],
                        "json": sorted({place.partition(":")[0] for place in mapping["fields"].values()})}
        for again in (False, True):
            self._source = RangeFile(file, again)
            try:
                self._open()
                break
            except (pa.ArrowException, OSError, ValueError) as error:
                if again or not self._cached or _did_not_answer(error):
                    raise ValueError(f"{path} is not a parquet file ({error}): copy it again") from error
        names = self._file.schema_arrow.names
        for name in (*self.columns["image"], *self.columns["json"]):
            if name not in names:
                raise ValueError(f"{path} has no column {name!r}: it has {', '.join(names)}")
            if names.count(name) > 1:
                raise ValueError(f"{path} has {names.count(name)} columns {name!r}: write it with names of their own")
        if path not in groups.footers:
            self._check_sizes()
            read = {*self.columns["image"], *self.columns["json"]}
            groups.footers[path] = [RowGroup(rows, [chunk for chunk in chunks if chunk.column in read])
                                    for rows, chunks in self.row_groups]

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def read(self, row: int, kind: str, again: bool = False) -> bytes:
        """The payload of one row; b"" when it has none. ValueError when a value does not fit its field.

        again: past the cache, whose bytes are damaged.
        """
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        if again:
            self.groups.drop((self.path, group, kind))
        table = self.groups.get((self.path, group, kind), lambda: self._load(group, kind, again))
        try:
            values = {name: table.column(name)[row - int(self.starts[group])].as_py() for name in table.column_names}
        except (pa.ArrowException, ArithmeticError) as error:      # a time that Python has not, among others
            raise ValueError(f"{self.path}: no value of row {row} for Python: {error}") from error
        return self._image(values) if kind == "image" else self._record(values)

    def extents(self, rows: np.ndarray, after: np.ndarray) -> list[tuple[int, int, int]]:
        """(start, stop, next use) of the columns that are read of each row's row group; after: of the rows, [n]."""
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        found = []
        for group in np.unique(groups).tolist():
            again = int(after[groups == group].min())
            for chunk in (chunk for kind in self.columns for chunk in self._chunks(group, kind)):
                found.append((chunk.start, min(chunk.start + chunk.stored, self._source.size()), again))
        return [(start, stop, again) for start, stop, again in found if 0 <= start < stop]

    def _open(self) -> None:
        """ValueError when the footer contradicts itself; what pyarrow raises when it is none."""
        self._file = pa.parquet.ParquetFile(pa.PythonFile(self._source, "r"), page_checksum_verification=True)
        self.metadata = self._file.metadata
        vars(self).pop("row_groups", None)        # of a first attempt
        sizes = [self.metadata.row_group(number).num_rows for number in range(self.metadata.num_row_groups)]
        if sum(sizes) != self.metadata.num_rows or min(sizes, default=0) < 0:
            raise ValueError(f"its footer is damaged: {self.metadata.num_rows} rows, {sum(sizes)} in its row groups")
        if self.path not in self.groups.footers:
            for number, (rows, chunks) in enumerate(self.row_groups):
                if rows > max((chunk.values for chunk in chunks), default=0):
                    raise ValueError(f"its footer is damaged: row group {number} has {rows} rows, no column as many")
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def _check_sizes(self) -> None:
        for number in range(len(self.row_groups)):
            for kind, columns in self.columns.items():
                size = sum(chunk.size for chunk in self._chunks(number, kind))
                if size > LARGEST:
                    raise ValueError(f"{self.path}: row group {number} holds {size} bytes in {', '.join(columns)}, "
                                     f"more than {LARGEST}: write it with smaller row groups "
                                     f"(pyarrow.parquet.write_table(..., row_group_size=100))")

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        """Where the columns of the row groups lie, those that are read at least."""
        return self.groups.footers.get(self.path) or row_groups(self.metadata)

    def _load(self, group: int, kind: str, again: bool) -> pa.Table:
        with self._lock:
            self._source.again = again
            try:
                table = self._file.read_row_group(group, columns=self.columns[kind], use_threads=False)
                expected = int(self.starts[group + 1] - self.starts[group])
                if table.num_rows == expected:
                    return table
                raise pa.ArrowInvalid(f"{table.num_rows} rows, {expected} expected by the footer")
            except (pa.ArrowException, OSError) as error:
                if _did_not_answer(error):
                    raise
                if again or not self._cached:
                    raise ValueError(f"{self.path}: row group {group} is damaged ({error})") from error
        return self._load(group, kind, True)

    def _chunks(self, group: int, kind: str) -> list[Chunk]:
        return [chunk for chunk in self.row_groups[group].chunks if chunk.column in self.columns[kind]]

    def _image(self, values: dict) -> bytes:
        name, _, path = self.mapping["image"].partition(":")
        value = values[name]
        try:
            value = value if value is None else follow(value, path)
        except ValueError:
            value = None                          # this row's list has fewer images
        if isinstance(value, dict) and "bytes" in value:           # as Hugging Face writes them
            if value["bytes"] is None and value.get("path"):
                raise ValueError(f"column {name!r} holds the path {shortened(value['path'])} and no image bytes: store "
                                 f"the bytes in it (datasets.Dataset.to_parquet does)")
            value = value["bytes"]
        if value is not None and not isinstance(value, bytes):
            several = isinstance(value, list) and any(isinstance(item, dict | bytes) for item in value)
            hint = ": name one of the list, such as --image COLUMN:0" if several else ": store it as binary"
            raise ValueError(f"column {name!r} holds {_kind(value)}, not image bytes{hint}")
        return value or b""

    def _record(self, values: dict) -> bytes:
        record = {}
        for key, place in self.mapping["fields"].items():
            name, _, path = place.partition(":")
            record[key] = checked(key, place, follow(values[name], path))
        try:
            return _dumped(record)
        except TypeError:                         # a time, bytes, a decimal
            return _dumped({key: self._storable(key, value) for key, value in record.items()})

    def _storable(self, key: str, value):
        """A value as JSON gives it back: `source` may be anything, as text; ValueError for what else JSON has not."""
        column = self.mapping["fields"][key].partition(":")[0]

        def text(found) -> str:
            if key == OPTIONAL:
                return str(found)
            raise ValueError(f"column {column!r} holds {type(found).__name__}, which no record can: cast it")

        return json.loads(json.dumps(value, default=text))


def index_parquet(name: str, file, mapping: dict, progress=iter) -> pa.Table:
    """The index of a file; keys are row numbers, and a row whose values do not fit the fields has no record.

    progress: callable(iterable) -> iterable. ValueError when no row fits.
    """
    parquet = ParquetFile(name, file, mapping, RowGroups())
    rows: list[Row] = []
    reason = ""
    for row in progress(range(parquet.rows)):
        members = {}
        for kind in ("image", "json") if mapping["image"] else ("json",):
            try:
                if data := parquet.read(row, kind):
                    members[kind] = (row + 1, data)
            except ValueError as error:
                reason = reason or str(error)
        rows.append(index_row(f"{row:08d}", members, "image"))
    if not any("json" in row.members for row in rows):
        raise ValueError(f"{name}: no row fits: {reason or 'it holds none'}")
    return index_table(rows)


def _dumped(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _kind(value) -> str:
    """What a value is, for messages."""
    return f"a struct of {', '.join(value)}" if isinstance(value, dict) else type(value).__name__


def _did_not_answer(error: Exception) -> bool:
    """Whether an error is the disk's or the store's, not pyarrow's own."""
    return isinstance(error, OSError) and bool(error.errno or type(error) is not OSError)


class RangeFile(io.RawIOBase):
    """What pyarrow wants of a file, over `read(offset, size)`, or `read_again` as long as `again` is set."""

    def __init__(self, file, again: bool = False):
        self._file, self._at, self.again = file, 0, again

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._file.size

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        read = self._file.read_again if self.again else self._file.read
        data = read(self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data
