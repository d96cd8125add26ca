"""Manifests that are JSON or Arrow and not ours: one clear error each, never a traceback."""

import hashlib
import json

import pyarrow as pa
import pytest

from dsvlm.data.manifest import arrow_bytes, load_manifest
from dsvlm.data.shard import ShardWriter
from dsvlm.data.verify import verify


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "set", "caption") as writer:
        writer.write("a", {"json": b'{"caption":"x"}'})
    return tmp_path / "set"


def change_table(shards, change) -> None:
    """Give the set another table, and a manifest that knows it."""
    data = arrow_bytes(change(pa.ipc.open_file(shards / "shards.arrow").read_all()))
    (shards / "shards.arrow").write_bytes(data)
    change_header(shards, {"shards_sha256": hashlib.sha256(data).hexdigest()})


def change_header(shards, change: dict) -> None:
    path = shards / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def refused(shards, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_manifest(shards)
    assert len(verify(shards)["problems"]) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '"x"', "null", "{}", "\ufeff{"])
def test_what_is_no_manifest(shards, text):
    (shards / "manifest.json").write_text(text, "utf-8")
    refused(shards, "manifest.json is not a manifest .*: convert the data again")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preprocessing": {"index": "x"}}, "preprocessing.index.fields is 'x', not record keys with their places"),
        ({"preprocessing": {"index": []}}, r"preprocessing.index.fields is \[\], not record keys"),
        ({"preprocessing": {"index": {}}}, "preprocessing.index.fields is None, not record keys"),
        ({"preprocessing": {"index": None}}, "preprocessing.index.fields is None, not record keys"),
        ({"preprocessing": {"index": {"fields": {}, "image": 5}}}, "preprocessing.index.image is 5, not an extension"),
        ({"members": [5]}, "'members' has 5, not an extension"),
        ({"members": [["x"] * 1000]}, r"'members' has .{58,63}\.\.\., not an extension"),
        ({"samples": True}, "'samples' is True, not int"),
        ({"samples": -1}, "-1 samples in 1 shards, but shards.arrow lists 1 in 1"),
        ({"format": ["x"] * 1000}, r"format .{58,63}\.\.\., this version reads format 1"),
    ],
)
def test_headers_whose_values_are_of_another_kind(shards, change, message):
    change_header(shards, change)
    refused(shards, f"manifest.json: .*{message}")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop_columns(["sha256"]), "column 'sha256' is absent, not string"),
        (lambda t: t.append_column("name", t.column("name")), "column 'name' is absent"),
        (lambda t: t.set_column(0, "name", pa.array([None], pa.utf8())), "column 'name' is string with nulls"),
        (lambda t: t.set_column(1, "samples", pa.array(["1"])), "column 'samples' is string, not uint32"),
        (lambda t: t.set_column(1, "samples", pa.array([1.5])), "column 'samples' is double, not uint32"),
    ],
)
def test_tables_with_other_columns(shards, change, message):
    change_table(shards, change)
    refused(shards, f"shards.arrow: {message}.*: convert the data again")


def test_a_table_that_is_none(shards):
    (shards / "shards.arrow").write_bytes(b"x" * 1000)
    change_header(shards, {"shards_sha256": hashlib.sha256(b"x" * 1000).hexdigest()})
    refused(shards, "shards.arrow is not a table .*: convert the data again")


def test_a_set_without_samples(shards):
    change_table(shards, lambda table: table.set_column(1, "samples", pa.array([0], pa.uint32())))
    change_header(shards, {"samples": 0})
    refused(shards, "manifest.json: 0 samples: an empty shard set cannot be trained on")
