"""The header of a shard set: `manifest.json` (a few lines) and `shards.arrow` (one row per shard)."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from dsvlm.data.fields import shortened

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS = "shards.arrow"
INDEXED = "index"                 # in `preprocessing`: shards of another tool, how they are read, and where they lie
SHOWN = 12                        # shard sets that a message names
URL = re.compile(r"[a-z][a-z0-9+.-]*://")
HEADER = {"type": str, "samples": int, "shards": int, "shards_sha256": str, "members": list, "preprocessing": dict}
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
    url: str | None = None            # where the set lies, when `path` is only a copy of its small files

    def shard(self, number: int) -> str:
        """Path or URL of a shard."""
        name = self.names[number]
        if is_url(name):
            return name
        if self.url is None:
            return os.path.normpath(self.path / name)
        scheme, path = f"{self.url}/{name}".split("://", 1)
        return f"{scheme}://{os.path.normpath(path) if '..' in name else path}"

    def index(self, number: int) -> Path:
        """Path of a shard's index: beside a shard that lies in the directory itself, numbered for others."""
        return self.path / index_name(self.names[number], number)

    @property
    def mapping(self) -> dict | None:
        """How shards of another tool become records (`fields`, `image`); None for our own."""
        return self.preprocessing.get(INDEXED)

    @cached_property
    def is_parquet(self) -> bool:
        """Whether the shards are parquet files; those of one set are of one kind."""
        return any(map(is_parquet, self.names))

    @property
    def image(self) -> str | None:
        """The member that is a sample's image, where that is stated; else it is the first that is one."""
        named = (self.mapping or {}).get("image")
        return "image" if named and self.is_parquet else named


def is_parquet(name: str) -> bool:
    """Whether a path or URL, its query left out, is that of a parquet file."""
    return name.partition("?")[0].lower().endswith(".parquet")


def is_url(name: str) -> bool:
    """Whether a shard is read through fsspec."""
    return URL.match(name) is not None


def index_name(name: str, number: int) -> str:
    """Name of the index of a shard, in the directory of its manifest."""
    return f"index-{number:06d}.arrow" if "/" in name else str(Path(name).with_suffix(".arrow"))


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


def join(root: str, name: str) -> str:
    """A path or URL below a directory that may be a URL itself."""
    if is_url(name):
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else os.path.join(root, name)


def load_manifest(directory, cache: str = "") -> Manifest:
    """Read the manifest of a shard set; ValueError when it is missing, damaged or of another format.

    directory: path or URL; of a URL the small files are copied to `cache` (a directory on the node).
    """
    if is_url(str(directory)):
        from dsvlm.data.remote import download, mirror

        url = str(directory).rstrip("/")
        copy = mirror(url, MANIFEST, cache)
        header = _header(copy / MANIFEST, (copy / MANIFEST).read_bytes())
        download(f"{url}/{SHARDS}", copy / SHARDS, header["shards_sha256"])
        manifest = replace(load_manifest(copy), url=url)
        _check_host(manifest)
        return manifest
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(_no_manifest(directory))
    data = path.read_bytes()
    header = _header(path, data)
    table = _shards(directory / SHARDS, header["shards_sha256"])
    manifest = Manifest(
        path=directory, type=header["type"], samples=header["samples"], members=tuple(header["members"]),
        preprocessing=header["preprocessing"], hash=hashlib.sha256(data).hexdigest(), sizes=tuple(table["samples"]),
        names=tuple(table["name"]), **{name: tuple(table[name]) for name in ("bytes", "sha256", "index_sha256")})
    if sum(manifest.sizes) != manifest.samples or len(manifest.sizes) != header["shards"]:
        raise ValueError(f"{path}: {manifest.samples} samples in {header['shards']} shards, but {SHARDS} lists "
                         f"{sum(manifest.sizes)} in {len(manifest.sizes)}: copy both files again")
    if manifest.samples < 1:
        raise ValueError(f"{path}: {manifest.samples} samples: an empty shard set cannot be trained on; convert the "
                         f"data again")
    _check_names(manifest)
    return manifest


def _header(path: Path, data: bytes) -> dict:
    """The manifest, each of whose values is of its kind."""
    try:
        header = json.loads(data)
        found = header["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}): convert the data again") from error
    if found != FORMAT:
        raise ValueError(f"{path}: format {shortened(found)}, this version reads format {FORMAT}: convert the data "
                         f"again")
    for key, kind in HEADER.items():
        if not isinstance(header.get(key), kind) or isinstance(header[key], bool):
            raise ValueError(f"{path}: {key!r} is {shortened(header.get(key))}, not {kind.__name__}: convert the data "
                             f"again")
    wrong = next((member for member in header["members"] if not isinstance(member, str)), None)
    if wrong is not None:
        raise ValueError(f"{path}: 'members' has {shortened(wrong)}, not an extension: convert the data again")
    return header


def check_files(manifest: Manifest, remote: bool = True) -> None:
    """Every shard is there with its recorded size, and its index (stat only); ValueError names the first missing.

    remote: look at shards with a URL too (one request each, several at a time).
    """
    shards = [manifest.shard(number) for number in range(len(manifest.names))]
    found = _sizes([shard for shard in shards if remote or not is_url(shard)])
    for number, (shard, size) in enumerate(zip(shards, manifest.bytes, strict=True)):
        if shard not in found:
            continue
        if found[shard] is None:
            raise ValueError(f"shard {shard} is missing ({size} bytes expected): copy it again, or convert again")
        if found[shard] != size:
            raise ValueError(f"shard {shard}: {size} bytes expected, {found[shard]} found: the copy is incomplete or "
                             f"the file was changed; copy it again, and see `dsvlm data verify {manifest.path}`")
        if manifest.url is None and not manifest.index(number).is_file():
            raise ValueError(f"index {manifest.index(number)} is missing: copy it again")


def _sizes(shards: list[str]) -> dict[str, int | None]:
    """Bytes of each shard, None = it is not there."""
    found = {shard: os.path.getsize(shard) if os.path.isfile(shard) else None for shard in shards if not is_url(shard)}
    urls = [shard for shard in shards if is_url(shard)]
    if urls:
        from dsvlm.data.remote import sizes

        found |= sizes(urls)
    return found


def _check_names(manifest: Manifest) -> None:
    """They lie in the set's directory, unless it names itself an index of files elsewhere; a program is never run.

    Such a set may name any file its reader may read, as a symbolic link may: take it from those you trust.
    """
    mapping = manifest.preprocessing.get(INDEXED, {"fields": {}})
    fields, image = (mapping.get("fields"), mapping.get("image")) if isinstance(mapping, dict) else (mapping, None)
    if not isinstance(fields, dict) or not all(isinstance(place, str) for place in fields.values()):
        raise ValueError(f"{manifest.path / MANIFEST}: preprocessing.{INDEXED}.fields is {shortened(fields)}, not "
                         f"record keys with their places: index the shards again")
    if not isinstance(image, str | None):
        raise ValueError(f"{manifest.path / MANIFEST}: preprocessing.{INDEXED}.image is {shortened(image)}, not an "
                         f"extension or column: index the shards again")
    ours = manifest.mapping is None
    for name in manifest.names:
        parts = name.split("/")
        away = is_url(name) or name.startswith("/") or ".." in parts
        runs = "::" in name or name.startswith("pipe:")
        if not name or runs or "\0" in name or (ours and (away or manifest.is_parquet)):
            raise ValueError(f"{manifest.path / SHARDS}: shard name {name!r} leaves the directory: only sets such as "
                             f"`dsvlm data index --out` makes may name files elsewhere, and none may name programs")


def _check_host(manifest: Manifest) -> None:
    """A set at a URL is somebody else's: it names nothing but files of its own host."""
    host = manifest.url.split("/")[:3]
    for name in manifest.names:
        if name.startswith("/") or (is_url(name) and name.split("/")[:3] != host):
            raise ValueError(f"{manifest.url}/{SHARDS}: shard name {name!r} is no file of {'/'.join(host)}: index the "
                             f"shards yourself with `dsvlm data index --out`")


def _shards(path: Path, expected: str) -> dict[str, list]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it again")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: sha256 {expected} expected by {MANIFEST}, {found} found: "
                         f"the two files are of different conversions or damaged; copy both again")
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a table ({error}): convert the data again") from error
    for name, kind in zip(SHARDS_SCHEMA.names, SHARDS_SCHEMA.types, strict=True):
        found = str(table.schema.field(name).type) if table.column_names.count(name) == 1 else "absent"
        if found != str(kind) or table.column(name).null_count:
            raise ValueError(f"{path}: column {name!r} is {found}{' with nulls' * (found == str(kind))}, not {kind}: "
                             f"convert the data again")
    return table.to_pydict()


def _no_manifest(directory: Path) -> str:
    if not directory.is_dir():
        return f"no directory {directory}: give the directory of a shard set"
    inside = sorted(str(p.parent) for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}") for p in directory.glob(pattern))
    more = f", ... ({len(inside)} in all)" if len(inside) > SHOWN else ""
    hint = f"did you mean one of {', '.join(inside[:SHOWN])}{more}?" if inside else "make one with `dsvlm data convert`"
    return f"{directory} holds no {MANIFEST}, so it is no (complete) shard set: {hint}"
