"""The index of a shard: one Arrow row per sample, saying where each member lies."""

import re
import struct
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from dsvlm.data.checksum import crc32
from dsvlm.data.files import write_file
from dsvlm.data.manifest import Manifest, arrow_bytes
from dsvlm.data.stream import LocalFile, Stream
from dsvlm.data.tar import DamagedTar, Member, walk

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "image")                  # `image`: a column of a parquet file
MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)        # WebDataset: key up to the first dot
PAYLOAD = 16 * 2**20                                                      # bytes of a member held at once
EXTENSIONS = 1000                 # of a shard: each is three columns with a row per sample


class Row(NamedTuple):
    """One sample of the index; `members`: extension -> (offset, size, crc32)."""

    key: str
    width: int
    height: int
    crc: int
    members: dict[str, tuple[int, int, int]]


def is_image(extension: str) -> bool:
    """Whether a member with this extension (`png`, `img0.jpg`) is an image."""
    return extension.rpartition(".")[2] in IMAGE_SUFFIXES


def has_images(manifest: Manifest) -> bool:
    """Whether samples of the set have images."""
    return manifest.image is not None or any(map(is_image, manifest.members))


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from an image's header; (0, 0) when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            return image.size
    except Exception:                  # Pillow's parsers raise nearly every type on damaged bytes
        return 0, 0


def index_row(key: str, members: dict[str, tuple[int, bytes]], image: str | None = None) -> Row:
    """The row of one sample from `members`: extension -> (offset, payload); image: as of `scan_tar`."""
    found = {ext: (offset, len(data), crc32(data)) for ext, (offset, data) in members.items()}
    first = image or next((ext for ext in sorted(members) if is_image(ext)), None)
    return make_row(key, found, image_size(members[first][1]) if first in members else (0, 0))


def make_row(key: str, members: dict[str, tuple[int, int, int]], size: tuple[int, int]) -> Row:
    """The row of one sample from `members`: extension -> (offset, size, crc32).

    size: (width, height) of the image that trains; (0, 0) = none.
    """
    found = dict(sorted(members.items()))
    width, height = size
    crc = crc32(struct.pack(f"<{len(found)}I", *(member[2] for member in found.values())))
    return Row(key, min(width, 0xFFFF), min(height, 0xFFFF), crc, found)


def index_table(rows: list[Row]) -> pa.Table:
    """The index as a table, in the order of the rows; an absent member has offset, size and crc 0."""
    columns = {
        "key": pa.array([row.key for row in rows], pa.utf8()),
        "width": pa.array([row.width for row in rows], pa.uint16()),
        "height": pa.array([row.height for row in rows], pa.uint16()),
        "crc": pa.array([row.crc for row in rows], pa.uint32()),
    }
    for ext in sorted({ext for row in rows for ext in row.members}):
        offset, size, crc = zip(*(row.members.get(ext, (0, 0, 0)) for row in rows), strict=True)
        columns[f"{ext}.offset"] = pa.array(offset, pa.uint64())
        columns[f"{ext}.size"] = pa.array(size, pa.uint32())
        columns[f"{ext}.crc"] = pa.array(crc, pa.uint32())
    return pa.table(columns)


def index_tar(path) -> pa.Table:
    """Scan an uncompressed tar (ours or any WebDataset tar) into an index table.

    ValueError when the tar is truncated or damaged, holds no sample, a member is sparse or its name leaves the
    archive, a sample has two members of one extension, or there are too many extensions.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    file = LocalFile(path)
    return scan_tar(str(path), Stream(file.read, file.size))


def scan_tar(name: str, stream: Stream, image: str | None = None) -> pa.Table:
    """As `index_tar`, of a stream that messages call `name`; image: extension of the image, default the first.

    Members of one key are one sample wherever they lie; samples come in the order of their first members.
    """
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    sizes: dict[str, tuple[str, tuple[int, int]]] = {}               # extension of the image, (width, height)
    extensions: set[str] = set()
    key = None
    try:
        for member in walk(stream):
            match = MEMBER_NAME.fullmatch(member.name)
            if not member.regular or match is None:
                continue
            if match[1].startswith("__") and match[1].endswith("__"):  # WebDataset keeps such names for itself
                continue
            _check_member(name, member)
            key, ext = match[1], match[2].lower()
            extensions.add(ext)
            if len(extensions) > EXTENSIONS:
                raise ValueError(f"{name}: more than {EXTENSIONS} extensions, such as {ext!r} of {member.name!r}: the "
                                 f"key of a member ends at the first dot of its name; rename them, so that only an "
                                 f"extension follows")
            members = samples.setdefault(key, {})
            if ext in members:
                raise ValueError(f"{name}: sample {key!r} has two members {ext!r}: give each sample a key of its own, "
                                 f"and each of its members an extension")
            crc, start = _payload(stream, member)
            members[ext] = (member.offset, member.size, crc)
            if ext == image or (image is None and is_image(ext) and ext <= sizes.get(key, (ext,))[0]):
                sizes[key] = ext, image_size(start)
    except DamagedTar as error:
        raise ValueError(_damaged(name, error, key)) from error
    if not samples:
        raise ValueError(f"{name} holds no sample (no member named KEY.EXTENSION)")
    return index_table([make_row(key, members, sizes.get(key, ("", (0, 0)))[1]) for key, members in samples.items()])


def gathered(table: pa.Table) -> int:
    """Samples of an index with another sample between their members: what reads a tar in order has parts of them."""
    offsets = [table.column(name).to_numpy() for name in table.column_names if name.endswith(".offset")]
    member, row = np.nonzero(offsets)
    in_order = row[np.argsort(np.stack(offsets)[member, row])]
    return int((np.bincount(in_order[np.flatnonzero(np.diff(in_order, prepend=-1))]) > 1).sum())


def write_index(path) -> dict:
    """Write the index of another tool's tar next to it (`x.tar` -> `x.arrow`); the tar is left as it is.

    Returns {"shard", "index", "samples", "members", "gathered"}. ValueError when another file has that name already.
    """
    path = Path(path)
    target, table = path.with_suffix(".arrow"), index_tar(path)
    data = arrow_bytes(table)
    if target.exists() and target.read_bytes() != data:
        raise ValueError(f"{target} exists and is not the index of {path.name}: remove it first")
    write_file(target, data)
    members = [name.removesuffix(".offset") for name in table.column_names if name.endswith(".offset")]
    return {"shard": str(path), "index": str(target), "samples": table.num_rows, "members": members,
            "gathered": gathered(table)}


class ShardIndex:
    """One shard's index, mapped into memory: columns are zero-copy numpy arrays of shape [samples].

    image: extension of the image that trains; default: the first in the order of extensions that a sample has.
    """

    def __init__(self, path, image: str | None = None):
        with pa.memory_map(str(path)) as source:          # the mapping outlives the file: no descriptor stays open
            self._batch = pa.ipc.open_file(source).get_batch(0)
        self._columns = {name: self._batch.column(name).to_numpy(zero_copy_only=True)
                         for name in self._batch.schema.names if name != "key"}
        self.samples = self._batch.num_rows
        self.extensions = tuple(n.removesuffix(".offset") for n in self._columns if n.endswith(".offset"))
        self.images = tuple(ext for ext in self.extensions if (ext == image if image else is_image(ext)))
        # Offsets, sizes and crcs of each extension. Indexing a view gives a Python int, faster than a numpy scalar.
        self.members = {ext: tuple(memoryview(self._columns[f"{ext}.{field}"]) for field in ("offset", "size", "crc"))
                         for ext in self.extensions}
        self.crc = memoryview(self._columns["crc"])

    @property
    def table(self) -> pa.Table:
        """All columns, as `index_tar` gives them."""
        return pa.Table.from_batches([self._batch])

    def column(self, name: str) -> np.ndarray:
        """A numeric column: `width`, `height`, `crc`, `EXT.offset`, `EXT.size` or `EXT.crc`."""
        return self._columns[name]

    def key(self, row: int) -> str:
        """The key of one sample."""
        return self._batch.column("key")[row].as_py()

    def member(self, row: int, extension: str) -> tuple[int, int, int] | None:
        """(offset, size, crc32) of a member; None when the sample has none of this extension."""
        columns = self.members.get(extension)
        if columns is None:
            return None
        offset = columns[0][row]
        return (offset, columns[1][row], columns[2][row]) if offset else None

    def image(self, row: int) -> str | None:
        """The extension of the sample's image; None when it has no image."""
        for extension in self.images:
            if self.members[extension][0][row]:
                return extension
        return None


def _check_member(name: str, member: Member) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ValueError(f"{name}: member name {member.name!r} leaves the archive: write the tar with relative names")
    if member.size >= 2**32:
        raise ValueError(f"{name}: member {member.name!r} has {member.size} bytes: at most 2^32-1 can be indexed")


def _payload(stream: Stream, member: Member) -> tuple[int, bytes]:
    """(crc32, first bytes) of a member; a large one is read piece by piece."""
    crc, start = 0, None
    for at in range(member.offset, member.offset + member.size, PAYLOAD):
        piece = stream.read(at, min(PAYLOAD, member.offset + member.size - at))
        crc = crc32(piece, crc)
        start = piece if start is None else start
    return crc, start or b""


def _damaged(name: str, error: DamagedTar, key: str | None) -> str:
    if not error.offset:
        return f"{name} is not an uncompressed tar ({error.why}): decompress it, or copy it again"
    after = "before the first sample" if key is None else f"after a member of sample {key!r}"
    return f"{name} is damaged at byte {error.offset}, {after}: {error.why}; copy or convert it again"
