"""Walking the headers of a tar: where each member lies. Nothing that a header says is believed before it is checked."""

from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
REGULAR = b"0\0007"              # types of a regular file: POSIX, before POSIX, contiguous
WITHOUT_DATA = b"123456"         # links, devices, directories, pipes: their size says nothing
LONGEST_HEADER = 2**20           # bytes of an extended header (long names): far above what any file system allows


class Member(NamedTuple):
    """One entry: name, offset of its data, bytes, and whether it is a regular file."""

    name: str
    offset: int
    size: int
    regular: bool


class DamagedTar(ValueError):
    """The archive ends or breaks at byte `offset`."""

    def __init__(self, offset: int, why: str):
        super().__init__(f"byte {offset}: {why}")
        self.offset, self.why = offset, why


def walk(source, several: bool = False) -> Iterator[Member]:
    """Every member of an uncompressed tar, in order: ustar, GNU long names, pax.

    source: `size` and `read(offset, size) -> bytes`, shorter at the end; it is read forward only and never asked for
    more than an extended header at once. several: go on with the tar that follows another one's end mark, as `cat a.tar
    b.tar` writes them. DamagedTar for a truncated or damaged archive, a member that reaches beyond
    the end, or a sparse member.
    """
    offset, common, extra = 0, {}, {}
    while True:
        header = source.read(offset, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(offset, "truncated, the end mark is missing")
        if not header.strip(b"\0"):
            following = _after_end(source, offset)
            if following is None:
                return
            if not several:
                raise DamagedTar(offset, "damaged header, or data after the end of the archive")
            offset, common, extra = following, {}, {}
            continue
        if not _sum_is_right(header):
            raise DamagedTar(offset, "damaged header, or data after the end of the archive")
        kind, size = header[156:157], _number(header[124:136], offset)
        if kind in b"LKxXg":
            text = _extended(source, offset, size)
            if kind == b"L":
                extra["path"] = _text(text)
            elif kind == b"g":
                common |= _pax(text, offset)
            elif kind != b"K":
                extra |= _pax(text, offset)
            offset += BLOCK + size + -size % BLOCK
            continue
        fields, extra = common | extra, {}
        name = fields.get("path") or _name(header)
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in fields):
            raise DamagedTar(offset, f"member {name!r} is sparse: write the tar without --sparse")
        if "size" in fields:
            size = _decimal(fields["size"], offset)
        data = offset + BLOCK
        has_data = kind not in WITHOUT_DATA and not (kind == b"\0" and name.endswith("/"))
        if has_data and data + size > source.size:
            raise DamagedTar(offset, f"truncated, or a damaged header: member {name!r} claims {size} bytes, "
                                     f"{max(0, source.size - data)} are left")
        yield Member(name, data, size, has_data and kind in REGULAR)
        offset = data + (size + -size % BLOCK if has_data else 0)


def _after_end(source, offset: int) -> int | None:
    """Where the first block that is not zero follows the two that end an archive; a lone zero block may hide damage."""
    mark = source.read(offset, 2 * BLOCK)
    if len(mark) < 2 * BLOCK:
        raise DamagedTar(offset, "truncated, the end mark is missing")
    if mark.strip(b"\0"):
        raise DamagedTar(offset, "damaged header, or data after the end of the archive")
    at = offset
    while block := source.read(at, LONGEST_HEADER):
        zeros = len(block) - len(block.lstrip(b"\0"))
        if zeros < len(block):
            return at + zeros - zeros % BLOCK
        at += len(block)
    return None


def _sum_is_right(header: bytes) -> bool:
    """The sum of all bytes, the field itself as spaces; some old programs summed signed bytes."""
    try:
        expected = int(header[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return False
    found = sum(header) - sum(header[148:156]) + 8 * 32
    if found == expected:
        return True
    signed = 256 * (sum(byte > 127 for byte in header) - sum(byte > 127 for byte in header[148:156]))
    return found - signed == expected


def _number(field: bytes, offset: int) -> int:
    """An octal number, or a base-256 one of GNU tar."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if text.strip(b"01234567"):
        raise DamagedTar(offset, f"the size {field!r} in a header is no octal number")
    return int(text or b"0", 8)


def _decimal(text: str, offset: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DamagedTar(offset, f"the size {text[:40]!r} in a pax header is no number")
    return int(text)


def _extended(source, offset: int, size: int) -> bytes:
    if size > LONGEST_HEADER:
        raise DamagedTar(offset, f"an extended header claims {size} bytes, more than {LONGEST_HEADER}")
    text = source.read(offset + BLOCK, size)
    if len(text) < size:
        raise DamagedTar(offset, "truncated inside an extended header")
    return text


def _pax(text: bytes, offset: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`, LENGTH in bytes and of the whole record."""
    fields, at = {}, 0
    while at < len(text) and text[at]:
        digits, space, _ = text[at:at + 20].partition(b" ")
        end = at + int(digits) if space and digits.isdigit() else 0
        key, sign, value = text[at + len(digits) + 1:max(end - 1, 0)].partition(b"=")
        if not sign or end > len(text) or text[end - 1:end] != b"\n":
            raise DamagedTar(offset, "a damaged pax header")
        fields[_text(key)] = _text(value)
        at = end
    return fields


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    """Up to the first NUL; bytes that are not UTF-8 are spelt as escapes, so that every name can be stored."""
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
