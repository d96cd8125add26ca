"""Remote shards: the same bytes as local ones, few requests, a cache that several processes share, stores that fail."""

import errno
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import slow_store
from dsvlm.data import remote
from dsvlm.data.adopt import index_set
from dsvlm.data.cached import GAP, LONGEST, coalesce
from dsvlm.data.manifest import check_files, join, load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.remote import RemoteError, RemoteFile, Stores, cache_directory
from dsvlm.data.shard import ShardWriter
from dsvlm.data.verify import verify

ROOT = Path(__file__).resolve().parents[2]
COUNT = 200


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    return slow_store.register(latency=0.001, bandwidth=1e9)


@pytest.fixture
def local(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "set", "caption", shard_bytes=2**20) as writer:
        for i in range(COUNT):
            image = rng.bytes(int(rng.integers(1000, 20000)))
            writer.write(f"k{i}", {"json": b'{"caption":"%d"}' % i, "jpg": image})
    return load_manifest(tmp_path / "set")


@pytest.fixture
def reader(store, local, tmp_path):
    """The same set at a URL; the requests counted are those after its small files were read."""
    reader = ShardReader(load_manifest(f"slow://{local.path}", str(tmp_path / "cache")), str(tmp_path / "cache"))
    for number in np.cumsum((0, *reader.manifest.sizes[:-1])):
        reader.key(number)
    store.requests.clear()
    return reader


def equal(reader, local, samples=range(COUNT)) -> bool:
    truth = ShardReader(local)
    return all(reader.record(i) == truth.record(i) and reader.image(i) == truth.image(i) for i in samples)


def test_a_set_at_a_url_is_the_set(reader, local, tmp_path, monkeypatch):
    assert reader.manifest.hash == local.hash and reader.manifest.sizes == local.sizes and len(local.names) > 1
    check_files(reader.manifest)
    assert equal(reader, local)
    assert reader.where(3) == ShardReader(local).where(3) and reader.crc(7) == ShardReader(local).crc(7)
    assert equal(pickle.loads(pickle.dumps(reader)), local, range(0, COUNT, 7))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))   # where the cache is when nobody names a directory
    assert not verify(f"slow://{local.path}")["problems"] and (tmp_path / f"dsvlm-cache-{os.getuid()}").is_dir()


def test_fetch_asks_once_for_neighbours_and_reading_asks_no_more(reader, local, store):
    requests = reader.fetch(np.arange(64), 5)
    assert [request.result(10) for request in requests] == [None]        # and not the bytes
    assert equal(reader, local, range(64)) and len(store.requests) == 1
    reader.fetch(np.arange(64), 6)                            # it is here already
    assert len(store.requests) == 1
    reader.fetch(np.array([180, 2, 100, 181, 101]), 7)        # 2 is cached; the others lie in two places
    assert equal(reader, local, [180, 2, 100, 181, 101]) and len(store.requests) == 3
    other = ShardReader(reader.manifest, reader.cache)        # another process would find the same files
    assert equal(other, local, range(64)) and len(store.requests) == 3
    assert equal(reader, local, [150]) and len(store.requests) == 5      # without a hint: record and image
    assert equal(reader, local, [150]) and len(store.requests) == 5


def test_who_waits_for_another_process_shows_that_a_store_is_waited_for(reader, local, store, monkeypatch):
    """Else workers that wait for another rank's request would be taken for hung."""
    cache, shard = reader._shared.cache, reader.manifest.sha256[0][:32]
    part = cache.reserve(shard, 0, local.bytes[0], 0)
    found = []
    thread = threading.Thread(target=lambda: found.append(reader.image(0)))
    thread.start()
    deadline = time.monotonic() + 10
    while not reader.is_asking and time.monotonic() < deadline:
        time.sleep(0.001)
    assert reader.is_asking and not found and not store.requests
    data = (local.path / local.names[0]).read_bytes()
    cache.fill(part, lambda offset, size: data[offset:offset + size])
    thread.join()
    assert found == [ShardReader(local).image(0)] and not store.requests and not reader.is_asking


def test_the_default_cache_belongs_to_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = tmp_path / f"dsvlm-cache-{os.getuid()}"
    assert cache_directory("") == directory and directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    with pytest.raises(ValueError, match="others may write to it: set data.remote_cache"):
        cache_directory("")
    directory.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="is a link"):
        cache_directory("")
    assert cache_directory(str(directory)) == directory           # named by the user: as it is


def test_without_a_cache_every_read_is_a_request(reader, local, store):
    bare = ShardReader(reader.manifest, "", 0)
    bare.fetch(np.arange(10), 0)
    assert equal(bare, local, range(10)) and len(store.requests) >= 20


def test_fetches_go_side_by_side(store, local, tmp_path):
    most, now, lock = [0], [0], threading.Lock()
    original = slow_store.SlowStore.cat_file

    def counted(self, *args, **options):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            return original(self, *args, **options)
        finally:
            with lock:
                now[0] -= 1

    slow_store.register(latency=0.02, bandwidth=1e9)
    reader = ShardReader(load_manifest(f"slow://{local.path}", str(tmp_path / "cache")), str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow_store.SlowStore, "cat_file", counted)
        reader.fetch(np.arange(0, COUNT, 20), 0)
        assert equal(reader, local, range(0, COUNT, 20))
    assert most[0] >= 4


def test_coalesce():
    assert coalesce([(5, 9, 3), (0, 5, 4), (9 + GAP, 10 + GAP, 7)]) == [(0, 10 + GAP, 3)]
    assert coalesce([(0, 5, 1), (6 + GAP, 7 + GAP, 0)]) == [(0, 5, 1), (6 + GAP, 7 + GAP, 0)]
    half = LONGEST // 2
    assert coalesce([(0, half, 5), (half, 2 * half, 6), (2 * half, 3 * half, 1)]) == [
        (0, 2 * half, 5), (2 * half, 3 * half, 1)]
    assert coalesce([(0, 100, 2), (10, 20, 1), (30, 130, 3)]) == [(0, 130, 1)] and coalesce([]) == []


def test_a_store_that_fails_now_and_then_is_asked_again(store, local, tmp_path):
    slow_store.register(latency=0.0, fail_every=3)
    reader = ShardReader(load_manifest(f"slow://{local.path}", str(tmp_path / "cache")), str(tmp_path / "cache"))
    reader.fetch(np.arange(0, COUNT, 15), 0)
    assert equal(reader, local, range(0, COUNT, 9))


def test_a_store_that_is_gone_is_an_error_that_says_so(reader, local, store, monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    slow_store.SlowStore.clear_instance_cache()
    monkeypatch.setattr(slow_store.SlowStore, "cat_file", lambda *a, **o: (_ for _ in ()).throw(TimeoutError("busy")))
    with pytest.raises(RemoteError) as error:
        reader.image(0)
    name, url = local.names[0], reader.manifest.shard(0)
    assert f"{name} cannot be read from {url} after 7 attempts: TimeoutError: busy" in str(error.value)
    assert len(waits) == 6 and all(0.5 * w <= got <= 1.5 * w for w, got in zip((1e-3 * 2**k for k in range(6)), waits,
                                                                            strict=True))
    with pytest.raises(RemoteError, match=f"^{name}:k0: {name} cannot be read from"):
        reader.record(0)


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no key")])
def test_what_waiting_does_not_mend_is_not_asked_again(reader, store, error, monkeypatch):
    calls = []

    def fail(*args, **options):
        calls.append(1)
        raise error

    monkeypatch.setattr(slow_store.SlowStore, "cat_file", fail)
    with pytest.raises(RemoteError, match=r"\(attempt 1\)"):
        reader.image(0)
    assert len(calls) == 1


def test_missing_and_short_shards(reader, local):
    path = local.path / local.names[1]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{local.names[1]}: {len(data)} bytes expected, {len(data) - 1} found"):
        check_files(reader.manifest)
    path.unlink()
    with pytest.raises(ValueError, match=f"{local.names[1]} is missing"):
        check_files(reader.manifest)
    check_files(reader.manifest, remote=False)
    with pytest.raises(ValueError, match="no shard set at slow:///nowhere"):
        load_manifest("slow:///nowhere")


def test_damage_in_the_cache_is_mended_and_damage_in_the_store_is_the_samples(reader, local, tmp_path):
    reader.fetch(np.arange(20), 0)
    (cached,) = (path for path in (tmp_path / "cache").glob("ranges/*/*/*-*"))
    data = bytearray(cached.read_bytes())
    data[::100] = bytes(len(data[::100]))
    cached.write_bytes(data)
    assert equal(reader, local, range(20)) and not cached.exists()
    reader.fetch(np.arange(20), 0)
    cached.write_bytes(data[:1000])                           # cut short
    assert equal(ShardReader(reader.manifest, reader.cache), local, range(20))
    path = local.path / local.names[0]
    whole = bytearray(path.read_bytes())
    whole[700] ^= 1                                           # in the first member of the first sample
    path.write_bytes(whole)
    fresh = ShardReader(reader.manifest, str(tmp_path / "other"))
    fresh.fetch(np.arange(20), 0)
    with pytest.raises(BadSample, match="k0: jpg is damaged"):
        fresh.image(0)
    assert fresh.record(0) and equal(fresh, local, range(1, 20))


def test_a_cache_smaller_than_a_window_costs_requests_never_samples(reader, local, store, tmp_path):
    small = ShardReader(reader.manifest, str(tmp_path / "small"), 1)
    for step, start in enumerate((0, 100)):
        small.fetch(np.arange(start, start + 100), step)
    assert equal(small, local, range(0, COUNT, 5))
    used = sum(path.stat().st_size for path in (tmp_path / "small").rglob("*-*") if path.is_file())
    assert used <= 1.2 * 2**20


def test_ranks_of_a_node_fetch_a_range_once(store, local, tmp_path):
    """Three processes fetch and read the same samples; the store is asked for each range once."""
    code = (
        "import sys, numpy as np; from dsvlm.data.manifest import load_manifest; from dsvlm.data.reader import *\n"
        "from benchmarks.slow_store import SlowStore\n"
        "cache = sys.argv[2]; reader = ShardReader(load_manifest(sys.argv[1], cache), cache)\n"
        "reader.fetch(np.arange(60), 0); reader.fetch(np.arange(120, 180), 1)\n"
        "assert all(reader.record(i) and reader.image(i) for i in [*range(60), *range(120, 180)])\n"
        "print(sum(p.endswith('.tar') for p in SlowStore.requests))"
    )
    environ = os.environ | slow_store.environment(tmp_path / "package", latency=0.05)
    command = [sys.executable, "-c", code, f"slow://{local.path}", str(tmp_path / "cache")]
    ranks = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    counts = [int(rank.communicate(timeout=60)[0]) for rank in ranks]
    ranges = [path for path in (tmp_path / "cache").glob("ranges/*/*/*-*")]
    assert all(rank.returncode == 0 for rank in ranks) and sum(counts) == len(ranges) and 2 <= len(ranges) <= 4


def test_foreign_tars_at_urls(store, local, tmp_path):
    """Indexes are local, the tars remote: file://, memory:// and a store's own scheme alike."""
    import fsspec

    tar = (local.path / local.names[0]).read_bytes()
    fsspec.filesystem("memory").pipe_file("/bucket/a.tar", tar)
    (tmp_path / "b.tar").write_bytes(tar)
    urls = ["memory://bucket/a.tar", f"file://{tmp_path}/b.tar", f"slow://{tmp_path}/b.tar"]
    report = index_set(urls, "caption", tmp_path / "foreign")
    manifest = load_manifest(tmp_path / "foreign")
    assert manifest.names == tuple(urls) and report["samples"] == 3 * local.sizes[0]
    check_files(manifest)
    reader, truth = ShardReader(manifest, str(tmp_path / "cache")), ShardReader(local)
    reader.fetch(np.arange(len(reader)), 0)
    for i in range(len(reader)):
        assert reader.image(i) == truth.image(i % local.sizes[0])
    with pytest.raises(ValueError, match="no file memory://bucket/c.tar"):
        index_set(["memory://bucket/c.tar"], "caption", tmp_path / "none")


def test_servers_without_ranges_are_refused(monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/whole", b"x" * 100)
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start=None, end=None: b"x" * 100)
    with pytest.raises(RemoteError, match="100 bytes instead of 10: the server does not support ranges"):
        RemoteFile("memory://whole", 100).read(0, 10)


def test_stores_are_shared_by_threads_and_not_by_processes():
    stores = Stores()
    systems = []
    threads = [threading.Thread(target=lambda: systems.append(stores.connect("memory://x/y")[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert all(system is systems[0] for system in systems)
    child = os.fork()
    if child == 0:
        os._exit(0 if stores.connect("memory://x/y")[1] == "/x/y" and len(stores._systems) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0 and len(stores._systems) == 1


def test_threads_may_start_fetching_at_once(reader):
    """Each of four threads starts the background of a fresh reader, again and again."""
    found, interval = [], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(150):
            shared = ShardReader(reader.manifest, reader.cache)._shared
            threads = [threading.Thread(target=lambda at=shared: at.later(lambda: found.append(1))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (pool, _), = shared._background.values()
            pool.shutdown()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 600


def test_join():
    assert join("s3://b/data/", "a/b") == "s3://b/data/a/b" and join("data", "a") == "data/a"
    assert join("data", "s3://b/c") == "s3://b/c" and join("data", "/x") == "/x"


def test_a_set_that_was_looked_at_while_it_was_copied_is_read_when_it_is_complete(local, tmp_path):
    """Nothing that does not belong together is kept; what is damaged in the cache is fetched again."""
    cache, url, names = str(tmp_path / "cache"), f"file://{local.path}", ("shards.arrow", "shard-000000.arrow")
    whole = {name: (local.path / name).read_bytes() for name in names}
    (local.path / names[0]).write_bytes(whole[names[0]][:-1])
    with pytest.raises(ValueError, match=f"{url}/{names[0]}: sha256 .* expected, .* found: the set is being copied"):
        load_manifest(url, cache)
    (local.path / names[0]).write_bytes(whole[names[0]])
    manifest = load_manifest(url, cache)
    (local.path / names[1]).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{url}/{names[1]}: sha256 .* expected, .* found: the set is being copied"):
        ShardReader(manifest, cache).record(0)
    assert sorted(path.name for path in manifest.path.iterdir()) == ["manifest.json", "shards.arrow"]
    (local.path / names[1]).write_bytes(whole[names[1]])
    assert equal(ShardReader(manifest, cache), local, range(3))
    for name in ("manifest.json", *names):
        (manifest.path / name).write_bytes(b"damaged")
    assert equal(ShardReader(load_manifest(url, cache), cache), local, range(3))


def test_a_copy_that_fails_leaves_nothing(local, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*/cache/sets/.*/manifest.json'"):
        load_manifest(f"file://{local.path}", str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
