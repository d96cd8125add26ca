"""WebDataset sources that can only be read in order (`pipe:`, compressed tars), copied once into our shards."""

import argparse
import json
from pathlib import Path

SUMMARY = """Streams WebDataset tars once, through a plain webdataset pipeline, and writes shards of our own. Exact
training needs any sample at any time; what comes out of a program (pipe:...), or a compressed tar, can only be read in
order, so it is copied first. Tars that are files or URLs need no copy: see `dsvlm data index --out`."""
TRIED = 100                       # samples, of which one has to fit the fields


def convert_webdataset(urls: list[str], task_type: str, out, fields: list[str] = (), image: str | None = None,
                       shard_mb: float = 256, limit: int | None = None, progress=None) -> dict:
    """Write OUT as a shard set, samples in the order they come; keys are numbers, `source` is the original key.

    urls: whatever webdataset opens, `pipe:COMMAND` and braces included. fields: `KEY=PLACE`. image: extension of the
    image; default: a sample's first. limit: only so many samples. progress: callable(iterable, desc=str) -> iterable.
    Returns {"samples", "shards", "bytes", "hash", "fields", "skipped": {reason: count}}. ValueError when a source
    cannot be read or none of the first samples fits.
    """
    from dsvlm.data.fields import choose_fields, make_record
    from dsvlm.data.index import IMAGE_SUFFIXES, is_image
    from dsvlm.data.manifest import load_manifest
    from dsvlm.data.shard import ShardWriter, check_free

    out = Path(out)
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
    with ShardWriter(out, task_type, options, int(shard_mb * 2**20)) as writer:
        for number, (key, members) in enumerate(_with_first(first, samples, progress)):
            try:
                record = {"source": key} | make_record(chosen, lambda ext, of=members: _member(of, ext))
            except ValueError as error:
                reason = reason or str(error)
                skipped["does_not_fit"] = skipped.get("does_not_fit", 0) + 1
                if not written and number + 1 >= TRIED:
                    break
                continue
            found = image or next((ext for ext in sorted(members) if is_image(ext)), None)
            text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            payload = {"json": text.encode("utf-8")}
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
    parser.add_argument("--type", required=True, help="task type: caption, vqa, classify, locate, detect or pair")
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


def _samples(urls: list[str], limit: int | None):
    """(key, members) of each sample in order; members: lower-case extension -> payload."""
    import webdataset

    pipeline = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=None,
                                     empty_check=False)
    stream = iter(pipeline)
    number = 0
    while limit is None or number < limit:
        try:
            sample = next(stream)
        except StopIteration:
            return
        except Exception as error:                # tarfile's, a command's or a store's own
            where = f"after {number} samples of {', '.join(urls[:3])}"
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        yield sample["__key__"], {ext.lower(): data for ext, data in sample.items() if not ext.startswith("__")}
        number += 1


def _with_first(first, rest, progress):
    def both():
        yield first
        yield from rest

    return both() if progress is None else progress(both(), desc="convert")


def _member(members: dict[str, bytes], extension: str) -> bytes:
    if extension not in members:
        raise ValueError(f"no member {extension!r}")
    return members[extension]
