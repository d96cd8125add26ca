"""Shards that do not fit what they are indexed for: named when they are indexed, not when a training masks them all."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsvlm.data import scans
from dsvlm.data.adopt import index_set
from dsvlm.data.commands import to_json
from dsvlm.data.convert.webdataset import convert_webdataset
from dsvlm.data.fields import checked
from dsvlm.data.index import index_tar
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.data.verify import verify
from tests.data.test_adopt import captions, png, run, tar


def test_every_tar_is_tried_with_the_fields_of_the_set(tmp_path, monkeypatch):
    """The first has captions in json, which were tried; the second in txt, which come first in the set."""
    first = tar(tmp_path / "a.tar", {"a.png": png(1), "a.json": b'{"caption": "x"}'})
    second = tar(tmp_path / "b.tar", {"b.png": png(1), "b.txt": b"y", "b.json": b'{"title": "y"}'})
    out = tmp_path / "set"
    with pytest.raises(scans.Unfinished, match=r"1 of 2 shards do not fit.*\n.*a.tar: none .*'caption': 'txt'.*no txt"):
        index_set([first, second], "caption", out)
    with pytest.raises(scans.Unfinished, match="b.tar: none of the first 100 samples fits .*no 'caption' of 'caption'"):
        index_set([first, second], "caption", out, ["caption=json:caption"])
    monkeypatch.setattr(scans, "scan_tar", lambda *rest: pytest.fail("both were scanned already"))
    with pytest.raises(ValueError, match="a.tar: none of"):
        index_set([first, second], "caption", out)


def test_tars_with_other_members_besides_fit(tmp_path):
    first = tar(tmp_path / "a.tar", captions(0, 2))
    second = tar(tmp_path / "b.tar", captions(2, 2, [("json", b"{}")]) | {"c.png": png(1)})
    index_set([first, second], "caption", tmp_path / "set")
    reader = ShardReader(load_manifest(tmp_path / "set"))
    assert [reader.record(i)["caption"] for i in range(4)] == [f"caption {i}" for i in range(4)]


@pytest.mark.parametrize(
    "column, given, message",
    [
        (pa.array(["a.jpg", "b.jpg"]), None, r"'image' \(string\) holds no image .* first 2 rows: .*holds str"),
        (pa.array([[1, 2], [3]], pa.list_(pa.uint8())), None, r"'image' \(list<.*uint8>\) holds no image"),
        (pa.array([[{"bytes": png(1)}], []]), None, r"'image' \(list<.*struct<bytes: binary>>\) holds no image"),
        (pa.array([b"no image", None]), None, r"'image' \(binary\) holds no image .*: it holds b'no image'"),
        (pa.array([{"bytes": None, "path": "a"}] * 2), None, "holds no image|no sample has an image"),
        (pa.array([{"url": "http://h/a"}] * 2), None, "holds no image|no sample has an image"),
        (pa.array([png(1), png(2)]), "caption", r"'caption' \(string\) holds no image"),
        (pa.array([[{"bytes": png(1)}], []]), "image:1", "--image image:1: no sample has an image"),
    ],
)
def test_parquet_files_without_an_image_where_it_is_said_to_be(tmp_path, column, given, message):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": column, "caption": ["x", "y"]}), path)
    with pytest.raises(ValueError, match=message):
        index_set([path], "caption", tmp_path / "set", image=given)
    assert not (tmp_path / "set").exists()


def test_the_first_images_may_be_absent(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [None] * 150 + [png(1)], "caption": ["x"] * 151}), path)
    index_set([path], "caption", tmp_path / "set")
    assert ShardReader(load_manifest(tmp_path / "set")).image(150) == png(1)


def test_a_member_that_is_no_image(tmp_path):
    with pytest.raises(ValueError, match="--image txt: no sample has an image .PNG, JPEG, WEBP. there"):
        index_set([tar(tmp_path / "x.tar", captions(0, 2))], "caption", tmp_path / "set", image="txt")
    assert not (tmp_path / "set").exists()


def test_the_mark_before_a_text_is_no_part_of_it(tmp_path):
    index_set([tar(tmp_path / "x.tar", {"k.txt": b"\xef\xbb\xbfa dog\n"})], "caption", tmp_path / "set")
    assert ShardReader(load_manifest(tmp_path / "set")).record(0) == {"caption": "a dog"}


HALF = json.dumps({"caption": "a \ud800 dog", "id": [{"\udfff": 1}]}).encode()


def test_half_a_character_is_a_sample_that_does_not_fit(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.json": b'{"caption": "fine"}', "b.json": HALF})
    index_set([path], "caption", tmp_path / "set")
    reader = ShardReader(load_manifest(tmp_path / "set"))
    with pytest.raises(BadSample, match=r"caption \(json:caption\) is 'a .ud800 dog': half a character"):
        reader.record(1)
    assert [sample["key"] for sample in verify(tmp_path / "set")["damaged"]] == ["b"]
    report = convert_webdataset([str(path)], "caption", tmp_path / "copy")
    assert report["samples"] == 1 and report["skipped"] == {"does_not_fit": 1}
    with pytest.raises(ValueError, match="x.tar: none of the first .*half a character"):
        index_set([tar(tmp_path / "x.tar", {"b.json": HALF})], "caption", tmp_path / "none")


def test_half_a_character_anywhere_in_a_value():
    for value in ("x\ud800", ["a", {"b": "\udfff"}], {"\ud800": 1}):
        with pytest.raises(ValueError, match="source .json. is .*: half a character"):
            checked("source", "json", value)
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert checked("boxes", "json:boxes", deep) is deep
    for value in ("x\U0001f415", ["a", {"b": None}], 7, ""):
        assert checked("source", "json", value) == value


def test_dots_in_names_are_no_extensions(tmp_path):
    """frame_00001.00001.jpg: each sample would have an extension of its own, and all a place for each of them."""
    path = tar(tmp_path / "x.tar", {f"frame_{i:05d}.{i:05d}.txt": b"" for i in range(1001)})
    with pytest.raises(ValueError, match="x.tar: more than 1000 extensions, such as '01000.txt' .* at the first dot"):
        index_set([path], "caption", tmp_path / "set")
    assert index_tar(tar(tmp_path / "y.tar", {f"k.{i}": b"" for i in range(1000)})).num_rows == 1


def test_one_file_with_two_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar(tmp_path / "a.tar", captions(0, 1))
    (tmp_path / "link.tar").symlink_to("a.tar")
    for shards, message in (
        (["a.tar", "./a.tar"], "./a.tar and a.tar are one file: its samples would count twice; name it once"),
        (["link.tar", tmp_path / "a.tar"], "a.tar and link.tar are one file"),
        (["a.tar", "a.tar"], "a.tar is named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            index_set(shards, "caption", "set")
        with pytest.raises(ValueError, match=message):
            run("index", *shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "link.tar"]


def test_an_out_that_is_a_file_or_the_directory_of_the_tars(tmp_path):
    path = tar(tmp_path / "shard-000000.tar", captions(0, 1))
    for make in (lambda: index_set([path], "caption", path), lambda: ShardWriter(path, "caption").__enter__()):
        with pytest.raises(ValueError, match="shard-000000.tar is a file: --out is the directory of a shard set"):
            make()
    with pytest.raises(ValueError, match="already holds shard-000000.tar, .*: choose another --out, or remove"):
        ShardWriter(tmp_path, "caption").__enter__()
    index_set([path], "caption", tmp_path)
    assert ShardReader(load_manifest(tmp_path)).record(0) == {"caption": "caption 0"}


def test_capital_letters_are_parquet_too(tmp_path):
    path = tmp_path / "X.PARQUET"
    pq.write_table(pa.table({"caption": ["x"]}), path)
    index_set([path], "caption", tmp_path / "set")
    assert ShardReader(load_manifest(tmp_path / "set")).record(0) == {"caption": "x"}


def test_reports_are_json_for_every_parser(tmp_path, capsys):
    with ShardWriter(tmp_path, "caption", {"ratio": float("nan")}) as writer:
        writer.write("a", {"json": b'{"caption": "x", "score": -Infinity, "far": 1e999, "n": 1.5}'})
    assert run("info", tmp_path, "--json") == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert report["preprocessing"] == {"ratio": "NaN"}
    assert report["first"] == {"caption": "x", "score": "-Infinity", "far": "Infinity", "n": 1.5}
    assert run("info", tmp_path) == 0 and '{"ratio": "NaN"}' in capsys.readouterr().out


def test_a_record_that_is_nested_deeply_is_one_error():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        to_json(deep)


def test_names_in_shards_do_not_command_the_terminal(tmp_path, capsys):
    members = {"a\x1b[31m\r\u00e9.txt": b"\xff", "b.t\x1b[2Jxt": b"x", "c.txt": b"fine"}
    path = tar(tmp_path / "x.tar", members)
    assert run("index", path, "--type", "caption", "--out", tmp_path / "set") == 0
    assert "members t\\x1b[2jxt, txt\n" in capsys.readouterr().out
    assert run("verify", tmp_path / "set") == 1
    printed = capsys.readouterr().out
    assert "../x.tar:a\\x1b[31m\\r\u00e9: txt is not UTF-8" in printed and "\x1b" not in printed
    assert run("index", path) == 0 and "\x1b" not in capsys.readouterr().out
