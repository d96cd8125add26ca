"""The header of a shard set: `manifest.json` (a few lines) and `shards.arrow` (one row per shard)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS = "shards.arrow"
SHOWN = 12                        # shard sets that a message names
SHARDS_SCHEMA = pa.schema([("name", pa.utf8()), ("samples", pa.uint32()), ("bytes", pa.uint64()),
                           ("sha256", pa.utf8()), ("index_sha256", pa.utf8())])


@dataclass(frozen=True)
class Manifest:
    """One shard set, as its manifest states it; the tuples have one item per shard, in sample order."""

    path: Path
    type: str
    samples: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]            # samples of each shard
    bytes: tuple[int, ...]
    sha256: tuple[str, ...]
    index_sha256: tuple[str, ...]
    members: tuple[str, ...]
    preprocessing: dict
    hash: str                         # sha256 of manifest.json: the identity of the data


def arrow_bytes(table: pa.Table) -> bytes:
    """The table as an uncompressed Arrow IPC file of one record batch: the same table, the same bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def manifest_bytes(task_type: str, shards: list[dict], members, preprocessing: dict) -> tuple[bytes, bytes]:
    """The bytes of (`shards.arrow`, `manifest.json`); `shards` are rows of `SHARDS_SCHEMA`."""
    table = arrow_bytes(pa.Table.from_pylist(shards, schema=SHARDS_SCHEMA))
    header = {
        "format": FORMAT, "type": task_type, "samples": sum(s["samples"] for s in shards),
        "bytes": sum(s["bytes"] for s in shards), "shards": len(shards),
        "shards_sha256": hashlib.sha256(table).hexdigest(),
        "preprocessing": preprocessing, "members": sorted(members),
    }
    return table, (json.dumps(header, sort_keys=True, indent=1) + "\n").encode("ascii")


def load_manifest(directory) -> Manifest:
    """Read the manifest of a shard set; ValueError when it is missing, damaged or of another format."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(_no_manifest(directory))
    data = path.read_bytes()
    try:
        header = json.loads(data)
        found = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}): convert the data again") from error
    if found != FORMAT:
        raise ValueError(f"{path}: format {found!r}, this version reads format {FORMAT}: convert the data again")
    table = _shards(directory / SHARDS, header["shards_sha256"])
    manifest = Manifest(
        path=directory, type=header["type"], samples=header["samples"], members=tuple(header["members"]),
        preprocessing=header["preprocessing"], hash=hashlib.sha256(data).hexdigest(), sizes=tuple(table["samples"]),
        names=tuple(table["name"]), **{name: tuple(table[name]) for name in ("bytes", "sha256", "index_sha256")})
    if sum(manifest.sizes) != manifest.samples or len(manifest.sizes) != header["shards"]:
        raise ValueError(f"{path}: {manifest.samples} samples in {header['shards']} shards, but {SHARDS} lists "
                         f"{sum(manifest.sizes)} in {len(manifest.sizes)}: copy both files again")
    return manifest


def check_files(manifest: Manifest) -> None:
    """Every shard is there with its recorded size, and its index (stat only); ValueError names the first missing."""
    for name, size in zip(manifest.names, manifest.bytes, strict=True):
        shard = manifest.path / name
        if not shard.is_file():
            raise ValueError(f"shard {shard} is missing ({size} bytes expected): copy it again, or convert again")
        found = shard.stat().st_size
        if found != size:
            raise ValueError(f"shard {shard}: {size} bytes expected, {found} found: the copy is incomplete or the file "
                             f"was changed; copy it again, and see `dsvlm data verify {manifest.path}`")
        if not shard.with_suffix(".arrow").is_file():
            raise ValueError(f"index {shard.with_suffix('.arrow')} is missing: copy it again")


def _shards(path: Path, expected: str) -> dict[str, list]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it again")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: sha256 {expected} expected by {MANIFEST}, {found} found: "
                         f"the two files are of different conversions or damaged; copy both again")
    return pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pydict()


def _no_manifest(directory: Path) -> str:
    if not directory.is_dir():
        return f"no directory {directory}: give the directory of a shard set"
    inside = sorted(str(p.parent) for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}") for p in directory.glob(pattern))
    more = f", ... ({len(inside)} in all)" if len(inside) > SHOWN else ""
    hint = f"did you mean one of {', '.join(inside[:SHOWN])}{more}?" if inside else "make one with `dsvlm data convert`"
    return f"{directory} holds no {MANIFEST}, so it is no (complete) shard set: {hint}"
