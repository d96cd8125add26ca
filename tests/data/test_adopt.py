"""Shards of other tools as shard sets: where their records lie, where they lie, and what is refused."""

import argparse
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from dsvlm.data.adopt import index_set
from dsvlm.data.commands import add_data_parser
from dsvlm.data.index import gathered, has_images, index_tar
from dsvlm.data.manifest import arrow_bytes, check_files, load_manifest, manifest_bytes
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.verify import describe, verify


def run(*argv) -> int:
    parser = argparse.ArgumentParser(prog="dsvlm")
    add_data_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, argv)])
    return args.run(args)


def png(colour: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (7, 5), (colour, 0, 0)).save(data, "PNG")
    return data.getvalue()


def tar(path, members: dict[str, bytes], form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def captions(start: int, count: int, extra=()) -> dict[str, bytes]:
    members = {}
    for i in range(start, start + count):
        members |= {f"train/{i:05d}.png": png(i), f"train/{i:05d}.txt": f" caption {i}\n".encode()}
        members |= {f"train/{i:05d}.{ext}": data for ext, data in extra}
    return members


def test_tars_of_captions_train_where_they_lie(tmp_path, capsys):
    first = tar(tmp_path / "laion/00000.tar", captions(0, 3), tarfile.GNU_FORMAT)
    second = tar(tmp_path / "laion/more/00000.tar", captions(3, 2, [("md5", b"foreign")]))
    before = first.read_bytes(), second.read_bytes()
    out = tmp_path / "laion/set"
    assert run("index", first, second, "--type", "caption", "--out", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    manifest = load_manifest(out)
    assert manifest.hash == report["hash"] and manifest.names == ("../00000.tar", "../more/00000.tar")
    assert manifest.mapping == {"version": 1, "fields": {"caption": "txt"}, "image": None} and has_images(manifest)
    assert sorted(p.name for p in out.iterdir()) == ["index-000000.arrow", "index-000001.arrow", "manifest.json",
                                                     "shards.arrow"]
    check_files(manifest)
    reader = ShardReader(manifest)
    assert [reader.record(i) for i in range(5)] == [{"caption": f"caption {i}"} for i in range(5)]
    assert [reader.image(i) for i in range(5)] == [png(i) for i in range(5)]
    assert reader.where(3) == "../more/00000.tar:train/00003" and reader.read(4, "md5") == b"foreign"
    assert verify(out, decode=True)["problems"] == verify(out)["damaged"] == []
    assert describe(out)["first"] == {"caption": "caption 0"}
    assert before == (first.read_bytes(), second.read_bytes())
    moved = tmp_path / "elsewhere"
    os.rename(tmp_path / "laion", moved)                      # relative names: the whole data directory may move
    assert ShardReader(load_manifest(moved / "set")).record(4) == {"caption": "caption 4"}
    assert load_manifest(moved / "set").hash == manifest.hash
    remote = load_manifest(f"file://{moved}/set", str(tmp_path / "cache"))
    assert remote.shard(1) == f"file://{moved}/more/00000.tar" and remote.hash == manifest.hash
    assert ShardReader(remote, str(tmp_path / "cache")).record(4) == {"caption": "caption 4"}


def test_members_of_one_key_may_lie_anywhere_in_a_tar(tmp_path, capsys):
    """First all images, then all texts, as `tar` packs names sorted by extension: webdataset sees halves of samples."""
    import webdataset

    whole = captions(0, 40, [("json", b"{}")])
    tar(tmp_path / "beside.tar", whole)
    apart = dict(sorted(whole.items(), key=lambda item: item[0].rpartition(".")[2]))
    apart |= {"train/alone.txt": b"alone"}
    assert run("index", tar(tmp_path / "apart.tar", apart), "--type", "caption", "--out", tmp_path / "set") == 0
    assert "40 samples were gathered by key" in capsys.readouterr().out
    reader = ShardReader(load_manifest(tmp_path / "set"))
    for i in range(40):
        assert reader.key(i) == f"train/{i:05d}" and reader.record(i) == {"caption": f"caption {i}"}
        assert reader.image(i) == png(i) and reader.read(i, "json") == b"{}"
    assert reader.record(40) == {"caption": "alone"} and reader.image(40) is None
    report = verify(tmp_path / "set", decode=True)
    assert report["problems"] == [] and [d["key"] for d in report["damaged"]] == ["train/alone"]
    remote = ShardReader(load_manifest(f"file://{tmp_path}/set", str(tmp_path / "cache")), str(tmp_path / "cache"))
    remote.fetch(np.arange(41), 0)
    assert [remote.record(i) for i in range(41)] == [reader.record(i) for i in range(41)]
    assert [remote.image(i) for i in range(41)] == [reader.image(i) for i in range(41)]
    halves = list(webdataset.WebDataset(str(tmp_path / "apart.tar"), shardshuffle=False))
    assert len(halves) == 3 * 40 + 1
    # Beside the tar too, and with a report; members side by side are nothing to report, in whatever order.
    assert run("index", tmp_path / "apart.tar", tmp_path / "beside.tar", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["gathered"] for entry in report] == [40, 0] and [entry["samples"] for entry in report] == [41, 40]
    tables = [index_tar(tmp_path / name).to_pydict() for name in ("apart.tar", "beside.tar")]
    for column in ("key", "width", "height", "crc", "png.size", "txt.crc"):
        assert tables[0][column][:40] == tables[1][column]
    assert run("index", tmp_path / "beside.tar") == 0
    assert "gathered" not in capsys.readouterr().out


def test_how_many_samples_were_gathered(tmp_path):
    """Those with another sample between two of their members."""
    for names, count in (("a.x a.y b.x b.y", 0), ("a.x b.x a.y", 1), ("a.x b.x a.y b.y", 2), ("a.x b.x c.x a.y a.z", 1),
                         ("a.x b.x a.y c.x b.y", 2), ("a.x", 0)):
        table = index_tar(tar(tmp_path / "x.tar", dict.fromkeys(names.split(), b"1")))
        assert gathered(table) == count, names
        assert table["key"].to_pylist() == list(dict.fromkeys(name[0] for name in names.split()))


def test_a_key_of_two_samples_is_refused(tmp_path):
    """Two tars with the same keys in one: nobody knows which image belongs to which text."""
    path, data = tmp_path / "x.tar", [(name, b"1") for name in ("k/a.png", "k/a.txt", "k/b.txt", "k/a.png", "k/a.txt")]
    with tarfile.open(path, "w") as file:
        for name, payload in data:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            file.addfile(info, io.BytesIO(payload))
    with pytest.raises(ValueError, match="x.tar: sample 'k/a' has two members 'png': give each sample a key"):
        index_set([path], "caption", tmp_path / "set")


def test_what_is_fetched_of_a_gathered_sample_is_its_members(tmp_path):
    """Not all that lies between them."""
    members = {"a.png": png(1), "b.bin": bytes(10**6), "a.txt": b"text"}
    index_set([tar(tmp_path / "x.tar", members)], "caption", tmp_path / "set")
    shard = ShardReader(load_manifest(tmp_path / "set"))._shard(0)
    extents = shard.extents(np.array([0]), np.array([7]))
    assert sorted(stop - start for start, stop, _ in extents) == [4, len(png(1))] and {e[2] for e in extents} == {7}


def test_the_same_tars_give_the_same_set_and_the_fields_are_its_identity(tmp_path):
    record = json.dumps({"a": "one", "b": {"c": ["two", "three"]}}).encode()
    path = tar(tmp_path / "x.tar", {"k.jpg": png(1), "k.json": record})
    fields = ["question=json:a", "answer=json:b.c.1"]
    hashes = [index_set([path], "vqa", tmp_path / name, given)["hash"]
              for name, given in (("p", fields), ("q", fields), ("r", ["question=json:a", "answer=json:b.c.0"]))]
    assert hashes[0] == hashes[1] != hashes[2]
    assert ShardReader(load_manifest(tmp_path / "p")).record(0) == {"question": "one", "answer": "three"}
    assert ShardReader(load_manifest(tmp_path / "r")).record(0)["answer"] == "two"


@pytest.mark.parametrize("task_type, members, given, record", [
    ("caption", {"json": b'{"caption":"x","n":1}'}, [], {"caption": "x"}),
    ("pair", {"cls": b"3\n", "txt": b"t"}, [], {"text": "t", "label": 3}),
    ("pair", {"json": b'{"label":2,"t":"u"}', "id": b"7"}, ["text=json:t", "source=id"],
     {"text": "u", "label": 2, "source": "7"}),
    ("classify", {"json": b'{"box":[0,0,1,1],"name":"x"}'}, [], {"box": [0, 0, 1, 1], "name": "x"}),
    ("detect", {"json": b'{"objects":[]}'}, [], {"objects": []}),
    ("locate", {"box": b"[[0,0,1,1]]", "cat": b"dog"}, ["boxes=box", "name=cat"],
     {"boxes": [[0, 0, 1, 1]], "name": "dog"}),
    ("conversation", {"json": b'{"messages":[{"role":"user","content":"hi"}]}'}, ["conversations=json:messages"],
     {"conversations": [{"role": "user", "content": "hi"}]}),
])
def test_fields(tmp_path, task_type, members, given, record):
    path = tar(tmp_path / "x.tar", {f"k.{ext}": data for ext, data in members.items()})
    index_set([path], task_type, tmp_path / "set", given)
    assert ShardReader(load_manifest(tmp_path / "set")).record(0) == record


def test_a_sample_that_does_not_fit_is_masked_not_the_run(tmp_path):
    members = {"a.txt": b"fine", "b.txt": b"\xff", "c.jpg": b"", "d.cls": b"1", "d.txt": b"x"}
    index_set([tar(tmp_path / "x.tar", members)], "caption", tmp_path / "set")
    reader = ShardReader(load_manifest(tmp_path / "set"))
    assert reader.record(0) == {"caption": "fine"} and reader.record(3) == {"caption": "x"}
    for sample, reason in ((1, "txt is not UTF-8"), (2, "no member 'txt'")):
        with pytest.raises(BadSample, match=reason):
            reader.record(sample)
    found = {d["key"]: d["reason"] for d in verify(tmp_path / "set")["damaged"]}
    assert "txt is not UTF-8" in found.pop("b") and "no member 'txt'" in found.pop("c")
    assert found == dict.fromkeys("ad", "it has no image, and other samples of the set have")


def test_the_image_that_is_meant(tmp_path):
    """`depth.png` comes first in the order of extensions; only --image says which one trains."""
    path = tar(tmp_path / "x.tar", {"k.depth.png": png(1), "k.jpg": png(2), "k.txt": b"t"})
    with pytest.raises(ValueError, match="x.tar: sample 'k' has several images, depth.png, jpg: say which .* --image"):
        index_set([path], "caption", tmp_path / "first")
    one = tar(tmp_path / "one.tar", {"a.jpg": png(2), "a.txt": b"t", "b.png": png(2), "b.txt": b"t"})
    with pytest.raises(ValueError, match="x.tar: sample 'k' has several images"):
        index_set([one, path], "caption", tmp_path / "first")
    assert index_set([one], "caption", tmp_path / "first")["samples"] == 2
    index_set([path], "caption", tmp_path / "meant", image="jpg")
    assert ShardReader(load_manifest(tmp_path / "meant")).image(0) == png(2)
    assert load_manifest(tmp_path / "meant").mapping["image"] == "jpg" and not verify(tmp_path / "meant")["damaged"]


@pytest.mark.parametrize("options, message", [
    ({"task_type": "captions"}, "--type 'captions' is none of caption, vqa"),
    ({"task_type": "vqa"}, "--field question=...: needed, since no sample has json:question; there are png, txt"),
    ({"fields": ["caption"]}, "--field 'caption': expected KEY=PLACE"),
    ({"fields": ["title=txt"]}, "--field title=txt: a caption record has caption, and source"),
    ({"fields": ["caption=text"]}, "no sample has 'text'; there are png, txt"),
    ({"fields": ["caption=png"]}, "none of the first 100 samples fits .*: png is not UTF-8"),
    ({"image": "jpg"}, "--image jpg: no sample has such a member"),
    ({"shards": ["pipe:cat x.tar"]}, "pipe:cat x.tar: a program cannot be read at random: .*convert webdataset"),
    ({"shards": ["simplecache::http://h/x.tar"]}, "cannot be read at random"),
    ({"shards": ["absent.tar"]}, "no file absent.tar"),
    ({"shards": ["a.parquet", "b.tar"]}, "tars and parquet files in one shard set"),
])
def test_mistakes_are_named_and_leave_nothing(tmp_path, options, message):
    path = tar(tmp_path / "x.tar", captions(0, 1))
    options = {"shards": [path], "task_type": "caption", "out": tmp_path / "set"} | options
    with pytest.raises(ValueError, match=message):
        index_set(**options)
    assert not (tmp_path / "set").exists() or list((tmp_path / "set").iterdir()) == []


def test_options_that_need_out(tmp_path):
    path = tar(tmp_path / "x.tar", captions(0, 1))
    with pytest.raises(ValueError, match="--type is part of a shard set: give --out"):
        run("index", path, "--type", "caption")
    with pytest.raises(ValueError, match="--type is needed with --out"):
        run("index", path, "--out", tmp_path / "set")
    with pytest.raises(ValueError, match="https://h/x.tar cannot have an index beside it"):
        run("index", "https://h/x.tar")
    index_set([path], "caption", tmp_path / "set")
    with pytest.raises(ValueError, match="already holds a shard set"):
        index_set([path], "caption", tmp_path / "set")


def test_member_names_that_leave_the_archive_are_refused(tmp_path):
    for name in ("../a.txt", "/etc/a.txt", "x/../../a.txt"):
        with pytest.raises(ValueError, match="leaves the archive: write the tar with relative names"):
            index_set([tar(tmp_path / "x.tar", {name: b"x"})], "caption", tmp_path / "set")


@pytest.mark.parametrize("name", ["../x.tar", "/x.tar", "https://h/x.tar", "pipe:cat x.tar", "a::file:///x.tar", ""])
def test_a_manifest_names_files_elsewhere_only_if_index_made_it(tmp_path, name):
    """A converter's manifest that somebody changed cannot make a reader open other files, nor run a program."""
    row = {"name": name, "samples": 1, "bytes": 1, "sha256": "", "index_sha256": ""}
    indexed = {"index": {"version": 1, "fields": {"caption": "txt"}, "image": None}}
    for preprocessing in ({"converter": "coco"}, indexed):
        table, header = manifest_bytes("caption", [row], {"txt"}, preprocessing)
        (tmp_path / "shards.arrow").write_bytes(table)
        (tmp_path / "manifest.json").write_bytes(header)
        if "index" in preprocessing and name in ("../x.tar", "/x.tar", "https://h/x.tar"):
            assert load_manifest(tmp_path).names == (name,)
        else:
            with pytest.raises(ValueError, match="leaves the directory: only sets such as"):
                load_manifest(tmp_path)


@pytest.mark.parametrize("name", ["file:///etc/hostname", "/etc/hostname", "memory://elsewhere/x.tar", "x.tar"])
def test_a_set_at_a_url_names_files_of_its_host_only(tmp_path, name):
    import fsspec

    row = {"name": name, "samples": 1, "bytes": 1, "sha256": "", "index_sha256": ""}
    indexed = {"index": {"version": 1, "fields": {"caption": "txt"}, "image": None}}
    table, header = manifest_bytes("caption", [row], {"txt"}, indexed)
    for file, data in (("shards.arrow", table), ("manifest.json", header)):
        fsspec.filesystem("memory").pipe_file(f"/host/{file}", data)
    if name == "x.tar":
        assert load_manifest("memory://host", str(tmp_path)).shard(0) == "memory://host/x.tar"
    else:
        with pytest.raises(ValueError, match="is no file of memory://host: index the shards yourself"):
            load_manifest("memory://host", str(tmp_path))


@pytest.mark.parametrize("change", [{"preprocessing": None}, {"members": 5}, {"type": 5}, {"shards_sha256": None}])
def test_a_damaged_header_is_one_error(tmp_path, change):
    table, header = manifest_bytes("caption", [], {"txt"}, {})
    (tmp_path / "shards.arrow").write_bytes(table)
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(header) | change))
    with pytest.raises(ValueError, match=f"manifest.json: '{next(iter(change))}' is .*: convert the data again"):
        load_manifest(tmp_path)


def test_manifests_that_were_written_before_are_read_as_before(tmp_path):
    """A set whose index lies beside its tar has the index's old name."""
    path = tar(tmp_path / "x.tar", captions(0, 2))
    index_set([path], "caption", tmp_path)
    manifest = load_manifest(tmp_path)
    assert manifest.index(0) == tmp_path / "x.arrow" and manifest.names == ("x.tar",)
    assert arrow_bytes(index_tar(path)) == manifest.index(0).read_bytes()
