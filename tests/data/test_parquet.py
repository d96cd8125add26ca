"""Parquet files with image bytes, read where they lie: every row, by row group, with damage and mistakes named."""

import io
import json
import random
import subprocess
import sys
from datetime import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import slow_store
from dsvlm.data.adopt import index_set
from dsvlm.data.footer import row_groups
from dsvlm.data.index import ShardIndex, has_images
from dsvlm.data.manifest import check_files, load_manifest
from dsvlm.data.parquet import ParquetFile, RowGroups
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.stream import LocalFile
from dsvlm.data.verify import describe, verify

FIELDS = ["question=query", "answer=label:0"]


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 0)).save(data, "PNG")
    return data.getvalue()


def rows(start: int, count: int) -> list[dict]:
    """As Hugging Face writes them: {bytes, path}, strings and lists of strings."""
    return [{"image": {"bytes": png(i), "path": f"{i}.png"}, "query": f"what is {i}?", "label": [f"it is {i}", "no"],
             "other": i} for i in range(start, start + count)]


def write(path, table, group=4):
    pq.write_table(pa.Table.from_pylist(table) if isinstance(table, list) else table, path, row_group_size=group)
    return path


@pytest.fixture
def manifest(tmp_path):
    paths = [write(tmp_path / "a.parquet", rows(0, 10)), write(tmp_path / "b.parquet", rows(10, 5))]
    index_set(paths, "vqa", tmp_path / "set", FIELDS)
    return load_manifest(tmp_path / "set")


def test_rows_are_samples(manifest, tmp_path):
    check_files(manifest)
    assert manifest.names == ("../a.parquet", "../b.parquet") and manifest.sizes == (10, 5) and has_images(manifest)
    assert manifest.mapping["fields"] == {"question": "query", "answer": "label:0"}
    reader = ShardReader(manifest)
    for i in random.Random(0).sample(range(15), 15):
        assert reader.record(i) == {"question": f"what is {i}?", "answer": f"it is {i}"}
        assert reader.image(i) == png(i)
    assert reader.where(11) == "../b.parquet:00000001" and len({reader.crc(i) for i in range(15)}) == 15
    index = ShardIndex(manifest.index(0))
    assert index.member(3, "image")[:2] == (4, len(png(3))) and index.column("width")[3] == 6
    report = verify(manifest.path, decode=True)
    assert not report["problems"] and not report["damaged"]
    assert describe(manifest.path)["first"] == {"question": "what is 0?", "answer": "it is 0"}


def test_the_default_fields_are_columns_and_images_may_be_plain_bytes_or_lists(tmp_path):
    plain = [{"image": png(i), "caption": f"c{i}"} for i in range(3)]
    index_set([write(tmp_path / "x.parquet", plain)], "caption", tmp_path / "plain")
    listed = [{"images": [{"bytes": png(i + j), "path": None} for j in range(i)], "texts": [{"user": f"c{i}"}]}
              for i in range(3)]
    index_set([write(tmp_path / "y.parquet", listed)], "caption", tmp_path / "listed", ["caption=texts:0.user"],
              "images:0")
    for name, first in (("plain", png(0)), ("listed", None)):
        reader = ShardReader(load_manifest(tmp_path / name))
        assert [reader.record(i)["caption"] for i in range(3)] == ["c0", "c1", "c2"]
        assert reader.image(0) == first and reader.image(2) == png(2)


def test_a_row_that_does_not_fit_is_masked(tmp_path):
    table = pa.table({"image": [png(0), b"no image", None], "caption": ["fine", None, "fine too"]})
    index_set([write(tmp_path / "x.parquet", table)], "caption", tmp_path / "set")
    reader = ShardReader(load_manifest(tmp_path / "set"))
    assert reader.record(0) and reader.record(2) and reader.image(2) is None and reader.image(1) == b"no image"
    with pytest.raises(BadSample, match="no member 'json'"):
        reader.record(1)
    assert {d["key"]: d["reason"] for d in verify(tmp_path / "set")["damaged"]} == {
        "00000001": "no member 'json'", "00000002": "it has no image, and other samples of the set have"}


def test_row_groups_are_kept_up_to_a_limit(manifest):
    reader = ShardReader(manifest)
    groups = reader._shard(0).parquet.groups
    groups.limit = 1
    loads = []
    original = RowGroups.get
    groups.get = lambda key, load: original(groups, key, lambda: loads.append(key) or load())
    for i in (0, 1, 2, 3, 5, 4):                              # two row groups, in turn
        reader.image(i)
    assert len(loads) == 2 and len(groups.columns) == 1


def test_remote_parquet(manifest, tmp_path):
    store = slow_store.register(latency=0.0)
    urls = [f"slow://{tmp_path}/{name}.parquet" for name in "ab"]
    index_set(urls, "vqa", tmp_path / "remote", FIELDS)
    reader, truth = ShardReader(load_manifest(tmp_path / "remote"), str(tmp_path / "cache")), ShardReader(manifest)
    reader.key(0), reader.key(14)
    store.requests.clear()
    reader.fetch(np.arange(15), 0)
    asked = len(store.requests)
    assert asked <= 6                                         # footers, and each file's columns as one range
    for i in range(15):
        assert reader.record(i) == truth.record(i) and reader.image(i) == truth.image(i)
    assert len(store.requests) == asked
    assert verify(tmp_path / "remote")["problems"] == []


@pytest.mark.parametrize("damage", ["all", "a row group", "a few bytes of one image"])
def test_damage_in_the_cache_is_mended(tmp_path, damage):
    """As after a loss of power: files of the right size that hold zeros."""
    slow_store.register(latency=0.0)
    pq.write_table(pa.Table.from_pylist(rows(0, 10)), tmp_path / "a.parquet", 4, compression="none")
    index_set([f"slow://{tmp_path}/a.parquet"], "vqa", tmp_path / "set", FIELDS)
    manifest = load_manifest(tmp_path / "set")
    whole = ShardReader(manifest, str(tmp_path / "cache"))
    whole.fetch(np.arange(10), 0)
    truth = [(whole.record(i), whole.image(i)) for i in range(10)]
    path, = (path for path in (tmp_path / "cache").rglob("*-*") if path.is_file())
    data = path.read_bytes()
    start = data.index(png(4)) - 100
    path.write_bytes({"all": bytes(len(data)), "a row group": data[:start] + bytes(200) + data[start + 200:],
                      "a few bytes of one image": data.replace(png(5), png(5)[:-9] + bytes(9))}[damage])
    assert path.read_bytes() != data
    reader = ShardReader(manifest, str(tmp_path / "cache"))
    assert [(reader.record(i), reader.image(i)) for i in range(10)] == truth
    assert ShardReader(manifest, str(tmp_path / "cache")).image(5) == truth[5][1]


def test_damage_touches_its_row_group_only(manifest):
    """Flipped bytes in a file of several row groups: rows are right or masked, those of other groups stay right."""
    path = manifest.path / manifest.names[0]
    whole, truth = path.read_bytes(), [ShardReader(manifest).image(i) for i in range(10)]
    metadata = pq.ParquetFile(path).metadata
    start = metadata.row_group(1).column(0).dictionary_page_offset or metadata.row_group(1).column(0).data_page_offset
    rng, found = random.Random(0), set()
    for _ in range(40):
        data = bytearray(whole)
        data[start + rng.randrange(metadata.row_group(1).total_byte_size // 2)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        reader = ShardReader(manifest)
        for i in range(10):
            try:
                assert reader.image(i) == truth[i]
            except BadSample:
                found.add(i)
    assert found and found <= {4, 5, 6, 7}


@pytest.mark.parametrize("change, options, message", [
    (None, {"fields": ["question=title"]}, "no sample has 'title'; there are image, label, other, query"),
    (None, {"fields": ["question=other", "answer=query"]}, "none of the .* fits .*question .other. is 2, not text"),
    (None, {"fields": FIELDS, "image": "picture"}, "has no column 'picture'"),
    (b"no parquet", {"fields": FIELDS}, "x.parquet is not a parquet file"),
])
def test_mistakes_are_named(tmp_path, change, options, message):
    path = write(tmp_path / "x.parquet", rows(0, 3))
    if change is not None:
        path.write_bytes(change)
    with pytest.raises(ValueError, match=message):
        index_set([path], "vqa", tmp_path / "set", **options)


def opened(path, image="image", **fields):
    return ParquetFile(str(path), LocalFile(path), {"image": image, "fields": fields}, RowGroups())


def test_the_footer_is_read_as_pyarrow_reads_it(tmp_path):
    path = write(tmp_path / "x.parquet", [row | {"box": [0.5] * (row["other"] % 3)} for row in rows(0, 10)])
    metadata = pq.ParquetFile(path).metadata
    for number, group in enumerate(row_groups(metadata)):
        truth = metadata.row_group(number)
        assert group.rows == truth.num_rows and len(group.chunks) == truth.num_columns
        for at, found in enumerate(group.chunks):
            chunk = truth.column(at)
            first = chunk.dictionary_page_offset or chunk.data_page_offset
            assert found == (chunk.path_in_schema.partition(".")[0], chunk.num_values, first,
                             chunk.total_compressed_size, chunk.total_uncompressed_size)


FLIPS = """
import random, sys
from pathlib import Path
import numpy as np
from dsvlm.data.parquet import ParquetFile, RowGroups
from dsvlm.data.stream import LocalFile

path, rng, ends = Path(sys.argv[1]), random.Random(0), set()
whole = path.read_bytes()
for at in range(len(whole) - int.from_bytes(whole[-8:-4], "little") - 8, len(whole)):
    data = bytearray(whole)
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
        file = ParquetFile("x", LocalFile(path), {"image": None, "fields": {"caption": "caption"}}, RowGroups())
        file.extents(np.arange(file.rows), np.arange(file.rows))
        ends.add(b"".join(file.read(row, "json") for row in range(file.rows)))
    except ValueError as error:
        ends.add(ValueError)
assert b'{"caption":"a"}' in ends and ValueError in ends, ends
"""


def test_a_flipped_bit_in_a_footer_ends_no_process(tmp_path):
    """Some make pyarrow throw to the end of the process when it is asked for a column chunk."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"caption": ["a"]}), path, store_schema=False)
    done = subprocess.run([sys.executable, "-c", FLIPS, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_footer_that_counts_other_rows_is_damaged(tmp_path):
    path = write(tmp_path / "x.parquet", rows(0, 8))
    file = opened(path, question="query")
    file.starts = np.array([0, 5, 9])
    with pytest.raises(ValueError, match="row group 0 is damaged .4 rows, 5 expected"):
        file.read(4, "json")
    whole = path.read_bytes()
    data = whole[:-8].rpartition(b"\x16\x08")                # rows of the last group: 4, as Thrift writes it
    path.write_bytes(data[0] + b"\x16\x0a" + data[2] + whole[-8:])
    with pytest.raises(ValueError, match="footer is damaged: 8 rows, 9 in its row groups"):
        opened(path, question="query")


def test_values_that_json_has_not(tmp_path):
    table = [{"caption": "a", "taken": datetime(2020, 1, 2), "objects": [{"name": "dog", "box": [Decimal("0.5")]}]}]
    path = write(tmp_path / "x.parquet", table)
    record = json.loads(opened(path, None, caption="caption", source="taken").read(0, "json"))
    assert record == {"caption": "a", "source": "2020-01-02 00:00:00"}
    with pytest.raises(ValueError, match="column 'objects' holds Decimal, which no record can"):
        opened(path, None, objects="objects").read(0, "json")


def test_times_that_python_has_not(tmp_path):
    path = write(tmp_path / "x.parquet", pa.table({"source": pa.array([2**61], pa.timestamp("us"))}))
    with pytest.raises(ValueError, match="no value of row 0 for Python"):
        opened(path, None, source="source").read(0, "json")


def test_columns_of_one_name_are_refused(tmp_path):
    path = write(tmp_path / "x.parquet", pa.table([[png(0)], ["a"], ["b"]], names=["image", "caption", "caption"]))
    with pytest.raises(ValueError, match="has 2 columns 'caption'"):
        opened(path, caption="caption")
    assert opened(write(tmp_path / "y.parquet", rows(0, 1)), question="query").read(0, "image") == png(0)


@pytest.mark.parametrize("column, message", [
    (pa.array(["a.png"]), "holds str, not image bytes"),
    (pa.array([{"bytes": None, "path": "a.png"}]), "holds the path 'a.png' and no image bytes: store the bytes"),
    (pa.array([{"url": "a.png"}]), "holds a struct of url, not image bytes"),
    (pa.array([list(png(0))], pa.list_(pa.uint8())), "holds list, not image bytes: store it as binary"),
    (pa.array([[{"bytes": png(0), "path": ""}]]), "holds list, not image bytes: name one of the list"),
])
def test_a_column_without_image_bytes_is_named(tmp_path, column, message):
    path = write(tmp_path / "x.parquet", pa.table({"image": column, "caption": ["a"]}))
    with pytest.raises(ValueError, match=f"column 'image' {message}"):
        opened(path, caption="caption").read(0, "image")


def test_no_image_is_no_mistake(tmp_path):
    path = write(tmp_path / "x.parquet", [{"image": {"bytes": None, "path": None}, "caption": "a"}])
    assert opened(path, caption="caption").read(0, "image") == b""


def test_huge_row_groups_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dsvlm.data.parquet.LARGEST", 1000)
    path = write(tmp_path / "x.parquet", rows(0, 40), group=40)
    with pytest.raises(ValueError, match="row group 0 holds .* in image, .* write it with smaller row groups"):
        index_set([path], "vqa", tmp_path / "set", FIELDS)
    texts = [{"image": {"bytes": b"", "path": ""}, "caption": f"{i}" * 40} for i in range(40)]
    with pytest.raises(ValueError, match="row group 0 holds .* in caption, .* write it with smaller row groups"):
        index_set([write(tmp_path / "y.parquet", texts, group=40)], "caption", tmp_path / "set")


def test_the_index_is_the_same_each_time(tmp_path, manifest):
    again = index_set([tmp_path / "a.parquet", tmp_path / "b.parquet"], "vqa", tmp_path / "again", FIELDS)
    assert again["hash"] == manifest.hash
    assert json.loads((tmp_path / "again/manifest.json").read_text())["members"] == ["image", "json"]
