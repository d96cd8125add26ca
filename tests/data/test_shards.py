"""Shards: round trip, determinism, what others read, and every kind of damage."""

import hashlib
import json
import os
import pickle
import random
import tarfile
import zlib
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dsvlm.data.index import ShardIndex, index_tar
from dsvlm.data.manifest import arrow_bytes, check_files, load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.data.transforms import decode_image


def png(colour, size=(12, 8)) -> bytes:
    data = BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def make_samples(count=20):
    """(key, members) of every kind: with a PNG, with a JPEG, without an image; sizes around the block size."""
    samples = []
    for i in range(count):
        record = {"caption": "x" * (500 + i), "source": f"s{i}"}
        members = {"json": json.dumps(record).encode()}
        if i % 3 == 0:
            members["png"] = png((i, 0, 0))
        elif i % 3 == 1:
            members["jpg"] = random.Random(i).randbytes(511 + i % 3)
        samples.append((f"s-{i:03d}", members))
    return samples


def write(directory, samples, shard_bytes=16 * 1024, **options):
    with ShardWriter(directory, "caption", shard_bytes=shard_bytes, **options) as writer:
        for key, members in samples:
            writer.write(key, members)
    return load_manifest(directory)


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path / "set", make_samples(), preprocessing={"resize": 3})


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_round_trip(shards):
    assert len(shards.names) > 2 and shards.samples == 20 and sum(shards.sizes) == 20
    assert shards.preprocessing == {"resize": 3} and shards.type == "caption"
    assert shards.members == ("jpg", "json", "png")
    assert shards.hash == hashlib.sha256((shards.path / "manifest.json").read_bytes()).hexdigest()
    check_files(shards)
    reader = ShardReader(shards)
    crcs = set()
    for i, (key, members) in enumerate(make_samples()):
        assert reader.key(i) == key and reader.where(i).endswith(f".tar:{key}")
        assert reader.record(i) == json.loads(members["json"])
        assert reader.image(i) == members.get("png", members.get("jpg"))
        crcs.add(reader.crc(i))
    assert len(crcs) == 20


def test_same_input_same_bytes(tmp_path, shards):
    again = write(tmp_path / "again", make_samples(), preprocessing={"resize": 3})
    assert contents(again.path) == contents(shards.path) and again.hash == shards.hash
    assert write(tmp_path / "other", make_samples()[::-1], preprocessing={"resize": 3}).hash != shards.hash


def test_webdataset_reads_the_same_samples_in_the_same_order(shards):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(shards.path / name) for name in shards.names]
    found = [(sample["__key__"], {ext: sample[ext] for ext in sample if not ext.startswith("__")})
             for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert found == make_samples()


def test_index_is_what_tarfile_says(shards):
    for name in shards.names:
        index = ShardIndex((shards.path / name).with_suffix(".arrow"))
        with tarfile.open(shards.path / name) as tar:
            truth = {m.name: (m.offset_data, m.size) for m in tar}
        found = {f"{index.key(row)}.{ext}": index.member(row, ext)[:2] for row in range(index.samples)
                 for ext in index.extensions if index.member(row, ext)}
        assert found == truth
        assert arrow_bytes(index_tar(shards.path / name)) == (shards.path / name).with_suffix(".arrow").read_bytes()


def test_index_is_mapped_not_copied(shards):
    index = ShardIndex((shards.path / shards.names[0]).with_suffix(".arrow"))
    before = pa.total_allocated_bytes()
    crc = index.column("crc")
    assert not crc.flags.owndata and not crc.flags.writeable and pa.total_allocated_bytes() == before
    assert index.column("width")[0] == 12 and index.column("height")[0] == 8 and index.column("width")[2] == 0


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars(tmp_path, form):
    """Directories, long and non-ASCII names, meta files and files without extension, as other tools write them."""
    long = "" if form == tarfile.USTAR_FORMAT else "d" * 90 + "/" + "k" * 90
    members = {f"train/a{long}.JPG": b"1", f"train/a{long}.seg.png": b"22", f"train/a{long}.json": b"{}",
               "train/b-\u00e4.txt": b"", "README": b"no sample", "__meta__.json": b"no sample"}
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("train.d/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    table = index_tar(tmp_path / "x.tar").to_pydict()
    assert table["key"] == [f"train/a{long}", "train/b-\u00e4"]
    data = (tmp_path / "x.tar").read_bytes()
    for ext, payload in (("jpg", b"1"), ("seg.png", b"22"), ("json", b"{}")):
        offset, size = table[f"{ext}.offset"][0], table[f"{ext}.size"][0]
        assert data[offset:offset + size] == payload and table[f"{ext}.offset"][1] == 0
    assert table["txt.offset"][1] > 0 and table["txt.size"][1] == 0


def test_tars_that_are_refused(tmp_path):
    def tar(name, *names, mode="w"):
        with tarfile.open(tmp_path / name, mode) as file:
            for member in names:
                file.addfile(tarfile.TarInfo(member))
        return tmp_path / name

    for path, message in [
            (tar("twice.tar", "a.json", "a.json"), "twice.tar: sample 'a' has two members 'json'"),
            (tar("apart.tar", "x/a.json", "b.json", "x/a.json"), "apart.tar: sample 'x/a' has two members 'json'"),
            (tar("empty.tar", "README"), "no sample"),
            (tar("zip.tar", "a.json", mode="w:gz"), "not an uncompressed tar"),
            (tmp_path / "absent.tar", "no file")]:
        with pytest.raises(ValueError, match=message):
            index_tar(path)


def test_every_truncation_is_found_and_the_samples_before_it_are_read(tmp_path):
    manifest = write(tmp_path / "set", make_samples(4), shard_bytes=2**20)
    path = manifest.path / manifest.names[0]
    data, index = path.read_bytes(), ShardIndex(path.with_suffix(".arrow"))
    ends = [max(sum(index.member(row, ext)[:2]) for ext in index.extensions if index.member(row, ext))
            for row in range(4)]
    for cut in [*range(0, len(data), 128), *(end + d for end in ends for d in (-1, 0, 1)), len(data) - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="damaged at byte|not an uncompressed tar"):
            index_tar(path)
        with pytest.raises(ValueError, match=f"{len(data)} bytes expected, {cut} found"):
            check_files(manifest)
        reader = ShardReader(manifest)
        for row, end in enumerate(ends):
            if end <= cut:
                assert reader.record(row)
            else:
                with pytest.raises(BadSample, match="truncated"):
                    reader.record(row)
                    reader.image(row)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    manifest = write(tmp_path / "set", make_samples(4), shard_bytes=2**20)
    path = manifest.path / manifest.names[0]
    data = bytearray(path.read_bytes())
    offset = ShardIndex(path.with_suffix(".arrow")).member(2, "json")[0] - 512
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"damaged at byte {offset}, after a member of sample 's-001'"):
        index_tar(path)


def test_a_flipped_byte_damages_one_sample_only(shards):
    reader, samples = ShardReader(shards), make_samples()
    for bad, ext in ((4, "json"), (9, "png")):
        name, key = reader.where(bad).split(":")
        path = shards.path / name
        index = ShardIndex(path.with_suffix(".arrow"))
        row = next(r for r in range(index.samples) if index.key(r) == key)
        data = bytearray(path.read_bytes())
        data[index.member(row, ext)[0] + 5] ^= 1
        path.write_bytes(data)
    fresh = ShardReader(shards)
    for i, (_, members) in enumerate(samples):
        if i == 4:
            with pytest.raises(BadSample, match=r"shard-\d+.tar:s-004: json is damaged: crc32"):
                fresh.record(4)
            assert fresh.image(4) == members["jpg"]
        elif i == 9:
            with pytest.raises(BadSample, match="s-009: png is damaged"):
                fresh.image(9)
        else:
            assert fresh.read(i, "json") == members["json"]
            assert fresh.image(i) == members.get("png", members.get("jpg"))


@pytest.mark.parametrize("offset, size", [(2**63, 4), (2**64 - 1, 4), (512, 2**32 - 1)])
def test_an_index_that_lies_about_a_place_masks_the_sample(shards, offset, size, monkeypatch):
    reader = ShardReader(shards)
    sound = reader.read(1, "json")
    file, descriptor, *columns = reader._plain["json"][0]
    columns = [list(column) for column in columns]
    columns[0][0], columns[1][0] = offset, size
    reader._open[0]._members["json"], reader._plain["json"][0] = columns, (file, descriptor, *columns)
    pread = os.pread

    def cautious(file, size, offset):
        if size > 2**30:
            raise MemoryError             # as under a limit of the address space
        return pread(file, size, offset)

    monkeypatch.setattr("dsvlm.data.reader.pread", cautious)
    with pytest.raises(BadSample, match="json is truncated"):
        reader.read(0, "json")
    assert reader.read(1, "json") == sound


def test_records_that_are_no_objects(tmp_path):
    records = (b"{", b"[1]", b"\xff", b'{"c":"\\ud800"}', b'{"a":[{"\xed\xa0\x80":1}]}', b'{"a":"\\ud83d\\udc15"}')
    manifest = write(tmp_path / "set", [(f"{i}", {"json": record}) for i, record in enumerate(records)])
    reader = ShardReader(manifest)
    assert reader.record(5) == {"a": "\U0001f415"}
    half = "holds half a character"
    for i, reason in enumerate(("not JSON", "a list, not an object", "not JSON", half, half)):
        with pytest.raises(BadSample, match=reason) as error:
            reader.record(i)
        assert pickle.loads(pickle.dumps(error.value)).reason == error.value.reason
    with pytest.raises(BadSample, match="no member 'png'"):
        reader.read(0, "png")
    assert reader.image(0) is None


def test_missing_and_foreign_files(tmp_path, shards):
    middle = shards.path / shards.names[1]
    index = middle.with_suffix(".arrow")
    kept = index.read_bytes()
    index.unlink()
    with pytest.raises(ValueError, match=f"{index.name} is missing"):
        check_files(shards)
    first, last = shards.sizes[0] - 1, shards.samples - 1
    with pytest.raises(ValueError, match=middle.name):
        ShardReader(shards).record(first + 1)
    index.write_bytes((shards.path / shards.names[0]).with_suffix(".arrow").read_bytes())
    with pytest.raises(ValueError, match="sha256 .* expected"):
        ShardReader(shards).record(first + 1)
    index.write_bytes(kept)
    middle.unlink()
    with pytest.raises(ValueError, match=f"{middle.name} is missing"):
        check_files(shards)
    reader = ShardReader(shards)
    assert reader.record(first) and reader.record(last)
    with pytest.raises(ValueError, match=middle.name):
        reader.record(first + 1)
    other = write(tmp_path / "other", make_samples(5))
    (shards.path / "shards.arrow").write_bytes((other.path / "shards.arrow").read_bytes())
    with pytest.raises(ValueError, match="different conversions or damaged"):
        load_manifest(shards.path)


def test_manifests_that_are_refused(tmp_path, shards):
    with pytest.raises(ValueError, match=f"did you mean one of {shards.path}"):
        load_manifest(tmp_path)
    with pytest.raises(ValueError, match="no directory"):
        load_manifest(tmp_path / "absent")
    path = shards.path / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="format 9, this version reads format 1"):
        load_manifest(shards.path)
    path.write_text(text.replace('"samples": 20', '"samples": 21'))
    with pytest.raises(ValueError, match="21 samples .* lists 20"):
        load_manifest(shards.path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a manifest"):
        load_manifest(shards.path)


@pytest.mark.parametrize("key, members, message", [
    ("a.b", {"json": b"{}"}, "only letters"),
    ("a/b", {"json": b"{}"}, "only letters"),
    ("", {"json": b"{}"}, "only letters"),
    ("first", {"json": b"{}"}, "comes twice"),
    ("a", {"png": b"x"}, "no member 'json'"),
    ("a", {"json": b""}, "0 bytes"),
    ("a", {"json": b"{}", "PNG": b"x"}, "lower case"),
    ("k" * 96, {"json": b"{}"}, "at most 100 characters"),
])
def test_an_exception_leaves_no_file(tmp_path, key, members, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "set", [("first", {"json": b"{}" * 9000}), ("second", {"json": b"{}"}), (key, members)])
    assert list((tmp_path / "set").iterdir()) == []


def test_a_directory_in_use_is_refused(tmp_path, shards):
    before = contents(shards.path)
    with pytest.raises(ValueError, match="already holds a shard set .* choose another --out"):
        write(shards.path, make_samples())
    assert contents(shards.path) == before
    (shards.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="already holds shard-000000"):
        write(shards.path, make_samples())
    with pytest.raises(ValueError, match="no sample was written"):
        write(tmp_path / "none", [])
    assert list((tmp_path / "none").iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path, shards):
    partial = tmp_path / "set2" / ".partial"
    partial.mkdir(parents=True)
    (partial / "shard-000009.tar").write_bytes(b"half")
    again = write(tmp_path / "set2", make_samples(), preprocessing={"resize": 3})
    assert again.hash == shards.hash and not partial.exists()


def test_a_failed_rename_takes_the_others_back(tmp_path, monkeypatch):
    rename = os.rename

    def fail(source, target):
        if target.name == "shards.arrow":
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="disk gone"):
        write(tmp_path / "set", make_samples())
    assert list((tmp_path / "set").iterdir()) == []


def test_reader_survives_fork_and_pickle(shards):
    reader = ShardReader(shards)
    truth = [reader.read(i, "json") for i in range(20)]
    child = os.fork()
    if child == 0:
        os._exit(0 if [reader.read(i, "json") for i in range(20)] == truth else 1)
    assert os.waitpid(child, 0)[1] == 0
    data = pickle.dumps(reader)
    assert len(data) < 4096
    assert [pickle.loads(data).read(i, "json") for i in range(20)] == truth


def test_reader_keeps_few_files_open(tmp_path):
    manifest = write(tmp_path / "set", [(f"k{i}", {"json": b"[%d]" % i}) for i in range(150)], shard_bytes=1)
    assert len(manifest.names) == 150
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(manifest)
    for i in [*range(150), 0, 149]:
        assert reader.read(i, "json") == b"[%d]" % i
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_decode_image():
    left = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    left.paste((0, 0, 255, 255), (20, 0, 40, 20))
    data = BytesIO()
    left.save(data, "WEBP", lossless=True)
    pixels = decode_image(data.getvalue(), 10)
    assert pixels.shape == (3, 10, 10) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels[0, 5, 0] == 255 and pixels[2, 5, 0] == 0 and pixels[2, 5, 9] == 255 and pixels[0, 5, 9] == 0
    grey = BytesIO()
    Image.new("L", (4, 4), 7).save(grey, "JPEG")
    assert decode_image(grey.getvalue(), 4).tolist() == np.full((3, 4, 4), 7).tolist()


def test_decode_image_refuses(monkeypatch):
    noise = BytesIO()
    Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3072)).save(noise, "PNG")
    whole = noise.getvalue()
    for data in (b"", b"no image", whole[:60], whole[:2000], b"GIF89a" + whole):
        with pytest.raises(BadSample, match="does not decode"):
            decode_image(data, 8)
    bomb = png(0, (8, 8))
    header = bytearray(bomb)
    header[16:24] = (8001).to_bytes(4, "big") + (8000).to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded before the check"))
    with pytest.raises(BadSample, match="8001 x 8000 pixels, more than 64 megapixels"):
        decode_image(bytes(header), 8)
