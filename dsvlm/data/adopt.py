"""Shard sets over files that other tools wrote: indexes and a manifest beside them, the files left as they are."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from dsvlm.data.fields import choose_fields, make_record, shortened
from dsvlm.data.files import write_file
from dsvlm.data.index import IMAGE_FORMATS, ShardIndex, image_size
from dsvlm.data.locks import writing
from dsvlm.data.manifest import (
    INDEXED,
    MANIFEST,
    SHARDS,
    SHARDS_SCHEMA,
    index_name,
    is_parquet,
    is_url,
    manifest_bytes,
)
from dsvlm.data.scans import Scan, Unfinished, check_distinct, each, open_file
from dsvlm.data.shard import PARTIAL, check_no_set

TRIED = 100                       # samples that are tried with the fields before all shards are read
TOGETHER = 16                     # shards that are tried at once: those at URLs are waited for
IMAGE_COLUMNS = ("image", "jpg", "png", "img")


def index_set(shards: list[str], task_type: str, out, fields: list[str] = (), image: str | None = None,
              progress=None, workers: int = 1) -> dict:
    """Write OUT/manifest.json, shards.arrow and an index per shard, so that the files train where they lie.

    shards: paths or URLs, all tars or all parquet files. fields: `KEY=PLACE`, see `choose_fields`. image: extension or
    column of the image; default: the only one that a sample of a tar has, or the first of IMAGE_COLUMNS. workers:
    processes that read shards; progress: callable(iterable, desc=str, total=int) -> iterable. The result is the same
    for any number of them.
    Returns {"samples", "shards", "bytes", "members", "gathered", "fields", "image", "hash"}; gathered: samples of tars
    with others between their members.
    ValueError names what is wrong with the fields or the image, when nothing stays in OUT, or every damaged shard, or
    all but the first that the fields do not fit: then OUT/.partial keeps what was made of the others, and the next
    call reads only those that are not there or have changed since.
    """
    out = Path(out)
    shards = [str(shard) for shard in shards]
    check_no_set(out)
    parquet = [is_parquet(shard) for shard in shards]
    if any(parquet) and not all(parquet):
        raise ValueError("tars and parquet files in one shard set: index each kind to an --out of its own")
    check_distinct(shards)
    names = [shard_name(shard, out) for shard in shards]
    indexes = [index_name(name, number) for number, name in enumerate(names)]
    scan_all = _scan_parquets if all(parquet) else _scan_tars
    part = out / PARTIAL
    try:
        with writing(out):
            try:
                check_no_set(out)                 # another process may have ended since
                _take_back(out, part)
                _check_indexes(out, indexes)
                part.mkdir(exist_ok=True)
                found, members, mapping = scan_all(shards, part, task_type, list(fields), image, partial(
                    each, workers=workers, progress=progress))
                header = _publish(out, task_type, names, indexes, found, members, mapping)
            except ValueError as error:
                if not isinstance(error, Unfinished):
                    shutil.rmtree(part, ignore_errors=True)
                raise
            finally:
                _remove_empty(part)
    finally:
        _remove_empty(out)
    return {"samples": sum(row["samples"] for row in found), "shards": len(found), "members": sorted(members),
            "gathered": sum(row["gathered"] for row in found),
            "bytes": sum(row["bytes"] for row in found), "hash": hashlib.sha256(header).hexdigest()} | mapping


def _take_back(out: Path, part: Path) -> None:
    """A call that was killed while it gave files their names has left some with theirs: they are kept as the others."""
    if not (part / MANIFEST).exists():
        return
    gone: dict[str, list[str]] = {}               # sha256 -> names in `part`; shards that are alike have one sha256
    for path in part.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):         # it was being written
            found = json.loads(path.read_bytes())
            is_set = path.name == MANIFEST
            sha256, name = (found["shards_sha256"], SHARDS) if is_set else (found["index_sha256"], found["file"])
            if not (part / name).exists():
                gone.setdefault(sha256, []).append(name)
    for path in out.glob("*.arrow"):
        if names := gone.get(hashlib.sha256(path.read_bytes()).hexdigest()):
            path.replace(part / names.pop())


def _check_indexes(out: Path, indexes: list[str]) -> None:
    """No file has a name that one of the set will get."""
    for index in indexes:
        if indexes.count(index) > 1 or index == SHARDS:
            raise ValueError(f"{out / index} is the index of two shards: choose another --out")
    for index in (*indexes, SHARDS):
        if (out / index).exists():
            raise ValueError(f"{out / index} exists: choose another --out")


def _publish(out: Path, task_type: str, names, indexes, found: list[dict], members, mapping: dict) -> bytes:
    """Give all files their names, the manifest last; returns its bytes."""
    part, named = out / PARTIAL, []
    try:
        rows = [row | {"name": name} for row, name in zip(found, names, strict=True)]
        columns = [{column: row[column] for column in SHARDS_SCHEMA.names} for row in rows]
        table, header = manifest_bytes(task_type, columns, members, {INDEXED: {"version": 1} | mapping})
        write_file(part / SHARDS, table)
        write_file(part / MANIFEST, header)
        files = [row["file"] for row in found]
        for file, name in zip((*files, SHARDS, MANIFEST), (*indexes, SHARDS, MANIFEST), strict=True):
            os.rename(part / file, out / name)
            named.append(name)
    except BaseException:
        for name in reversed(named):              # the others may be somebody else's
            (out / name).unlink(missing_ok=True)
        raise
    shutil.rmtree(part, ignore_errors=True)
    return header


def _remove_empty(*directories: Path) -> None:
    for directory in directories:
        with suppress(OSError):       # it holds something, or is gone
            directory.rmdir()


def shard_name(shard: str, out: Path) -> str:
    """The name of a shard in a manifest: relative when it lies below or next to `out`, else a full path, or the URL."""
    if "::" in shard or shard.startswith("pipe:"):
        raise ValueError(f"{shard}: a program cannot be read at random: stream it once into shards with "
                         f"`dsvlm data convert webdataset`")
    if is_url(shard):
        return shard
    path, out = Path(shard).resolve(), out.resolve()
    return os.path.relpath(path, out) if path.is_relative_to(out.parent) else str(path)


def _scan_tars(shards, directory, task_type, fields, image, each_shard) -> tuple[list[dict], set[str], dict]:
    tried = {}

    def check(shard: str, row: dict) -> None:
        tried[shard] = choose_fields(task_type, fields, row["members"])
        _try_tar(directory, shard, row, tried[shard])
        if image is None:
            _check_choice(directory, shard, row)
        elif image in row["members"]:
            _check_images(directory, [row], image)

    found = each_shard(Scan(directory, image=image), shards, check=check)
    members = {name for row in found for name in row["members"]}
    if image is not None and image not in members:
        raise ValueError(f"--image {image}: no sample has such a member; there are {', '.join(sorted(members))}")
    if image is not None:
        _check_images(directory, found, image)
    else:
        for shard, row in zip(shards, found, strict=True):
            _check_choice(directory, shard, row)
    mapping = {"fields": choose_fields(task_type, fields, members), "image": image}
    left = [(shard, row) for shard, row in zip(shards, found, strict=True) if tried.get(shard) != mapping["fields"]]
    _try_tars(directory, left, mapping["fields"])
    return found, members, mapping


def _try_tars(directory: Path, found: list[tuple[str, dict]], fields: dict[str, str]) -> None:
    """Whether samples of every tar fit: others than the first may have other members, or other records in them."""
    def wrong(shard: str, row: dict) -> str | None:
        try:
            _try_tar(directory, shard, row, fields)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(TOGETHER) as pool:
        errors = [error for error in pool.map(lambda one: wrong(*one), found) if error]
    if errors:
        raise Unfinished(f"{len(errors)} of {len(found)} shards do not fit; what was made of all is kept for the "
                         f"next call:\n" + "\n".join(errors))


def _try_tar(directory: Path, shard: str, row: dict, fields: dict[str, str]) -> None:
    table = ShardIndex(directory / row["file"]).table.slice(0, TRIED)
    _try_fields(shard, fields, _tar_records(shard, row["bytes"], table, fields))


def _tar_records(shard: str, size: int, table, fields: dict[str, str]) -> Iterator[Callable[[], dict]]:
    file = open_file(shard, size)

    def read(row: dict, extension: str) -> bytes:
        if not row.get(f"{extension}.offset"):
            raise ValueError(f"sample {row['key']!r} has no {extension}")
        return file.read(row[f"{extension}.offset"], row[f"{extension}.size"])

    return (partial(make_record, fields, partial(read, row)) for row in table.to_pylist())


def _try_fields(shard: str, fields: dict[str, str], records: Iterable[Callable[[], object]]) -> None:
    """Of the first samples of a shard one has to fit: the rest would take long to find that out."""
    reason = "there is none"
    for record in records:
        try:
            record()
            return
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"{shard}: none of the first {TRIED} samples fits {fields}: {reason}; see --field")


def _scan_parquets(shards, directory, task_type, fields, image, each_shard) -> tuple[list[dict], set[str], dict]:
    columns = _first(shards, _schema).names
    image = image or next((name for name in IMAGE_COLUMNS if name in columns), None)
    mapping = {"fields": choose_fields(task_type, fields, columns, columns=True), "image": image}
    _first(shards, partial(_try_parquet, mapping))
    found = each_shard(Scan(directory, mapping=mapping), shards)
    if image:
        _check_images(directory, found, image)
    return found, {"json", "image"} if image else {"json"}, mapping


def _first(shards: list[str], function: Callable):
    """function(shard) of the first shard that is not damaged; ValueError of the first one when all are."""
    wrong = []
    for shard in shards:
        try:
            return function(shard)
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    raise ValueError(wrong[0])


def _schema(shard: str):
    import pyarrow.parquet

    from dsvlm.data.parquet import RangeFile

    try:
        return pyarrow.parquet.read_schema(RangeFile(open_file(shard)))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{shard} is not a parquet file ({error}): copy it again") from error


def _try_parquet(mapping: dict, shard: str) -> None:
    from dsvlm.data.parquet import ParquetFile, RowGroups

    file = ParquetFile(shard, open_file(shard), mapping, RowGroups())
    rows = range(min(TRIED, file.rows))
    _try_fields(shard, mapping["fields"], (partial(file.read, row, "json") for row in rows))
    if mapping["image"]:
        _try_images(shard, mapping["image"], [partial(file.read, row, "image") for row in rows])


def _try_images(shard: str, column: str, rows: list[Callable[[], bytes]]) -> None:
    """Of the first rows that have something in place of an image, one has to have an image."""
    reason = None
    for read in rows:
        try:
            data = read()
            if image_size(data) != (0, 0):
                return
            reason = reason or (f"it holds {shortened(data)}" if data else None)
        except ValueError as error:
            reason = reason or str(error)
    if reason is not None:
        raise ValueError(f"{shard}: {column!r} ({_schema(shard).field(column.partition(':')[0]).type}) holds no image "
                         f"({', '.join(IMAGE_FORMATS)}) in the first {len(rows)} rows: {reason}; name the column of "
                         f"the image bytes with --image")


def _check_choice(directory: Path, shard: str, row: dict) -> None:
    """No sample has several images: which of them trains, the names do not say."""
    index = ShardIndex(directory / row["file"])
    if len(index.images) > 1:
        has = np.stack([index.column(f"{extension}.offset") > 0 for extension in index.images])
        several = np.flatnonzero(has.sum(axis=0) > 1)
        if len(several):
            choices = ", ".join(name for name, there in zip(index.images, has[:, several[0]], strict=True) if there)
            raise ValueError(f"{shard}: sample {index.key(int(several[0]))!r} has several images, {choices}: say which "
                             f"one trains with --image")


def _check_images(directory: Path, found: list[dict], image: str) -> None:
    """Some sample of the set has an image: where all are absent or no image, the wrong place is named."""
    if not any(ShardIndex(directory / row["file"]).column("width").any() for row in found):
        raise ValueError(f"--image {image}: no sample has an image ({', '.join(IMAGE_FORMATS)}) there: name another "
                         f"member or column with --image")
