"""Shards that do not fit what they are indexed for: named when they are indexed, not when a training masks them all."""

import pytest

from dsvlm.data import scans
from dsvlm.data.adopt import index_set
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from tests.data.test_adopt import captions, png, tar


def test_every_tar_is_tried_with_the_fields_of_the_set(tmp_path, monkeypatch):
    """The first has captions in json, which were tried; the second in txt, which come first in the set."""
    first = tar(tmp_path / "a.tar", {"a.png": png(1), "a.json": b'{"caption": "x"}'})
    second = tar(tmp_path / "b.tar", {"b.png": png(1), "b.txt": b"y", "b.json": b'{"title": "y"}'})
    out = tmp_path / "set"
    with pytest.raises(scans.Unfinished, match=r"1 shards do not fit.*\n.*a.tar: none .*'caption': 'txt'.*has no txt"):
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
