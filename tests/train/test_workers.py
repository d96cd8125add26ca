"""A training whose data workers are killed and stopped: the same updates as without, and lines in the journal."""

import json
import os
import signal
import time
from pathlib import Path


def workers_of(pid: int) -> list[int]:
    """Data workers below a process."""
    children: dict[int, list[int]] = {}
    commands = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue  # it has just ended
        children.setdefault(parent, []).append(int(path.name))
    found, below = [], [pid]
    while below:
        for child in children.get(below.pop(), []):
            below.append(child)
            if "dsvlm.data.serve" in commands[child]:
                found.append(child)
    return found


def test_two_ranks_go_on_when_their_workers_die_or_hang(tiny, uninterrupted):
    output, start = tiny.directory / "workers", time.time()
    command = tiny.nproc(output)
    sets = ["data.workers=1", "data.cache_mb=0", "data.worker_timeout=2"]
    process = tiny.start([*command, *(word for value in sets for word in ("--set", value))])
    try:
        tiny.wait_for(output, 0, start, alive=lambda: process.poll() is None)
        first, second = workers_of(process.pid)
        os.kill(first, signal.SIGKILL)
        os.kill(second, signal.SIGSTOP)
    finally:
        code = tiny.finish(process)
    assert code == 0, tiny.log()
    assert tiny.rows(output) == uninterrupted
    events = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    assert sorted(event["rank"] for event in events) == [0, 1]
    assert all(event["event"] == "workers restarted" for event in events)
    assert len([event for event in events if "signal 9" in event["reason"]]) == 1
    assert not Path(f"/proc/{second}").exists()
