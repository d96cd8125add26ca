"""Columns of whole numbers in few bytes, for state that checkpoints keep."""

import math
from collections.abc import Sequence


def pack_columns(columns: Sequence[Sequence[int]]) -> bytes:
    """Return columns of integers >= 0 of one length as bytes.

    Of each column the least number that is not 0, the greatest common step from there on and the count of values are
    kept; each number then takes log2(values) bits.
    """
    packed = bytearray()
    for column in columns:
        low = min(filter(None, column), default=1)
        step = math.gcd(*(number - low for number in column if number)) or 1
        digits = [1 + (number - low) // step if number else 0 for number in column]
        base = 1 + max(digits, default=0)
        whole = 0
        for digit in reversed(digits):
            whole = whole * base + digit
        packed += _number(low) + _number(step) + _number(base) + whole.to_bytes(_room(base, len(column)), "little")
    return bytes(packed)


def unpack_columns(packed: bytes, length: int) -> list[list[int]]:
    """Invert `pack_columns`; length: of each column."""
    columns, at = [], 0
    while at < len(packed):
        low, at = _read_number(packed, at)
        step, at = _read_number(packed, at)
        base, at = _read_number(packed, at)
        end = at + _room(base, length)
        whole, at, column = int.from_bytes(packed[at:end], "little"), end, []
        for _ in range(length):
            whole, digit = divmod(whole, base)
            column.append(low + (digit - 1) * step if digit else 0)
        columns.append(column)
    return columns


def _room(base: int, length: int) -> int:
    """Bytes of the largest number of so many digits."""
    return ((base**length - 1).bit_length() + 7) // 8


def _number(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last byte have the high bit set."""
    packed = bytearray()
    while number > 127:
        packed.append(number & 127 | 128)
        number >>= 7
    return bytes([*packed, number])


def _read_number(packed: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    number = shift = 0
    while packed[at] > 127:
        number |= (packed[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | packed[at] << shift, at + 1
