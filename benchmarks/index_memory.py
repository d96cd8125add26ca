"""Memory that a worker needs for the index of a large shard set: `python -m benchmarks.index_memory --samples 100e6`.

Writes the indexes (not the tars: 35 bytes and a key per sample) of a shard set with that many samples, then starts
processes that look samples up at random, as a worker does, and reads from /proc what is theirs alone (anonymous) and
what belongs to the page cache, which they share and which the kernel takes back when it needs it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from dsvlm.data.manifest import MANIFEST, SHARDS, arrow_bytes, load_manifest, manifest_bytes
from dsvlm.data.reader import ShardReader

FIELDS = ("Anonymous", "Pss", "Pss_File", "Rss")


def write_set(directory: Path, samples: int, shard_samples: int) -> None:
    """A shard set whose tars are empty: every file that a lookup touches is real."""
    rows, rng = [], np.random.default_rng(0)
    for number, start in enumerate(range(0, samples, shard_samples)):
        count = min(shard_samples, samples - start)
        sizes = rng.integers(20_000, 100_000, count, np.uint32)
        offsets = 512 + np.cumsum(sizes, dtype=np.uint64) - sizes
        columns = {"key": pa.array([f"{start + i:012d}" for i in range(count)]),
                   "width": np.full(count, 336, np.uint16), "height": np.full(count, 336, np.uint16),
                   "crc": rng.integers(0, 2**32, count, np.uint32)}
        for ext in ("jpg", "json"):
            columns |= {f"{ext}.offset": offsets, f"{ext}.size": sizes, f"{ext}.crc": columns["crc"]}
        index = arrow_bytes(pa.table(columns))
        name = f"shard-{number:06d}"
        (directory / f"{name}.arrow").write_bytes(index)
        (directory / f"{name}.tar").touch()
        rows.append({"name": f"{name}.tar", "samples": count, "bytes": 0, "sha256": "",
                     "index_sha256": hashlib.sha256(index).hexdigest()})
    table, header = manifest_bytes("caption", rows, {"json", "jpg"}, {})
    (directory / SHARDS).write_bytes(table)
    (directory / MANIFEST).write_bytes(header)


def memory() -> dict[str, float]:
    """MiB of this process by the kernel's account."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {field: round(found[field], 1) for field in FIELDS}


def look_up(directory: Path, lookups: int) -> dict:
    """Memory before and after a reader has looked samples up all over the set, as all processes have by then."""
    before = memory()
    reader = ShardReader(load_manifest(directory))
    rng = np.random.default_rng(1)
    for sample in rng.integers(0, len(reader), lookups).tolist():
        shard, row = reader._find(sample)
        shard.index.member(row, "jpg"), shard.index.member(row, "json"), reader.crc(sample)
    print("ready", flush=True)
    sys.stdin.readline()
    after = memory()
    return {"samples": len(reader), "lookups": lookups, "mib_before": before, "mib_after": after,
            "own_mib": round(after["Anonymous"] - before["Anonymous"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=5e6)
    parser.add_argument("--shard-samples", type=float, default=1e5)
    parser.add_argument("--lookups", type=float, default=5e4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(look_up(args.child, int(args.lookups))), flush=True)
        sys.stdin.read()                          # stays until the others have measured too
        return
    with tempfile.TemporaryDirectory() as directory:
        write_set(Path(directory), int(args.samples), int(args.shard_samples))
        command = [sys.executable, "-m", "benchmarks.index_memory", "--child", directory,
                   "--lookups", str(args.lookups)]
        children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                    for _ in range(args.processes)]
        for child in children:
            assert child.stdout.readline() == "ready\n", child.wait()
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            print(child.stdout.readline(), end="")
        for child in children:
            child.communicate()


if __name__ == "__main__":
    main()
