"""Row f: shards behind a simulated object store against the same shards on the local disk."""

import shutil
from pathlib import Path

from benchmarks import contest
from benchmarks.endtoend import BATCH, WORKERS
from benchmarks.measure import Row, interleaved, ratios, spread
from benchmarks.slow_store import PROTOCOL

SITE = "from benchmarks.slow_store import register\nregister()\n"


def measure_store(root: Path, work: Path, repeats: int, warm: int, timed: int) -> list[Row]:
    """Images per second with 2 workers and `block: 64`: local, and remote with an empty cache at every repeat.

    The store answers after 30 ms at 200 MB/s per stream; every byte is asked for once, since this is the first epoch.
    """
    site = work / "site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)  # every process, workers too, knows the store

    def local() -> float:
        return run(root, None, site, None, warm, timed)

    def remote() -> float:
        cache = work / "store-cache"
        shutil.rmtree(cache, ignore_errors=True)
        return run(root, f"{PROTOCOL}://{root}", site, cache, warm, timed)

    found = interleaved({"local": local, "remote": remote}, repeats)
    share = spread("f", "share of local throughput, first epoch", ratios(found, "remote", "local"), "")
    return [
        spread("f", "local shards, block 64", found["local"], "images/s"),
        spread("f", "object store (30 ms, 200 MB/s per stream), block 64, empty cache", found["remote"], "images/s"),
        Row(**share.to_dict() | {"goal": ">= 0.9", "met": share.value >= 0.9}),
    ]


def run(root: Path, url: str | None, site: Path, cache: Path | None, warm: int, timed: int) -> float:
    options = {"block": 64, "site": str(site)} | ({"url": url, "cache": str(cache)} if url else {})
    return contest.run(contest.OURS, root, workers=WORKERS, batch=BATCH, warm=warm, timed=timed, **options)["rate"]
