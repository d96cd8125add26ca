"""Checking a shard set byte by byte: every damaged sample by name."""

import hashlib
from pathlib import Path

import numpy as np

from dsvlm.data.index import ShardIndex, has_images, scan_tar
from dsvlm.data.manifest import MANIFEST, SHARDS, Manifest, is_url, load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.remote import download
from dsvlm.data.scans import open_file, open_stream
from dsvlm.data.stream import Stream
from dsvlm.data.transforms import decode_image

FETCHED = 256         # samples of a remote shard that are asked for together
DECODED = 32          # pixels: the smallest side that still runs the whole decoder


def verify(directory, decode: bool = False, progress=None) -> dict:
    """Check sizes, sha256, the index against the tar, checksums, records and keys; with `decode` every image too.

    A sample without an image is damaged where others have one, as training masks it.
    progress: callable(iterable, desc=str) -> iterable. Returns {"directory", "samples", "problems": [text],
    "damaged": [{"sample", "shard", "key", "reason"}]}; both lists are empty for a sound shard set.
    ValueError when there is nothing of a shard set in the directory.
    """
    report = {"directory": str(directory), "samples": 0, "problems": [], "damaged": []}
    try:
        manifest = load_manifest(directory)
    except ValueError as error:
        if not any(Path(directory, name).exists() for name in (MANIFEST, SHARDS)):
            raise ValueError(f"no shard set at {directory}: {error}") from None
        report["problems"].append(str(error))
        return report
    report["samples"] = manifest.samples
    keys: dict[str, str] = {}
    shards = range(len(manifest.names))
    for number in shards if progress is None else progress(shards, desc="verify"):
        problems = _check_index(manifest, number)
        name, stream = manifest.names[number], None
        try:
            stream = open_stream(manifest.shard(number))
        except (ValueError, OSError) as error:
            missing = not is_url(manifest.shard(number)) or "no file" in str(error)
            problems.append(f"shard {name} is missing" if missing else f"shard {name}: {error}")
        if not problems:
            index = ShardIndex(manifest.index(number), manifest.image)
            damaged = _check_samples(manifest, number, index, decode)
            found = _check_contents(manifest, number, stream, index, damaged)
            problems += _check_shard(manifest, number, stream) + found
            if manifest.mapping is None:          # shards of other tools may use a key again; ours never do
                problems += _check_keys(name, index, keys)
            first = sum(manifest.sizes[:number])
            report["damaged"] += [{"sample": first + row, "shard": name, "key": index.key(row), "reason": reason}
                                  for row, reason in sorted(damaged.items())]
        report["problems"] += problems
    return report


def _check_index(manifest: Manifest, number: int) -> list[str]:
    path = manifest.index(number)
    if manifest.url is not None:
        try:
            download(f"{manifest.url}/{path.name}", path, manifest.index_sha256[number])
        except ValueError as error:
            return [f"index {path.name}: {error}"]
    if not path.is_file():
        return [f"index {path.name} is missing"]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != manifest.index_sha256[number]:
        return [f"index {path.name}: sha256 {manifest.index_sha256[number]} expected, {found} found"]
    return []


def _check_shard(manifest: Manifest, number: int, stream: Stream) -> list[str]:
    name, size, sha256 = manifest.names[number], manifest.bytes[number], manifest.sha256[number]
    problems = []
    if stream.size != size:
        problems.append(f"shard {name}: {size} bytes expected, {stream.size} found")
    if stream.sha256() != sha256:
        problems.append(f"shard {name}: sha256 {sha256} expected, {stream.sha256()} found")
    return problems


def _check_samples(manifest: Manifest, number: int, index: ShardIndex, decode: bool) -> dict[int, str]:
    """Row -> what is wrong with the sample."""
    reader = ShardReader(manifest)
    first, images = sum(manifest.sizes[:number]), has_images(manifest)
    damaged = {}
    for row in range(index.samples):
        if row % FETCHED == 0:
            reader.fetch(np.arange(first + row, first + min(row + FETCHED, index.samples)), 0)
        try:
            reader.record(first + row)
            for extension in index.extensions:
                if index.member(row, extension) is not None:
                    reader.read(first + row, extension)
            image = reader.image(first + row)
            if image is None and images:          # training masks it
                raise BadSample("it has no image, and other samples of the set have")
            if decode and image is not None:
                decode_image(image, DECODED)
        except BadSample as error:
            damaged[row] = error.reason
    return damaged


def _check_contents(manifest: Manifest, number: int, stream: Stream, index: ShardIndex, damaged: dict) -> list[str]:
    """Scan the shard as a stranger would; rows that differ from the index join `damaged`."""
    name = manifest.names[number]
    try:
        if manifest.is_parquet:
            from dsvlm.data.parquet import index_parquet

            table = index_parquet(name, open_file(manifest.shard(number)), manifest.mapping)
        else:
            table = scan_tar(manifest.shard(number), stream, manifest.image)
    except ValueError as error:
        return [str(error)]
    if table.num_rows != index.samples:
        return [f"shard {name} holds {table.num_rows} samples, its index {index.samples}"]
    if table.column_names != index.table.column_names:
        return [f"shard {name} has columns {table.column_names}, its index {index.table.column_names}"]
    if not table.equals(index.table):
        for row, (found, expected) in enumerate(zip(table.to_pylist(), index.table.to_pylist(), strict=True)):
            if found != expected:
                differing = [f"{name} {expected[name]!r}, not {found[name]!r}"
                             for name in found if found[name] != expected[name]]
                damaged.setdefault(row, f"the index says {'; '.join(differing)}")
    return []


def _check_keys(shard: str, index: ShardIndex, keys: dict[str, str]) -> list[str]:
    """A key is unique in the whole set; `keys`: key -> the shard that holds it."""
    problems = []
    for row in range(index.samples):
        key = index.key(row)
        if key in keys:
            problems.append(f"key {key!r} is in {keys[key]} and in {shard}")
        keys.setdefault(key, shard)
    return problems


def describe(directory) -> dict:
    """What `dsvlm data info` prints: the manifest's header and the first record."""
    manifest = load_manifest(directory)
    try:
        first = ShardReader(manifest).record(0)
    except BadSample as error:
        first = {"damaged": str(error)}
    return {"directory": str(directory), "type": manifest.type, "samples": manifest.samples,
            "shards": len(manifest.names), "bytes": sum(manifest.bytes), "members": list(manifest.members),
            "hash": manifest.hash, "preprocessing": manifest.preprocessing,
            "first": first}
