"""Several processes, full disks and kills: a set has one writer, and what was finished stays."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from dsvlm.data import scans
from dsvlm.data.adopt import index_set
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.index import write_index
from dsvlm.data.manifest import load_manifest
from dsvlm.data.scans import each
from dsvlm.data.shard import ShardWriter
from tests.data.test_adopt import captions, tar


@pytest.fixture
def tars(tmp_path):
    return [tar(tmp_path / f"{i}.tar", captions(3 * i, 2 + i)) for i in range(3)]


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_second_writer_says_so_and_leaves_the_first_alone(tmp_path):
    out = tmp_path / "train/caption"
    with ShardWriter(out, "caption") as writer:
        writer.write("a", {"json": b"{}"})
        for second in (
            lambda: ShardWriter(out, "caption").__enter__(),
            lambda: make_scenes(tmp_path, samples=1, val_samples=0, tasks=("caption",)),
            lambda: index_set([tmp_path / "x.tar"], "caption", out),
        ):
            with pytest.raises(ValueError, match=f"another process is writing {out}: wait .* another --out"):
                second()
        writer.write("b", {"json": b"{}"})
    assert load_manifest(out).samples == 2
    assert names(out) == ["manifest.json", "shard-000000.arrow", "shard-000000.tar", "shards.arrow"]


def test_a_second_index_leaves_the_first_alone(tmp_path, tars):
    out, refused = tmp_path / "set", []

    def bar(items, **_):
        with pytest.raises(ValueError, match=f"another process is writing {out}") as error:
            index_set(tars[:1], "caption", out)
        refused.append(error)
        return items

    index_set(tars, "caption", out, progress=bar)
    assert refused and load_manifest(out).samples == 9 and len(names(out)) == 5


def _index(barrier, shards, out, results):
    barrier.wait()
    try:
        results.put(index_set(shards, "caption", out)["hash"])
    except ValueError as error:
        results.put(str(error))


def test_processes_that_race_leave_one_set(tmp_path, tars):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    for trial in range(5):
        out = tmp_path / f"set{trial}"
        racers = [context.Process(target=_index, args=(barrier, tars, out, results)) for _ in range(3)]
        for racer in racers:
            racer.start()
        said = [results.get(timeout=60) for _ in racers]
        for racer in racers:
            racer.join()
        assert [load_manifest(out).hash] == [text for text in said if " " not in text], said
        assert len(names(out)) == 5


def test_a_failed_rename_takes_back_only_its_own(tmp_path, tars, monkeypatch):
    """Without locks another process may have named its files meanwhile."""
    out, rename = tmp_path / "set", os.rename

    def fail(source, target):
        if target.name == "index-000001.arrow":
            (out / "manifest.json").write_text("another's")
            raise OSError("disk gone")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="disk gone"):
            index_set(tars, "caption", out)
    assert (out / "manifest.json").read_text() == "another's" and names(out) == [".partial", "manifest.json"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_will_do(tmp_path, tars, monkeypatch, code):
    def flock(handle, kind):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    index_set(tars, "caption", tmp_path / "set")
    with ShardWriter(tmp_path / "other", "caption") as writer:
        writer.write("a", {"json": b"{}"})
    assert len(names(tmp_path / "set")) == 5 and len(names(tmp_path / "other")) == 4


def _write_index(barrier, path, results):
    barrier.wait()
    try:
        for _ in range(50):
            write_index(path)
        results.put("")
    except Exception as error:
        results.put(repr(error))


def test_processes_that_write_one_index_beside_a_tar(tars):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    writers = [context.Process(target=_write_index, args=(barrier, tars[0], results)) for _ in range(2)]
    for writer in writers:
        writer.start()
    assert [results.get(timeout=60) for _ in writers] == ["", ""]
    for writer in writers:
        writer.join()
    assert names(tars[0].parent) == ["0.arrow", "0.tar", "1.tar", "2.tar"]


@pytest.fixture
def full(monkeypatch):
    """A disk that is full when a file is to be kept."""

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_named_and_nothing_half_is_left(tars, tmp_path, full):
    with pytest.raises(ValueError, match="0.tar: .* No space left on device: .*0.arrow") as error:
        each(write_index, [str(path) for path in tars])
    assert str(error.value).count("No space left") == 3 and names(tmp_path) == ["0.tar", "1.tar", "2.tar"]
    with pytest.raises(ValueError, match="2.tar: .* No space left on device: '.*/set/.partial/.*arrow'"):
        index_set(tars, "caption", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("given", range(6))
def test_what_is_killed_while_it_gives_names_goes_on(tmp_path, tars, monkeypatch, given):
    """After each number of names; two tars have one index."""
    tars.append(tar(tmp_path / "twin.tar", captions(0, 2)))
    out, whole, rename = tmp_path / "set", tmp_path / "whole", os.rename
    index_set(tars, "caption", whole)
    child = os.fork()
    if child == 0:
        done = []

        def die(source, target):
            if len(done) == given:
                os._exit(9)
            done.append(rename(source, target))

        monkeypatch.setattr(os, "rename", die)
        index_set(tars, "caption", out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not (out / "manifest.json").exists()
    monkeypatch.setattr(scans, "scan_tar", lambda *rest: pytest.fail("it was scanned already"))
    index_set(tars, "caption", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_a_file_that_has_the_name_of_an_index_stays(tmp_path, tars):
    out = tmp_path / "set"
    out.mkdir()
    for name in ("index-000001.arrow", "shards.arrow"):
        (out / name).write_bytes(b"the user's")
        with pytest.raises(ValueError, match=f"{out / name} exists: choose another --out"):
            index_set(tars, "caption", out)
        assert names(out) == [name]
        (out / name).unlink()


def test_a_shard_on_a_full_disk(tmp_path, full):
    with pytest.raises(OSError, match="No space left on device: '.*/set/.partial/shard-000000.tar'"):
        with ShardWriter(tmp_path / "set", "caption") as writer:
            writer.write("a", {"json": b"{}"})
    assert names(tmp_path / "set") == []


def test_a_shard_whose_disk_is_full_while_it_is_written(tmp_path):
    """Then closing it fails too, for what it holds cannot be written."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large: '.*/set/.partial/shard-000000.tar'"):
            with ShardWriter(tmp_path / "set", "caption") as writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
                for key in "abcdefgh":
                    writer.write(key, {"json": bytes(3000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(tmp_path / "set") == []


INTERRUPTED = """
import pathlib, signal, sys, time
from dsvlm.data.scans import each

def scan(shard):
    pathlib.Path(shard).touch()
    time.sleep(100)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this is run in the background
    try:
        each(scan, sys.argv[1:], workers=2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
"""


def test_workers_end_at_ctrl_c_without_a_word(tmp_path):
    (tmp_path / "job.py").write_text(INTERRUPTED)
    shards = [tmp_path / str(number) for number in range(6)]
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py", *shards], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (shards[0].exists() and shards[1].exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    assert job.communicate(timeout=30)[1] == "interrupted\n"
    assert not shards[5].exists()
