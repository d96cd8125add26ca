"""Ten thousand random mutations of a shard: nothing changes but the samples they touch, nothing crashes or hangs."""

import io
import random

import pytest
from PIL import Image

from dsvlm.data.index import ShardIndex, scan_tar
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.data.stream import Stream

MUTATIONS = 10_000


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)):]


def swap(data: bytearray, rng: random.Random) -> None:
    """Two ranges change places; half of the time whole blocks, so that headers stay headers."""
    unit = rng.choice((1, 512))
    length = unit * rng.randrange(1, 1 + max(1, 2048 // unit))
    if len(data) < 2 * length:
        return
    first, second = sorted(unit * rng.randrange((len(data) - length) // unit + 1) for _ in range(2))
    if first + length <= second:
        kept = data[first:first + length]
        data[first:first + length] = data[second:second + length]
        data[second:second + length] = kept


def overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    length = min(rng.randrange(1, 1024), len(data) - start)
    data[start:start + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))


@pytest.fixture
def manifest(tmp_path):
    with ShardWriter(tmp_path / "set", "caption") as writer:
        for i in range(6):
            image = io.BytesIO()
            Image.new("RGB", (4, 4), (i, 0, 0)).save(image, "PNG")
            writer.write(f"k{i}", {"json": b'{"caption":"%d"}' % i, "png": image.getvalue()})
    return load_manifest(tmp_path / "set")


def read(reader: ShardReader, sample: int, extension: str) -> bytes | None:
    try:
        return reader.read(sample, extension)
    except BadSample:
        return None


def test_mutations_touch_their_own_samples_only(manifest):
    path = manifest.path / manifest.names[0]
    whole = path.read_bytes()
    index = ShardIndex(manifest.index(0))
    places = {(row, ext): index.member(row, ext) for row in range(index.samples) for ext in index.extensions}
    rng, masked, refused, scanned = random.Random(1), 0, 0, 0
    with path.open("r+b", buffering=0) as file:
        for number in range(MUTATIONS):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                if data:
                    rng.choice((flip, flip, cut, swap, overwrite))(data, rng)
            file.truncate(0)
            file.seek(0)
            file.write(data)
            reader = ShardReader(manifest)
            for (row, ext), (offset, size, _) in places.items():
                expected = whole[offset:offset + size]
                expected = expected if data[offset:offset + size] == expected else None
                assert read(reader, row, ext) == expected, (number, row, ext)
                masked += expected is None
            frozen = bytes(data)
            try:
                scan_tar("mutated.tar", Stream(lambda offset, size: frozen[offset:offset + size], len(frozen)))  # noqa: B023
                scanned += 1
            except ValueError:
                refused += 1
    assert masked > MUTATIONS and refused > MUTATIONS // 4 and scanned > MUTATIONS // 20
