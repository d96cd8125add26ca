"""Checking a shard set byte by byte: every damaged sample by name."""

import hashlib
from pathlib import Path

from dsvlm.data.index import ShardIndex, index_tar
from dsvlm.data.manifest import MANIFEST, SHARDS, Manifest, load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.transforms import decode_image

DECODED = 32          # pixels: the smallest side that still runs the whole decoder


def verify(directory, decode: bool = False, progress=None) -> dict:
    """Check sizes, sha256, the index against the tar, checksums, records and keys; with `decode` every image too.

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
        path = manifest.path / manifest.names[number]
        if not path.is_file():
            problems.append(f"shard {path.name} is missing")
        elif not problems:
            index = ShardIndex(path.with_suffix(".arrow"))
            problems += _check_shard(manifest, number)
            damaged = _check_samples(manifest, number, index, decode)
            problems += _check_tar(path, index, damaged)
            problems += _check_keys(path.name, index, keys)
            first = sum(manifest.sizes[:number])
            report["damaged"] += [{"sample": first + row, "shard": path.name, "key": index.key(row), "reason": reason}
                                  for row, reason in sorted(damaged.items())]
        report["problems"] += problems
    return report


def _check_index(manifest: Manifest, number: int) -> list[str]:
    path = (manifest.path / manifest.names[number]).with_suffix(".arrow")
    if not path.is_file():
        return [f"index {path.name} is missing"]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != manifest.index_sha256[number]:
        return [f"index {path.name}: sha256 {manifest.index_sha256[number]} expected, {found} found"]
    return []


def _check_shard(manifest: Manifest, number: int) -> list[str]:
    path, size, sha256 = manifest.path / manifest.names[number], manifest.bytes[number], manifest.sha256[number]
    problems = []
    if path.stat().st_size != size:
        problems.append(f"shard {path.name}: {size} bytes expected, {path.stat().st_size} found")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        problems.append(f"shard {path.name}: sha256 {sha256} expected, {found} found")
    return problems


def _check_samples(manifest: Manifest, number: int, index: ShardIndex, decode: bool) -> dict[int, str]:
    """Row -> what is wrong with the sample."""
    reader = ShardReader(manifest)
    first = sum(manifest.sizes[:number])
    damaged = {}
    for row in range(index.samples):
        try:
            reader.record(first + row)
            for extension in index.extensions:
                if index.member(row, extension) is not None:
                    reader.read(first + row, extension)
            image = reader.image(first + row)
            if decode and image is not None:
                decode_image(image, DECODED)
        except BadSample as error:
            damaged[row] = error.reason
    return damaged


def _check_tar(path: Path, index: ShardIndex, damaged: dict[int, str]) -> list[str]:
    """Scan the tar as a stranger would; rows that differ from the index join `damaged`."""
    try:
        table = index_tar(path)
    except ValueError as error:
        return [str(error)]
    if table.num_rows != index.samples:
        return [f"shard {path.name} holds {table.num_rows} samples, its index {index.samples}"]
    if table.column_names != index.table.column_names:
        return [f"shard {path.name} has columns {table.column_names}, its index {index.table.column_names}"]
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
