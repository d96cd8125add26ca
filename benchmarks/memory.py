"""Row g: memory of the loader's worker processes over epochs, in a process of its own."""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.contest import planned_run
from benchmarks.inputs import PIXELS
from benchmarks.measure import Row, children, progress, pss_mb

GROWTH = 0.05  # of the memory after one epoch
WORKERS, BATCH = 2, 32
INDEX_LIMIT = 200  # MB


def measure_memory(root: Path, epochs: tuple[int, ...] = (1, 5, 10)) -> list[Row]:
    """PSS of each worker after some epochs of the questions' set, caches off, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", str(root), *map(str, epochs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    found = {int(epoch): sizes for epoch, sizes in json.loads(done.stdout.splitlines()[-1]).items()}
    rows = [
        Row("g", f"memory (PSS) of a worker after {epoch} epoch{'s' * (epoch > 1)}", max(sizes), "MB", min(sizes),
            max(sizes))
        for epoch, sizes in found.items()
    ]  # fmt: skip
    first, last = (max(found[epoch]) for epoch in (min(found), max(found)))
    growth = last / first - 1
    goal = {"goal": f"<= {GROWTH:.0%}", "met": growth <= GROWTH}
    return [*rows, Row("g", f"growth from {min(found)} to {max(found)} epochs", 100 * growth, "%", **goal)]


def measure_index(samples: int) -> list[Row]:
    """What the index of a large set costs a process of its own memory, and what a node's workers share of the files."""
    command = [sys.executable, "-m", "benchmarks.index_memory", "--samples", str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    own = max(one["own_mib"] for one in found)
    pages = max(one["mib_after"]["Rss"] - one["mib_after"]["Anonymous"] for one in found)
    note = f"and {pages:.0f} MB of mapped files at most, the page cache's, shared by the node's processes"
    what = f"memory of its own that a worker needs for an index of {samples:,} samples"
    return [Row("g", what, own, "MB", goal="< 200 MB", met=own < INDEX_LIMIT, note=note)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("root", type=Path)
    parser.add_argument("epochs", type=int, nargs="+")
    args = parser.parse_args()
    from dsvlm.data.tokenizer import load_tokenizer
    from dsvlm.train.build import make_loader

    planned = planned_run(args.root, ["vqa"], WORKERS, BATCH)
    stream = planned.schedule.streams[0]
    loader = make_loader(planned, load_tokenizer(args.root / "tokenizer", 8), PIXELS, 0, 1)
    found, step = {}, 0
    for epoch in range(1, max(args.epochs) + 1):
        while step * stream.samples < epoch * stream.size:
            for _ in loader.batches(loader.window(step), [1.0]):
                pass
            step += 1
        gc.collect()
        if epoch in args.epochs:
            found[epoch] = [pss_mb(pid) for pid in children(os.getpid())]
            progress(f"epoch {epoch}: workers {found[epoch]} MB, trainer {pss_mb(os.getpid()):.0f} MB")
    loader.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
