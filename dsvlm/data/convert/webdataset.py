"""WebDataset sources that can only be read in order (`pipe:`, compressed tars), copied once into our shards."""

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dsvlm.data.convert import shard_bytes
from dsvlm.data.fields import RECORDS, choose_fields, make_record

SUMMARY = """Streams WebDataset tars once, opened and grouped into samples by webdataset, and writes shards of our own.
Exact training needs any sample at any time; what comes out of a program (pipe:...), or a compressed tar, can only be
read in order, so it is copied first. Tars that are files or URLs need no copy: see `dsvlm data index --out`."""
TRIED = 100                       # samples, of which one has to fit the fields
META = re.compile(r"__[^/]*__($|/)")                                      # names that WebDataset keeps for itself
UNKNOWN = 2**63                   # bytes of a stream


def convert_webdataset(urls: list[str], task_type: str, out, fields: list[str] = (), image: str | None = None,
                       shard_mb: float = 256, limit: int | None = None, progress=None) -> dict:
    """Write OUT as a shard set, samples in the order they come; keys are numbers, `source` is the original key.

    urls: whatever webdataset opens, `pipe:COMMAND` and braces included. fields: `KEY=PLACE`. image: extension of the
    image; needed where samples have several. limit: only so many samples. progress: callable(iterable, desc=str) ->
    iterable. Returns {"samples", "shards", "bytes", "hash", "fields", "skipped": {reason: count}}. ValueError when a
    sample has several images and none is chosen, a source cannot be read to its end, its program fails or none of the
    first samples fits.
    """
    from dsvlm.data.index import IMAGE_SUFFIXES, is_image
    from dsvlm.data.manifest import load_manifest
    from dsvlm.data.shard import ShardWriter, check_free

    out = Path(out)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: at least 1 sample")
    size = shard_bytes(shard_mb)
    check_free(out)
    samples = _samples(urls, limit)
    first = next(samples, None)
    if first is None:
        raise ValueError(f"{urls[0]}: no sample came")
    chosen = choose_fields(task_type, list(fields), first[1])
    if image is not None and image not in first[1]:
        raise ValueError(f"--image {image}: the first sample has no such member; it has {', '.join(sorted(first[1]))}")
    skipped: dict[str, int] = {}
    written, reason = 0, ""
    options = {"converter": "webdataset", "version": 1, "fields": chosen, "image": image, "limit": limit}
    with ShardWriter(out, task_type, options, size) as writer:
        for number, (key, members) in enumerate(_with_first(first, samples, progress)):
            try:
                record = {"source": key} | make_record(chosen, lambda ext, of=members: _member(of, ext))
                text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
            except (ValueError, RecursionError) as error:         # half of a surrogate pair is no UTF-8, among others
                reason = reason or str(error)
                skipped["does_not_fit"] = skipped.get("does_not_fit", 0) + 1
                if not written and number + 1 >= TRIED:
                    break
                continue
            images = [image] if image else [ext for ext in sorted(members) if is_image(ext)]
            if len(images) > 1:
                raise ValueError(f"sample {key!r} has several images: choose one with --image: {', '.join(images)}")
            found = images[0] if images else None
            payload = {"json": text}
            if members.get(found):
                suffix = found.rpartition(".")[2]
                payload[suffix if suffix in IMAGE_SUFFIXES else "image"] = members[found]
            writer.write(f"{number:09d}", payload)
            written += 1
        if not written:
            raise ValueError(f"{urls[0]}: none of the first samples fits {chosen}: {reason}; see --field")
    manifest = load_manifest(out)
    return {"samples": manifest.samples, "shards": len(manifest.names), "bytes": sum(manifest.bytes),
            "hash": manifest.hash, "fields": chosen, "skipped": skipped}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dsvlm data convert webdataset`."""
    parser.description = SUMMARY
    parser.add_argument("urls", nargs="+", metavar="URL", help="tars as webdataset names them, `pipe:COMMAND` included")
    parser.add_argument("--type", required=True, help=f"task type: {', '.join(RECORDS)}")
    parser.add_argument("--field", action="append", default=[], metavar="KEY=PLACE",
                        help="where a key of the record is: caption=txt, question=json:qa.0.question")
    parser.add_argument("--image", help="extension of the image, where samples have several")
    parser.add_argument("--out", type=Path, required=True, help="directory of the shard set")
    parser.add_argument("--shard-mb", type=float, default=256, metavar="N", help="MiB of a shard (default: 256)")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N samples (default: all)")


def run(args: argparse.Namespace, progress=None) -> dict:
    """Run `dsvlm data convert webdataset`; returns the report."""
    return convert_webdataset(args.urls, args.type, args.out, args.field, args.image, args.shard_mb, args.limit,
                              progress)


def _samples(urls: list[str], limit: int | None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of each sample in order; members: lower-case extension -> payload.

    ValueError when a key comes again with other members: they are parts of one sample, which would train without its
    image. With the same members it is another sample, as in tars that were joined.
    """
    from webdataset.shardlists import expand_urls
    from webdataset.tariterators import group_by_keys

    number, kinds = 0, {}
    for url in (url for given in urls for url in expand_urls(given)):
        stream, earlier = group_by_keys(_files(url)), {}
        while limit is None or number < limit:
            try:
                sample = next(stream, None)
            except Exception as error:            # a command's or a store's own
                where = f"after {number} samples of {', '.join(urls[:3])}"
                raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
            if sample is None:
                break
            key, members = sample["__key__"], {ext: data for ext, data in sample.items() if not ext.startswith("__")}
            names = kinds.setdefault(frozenset(members), frozenset(members))    # one object for all that are alike
            if names and names.isdisjoint(earlier.setdefault(key, names)):
                raise ValueError(f"{url}: the members of sample {key!r} are not adjacent, and a stream cannot be "
                                 f"searched for them: copy the tar to a file and see `dsvlm data index --out`")
            yield key, members
            number += 1


def _files(url: str) -> Iterator[dict]:
    """The regular members of all tars in one stream, as `group_by_keys` takes them.

    Python's tarfile, and so webdataset, takes a stream that breaks between two members for its end, and reads nothing
    behind an end mark: our own walk lets no sample be lost. The stream is read to its end, where checksums of
    compressed ones are, and its program must say that all went well.
    """
    from webdataset.gopen import gopen

    from dsvlm.data.stream import Stream
    from dsvlm.data.tar import walk

    file = gopen(url, "rb")
    try:
        plain = _decompressed(file)
        stream = Stream(lambda offset, size: plain.read(size), UNKNOWN)
        for member in walk(stream, several=True):
            if member.regular and not META.match(member.name):
                yield {"fname": member.name, "data": _payload(stream, member), "__url__": url}
        process = getattr(file, "proc", None)
        if process is not None and process.wait():
            raise OSError(f"{url} ended with exit code {process.returncode}")
    finally:
        with suppress(Exception):                 # a program that is ended early may complain
            file.close()


def _payload(stream, member) -> bytes:
    """The bytes of a member, piece by piece: its size is a claim."""
    from dsvlm.data.index import PAYLOAD
    from dsvlm.data.tar import DamagedTar

    stop = member.offset + member.size
    pieces = []
    for at in range(member.offset, stop, PAYLOAD):
        pieces.append(stream.read(at, min(PAYLOAD, stop - at)))
        if len(pieces[-1]) < min(PAYLOAD, stop - at):
            found = sum(map(len, pieces))
            raise DamagedTar(member.offset, f"truncated: {found} of {member.size} bytes of {member.name!r}")
    return b"".join(pieces)


class _Resumed:
    """A file of which the first bytes were read already."""

    def __init__(self, head: bytes, file):
        self.head, self.file = head, file

    def read(self, size: int) -> bytes:
        head, self.head = self.head[:size], self.head[size:]
        return head + self.file.read(size - len(head)) if len(head) < size else head


def _decompressed(file):
    """What a file holds; which compression it has, its first bytes say."""
    import bz2
    import gzip
    import lzma

    head = file.read(6)
    whole = _Resumed(head, file)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=whole, mode="rb")
    if head.startswith(b"BZh"):
        return bz2.BZ2File(whole)
    return lzma.LZMAFile(whole) if head == b"\xfd7zXZ\0" else whole


def _with_first(first, rest, progress):
    def both():
        yield first
        yield from rest

    return both() if progress is None else progress(both(), desc="convert")


def _member(members: dict[str, bytes], extension: str) -> bytes:
    if extension not in members:
        raise ValueError(f"no member {extension!r}")
    return members[extension]
