"""Row a: samples per second as bytes, nothing decoded: index and pread against the limit and sequential tars."""

import os
import tarfile
from pathlib import Path

import numpy as np

from benchmarks.measure import Row, interleaved, rate, ratios, spread
from dsvlm.data.checksum import crc32
from dsvlm.data.index import ShardIndex
from dsvlm.data.manifest import Manifest, load_manifest
from dsvlm.data.reader import ShardReader


def measure_raw(root: Path, repeats: int, samples: int) -> list[Row]:
    """Samples with image and record, and records alone, where what is done per sample weighs most."""
    return measure_set(root / "caption", repeats, samples) + measure_set(root / "text", repeats, samples)


def measure_set(directory: Path, repeats: int, samples: int) -> list[Row]:
    """Reads `samples` samples (every member of each) of one set, from the page cache, in one process."""
    manifest = load_manifest(directory)
    order = np.random.default_rng(0).permutation(manifest.samples)[:samples].tolist()
    ranges, descriptors = bare_ranges(manifest, order)
    reader, members = ShardReader(manifest), manifest.members
    contestants = {
        "pread": lambda: rate(lambda: read_bare(ranges) // len(members)),
        "unchecked": lambda: rate(lambda: read_ours(reader, members, order, check=False)),
        "pread and crc": lambda: rate(lambda: read_bare(ranges, crc32) // len(members)),
        "checked": lambda: rate(lambda: read_ours(reader, members, order)),
        "in order": lambda: rate(lambda: read_ours(reader, members, range(len(order)))),
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
    return rows_of(found, "records alone" if members == ("json",) else "336 px and record")


def rows_of(found: dict[str, list[float]], what_is_read: str) -> list[Row]:
    """Neither bare pread nor webdataset looks at what it read: the goals are for the reader without its checksums.

    Training always checks; what that costs is shown beside it.
    """
    names = {
        "pread": "bare pread of the same bytes, random order (limit)",
        "unchecked": "dsvlm reader, random order, checksums not compared",
        "pread and crc": "bare pread and crc32 of the same bytes",
        "checked": "dsvlm reader, random order, as in training",
        "in order": "dsvlm reader, in order, as in training", "webdataset": "webdataset, in order",
        "tarfile": "tarfile of the standard library, in order",
    }  # fmt: skip
    rows = [spread("a", f"{what_is_read}: {names[name]}", values, "samples/s") for name, values in found.items()]
    comparisons = [
        ("unchecked", "pread", "share of bare pread", 0.9),
        ("checked", "pread and crc", "with checksums, share of pread and crc32", None),
        ("checked", "pread", "with checksums, share of bare pread", None),
        ("unchecked", "webdataset", "times webdataset", 6.0),
        ("checked", "webdataset", "with checksums, times webdataset", None),
    ]  # fmt: skip
    images = "px" in what_is_read
    for above, below, what, goal in comparisons:
        if below in found:
            row = spread("a", f"{what_is_read}: dsvlm reader, random order, {what}", ratios(found, above, below), "")
            met = {} if goal is None or not images else {"goal": f">= {goal:g}", "met": row.value >= goal}
            rows.append(Row(**row.to_dict() | met))
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
        for extension in manifest.members:
            offset, size, _ = indexes[shard].member(sample - int(starts[shard]), extension)
            ranges.append((descriptors[shard], size, offset))
    return ranges, descriptors


def read_bare(ranges: list[tuple[int, int, int]], then=None) -> int:
    pread = os.pread
    if then is None:
        for descriptor, size, offset in ranges:
            pread(descriptor, size, offset)
    else:
        for descriptor, size, offset in ranges:
            then(pread(descriptor, size, offset))
    return len(ranges)


def read_ours(reader: ShardReader, members: tuple[str, ...], order, check: bool = True) -> int:
    for sample in order:
        for extension in members:
            reader.read(sample, extension, check)
    return len(order)


def read_tarfile(manifest: Manifest, samples: int) -> int:
    members = 0
    for name in manifest.names:
        with tarfile.open(manifest.path / name, "r|") as tar:
            for member in tar:
                tar.extractfile(member).read()
                members += 1
                if members == samples * len(manifest.members):
                    return samples
    return members // len(manifest.members)


def read_webdataset(webdataset, manifest: Manifest, samples: int) -> int:
    """Raw bytes, shards in order: the fastest that webdataset has."""
    urls = [str(manifest.path / name) for name in manifest.names]
    count = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        assert all(extension in sample for extension in manifest.members)
        count += 1
        if count == samples:
            break
    return count
