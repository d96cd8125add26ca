"""Row a: bytes of samples per second, nothing decoded; index and pread against the limit and against sequential tars."""

import os
import tarfile
from pathlib import Path

import numpy as np

from benchmarks.measure import Row, interleaved, rate, ratios, spread
from dsvlm.data.index import ShardIndex
from dsvlm.data.manifest import Manifest, load_manifest
from dsvlm.data.reader import ShardReader

MEMBERS = ("jpg", "json")


def measure_raw(directory: Path, repeats: int, samples: int) -> list[Row]:
    """Reads `samples` samples (image and record of each) of one set, from the page cache, in one process."""
    manifest = load_manifest(directory)
    order = np.random.default_rng(0).permutation(manifest.samples)[:samples].tolist()
    ranges, descriptors = bare_ranges(manifest, order)
    reader = ShardReader(manifest)
    contestants = {
        "pread": lambda: rate(lambda: read_bare(ranges)),
        "ours, random": lambda: rate(lambda: read_ours(reader, order)),
        "ours, sequential": lambda: rate(lambda: read_ours(reader, range(len(order)))),
        "tarfile": lambda: rate(lambda: read_tarfile(manifest, len(order))),
    }
    try:
        import webdataset

        contestants["webdataset"] = lambda: rate(lambda: read_webdataset(webdataset, manifest, len(order)))
    except ImportError:
        pass
    for run in contestants.values():
        run()  # warms page cache and indexes
    found = interleaved(contestants, repeats)
    for descriptor in descriptors:
        os.close(descriptor)
    return rows_of(found)


def rows_of(found: dict[str, list[float]]) -> list[Row]:
    names = {
        "pread": "bare pread of the same bytes, random order (limit)", "ours, random": "dsvlm reader, random order",
        "ours, sequential": "dsvlm reader, in order", "webdataset": "webdataset, in order",
        "tarfile": "tarfile of the standard library, in order",
    }  # fmt: skip
    rows = [spread("a", names[name], values, "samples/s") for name, values in found.items()]
    goals = [("pread", "share of bare pread", 0.9)]
    if "webdataset" in found:
        goals.append(("webdataset", "times webdataset", 6.0))
    for below, what, goal in goals:
        row = spread("a", f"dsvlm reader, random order: {what}", ratios(found, "ours, random", below), "")
        rows.append(Row(**row.to_dict() | {"goal": f">= {goal:g}", "met": row.value >= goal}))
    return rows


def bare_ranges(manifest: Manifest, order: list[int]) -> tuple[list[tuple[int, int, int]], list[int]]:
    """(descriptor, size, offset) of every member of the samples of an order, looked up beforehand."""
    starts = np.concatenate([[0], np.cumsum(manifest.sizes)])
    paths = [manifest.path / name for name in manifest.names]
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    indexes = [ShardIndex(path.with_suffix(".arrow")) for path in paths]
    ranges = []
    for sample in order:
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        for extension in MEMBERS:
            offset, size, _ = indexes[shard].member(sample - int(starts[shard]), extension)
            ranges.append((descriptors[shard], size, offset))
    return ranges, descriptors


def read_bare(ranges: list[tuple[int, int, int]]) -> int:
    pread = os.pread
    for descriptor, size, offset in ranges:
        pread(descriptor, size, offset)
    return len(ranges) // len(MEMBERS)


def read_ours(reader: ShardReader, order) -> int:
    for sample in order:
        for extension in MEMBERS:
            reader.read(sample, extension)
    return len(order)


def read_tarfile(manifest: Manifest, samples: int) -> int:
    members = 0
    for name in manifest.names:
        with tarfile.open(manifest.path / name, "r|") as tar:
            for member in tar:
                tar.extractfile(member).read()
                members += 1
                if members == samples * len(MEMBERS):
                    return samples
    return members // len(MEMBERS)


def read_webdataset(webdataset, manifest: Manifest, samples: int) -> int:
    """Raw bytes, shards in order: the fastest that webdataset has."""
    urls = [str(manifest.path / name) for name in manifest.names]
    count = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        assert sample["jpg"] and sample["json"]
        count += 1
        if count == samples:
            break
    return count
