"""Any valid tar is indexed as stdlib tarfile reads it, truncation is reported, and what is written is read again."""

import io
import tarfile
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsvlm.data.index import ShardIndex, index_tar
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.data.stream import LocalFile, Stream
from dsvlm.data.tar import BLOCK, DamagedTar, walk

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
         tarfile.CHRTYPE, tarfile.FIFOTYPE)
WITH_DATA = KINDS[:3]

parts = st.text("ab.-_ \u00e4\u4e2d", min_size=1, max_size=8).filter(lambda part: part.strip(". ") == part)
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
long_paths = st.tuples(paths, st.integers(20, 300)).map(lambda pair: f"{pair[0]}/{'n' * pair[1]}.json")
entries = st.tuples(paths | long_paths, st.sampled_from(KINDS), st.integers(0, 1200), st.floats(0, 2e9))


def tar_bytes(members, form: int) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form, encoding="utf-8") as tar:
        for name, kind, size, mtime in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = kind, size if kind in WITH_DATA else 0, mtime
            info.linkname = "target/" * (size // 20) if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            try:
                tar.addfile(info, io.BytesIO(bytes(size)))
            except ValueError:                    # ustar has no room for the name
                continue
    return data.getvalue()


def stream(data: bytes) -> Stream:
    return Stream(lambda offset, size: data[offset:offset + size], len(data))


def truth(data: bytes) -> list[tuple]:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        return [(m.name.rstrip("/"), m.isreg()) + ((m.offset_data, m.size) if m.isreg() else ()) for m in tar]


def ours(data: bytes) -> list[tuple]:
    return [(m.name.rstrip("/"), m.regular) + ((m.offset, m.size) if m.regular else ()) for m in walk(stream(data))]


@settings(max_examples=150, deadline=None)
@given(st.lists(entries, max_size=8), st.sampled_from(FORMATS))
def test_offsets_are_those_of_tarfile(members, form):
    data = tar_bytes(members, form)
    assert ours(data) == truth(data)


@settings(max_examples=20, deadline=None)
@given(st.lists(entries, min_size=1, max_size=3), st.sampled_from(FORMATS), st.data())
def test_truncation_at_any_byte_is_reported_after_the_whole_members(members, form, draw):
    data = tar_bytes(members, form)
    whole = ours(data)
    end = len(data.rstrip(b"\0"))                             # the last byte that says something
    assume(end)                                               # ustar had room for none of the names
    for cut in draw.draw(st.lists(st.integers(0, end - 1), max_size=20)):
        found = []
        with pytest.raises(DamagedTar, match="truncated|no octal|damaged"):
            for member in walk(stream(data[:cut])):
                found.append((member.name.rstrip("/"), member.regular)
                             + ((member.offset, member.size) if member.regular else ()))
        assert found == whole[:len(found)]
        assert all(m[2] + m[3] <= cut for m in found if m[1])


def test_every_byte_of_a_shard_can_be_where_it_was_cut(tmp_path):
    with ShardWriter(tmp_path / "set", "caption") as writer:
        for i in range(3):
            writer.write(f"k{i}", {"json": b'{"caption":"%d"}' % i, "jpg": bytes([i]) * (300 + i)})
    manifest = load_manifest(tmp_path / "set")
    path = manifest.path / manifest.names[0]
    data = path.read_bytes()
    index = ShardIndex(manifest.index(0))
    ends = [max(sum(index.member(row, ext)[:2]) for ext in ("json", "jpg")) for row in range(3)]
    cut_path = tmp_path / "cut.tar"
    for cut in range(0, len(data), 37):
        with pytest.raises(ValueError, match="is damaged at byte|is not an uncompressed tar"):
            cut_path.write_bytes(data[:cut])
            index_tar(cut_path)
        path.write_bytes(data[:cut])
        reader = ShardReader(manifest)
        for row, end in enumerate(ends):
            if end <= cut:
                assert reader.record(row) and reader.image(row)
            else:
                with pytest.raises(BadSample, match="truncated"):
                    reader.record(row), reader.image(row)


@pytest.mark.parametrize("kind, size", [(b"0", 2**62), (b"L", 2**40), (b"x", 2**35), (b"g", 2**33), (b"S", 100)])
def test_sizes_in_headers_are_never_allocated(tmp_path, kind, size):
    info = tarfile.TarInfo("a.json")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[124:136] = kind, bytes([0x80]) + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "x.tar"
    first = tarfile.TarInfo("first.json")
    path.write_bytes(first.tobuf() + bytes(header) + bytes(4 * BLOCK))
    tracemalloc.start()
    with pytest.raises(ValueError, match="claims|sparse"):
        index_tar(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("records", [
    b"-5 path=x\n", b"9999 path=x\n", b"0 path=x\n", b"x\n", b"12 size=-10\n", b"10 size=x\n",
    b"30 size=11111111111111111111\n"])
def test_pax_headers_that_lie_are_refused(tmp_path, records):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf() + records + bytes(-len(records) % BLOCK) + tarfile.TarInfo("a.json").tobuf() + bytes(2 * BLOCK)
    with pytest.raises(DamagedTar, match="pax header"):
        list(walk(stream(data)))


def test_many_extended_headers_in_a_row_do_no_harm():
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 7
    headers = (info.tobuf() + b"n.json\0".ljust(BLOCK, b"\0")) * 5000
    data = headers + tarfile.TarInfo("a.json").tobuf() + bytes(2 * BLOCK)
    assert [member.name for member in walk(stream(data))] == ["n.json"]


def test_a_stream_hashes_what_it_passes(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr("dsvlm.data.stream.PIECE", 100)
    data = bytes(range(256)) * 5
    (tmp_path / "x").write_bytes(data)
    file = LocalFile(tmp_path / "x")
    source = Stream(file.read, file.size)
    assert source.read(3, 250) == data[3:253] and source.read(250, 5) == data[250:255]
    assert source.read(700, 40) == data[700:740] and source.read(1270, 50) == data[1270:]
    assert source.read(5000, 1) == b""
    assert source.sha256() == hashlib.sha256(data).hexdigest()


keys = st.text("abzAZ09_-", min_size=1, max_size=20)
extensions = st.sampled_from(["png", "jpg", "txt", "cls", "seg.png"])
payloads = st.dictionaries(extensions, st.binary(min_size=1, max_size=1100), max_size=3)
samples = st.dictionaries(keys, payloads, min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(samples, st.sampled_from([1, 3000, 2**20]))
def test_what_is_written_is_read_by_us_and_by_webdataset(samples, shard_bytes):
    import webdataset

    with TemporaryDirectory() as directory:
        manifests = []
        for name in ("one", "two"):
            with ShardWriter(Path(directory, name), "caption", shard_bytes=shard_bytes) as writer:
                for key, members in samples.items():
                    writer.write(key, {"json": b"{}"} | members)
            manifests.append(load_manifest(Path(directory, name)))
        assert manifests[0].sha256 == manifests[1].sha256 and manifests[0].hash == manifests[1].hash
        reader = ShardReader(manifests[0])
        for number, (key, members) in enumerate(samples.items()):
            assert reader.key(number) == key
            assert {ext: reader.read(number, ext) for ext in members} == members
        urls = [manifests[0].shard(number) for number in range(len(manifests[0].names))]
        found = [(sample["__key__"], {ext: sample[ext] for ext in sample if not ext.startswith("__")})
                 for sample in webdataset.WebDataset(urls, shardshuffle=False)]
        assert found == [(key, {"json": b"{}"} | members) for key, members in samples.items()]


def test_checksums_are_zlibs():
    from zlib import crc32 as truth

    from dsvlm.data.checksum import crc32

    for data in (b"", b"x", bytes(range(256)) * 300):
        assert crc32(data) == truth(data) and crc32(data, 7) == truth(data, 7)
