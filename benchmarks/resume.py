"""Rows d and e: what a resume needs: bytes of state, and time to the first batch at 99 % of 1 000 000 000 samples."""

import hashlib
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.contest import planned_run
from benchmarks.inputs import PIXELS
from benchmarks.measure import Row, progress, spread
from dsvlm.data.index import ShardIndex
from dsvlm.data.manifest import MANIFEST, SHARDS, arrow_bytes, load_manifest, manifest_bytes
from dsvlm.schedule.controller import Controlled, State, rounded, score

TASKS = 64
STATE_LIMIT = 1024  # bytes


def measure_state(root: Path, work: Path) -> list[Row]:
    """Bytes of what a checkpoint of a run of many tasks holds besides tensors, without and with a controller."""
    from dsvlm.schedule.plan import SCHEDULE_VERSION
    from dsvlm.train.build import hash_of, manifest_record
    from dsvlm.train.checkpoint import RunState, begin

    rows = []
    for controller in (None, {"kind": "stop_and_go"}):
        task = {"type": "caption", "shards": "caption", "samples": 8}
        changed = {
            "tasks": {f"task{number}": task for number in range(TASKS)}, "data": {"shared_shards": True},
            "schedule": {"controller": controller},
        }  # fmt: skip
        planned = planned_run(root, [], 0, 32, changed)
        if control := planned.plan.control:
            control.state = unlike(control, 10**6, np.random.default_rng(0))
        state = RunState(
            10**6, 2**31, planned.identity.hex(), SCHEDULE_VERSION, hash_of(manifest_record(planned.manifests)),
            10**4, 10**9, control.pack() if control else "",
        )  # fmt: skip
        begin(work / "state", state)
        size = (work / "state" / "state.json").stat().st_size
        what = f"state in a checkpoint, {TASKS} tasks" + (" under stop-and-go, none alike" if control else "")
        rows.append(Row("d", what, size, "bytes", goal="< 1 KB", met=size < STATE_LIMIT))
    return rows


def unlike(control: Controlled, steps: int, drawn: np.random.Generator) -> State:
    """A state under stop-and-go with fields drawn evenly from all that they can be; losses from 0.0001 to 100."""
    rules, tasks = control.controller, control.state.tasks.copy()
    costs = 1 + np.exp(drawn.uniform(np.log(1e-4), np.log(1e2), (2, len(tasks))))
    tasks["gap"] = drawn.choice([1, rules.gap], len(tasks))
    tasks["turn"] = drawn.integers(0, tasks["gap"])
    before, units = control.taken.cursors(steps), np.gcd.reduce(control.taken.shares)
    tasks["cursor"] = before - drawn.integers(0, before * (rules.gap - 1) // rules.gap // units) * units
    tasks["cost"], tasks["best"] = rounded(costs[0], control.cost_bits), score(costs[1])
    tasks["bad"] = drawn.integers(0, rules.patience + 1, len(tasks))
    tasks["cooldown"] = drawn.integers(0, rules.cooldown + 1, len(tasks))
    return State(steps, tasks)


def make_huge(source: Path, target: Path, shards: int, samples: int) -> Path:
    """A shard set of shards x samples: every shard is a link to one real tar, its index names the tar's samples again.

    To plan, reader and loader it is a set like any other, with every file in its place.
    """
    if (target / MANIFEST).exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    small = load_manifest(source)
    tar = small.path / small.names[0]
    table = ShardIndex(tar.with_suffix(".arrow")).table
    copies = -(-samples // table.num_rows)
    index = arrow_bytes(pa.concat_tables([table] * copies).slice(0, samples).combine_chunks())
    first = target / "index"
    first.write_bytes(index)
    row = {"samples": samples, "bytes": small.bytes[0], "index_sha256": hashlib.sha256(index).hexdigest()}
    names = [f"shard-{number:06d}.tar" for number in range(shards)]
    for name in names:
        (target / name).symlink_to(tar.resolve())
        (target / name).with_suffix(".arrow").symlink_to("index")
    # Checksums of the tars are made up: a shard that is listed twice would be refused.
    rows = [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **row} for name in names]
    listed, header = manifest_bytes("caption", rows, small.members, {})
    (target / SHARDS).write_bytes(listed)
    (target / MANIFEST).write_bytes(header)
    return target


def measure_resume(root: Path, repeats: int, shards: int, samples: int) -> list[Row]:
    """Seconds to the first batch at the start, in the middle and at 99 % of an epoch.

    From constructed objects: manifests are read and the loader's workers are up, but no step was asked for and no shard
    or index was opened. From the recipe: everything that a start does after its imports, workers started too.
    """
    from dsvlm.data.tokenizer import load_tokenizer
    from dsvlm.train.build import make_loader

    make_huge(root / "caption", root / f"huge-{shards}-{samples}", shards, samples)
    codec = load_tokenizer(root / "tokenizer", 8)
    huge = f"huge-{shards}-{samples}"
    found: dict[float, list[float]] = {0.0: [], 0.5: [], 0.99: []}
    whole: list[float] = []
    for repeat in range(repeats):
        for share, seconds in found.items():
            begin = time.perf_counter()
            planned = planned_huge(root, huge)
            loader = make_loader(planned, codec, PIXELS, 0, 1)
            step = int(planned.manifests["huge"].samples * share) // planned.schedule.streams[0].samples
            wait_for_workers(loader)
            start = time.perf_counter()
            next(loader.batches(loader.window(step), [1.0]))
            seconds.append(time.perf_counter() - start)
            if share == 0.99:
                whole.append(time.perf_counter() - begin)
            loader.close()
        progress(f"{repeat + 1}/{repeats} resume at 99 %: {found[0.99][-1]:.3f} s")
    total = shards * samples
    rows = [
        spread("e", f"first batch at {share:.0%} of an epoch of {total:,} samples", seconds, "s")
        for share, seconds in found.items()
    ]
    met = statistics.median(found[0.99]) <= 1.0
    rows[-1] = replace(rows[-1], goal="<= 1 s", met=met, note="objects made, no shard opened yet")
    return [*rows, spread("e", "the same at 99 %, from the recipe", whole, "s", note="manifest, file check, workers")]


def planned_huge(root: Path, directory: str):
    task = {"type": "caption", "shards": directory, "samples": 256}
    return planned_run(root, [], 2, 32, {"tasks": {"huge": task}})


def wait_for_workers(loader) -> None:
    """Until every worker process has imported what it needs."""
    words = getattr(loader.pool, "words", None)
    while words is not None and (words < 0).any():
        loader.pool.poll(0.01)
