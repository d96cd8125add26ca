"""Sources that are read once from start to end become shards of our own."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import pytest

from dsvlm.data.convert.webdataset import convert_webdataset
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.verify import verify
from tests.data.test_adopt import captions, png, run, tar


@pytest.fixture
def source(tmp_path):
    members = captions(0, 5) | {"train/bad.txt": b"\xff", "train/bad.png": png(9), "train/last.txt": b"no image"}
    return tar(tmp_path / "x.tar", members)


def test_what_a_program_writes_becomes_shards(source, tmp_path, capsys):
    url = f"pipe:{sys.executable} -c 'import sys; sys.stdout.buffer.write(open(\"{source}\", \"rb\").read())'"
    assert run("convert", "webdataset", url, "--type", "caption", "--out", tmp_path / "set", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 6 and report["skipped"] == {"does_not_fit": 1}
    assert report["fields"] == {"caption": "txt"}
    reader = ShardReader(load_manifest(tmp_path / "set"))
    assert [reader.record(i) for i in range(5)] == [{"caption": f"caption {i}", "source": f"train/{i:05d}"}
                                                    for i in range(5)]
    assert [reader.image(i) for i in range(6)] == [*map(png, range(5)), None]
    assert reader.record(5)["caption"] == "no image"
    assert [d["sample"] for d in verify(tmp_path / "set", decode=True)["damaged"]] == [5]


def test_a_sample_that_cannot_be_stored_is_counted(tmp_path):
    texts = (b'{"caption": "a"}', b'{"caption": "half of a pair: \\ud83d"}', b'{"caption": "b"}')
    source = tar(tmp_path / "x.tar", {f"{i}.json": text for i, text in enumerate(texts)})
    report = convert_webdataset([str(source)], "caption", tmp_path / "set")
    assert report["samples"] == 2 and report["skipped"] == {"does_not_fit": 1}
    assert not verify(tmp_path / "set")["damaged"]


def test_the_same_source_gives_the_same_shards(source, tmp_path):
    hashes = {convert_webdataset([str(source)], "caption", tmp_path / name)["hash"] for name in "ab"}
    assert len(hashes) == 1
    assert convert_webdataset([str(source)] * 2, "caption", tmp_path / "twice", limit=7)["samples"] == 6


def test_samples_whose_members_are_not_adjacent_are_refused_and_repeated_keys_are_not(tmp_path):
    whole = captions(0, 3)
    apart = tar(tmp_path / "apart.tar", dict(sorted(whole.items(), key=lambda item: item[0][-3:], reverse=True)))
    with pytest.raises(ValueError, match=r"apart.tar: the members of sample 'train/00000' are not adj.*data index"):
        convert_webdataset([str(apart)], "caption", tmp_path / "apart")
    assert not (tmp_path / "apart" / "manifest.json").exists()
    plain = tar(tmp_path / "x.tar", whole)
    (tmp_path / "joined.tar").write_bytes(2 * plain.read_bytes())
    assert convert_webdataset([str(tmp_path / "joined.tar"), str(plain)], "caption", tmp_path / "s")["samples"] == 9


@pytest.mark.parametrize("change, options, message", [
    ("cut", {}, "after . samples of .*x.tar: "),
    ("absent", {}, "after 0 samples of .*absent.tar: FileNotFoundError"),
    (None, {"task_type": "vqa"}, "--field question=...: needed"),
    (None, {"fields": ["caption=png"]}, "none of the first samples fits .*: png is not UTF-8"),
    (None, {"limit": 0}, "--limit 0: at least 1 sample"),
    (None, {"shard_mb": 0}, "--shard-mb 0: choose more than 0"),
    (None, {"shard_mb": float("inf")}, "--shard-mb inf: choose"),
    (None, {"shard_mb": float("nan")}, "--shard-mb nan: choose"),
    (None, {"shard_mb": 1e306}, "--shard-mb 1e.306: choose"),
    (None, {"image": "jpg"}, "--image jpg: the first sample has no such member; it has png, txt"),
])
def test_mistakes_are_named_and_leave_no_set(source, tmp_path, change, options, message):
    url = str(source)
    if change == "cut":
        source.write_bytes(source.read_bytes()[:5000])
    if change == "absent":
        url = str(tmp_path / "absent.tar")
    with pytest.raises(ValueError, match=message):
        convert_webdataset(**{"urls": [url], "task_type": "caption", "out": tmp_path / "set"} | options)
    assert not Path(tmp_path / "set/manifest.json").exists()


def test_one_of_several_images_has_to_be_chosen(tmp_path):
    source = tar(tmp_path / "x.tar", {"k.depth.png": png(1), "k.jpg": png(2), "k.txt": b"t"})
    with pytest.raises(ValueError, match="sample 'k' has several images: choose one with --image: depth.png, jpg"):
        convert_webdataset([str(source)], "caption", tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()
    convert_webdataset([str(source)], "caption", tmp_path / "meant", image="jpg")
    assert ShardReader(load_manifest(tmp_path / "meant")).image(0) == png(2)


def cut_between_members(data: bytes) -> bytes:
    """A tar without its last sample and its end mark, broken off where a member ends."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return data[:archive.getmember("train/00004.png").offset]


@pytest.mark.parametrize("change, url, message", [
    (None, "pipe:cat {}; exit 3", "exit code 3|exit 3"),
    (None, "pipe:cat {}; sleep 0.2; exit 3", "exit code 3|exit 3"),
    (None, "pipe:cat {}; kill -9 $$", "exit code -9|exit -9"),
    (None, "pipe:cat {0} {0} | head -c 25000", "truncated"),
    (None, "pipe:true", "truncated"),
    (cut_between_members, "{}", "truncated, the end mark is missing"),
    (cut_between_members, "pipe:cat {}", "truncated, the end mark is missing"),
    (lambda data: data + b"x" * 512, "pipe:cat {}", "damaged header, or data after the end"),
    (lambda data: gzip.compress(data)[:-4], "{}", "EOFError"),
    (lambda data: gzip.compress(cut_between_members(data)), "{}", "truncated, the end mark is missing"),
    (lambda data: gzip.compress(data)[:-8] + bytes(8), "{}", "CRC check failed"),
    (lambda data: bz2.compress(data)[:-4], "pipe:cat {}", "EOFError"),
    (lambda data: lzma.compress(data)[:-4], "{}", "EOFError"),
])
def test_streams_that_lose_samples_are_errors(source, tmp_path, change, url, message):
    if change is not None:
        source.write_bytes(change(source.read_bytes()))
    url = url.format(source)
    with pytest.raises(ValueError, match=f"after . samples of .*({message})"):
        convert_webdataset([url], "caption", tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("command", ["cat {0} {1}", "cat {0}; cat {1}; head -c 1024 /dev/zero"])
def test_tars_behind_one_another_are_all_read(tmp_path, pack, command):
    if pack is not bytes and ";" in command:
        command = "cat {0}; sleep 0.1; cat {1}"
    parts = [tar(tmp_path / name, captions(start, 5)) for name, start in (("a.tar", 0), ("b.tar", 5))]
    for part in parts:
        part.write_bytes(pack(part.read_bytes()))
    url = "pipe:" + command.format(*parts)
    assert convert_webdataset([url], "caption", tmp_path / "set")["samples"] == 10
    reader = ShardReader(load_manifest(tmp_path / "set"))
    assert [reader.record(i)["source"] for i in range(10)] == [f"train/{i:05d}" for i in range(10)]
    assert [reader.image(i) for i in range(10)] == [png(i) for i in range(10)]


def test_braces_and_a_limit(tmp_path):
    for name, start in (("a", 0), ("b", 5)):
        tar(tmp_path / f"{name}.tar", captions(start, 5))
    assert convert_webdataset([f"{tmp_path}/{{a,b}}.tar"], "caption", tmp_path / "all")["samples"] == 10
    endless = f"pipe:while cat {tmp_path}/a.tar; do true; done"
    assert convert_webdataset([endless], "caption", tmp_path / "some", limit=7)["samples"] == 7


def test_help_says_why_a_copy(capsys):
    with pytest.raises(SystemExit):
        run("convert", "webdataset", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Exact training needs any sample at any time" in shown and "dsvlm data index --out" in shown


def test_recipes_name_no_programs(tmp_path):
    """A pipe is part of a command line only: as a shard set's directory it is a directory that is not there."""
    with pytest.raises(ValueError, match="no directory pipe:cat x.tar"):
        load_manifest("pipe:cat x.tar")
