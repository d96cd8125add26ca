"""LLaVA's instruction data, a list of conversations in JSON and the images that they name, as two shard sets."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from dsvlm.data.convert import drawn_rank, shard_bytes
from dsvlm.data.convert.photos import JPEG_QUALITY, SUFFIXES, is_inside, resized
from dsvlm.data.fields import is_unicode
from dsvlm.data.turns import read_turns


class Talk(NamedTuple):
    """One conversation; image: the name of its file, or None."""

    key: str
    image: str | None
    record: dict


def convert_llava(source, out, *, images=None, resize: int | None = None, shard_mb: float = 256, seed: int = 0,
                  limit: int | None = None, skip_missing: bool = False, progress=None) -> dict:
    """Write OUT/image (conversations about an image) and OUT/text (those without one) as shard sets.

    source: JSON list, or JSON lines (.jsonl), of {"id", "image" or "images" or neither, "conversations" or "messages":
    see `read_turns`}. images: directory that the names of images are relative to. resize: shorter side in pixels
    (re-encoded as JPEG, never enlarged); None copies the files unchanged. limit: only so many conversations, drawn from
    the seed, as is their order. skip_missing: leave out conversations whose image is not there. progress:
    callable(iterable, desc=str) -> iterable.
    Returns {"tasks": {"image" | "text": {"samples", "shards", "bytes", "hash"}}, "skipped": {reason: count}}.
    ValueError for files that do not fit together, before anything is written; an image that does not decode is found
    while writing.
    """
    from dsvlm.data.shard import check_free

    source, out = Path(source), Path(out)
    for name, value in (("resize", resize), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: choose at least 1")
    size, skipped = shard_bytes(shard_mb), {}
    talks = sorted(_talks(source, skipped), key=lambda talk: drawn_rank(seed, talk.key))[:limit]
    if any(talk.image for talk in talks):
        talks = _with_images(talks, images, skip_missing, skipped)
    sets = {"image": [talk for talk in talks if talk.image], "text": [talk for talk in talks if not talk.image]}
    sets = {name: found for name, found in sets.items() if found}
    if not sets:
        raise ValueError(f"{source}: no conversation is left (skipped: {skipped})")
    for name in sets:
        check_free(out / name)
    options = {"converter": "llava", "version": 1, "resize": resize, "seed": seed, "limit": limit}
    options |= {} if resize is None else {"jpeg_quality": JPEG_QUALITY}
    written = {name: _write(out / name, found, images, options, resize, size, progress) for name, found in sets.items()}
    return {"tasks": written, "skipped": skipped}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dsvlm data convert llava`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="such as llava_v1_5_mix665k.json; .jsonl too")
    parser.add_argument("--images", type=Path, metavar="DIR", help="directory that names of images are relative to")
    parser.add_argument("--out", type=Path, required=True, help="directory to write OUT/image and OUT/text to")
    parser.add_argument("--resize", type=int, metavar="N", help="shorter side in pixels, re-encoded (default: copy)")
    parser.add_argument("--shard-mb", type=float, default=256, metavar="N", help="MiB of a shard (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' order (default: 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="use only N conversations (default: all)")
    parser.add_argument("--skip-missing", action="store_true",
                        help="leave out conversations whose image is not there, and count them")


def run(args: argparse.Namespace, progress=None) -> dict:
    """Run `dsvlm data convert llava`; returns the report."""
    return convert_llava(args.file, args.out, images=args.images, resize=args.resize, shard_mb=args.shard_mb,
                         seed=args.seed, limit=args.limit, skip_missing=args.skip_missing, progress=progress)


def _talks(path: Path, skipped: dict) -> list[Talk]:
    """The conversations that can be learnt; the others are counted by what is wrong with them."""
    talks = []
    for number, entry in enumerate(_entries(path)):
        turns = entry.get("conversations", entry.get("messages"))
        record = {"conversations": turns, "source": entry.get("id")}
        try:
            read_turns(turns)
            image = _image_name(entry)
            if not is_unicode(record):
                raise ValueError("half a character, which UTF-8 cannot write")
        except ValueError as error:
            skipped[str(error)] = skipped.get(str(error), 0) + 1
            continue
        if image is not None and not is_inside(image):
            raise ValueError(f"{path}: entry {number} has the image {image!r:.100}: give a name inside the directory "
                             f"of --images")
        talks.append(Talk(f"{number:09d}", image, record))
    return talks


def _entries(path: Path) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        data = path.read_bytes()
        lines = path.suffix == ".jsonl"
        entries = [json.loads(line) for line in data.splitlines() if line.strip()] if lines else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is no list of objects: is it a file of LLaVA's instruction data?")
    return entries


def _image_name(entry: dict) -> str | None:
    """The one image of a conversation; ValueError, in words that can be counted, when there are several."""
    names = entry.get("image") or entry.get("images") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("an image that is no name of a file")
    if len(names) > 1:
        raise ValueError("several images in one conversation")
    return names[0] if names else None


def _with_images(talks: list[Talk], images, skip_missing: bool, skipped: dict) -> list[Talk]:
    """Those without an image, or with one that is there."""
    if images is None:
        raise ValueError("--images DIR is needed: conversations name images")
    if not Path(images).is_dir():
        raise ValueError(f"--images: no directory {images}")
    there = {name: (Path(images) / name).is_file() for name in {talk.image for talk in talks} if name}
    missing = sorted(name for name, found in there.items() if not found)
    if missing and not skip_missing:
        raise ValueError(f"--images: {len(missing)} of {len(there)} images are not in {images}, first {missing[0]}: "
                         f"download them, or leave their conversations out with --skip-missing")
    other = next((name for name, found in there.items() if found and Path(name).suffix.lower() not in SUFFIXES), None)
    if other is not None:
        raise ValueError(f"{Path(images) / other}: only {', '.join(SUFFIXES)} are read: convert it")
    kept = [talk for talk in talks if not talk.image or there[talk.image]]
    if len(kept) < len(talks):
        skipped["its image is missing"] = len(talks) - len(kept)
    return kept


def _write(directory: Path, talks: list[Talk], images, options: dict, resize, size: int, progress) -> dict:
    from dsvlm.data.index import image_size
    from dsvlm.data.manifest import load_manifest
    from dsvlm.data.shard import ShardWriter

    with ShardWriter(directory, "conversation", options, size) as writer:
        for talk in talks if progress is None else progress(talks, desc=directory.name):
            text = json.dumps(talk.record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            members = {"json": text.encode("utf-8")}
            if talk.image:
                path = Path(images) / talk.image
                data = path.read_bytes()
                found = image_size(data)
                if found == (0, 0):
                    raise ValueError(f"{path} does not decode: download it again, or remove it and see --skip-missing")
                suffix, data = resized(path, data, found, resize)
                members[suffix] = data
            writer.write(talk.key, members)
    manifest = load_manifest(directory)
    return {"samples": manifest.samples, "shards": len(manifest.names), "bytes": sum(manifest.bytes),
            "hash": manifest.hash}
