"""Worker processes: the same bytes whatever their number, and whatever befalls them; nothing is left behind."""

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from dsvlm.data.jobs import Job
from dsvlm.data.reader import ShardReader
from dsvlm.data.remote import RemoteError
from dsvlm.data.serve import LENGTH, Server
from tests.data.deadly import Deadly, DeadlyText, DeadlyTexts, Patient, Unusable
from tests.data.loading import everything, loader_of, scenes, with_reader
from tests.train.test_faults import damage

STEPS = range(3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = scenes(tmp_path_factory.mktemp("workers"))
    damage(root, "question", 3, "png")
    damage(root, "locate", 5, "json")
    return root


@pytest.fixture(scope="module")
def alone(root):
    return loader_of(root)


@pytest.fixture(scope="module")
def expected(alone):
    return everything(alone, STEPS)


@pytest.fixture
def loading(root, alone):
    """Makes loaders with workers, and closes them."""
    made = []

    def make(kind=None, workers=2, **changes):
        if kind is None:
            made.append(loader_of(root, alone.codec, data__workers=workers, **changes))
        else:
            made.append(with_reader(alone, kind, workers, **changes))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def pids(loader) -> list[int]:
    return [process.pid for process in loader.pool.processes]


@pytest.mark.parametrize("workers, cache", [(1, 0), (2, 1), (5, 0)])
def test_their_number_changes_nothing(loading, expected, workers, cache):
    loader = loading(workers=workers, data__cache_mb=cache)
    assert everything(loader, STEPS) == expected and not loader.take_events()
    assert everything(loader, [2, 0, 1]) == [*expected[-len(expected) // 3 :], *expected[: len(expected) * 2 // 3]]


@pytest.mark.parametrize("changes", [{"encoder_decoder": True}, {"max_length": 18}])
def test_other_texts_are_the_same_from_them_too(alone, loading, changes):
    ours = with_reader(alone, ShardReader, 0, **changes)
    assert everything(loading(ShardReader, **changes), STEPS) == everything(ours, STEPS)
    drafts = ours.window(0).drafts
    assert any(draft.text.count for draft in drafts)
    assert any(draft.reason for draft in drafts) == ("max_length" in changes)


def test_one_that_is_killed_or_stopped_is_replaced_at_the_same_unit(loading, expected):
    loader, before = loading(data__worker_timeout=1), []

    def befall(loader, step):
        before.extend(pids(loader))
        if step == 0:
            loader.pool.processes[0].kill()
            loader.pool.processes[0].wait()
        if step == 1:
            for pid in pids(loader):
                os.kill(pid, signal.SIGSTOP)

    # Small windows are read ahead whole: what is asked for is dropped, so that something is asked of the workers.
    assert everything(forgetful(loader), STEPS, befall) == expected
    killed, stopped = loader.take_events()
    assert killed["event"] == stopped["event"] == "workers restarted" and killed["rank"] == 0
    assert "signal 9" in killed["reason"] and "1 seconds (data.worker_timeout)" in stopped["reason"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in before if pid not in pids(loader))
    assert not loader.take_events()


def forgetful(loader):
    window = loader.window

    def forgetting(step):
        loader.forget()
        found = window(step)
        loader.forget()
        del found.asked[:]
        return found

    loader.window = forgetting
    return loader


@pytest.mark.parametrize("kind, cause", [(Deadly, "signal 9"), (DeadlyText, "data.worker_timeout")])
def test_a_sample_that_ends_workers_is_masked_in_place(loading, expected, kind, cause):
    loader = loading(kind, worker_timeout=1)
    found = everything(loader, STEPS)
    where = loader.sources[0].reader.where(5)
    events = loader.take_events()
    assert [event["reason"].count(where) for event in events] == [1, 1]
    journal, known = ([line for entry in e if isinstance(entry, tuple) for line in entry[2]] for e in (found, expected))
    new = [line for line in journal if line not in known]
    assert {line["where"] for line in new} == {where} and all(cause in line["reason"] for line in new)
    assert [line for line in journal if line["where"] != where] == [line for line in known if line["where"] != where]
    changed = [a != b for a, b in zip(found, expected, strict=True) if isinstance(a, str)]
    assert 0 < sum(changed) <= 2 and len(new) == 2  # three windows are a little less than two epochs


def test_any_number_of_them_in_one_job_is_masked(loading):
    """Without an answer in between, for the only job there is ends with the last of them."""
    loader = loading(DeadlyTexts, workers=1)
    window = loader.window(0)
    deadly = [draft for draft in window.drafts if draft.task == 0]
    assert len({draft.sample for draft in deadly}) > 1
    assert [draft for draft in window.drafts if "ends workers" in (draft.reason or "")] == deadly


def test_a_cached_text_keeps_nothing_of_the_others(loading):
    loader = loading(workers=1, data__cache_mb=1)
    loader.window(0)
    texts = [text for (kind, *_), text in loader.cache.items.items() if kind == "text" and text.row]
    assert texts and all(text.row.ids.base is None for text in texts)


def test_waiting_for_a_store_is_no_hang_and_holds_up_nothing_else(loading, expected):
    loader = loading(Patient, workers=1, worker_timeout=1)
    found = everything(loader, STEPS)
    assert found == expected and not loader.take_events()


def test_workers_that_never_answer_end_the_run_with_one_message(loading, capfd):
    with pytest.raises(ValueError, match=r"exit code 1.*4th time.*data\.workers: 0"):
        loading(Unusable, workers=1).window(0)
    assert "this reader cannot be made" in capfd.readouterr().err


def test_what_stops_a_run_is_raised_here(root, loading, tmp_path):
    other = shutil.copytree(root, tmp_path / "data")
    loader = loader_of(other, data__workers=1)
    (other / "train/locate/shard-000000.tar").unlink()
    with pytest.raises(ValueError, match="cannot open shard .*copy it again"):
        loader.window(0)
    loader.close()
    loader.close()


def test_memory_does_not_grow_and_nothing_is_left(loading):
    loader = loading(workers=1)
    [pid] = pids(loader)

    def epochs(first, last):
        for step in range(12 * first // 4, 12 * last // 4):
            for batch in loader.batches(loader.window(step), [1.0, 1.0]):
                del batch
        # Without files: what is counted of shared libraries depends on who else has just started or ended.
        lines = re.findall(r"Pss_(?:Anon|Shmem):\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
        assert len(lines) == 2
        return sum(map(int, lines))

    early, blocks = epochs(0, 2), loader.pool.blocks.size
    assert epochs(2, 12) <= 1.05 * early and loader.pool.blocks.size <= 1.5 * blocks
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    files = len(os.listdir("/proc/self/fd"))
    loader.close()
    assert not Path(f"/proc/{pid}").exists() and len(os.listdir("/proc/self/fd")) < files
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert "dsvlm.data.serve" not in children


@pytest.mark.parametrize("end", [lambda request: request.set_result(b""),
                                 lambda request: request.set_exception(RemoteError("gone"))])
def test_a_hint_is_answered_once_the_store_has_or_after_a_while(end, monkeypatch):
    """Texts and images that were asked for before would keep a worker waiting that has others to read."""
    class Hinted:
        def fetch(self, task, samples, step, after):
            return requests

    requests = [Future(), Future()]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.2)
        server = Server(0, None, theirs, None, Hinted())
        thread = threading.Thread(target=server.fetch, args=(7, Job("fetch", [(0, 3)], 5, after=[9])))
        thread.start()
        end(requests[0])
        with pytest.raises(TimeoutError):
            ours.recv(1)
        end(requests[1])
        thread.join(10)
        assert pickle.loads(ours.recv(1000)[LENGTH.size:]) == (7, [])
        requests.append(Future())                 # a disk that blocks
        monkeypatch.setattr("dsvlm.data.serve.PATIENCE", 0.01)
        server.fetch(8, Job("fetch", [(0, 3)], 5, after=[9]))
        assert pickle.loads(ours.recv(1000)[LENGTH.size:]) == (8, []) and not server.fetching
