"""Reading by number: which shard a sample is in, and how many shards stay open."""

import os
import random

import pytest

from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter


def test_samples_of_uneven_shards_are_found_and_few_files_stay_open(tmp_path, monkeypatch):
    """The same bytes however the shards are cut; of more shards than may be open, the files are closed."""
    monkeypatch.setattr("dsvlm.data.reader.OPEN_SHARDS", 3)
    samples = [(f"k{i}", {"json": b"%d" % i, "bin": bytes(i if i % 7 else 60_000)}) for i in range(80)]
    samples += [(f"l{i}", {"json": b"-%d" % i, "bin": bytes(150_000)}) for i in range(9)]
    with ShardWriter(tmp_path / "set", "caption", shard_bytes=200_000) as writer:
        for key, members in samples:
            writer.write(key, members)
    manifest = load_manifest(tmp_path / "set")
    reader = ShardReader(manifest)
    assert min(manifest.sizes) == 1 and max(manifest.sizes) > 10
    for number in [*range(89), *random.Random(0).sample(range(89), 89)]:
        for extension, data in samples[number][1].items():
            assert reader.read(number, extension) == data
        held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                if os.path.lexists(f"/proc/self/fd/{name}")]
        assert sum(str(tmp_path) in path for path in held) <= 3
    for number in (89, -1, -2, -100):
        with pytest.raises(AssertionError, match="no sample of 89"):
            reader.read(number, "json")
