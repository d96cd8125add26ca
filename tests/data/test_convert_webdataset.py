"""Sources that are read once from start to end become shards of our own."""

import json
import sys
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
    assert reader.record(5)["caption"] == "no image" and not verify(tmp_path / "set", decode=True)["damaged"]


def test_the_same_source_gives_the_same_shards(source, tmp_path):
    hashes = {convert_webdataset([str(source)], "caption", tmp_path / name)["hash"] for name in "ab"}
    assert len(hashes) == 1
    assert convert_webdataset([str(source)] * 2, "caption", tmp_path / "twice", limit=7)["samples"] == 6


@pytest.mark.parametrize("change, options, message", [
    ("cut", {}, "after . samples of .*x.tar: "),
    ("absent", {}, "after 0 samples of .*absent.tar: FileNotFoundError"),
    (None, {"task_type": "vqa"}, "--field question=...: needed"),
    (None, {"fields": ["caption=png"]}, "none of the first samples fits .*: png is not UTF-8"),
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


def test_help_says_why_a_copy(capsys):
    with pytest.raises(SystemExit):
        run("convert", "webdataset", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Exact training needs any sample at any time" in shown and "dsvlm data index --out" in shown


def test_recipes_name_no_programs(tmp_path):
    """A pipe is part of a command line only: as a shard set's directory it is a directory that is not there."""
    with pytest.raises(ValueError, match="no directory pipe:cat x.tar"):
        load_manifest("pipe:cat x.tar")
