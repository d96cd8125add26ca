"""What a parquet file's footer says of its row groups, read here: pyarrow ends the process on some damaged ones.

The exceptions that its C++ throws when it is asked for one column chunk are not caught on their way to Python. A footer
that pyarrow has parsed it also writes again, without looking at a chunk: that copy, in Thrift's compact protocol, is
what we read.
"""

import io
from typing import NamedTuple

MAGIC = 4  # bytes before the footer in the copy
# Thrift's types
TRUE, FALSE, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, MAP, STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
# Fields of parquet's structures
ROW_GROUPS = 4  # FileMetaData
COLUMNS, ROWS = 1, 3  # RowGroup
META_DATA = 3  # ColumnChunk
PATH, VALUES, SIZE, STORED, DATA, DICTIONARY = 3, 5, 6, 7, 9, 11  # ColumnMetaData


class Chunk(NamedTuple):
    """One column in one row group.

    column: name of the top-level column; values: nulls and items of lists count; start: first byte in the file;
    stored, size: bytes compressed and not.
    """

    column: str
    values: int
    start: int
    stored: int
    size: int


class RowGroup(NamedTuple):
    rows: int
    chunks: list[Chunk]


def row_groups(metadata) -> list[RowGroup]:
    """The row groups of a `pyarrow.parquet.FileMetaData`; ValueError when the footer is damaged or encrypted."""
    copy = io.BytesIO()
    try:
        metadata.write_metadata_file(copy)
        footer = Compact(copy.getvalue(), MAGIC).struct()
        return [RowGroup(group[ROWS], [_chunk(chunk) for chunk in group[COLUMNS]]) for group in footer[ROW_GROUPS]]
    except (OSError, LookupError, TypeError, ValueError) as error:  # pyarrow's own are OSError or ValueError
        raise ValueError(f"its footer is damaged or encrypted ({error!r})") from error


def _chunk(fields: dict) -> Chunk:
    found = fields[META_DATA]
    start = min(found[DATA], found.get(DICTIONARY) or found[DATA])  # a dictionary comes before its data
    return Chunk(found[PATH][0].decode(), found[VALUES], start, found[STORED], found[SIZE])


class Compact:
    """Reads Thrift's compact protocol: a structure becomes a dict of its fields by number."""

    def __init__(self, data: bytes, at: int = 0):
        self.data, self.at = data, at

    def struct(self) -> dict[int, object]:
        fields, field = {}, 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.integer()
            fields[field] = self.value(head & 15)
        return fields

    def value(self, kind: int):
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind in INTEGERS:
            return self.integer()
        if kind == BINARY:
            return self.bytes(self.varint())
        if kind == STRUCT:
            return self.struct()
        if kind in LISTS:
            head = self.byte()
            size = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.item(head & 15) for _ in range(size)]
        if kind == MAP:
            size = self.varint()
            kinds = self.byte() if size else 0
            return [(self.item(kinds >> 4), self.item(kinds & 15)) for _ in range(size)]
        if kind == BYTE:
            return self.byte()
        if kind == DOUBLE:
            return self.bytes(8)
        raise ValueError(f"no Thrift type {kind}")

    def item(self, kind: int):
        """A value within a list or map, where truths are bytes."""
        return self.byte() == TRUE if kind in (TRUE, FALSE) else self.value(kind)

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def bytes(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self) -> int:
        number = shift = 0
        while (byte := self.byte()) > 127:
            number |= (byte & 127) << shift
            shift += 7
        return number | byte << shift

    def integer(self) -> int:
        number = self.varint()
        return number >> 1 ^ -(number & 1)
