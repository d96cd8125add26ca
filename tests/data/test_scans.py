"""Indexing many shards: the same set in any number of processes, damaged ones named together, nothing scanned twice."""

import argparse
import os

import pyarrow.parquet as pq
import pytest

from dsvlm.data import scans
from dsvlm.data.adopt import index_set
from dsvlm.data.commands import add_data_parser
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from tests.data.test_adopt import captions, tar


def run(*argv) -> int:
    parser = argparse.ArgumentParser(prog="dsvlm")
    add_data_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, argv)])
    return args.run(args)


@pytest.fixture
def tars(tmp_path):
    return [tar(tmp_path / f"{i}.tar", captions(3 * i, 2 + i)) for i in range(4)]


@pytest.fixture
def scanned(monkeypatch):
    """Names of the tars that are scanned from now on."""
    found, scan_tar = [], scans.scan_tar
    monkeypatch.setattr(scans, "scan_tar", lambda name, *rest: (found.append(name), scan_tar(name, *rest))[1])
    return found


def files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def truncate(path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[:1300])
    return whole


def test_the_same_set_in_any_number_of_processes(tmp_path, tars):
    index_set(tars, "caption", tmp_path / "one")
    bars = []

    def bar(items, **options):
        bars.append(options)
        return items

    index_set(tars, "caption", tmp_path / "two", progress=bar, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two") and bars == [{"desc": "index", "total": 4}]
    assert ShardReader(load_manifest(tmp_path / "two")).record(13) == {"caption": "caption 13"}
    with pytest.raises(ValueError, match="--workers 0: choose at least 1"):
        index_set(tars, "caption", tmp_path / "none", workers=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_all_damaged_shards_are_named_and_the_others_kept(tmp_path, tars, workers):
    index_set(tars, "caption", tmp_path / "whole")
    whole, out = {path: truncate(path) for path in (tars[1], tars[3])}, tmp_path / "set"
    with pytest.raises(scans.Unfinished) as error:
        run("index", *tars, "--type", "caption", "--out", out, "--workers", workers)
    text = str(error.value)
    assert "2 of 4 shards cannot be indexed" in text and "1.tar is damaged" in text and "3.tar is damaged" in text
    assert [path.name for path in out.iterdir()] == [".partial"] and len(files(out / ".partial")) == 4
    for path, data in whole.items():
        path.write_bytes(data)
    run("index", *tars, "--type", "caption", "--out", out, "--workers", workers)
    assert files(out) == files(tmp_path / "whole")


def test_the_next_call_scans_what_is_missing_or_was_changed(tmp_path, tars, scanned):
    whole, out = truncate(tars[2]), tmp_path / "set"
    with pytest.raises(scans.Unfinished, match="1 of 4 shards"):
        index_set(tars, "caption", out)
    assert scanned == [str(path) for path in tars]
    tars[2].write_bytes(whole)
    tar(tars[0], captions(50, 2))                      # of the same size as before, and later
    os.utime(tars[0], ns=(1, 1))
    damaged = next(path for path in (out / ".partial").iterdir() if path.suffix == ".arrow" and b"train/00003" in
                   path.read_bytes())
    damaged.write_bytes(damaged.read_bytes()[:-1])     # the index of 1.tar: not trusted
    scanned.clear()
    index_set(tars, "caption", out)
    assert scanned == [str(path) for path in tars[:3]]
    index_set(tars, "caption", tmp_path / "fresh")
    assert files(out) == files(tmp_path / "fresh")
    assert ShardReader(load_manifest(out)).record(0) == {"caption": "caption 50"}


def test_what_is_interrupted_goes_on(tmp_path, tars, scanned):
    def stop(items, **_):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_set(tars, "caption", tmp_path / "set", progress=stop)
    index_set(tars[:1] + tars[2:], "caption", tmp_path / "set")        # one was taken out: the others keep their names
    assert scanned == [str(path) for path in [tars[0], *tars[2:]]]


def test_a_mistake_in_the_fields_ends_it_after_one_shard(tmp_path, tars, scanned):
    with pytest.raises(ValueError, match="none of the first 100 samples fits"):
        index_set(tars, "caption", tmp_path / "set", ["caption=png"])
    assert scanned == [str(tars[0])] and not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match="0.tar is named twice"):
        index_set([tars[0], *tars], "caption", tmp_path / "set")


def test_a_shard_that_grows_while_it_is_read_is_not_taken(tmp_path, tars, monkeypatch):
    scan_tar = scans.scan_tar

    def append(name, *rest):
        table = scan_tar(name, *rest)
        with open(name, "ab") as file:
            file.write(bytes(512))
        return table

    monkeypatch.setattr(scans, "scan_tar", append)
    with pytest.raises(ValueError, match="0.tar was changed while it was read"):
        index_set(tars[:1], "caption", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_parquet_files_among_which_the_first_is_damaged(tmp_path):
    import pyarrow as pa

    paths = [tmp_path / f"{i}.parquet" for i in range(3)]
    for number, path in enumerate(paths):
        pq.write_table(pa.table({"caption": [f"{number}-{row}" for row in range(3)]}), path)
    whole = paths[0].read_bytes()
    paths[0].write_bytes(b"no parquet")
    with pytest.raises(scans.Unfinished, match="1 of 3 shards.*\n.*0.parquet is not a parquet file"):
        index_set(paths, "caption", tmp_path / "set")
    paths[0].write_bytes(whole)
    assert index_set(paths, "caption", tmp_path / "set", workers=2)["samples"] == 9
    assert ShardReader(load_manifest(tmp_path / "set")).record(3) == {"caption": "1-0"}


def test_indexes_beside_tars_are_made_of_those_that_are_whole(tmp_path, tars):
    truncate(tars[0])
    with pytest.raises(ValueError, match="1 of 4 shards.*\n.*0.tar is damaged"):
        run("index", *tars, "--workers", 2)
    assert [path.with_suffix(".arrow").exists() for path in tars] == [False, True, True, True]
