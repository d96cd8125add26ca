"""The index of a shard: one Arrow row per sample, saying where in the tar each member lies."""

import re
import struct
import tarfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from dsvlm.data.manifest import arrow_bytes

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)        # WebDataset: key up to the first dot
BLOCK = 512


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


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from an image's header; (0, 0) when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            return image.size
    except Exception:                  # Pillow's parsers raise nearly every type on damaged bytes
        return 0, 0


def index_row(key: str, members: dict[str, tuple[int, bytes]]) -> Row:
    """The row of one sample from `members`: extension -> (offset in the tar, payload)."""
    found = {ext: (offset, len(data), crc32(data)) for ext, (offset, data) in sorted(members.items())}
    image = next((data for ext, (_, data) in sorted(members.items()) if is_image(ext)), None)
    width, height = (0, 0) if image is None else image_size(image)
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
    """Scan an uncompressed tar (ours or any WebDataset tar that stdlib tarfile reads) into an index table.

    ValueError when the tar is truncated or damaged, holds no sample, a member is sparse, a sample has two members of
    one extension, or the members of a sample are not adjacent.
    """
    path = Path(path)
    groups: dict[str, dict[str, tuple[int, bytes]]] = {}
    rows: list[Row] = []
    with _open_tar(path) as tar:
        try:
            for member in tar:
                match = MEMBER_NAME.fullmatch(member.name)
                if not member.isreg() or match is None:
                    continue
                key, ext = match[1], match[2].lower()
                if key.startswith("__") and key.endswith("__"):     # WebDataset keeps such names for itself
                    continue
                if key not in groups:
                    _close_group(groups, rows)
                elif groups[key] is None:
                    raise ValueError(f"{path}: the members of sample {key!r} are not adjacent: "
                                     f"write the tar again with sorted names")
                if ext in groups.setdefault(key, {}):
                    raise ValueError(f"{path}: sample {key!r} has two members {ext!r}: give each its own extension")
                if member.issparse():
                    raise ValueError(f"{path}: member {member.name!r} is sparse: write the tar without --sparse")
                groups[key][ext] = (member.offset_data, tar.extractfile(member).read())
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(_damaged(path, tar.offset, groups, str(error))) from error
        _close_group(groups, rows)
        _check_end(path, tar, groups)
    if not rows:
        raise ValueError(f"{path} holds no sample (no member named KEY.EXTENSION)")
    return index_table(rows)


def write_index(path) -> dict:
    """Write the index of another tool's tar next to it (`x.tar` -> `x.arrow`); the tar is left as it is.

    Returns {"shard", "index", "samples", "members"}. ValueError when there already is another file of that name.
    """
    path = Path(path)
    target, table = path.with_suffix(".arrow"), index_tar(path)
    data = arrow_bytes(table)
    if target.exists() and target.read_bytes() != data:
        raise ValueError(f"{target} exists and is not the index of {path.name}: remove it first")
    partial = target.with_name(f"{target.name}.partial")
    partial.write_bytes(data)
    partial.replace(target)
    members = [name.removesuffix(".offset") for name in table.column_names if name.endswith(".offset")]
    return {"shard": str(path), "index": str(target), "samples": table.num_rows, "members": members}


class ShardIndex:
    """One shard's index, mapped into memory: columns are zero-copy numpy arrays of shape [samples]."""

    def __init__(self, path):
        with pa.memory_map(str(path)) as source:          # the mapping outlives the file: no descriptor stays open
            self._batch = pa.ipc.open_file(source).get_batch(0)
        self._columns = {name: self._batch.column(name).to_numpy(zero_copy_only=True)
                         for name in self._batch.schema.names if name != "key"}
        self.samples = self._batch.num_rows
        self.extensions = tuple(n.removesuffix(".offset") for n in self._columns if n.endswith(".offset"))

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
        if extension not in self.extensions:
            return None
        offset, size, crc = (int(self.column(f"{extension}.{field}")[row]) for field in ("offset", "size", "crc"))
        return (offset, size, crc) if offset else None

    def image(self, row: int) -> str | None:
        """The extension of the sample's first image; None when it has no image."""
        return next((e for e in self.extensions if is_image(e) and self.member(row, e) is not None), None)


def _open_tar(path: Path) -> tarfile.TarFile:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        return tarfile.open(path, "r:", encoding="utf-8")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar ({error}): decompress it, or copy it again") from error


def _close_group(groups: dict, rows: list[Row]) -> None:
    """Turn the last group into a row and drop its payloads; its key stays, to find members that are not adjacent."""
    key = next(reversed(groups), None)
    if key is not None and groups[key] is not None:
        rows.append(index_row(key, groups[key]))
        groups[key] = None


def _check_end(path: Path, tar: tarfile.TarFile, groups: dict) -> None:
    """After the last member come two zero blocks and nothing but zeros; tarfile takes a bad header as the end."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        block = file.read(2 * BLOCK)
        rest = block
        while rest and not rest.strip(b"\0"):
            rest = file.read(1 << 20)
    if rest.strip(b"\0"):
        raise ValueError(_damaged(path, tar.offset, groups, "damaged header, or data after the end of the archive"))
    if len(block) < 2 * BLOCK:
        raise ValueError(_damaged(path, tar.offset, groups, "truncated, the end mark is missing"))


def _damaged(path: Path, offset: int, groups: dict, why: str) -> str:
    last = next(reversed(groups), None)
    after = "before the first sample" if last is None else f"after a member of sample {last!r}"
    return f"{path} is damaged at byte {offset}, {after}: {why}; copy or convert it again"
