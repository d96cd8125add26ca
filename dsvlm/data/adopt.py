"""Shard sets over files that other tools wrote: indexes and a manifest beside them, the files left as they are."""

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

from dsvlm.data.fields import choose_fields, make_record
from dsvlm.data.index import scan_tar
from dsvlm.data.manifest import INDEXED, MANIFEST, SHARDS, arrow_bytes, index_name, is_parquet, is_url, manifest_bytes
from dsvlm.data.shard import PARTIAL, check_free
from dsvlm.data.stream import LocalFile, Stream

TRIED = 100                       # samples that are tried with the fields before all shards are read
IMAGE_COLUMNS = ("image", "jpg", "png", "img")


def index_set(shards: list[str], task_type: str, out, fields: list[str] = (), image: str | None = None,
              progress=None) -> dict:
    """Write OUT/manifest.json, shards.arrow and an index per shard, so that the files train where they lie.

    shards: paths or URLs, all tars or all parquet files. fields: `KEY=PLACE`, see `choose_fields`. image: extension or
    column of the image; default: the only one there is. progress: callable(iterable, desc=str) -> iterable.
    Returns {"samples", "shards", "bytes", "members", "fields", "image", "hash"}. ValueError names what is wrong with a
    file, or with its fields; nothing stays in OUT then.
    """
    out = Path(out)
    check_free(out)
    shards = [str(shard) for shard in shards]
    parquet = [is_parquet(shard) for shard in shards]
    if any(parquet) and not all(parquet):
        raise ValueError("tars and parquet files in one shard set: index each kind to an --out of its own")
    names = [shard_name(shard, out) for shard in shards]
    indexes = [index_name(name, number) for number, name in enumerate(names)]
    for index in indexes:
        if indexes.count(index) > 1 or index == SHARDS or (out / index).exists():
            raise ValueError(f"{out / index} exists, or is the index of two shards: choose another --out")
    part = out / PARTIAL
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write = _index_parquets if all(parquet) else _index_tars
        rows, members, mapping = write(shards, part, task_type, list(fields), image, progress)
        for row, name, index in zip(rows, names, indexes, strict=True):
            row["name"] = name
            os.rename(part / row.pop("file"), out / index)
        table, header = manifest_bytes(task_type, rows, members, {INDEXED: {"version": 1} | mapping})
        (part / SHARDS).write_bytes(table)
        (part / MANIFEST).write_bytes(header)
        os.rename(part / SHARDS, out / SHARDS)
        os.rename(part / MANIFEST, out / MANIFEST)
    except BaseException:
        for name in (MANIFEST, SHARDS, *indexes):
            (out / name).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {"samples": sum(row["samples"] for row in rows), "shards": len(rows), "members": sorted(members),
            "bytes": sum(row["bytes"] for row in rows), "hash": hashlib.sha256(header).hexdigest()} | mapping


def shard_name(shard: str, out: Path) -> str:
    """The name of a shard in a manifest: relative when it lies below or next to `out`, else a full path, or the URL."""
    if "::" in shard or shard.startswith("pipe:"):
        raise ValueError(f"{shard}: a program cannot be read at random: stream it once into shards with "
                         f"`dsvlm data convert webdataset`")
    if is_url(shard):
        return shard
    path, out = Path(shard).resolve(), out.resolve()
    return os.path.relpath(path, out) if path.is_relative_to(out.parent) else str(path)


def _index_tars(shards, directory, task_type, fields, image, progress) -> tuple[list[dict], set[str], dict]:
    rows, members = [], set()
    for shard in shards if progress is None else progress(shards, desc="index"):
        stream = open_stream(shard)
        table = scan_tar(shard, stream, image)
        members |= {name.removesuffix(".offset") for name in table.column_names if name.endswith(".offset")}
        if not rows:
            _try_fields(shard, table, choose_fields(task_type, fields, members))
        rows.append(_write(directory, len(rows), table) | {"bytes": stream.size, "sha256": stream.sha256()})
    if image is not None and image not in members:
        raise ValueError(f"--image {image}: no sample has such a member; there are {', '.join(sorted(members))}")
    return rows, members, {"fields": choose_fields(task_type, fields, members), "image": image}


def _try_fields(shard: str, table, fields: dict[str, str]) -> None:
    """Of the first samples of the first shard one has to fit: the rest would take long to find that out."""
    file, reason = open_file(shard), ""

    def read(row: dict, extension: str) -> bytes:
        if not row[f"{extension}.offset"]:
            raise ValueError(f"sample {row['key']!r} has no {extension}")
        return file.read(row[f"{extension}.offset"], row[f"{extension}.size"])

    for row in table.slice(0, TRIED).to_pylist():
        try:
            make_record(fields, partial(read, row))
            return
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"{shard}: none of the first {TRIED} samples fits {fields}: {reason}; see --field")


def _index_parquets(shards, directory, task_type, fields, image, progress) -> tuple[list[dict], set[str], dict]:
    import pyarrow.parquet

    from dsvlm.data.parquet import RangeFile, index_parquet

    mapping, rows = None, []
    for shard in shards if progress is None else progress(shards, desc="index"):
        file = open_file(shard)
        if mapping is None:
            try:
                columns = pyarrow.parquet.read_schema(RangeFile(file)).names
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{shard} is not a parquet file ({error}): copy it again") from error
            image = image or next((name for name in IMAGE_COLUMNS if name in columns), None)
            mapping = {"fields": choose_fields(task_type, fields, columns, columns=True), "image": image}
        table = index_parquet(shard, file, mapping)
        rows.append(_write(directory, len(rows), table)
                    | {"bytes": file.size, "sha256": Stream(file.read, file.size).sha256()})
    return rows, {"json", "image"} if mapping["image"] else {"json"}, mapping


def _write(directory: Path, number: int, table) -> dict:
    """Write an index under a temporary name; what the manifest says of it."""
    data, name = arrow_bytes(table), f"{number}.arrow"
    with (directory / name).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"file": name, "samples": table.num_rows, "index_sha256": hashlib.sha256(data).hexdigest()}


def open_file(shard: str):
    """A shard at a path or URL: `size` and `read(offset, size)`; ValueError when there is none."""
    if is_url(shard):
        from dsvlm.data.remote import RemoteFile

        return RemoteFile(shard)
    if not os.path.isfile(shard):
        raise ValueError(f"no file {shard}")
    return LocalFile(Path(shard))


def open_stream(shard: str) -> Stream:
    """A shard at a path or URL, to be read once from start to end."""
    file = open_file(shard)
    return Stream(file.read, file.size)
