"""crc32 as zlib has it, by the fastest library at hand (isal: some 30 GB/s instead of 4); all give the same numbers."""

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
