"""`dsvlm data ...` and tools/: they work, report, and never import torch."""

import argparse
import json
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from dsvlm.data.commands import add_data_parser, run_tool
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.index import ShardIndex
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.verify import verify

ROOT = Path(__file__).resolve().parents[2]


def run(*argv) -> int:
    parser = argparse.ArgumentParser(prog="dsvlm")
    add_data_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, argv)])
    return args.run(args)


@pytest.fixture
def shards(tmp_path):
    make_scenes(tmp_path / "scenes", samples=12, val_samples=0, tasks=("caption",), shard_mb=0.012)
    return load_manifest(tmp_path / "scenes/train/caption")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_convert(tmp_path, capsys):
    assert run("convert", "scenes", "--out", tmp_path / "a", "--samples", 3, "--val-samples", 2, "--tasks", "count",
               "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["count"]["samples"] == 3 and report["val"]["count"]["samples"] == 2
    assert run("convert", "scenes", "--out", tmp_path / "b", "--samples", 3, "--val-samples", 2) == 0
    output = capsys.readouterr()
    assert f"{tmp_path / 'b/val/relation'}: 2 samples, 1 shards" in output.out and output.err == ""
    with pytest.raises(ValueError, match="unknown task 'locat': did you mean 'locate'"):
        run("convert", "scenes", "--out", tmp_path / "c", "--tasks", "locat")


def test_verify_a_sound_set(shards, capsys):
    assert run("verify", shards.path, "--decode") == 0
    assert capsys.readouterr().out == f"{shards.path}: 12 samples, 0 damaged, 0 other problems\n"


def test_verify_names_every_damaged_sample(shards, capsys):
    assert len(shards.names) >= 3
    for number, rows, ext in ((0, (1,), "png"), (1, (0, 2), "json")):
        path = shards.path / shards.names[number]
        for row in rows:
            flip(path, ShardIndex(path.with_suffix(".arrow")).member(row, ext)[0])
    assert run("verify", shards.path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    first = shards.sizes[0]
    assert [(d["sample"], d["key"]) for d in report["damaged"]] == [
        (i, f"train-caption-{i:06d}") for i in (1, first, first + 2)]
    assert all("is damaged: crc32" in d["reason"] for d in report["damaged"])
    assert [p.split(":")[0] for p in report["problems"]] == [f"shard {name}" for name in shards.names[:2]]


def test_verify_finds_damage_that_no_checksum_of_a_sample_covers(shards):
    path = shards.path / shards.names[0]
    index = ShardIndex(path.with_suffix(".arrow"))
    whole = path.read_bytes()
    flip(path, index.member(1, "json")[0] - 512)                                  # the name in a header
    report = verify(shards.path)
    assert not report["damaged"] and "damaged at byte" in report["problems"][-1] and len(report["problems"]) == 2
    path.write_bytes(whole[:-600])
    report = verify(shards.path)
    assert any("bytes expected" in p for p in report["problems"]) and "truncated" in report["problems"][-1]
    assert not report["damaged"]
    path.write_bytes(whole[:index.member(index.samples - 1, "png")[0] + 3])
    assert [d["key"] for d in verify(shards.path)["damaged"]] == [index.key(index.samples - 1)]
    path.unlink()
    assert verify(shards.path)["problems"] == [f"shard {path.name} is missing"]
    path.write_bytes(whole)
    flip(path.with_suffix(".arrow"), -100)
    assert [p.split(":")[0] for p in verify(shards.path)["problems"]] == ["index shard-000000.arrow"]
    (shards.path / "manifest.json").unlink()
    assert "holds no manifest.json" in verify(shards.path)["problems"][0]


def test_verify_compares_index_and_tar(shards, tmp_path):
    """An index that matches its own hash, but not the tar: the rows that differ are named."""
    other = tmp_path / "other"
    make_scenes(other, samples=12, val_samples=0, tasks=("caption",), shard_mb=0.012, seed=1)
    donor = load_manifest(other / "train/caption")
    name = donor.names[0]
    (donor.path / name).write_bytes((shards.path / name).read_bytes())
    report = verify(donor.path)
    assert {d["shard"] for d in report["damaged"]} == {name} and f"shard {name}: sha256" in " ".join(report["problems"])


def test_verify_decodes_on_request(shards, tmp_path):
    from dsvlm.data.shard import ShardWriter

    with ShardWriter(tmp_path, "caption") as writer:
        writer.write("good", {"json": b'{"caption":"x"}', "png": ShardReader(shards).image(0)})
        writer.write("bad", {"json": b'{"caption":"x"}', "jpg": b"no image"})
    assert verify(tmp_path)["damaged"] == []
    (damaged,) = verify(tmp_path, decode=True)["damaged"]
    assert damaged["key"] == "bad" and damaged["sample"] == 1 and "does not decode" in damaged["reason"]


def test_keys_are_unique_across_shards(tmp_path):
    from dsvlm.data.shard import ShardWriter

    with ShardWriter(tmp_path, "caption", shard_bytes=1) as writer:
        for _ in range(2):
            writer.write("same", {"json": b"{}"})
            writer._keys.clear()
    assert verify(tmp_path)["problems"] == ["key 'same' is in shard-000000.tar and in shard-000001.tar"]


def test_info(shards, capsys):
    assert run("info", shards.path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 12 and report["hash"] == shards.hash and "caption" in report["first"]
    assert run("info", shards.path) == 0
    assert "caption" in capsys.readouterr().out


def test_index_of_a_foreign_tar(tmp_path, capsys):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "a.jpg", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, BytesIO(b"abc"))
    for _ in range(2):                                        # the second time the same index is there already
        assert run("index", path, "--json") == 0
        (entry,) = json.loads(capsys.readouterr().out)
        assert entry["samples"] == 2 and entry["members"] == ["jpg", "txt"]
    assert ShardIndex(tmp_path / "x.arrow").key(1) == "b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.arrow", "x.tar"]
    (tmp_path / "x.arrow").write_bytes(b"somebody's data")
    with pytest.raises(ValueError, match="x.arrow exists and is not the index"):
        run("index", path)


def test_tools_report_errors(tmp_path, capsys):
    assert run_tool("index", [str(tmp_path / "absent.tar")]) == 2
    assert capsys.readouterr().err == f"tools/index.py: error: no file {tmp_path / 'absent.tar'}\n"
    for nothing in (tmp_path, tmp_path / "nope"):
        assert run_tool("verify", [str(nothing)]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith(f"tools/verify.py: error: no shard set at {nothing}: ")
        assert output.err.count("\n") == 1


@pytest.mark.parametrize("count, end", [(12, "set11?\n"), (13, "set11, ... (13 in all)?\n")])
def test_info_of_a_directory_of_sets_names_them(tmp_path, count, end):
    for number in range(count):
        (tmp_path / f"set{number:02}").mkdir()
        (tmp_path / f"set{number:02}/manifest.json").write_text("{}")
    with pytest.raises(ValueError) as error:
        run("info", tmp_path)
    assert f"did you mean one of {tmp_path}/set00, " in str(error.value) and f"{error.value}\n".endswith(end)


def test_help_of_data_describes_and_shows(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert "Makes shards of datasets" in shown and "\n  dsvlm data convert scenes --out data/scenes\n" in shown


def imported(*command) -> set[str]:
    """Names of all modules that a command imported."""
    process = subprocess.run([sys.executable, "-X", "importtime", *map(str, command)], cwd="/", capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr
    return {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if line.startswith("import time:")}


def test_tools_never_import_torch(shards, tmp_path):
    for command in ([ROOT / "tools/verify.py", shards.path, "--decode"],
                    [ROOT / "tools/index.py", shards.path / shards.names[0]],
                    [ROOT / "tools/convert.py", "scenes", "--out", tmp_path / "x", "--samples", "2"]):
        modules = imported(*command)
        assert "dsvlm.data.commands" in modules and "pyarrow" in modules
        assert not {"torch", "transformers", "deepspeed"} & modules


def test_help_imports_nothing_heavy():
    for tool in ("convert", "index", "verify"):
        modules = imported(ROOT / f"tools/{tool}.py", "--help")
        assert "dsvlm.data.commands" in modules
        assert not {"torch", "numpy", "pyarrow", "PIL"} & modules
