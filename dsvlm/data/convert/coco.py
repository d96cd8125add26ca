"""COCO's own JSON files and photographs, as shard sets of four tasks."""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from dsvlm.data.convert import choose_tasks, drawn_rank, shard_bytes
from dsvlm.data.convert.photos import JPEG_QUALITY, SUFFIXES, is_inside, resized
from dsvlm.data.fields import is_unicode

TASKS = {"caption": "caption", "categorize": "classify", "locate": "locate", "detect": "detect"}


class Photo(NamedTuple):
    """One entry of "images"; sizes in pixels."""

    file_name: str
    width: int
    height: int


class Box(NamedTuple):
    """One usable annotation: the box is clipped and normalised, `area` in pixels is for ordering."""

    image: int
    id: int
    category: int
    name: str
    box: list[float]
    area: float


class Sample(NamedTuple):
    """What one task makes of a photo or an annotation."""

    key: str
    image: int
    record: dict


def convert_coco(images, out, *, captions=None, instances=None, tasks=tuple(TASKS), resize: int | None = None,
                 shard_mb: float = 256, max_boxes: int = 20, seed: int = 0, limit: int | None = None,
                 progress=None) -> dict:
    """Write OUT/TASK as a shard set for each task, samples in an order drawn from the seed.

    images: directory of the photographs. captions, instances: COCO JSON files, needed by the tasks that use them.
    resize: shorter side in pixels (re-encoded as JPEG, never enlarged); None copies the files unchanged.
    max_boxes: of `locate` and `detect` samples, largest first. limit: only so many photographs, drawn from the seed.
    progress: callable(iterable, desc=str) -> iterable.
    Returns {"photos", "tasks": {task: {"samples", "shards", "bytes", "hash"}}, "skipped": {reason: count}}.
    ValueError for files, annotations and tasks that do not fit together, before anything is written; a photograph that
    does not decode or is not of the stated size is found while writing.
    """
    from dsvlm.data.shard import check_free

    images, out = Path(images), Path(out)
    for name, value in (("resize", resize), ("max-boxes", max_boxes), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: choose at least 1")
    size = shard_bytes(shard_mb)
    for task in tasks:
        check_free(out / task)
    skipped = {"crowd": 0, "degenerate": 0, "empty_caption": 0, "over_max_boxes": 0}
    photos, samples = _samples(captions, instances, tasks, max_boxes, skipped, seed, limit)
    for task in tasks:
        if not samples[task]:
            raise ValueError(f"task {task!r} is empty: no annotation of {captions if task == 'caption' else instances} "
                             f"gives a sample (skipped: {skipped}): leave it out of --tasks")
    used = {sample.image for task in tasks for sample in samples[task]}
    _check_photos(images, [photos[image] for image in sorted(used)])
    report = {"photos": len(used), "tasks": {}, "skipped": skipped}
    options = {"converter": "coco", "version": 1, "resize": resize, "max_boxes": max_boxes, "seed": seed,
               "limit": limit} | ({} if resize is None else {"jpeg_quality": JPEG_QUALITY})
    for task in tasks:
        ordered = sorted(samples[task], key=lambda sample: drawn_rank(seed, sample.key))
        report["tasks"][task] = _write(out / task, task, ordered, photos, images, options, resize, size, progress)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dsvlm data convert coco`."""
    parser.add_argument("--images", type=Path, required=True, help="directory of the photographs, such as train2017")
    parser.add_argument("--captions", type=Path, help="captions_*.json, for the task caption")
    parser.add_argument("--instances", type=Path, help="instances_*.json, for the tasks categorize, locate, detect")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write OUT/TASK to")
    parser.add_argument("--resize", type=int, metavar="N", help="shorter side in pixels, re-encoded (default: copy)")
    parser.add_argument("--shard-mb", type=float, default=256, metavar="N", help="MiB of a shard (default: 256)")
    parser.add_argument("--max-boxes", type=int, default=20, metavar="N", help="most boxes in a sample (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' order (default: 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="use only N photographs (default: all)")


def run(args: argparse.Namespace, progress=None) -> dict:
    """Run `dsvlm data convert coco`; returns the report."""
    return convert_coco(args.images, args.out, captions=args.captions, instances=args.instances,
                        tasks=choose_tasks(args.tasks, tuple(TASKS)), resize=args.resize, shard_mb=args.shard_mb,
                        max_boxes=args.max_boxes, seed=args.seed, limit=args.limit, progress=progress)


def _samples(captions, instances, tasks, max_boxes, skipped, seed, limit) -> tuple[dict[int, Photo], dict]:
    """The photos that are used, by id, and the samples of each task."""
    wanted = {"--captions": captions} if "caption" in tasks else {}
    wanted |= {"--instances": instances} if set(tasks) - {"caption"} else {}
    contents = {option: _load(path, option) for option, path in wanted.items()}
    photos: dict[int, Photo] = {}
    for option, content in contents.items():
        found = _photos(wanted[option], content)
        for image in photos.keys() & found.keys():
            if photos[image] != found[image]:
                raise ValueError(f"image {image} is {tuple(photos[image])} in {captions} and {tuple(found[image])} in "
                                 f"{instances}: the two files are of different datasets")
        photos |= found
    if limit is not None:
        kept = sorted(photos, key=lambda image: drawn_rank(seed, str(image)))[:limit]
        photos = {image: photos[image] for image in kept}
    texts = _texts(captions, contents["--captions"], photos, skipped) if "--captions" in contents else []
    boxes = _boxes(instances, contents["--instances"], photos, skipped) if "--instances" in contents else []
    samples = {
        "caption": [Sample(f"{image:012d}-{number}", image, {"caption": caption, "source": str(number)})
                    for image, number, caption in texts],
        "categorize": [Sample(f"{b.image:012d}-{b.id}", b.image, {"box": b.box, "name": b.name, "source": str(b.id)})
                       for b in boxes],
    }
    located: dict[tuple[int, int], list[Box]] = {}
    detected: dict[int, list[Box]] = {}
    for box in sorted(boxes, key=lambda b: (-b.area, b.id)):
        located.setdefault((box.image, box.category), []).append(box)
        detected.setdefault(box.image, []).append(box)
    samples["locate"] = [
        Sample(f"{image:012d}-{category}", image,
               {"name": group[0].name, "boxes": [b.box for b in group[:max_boxes]], "source": str(image)})
        for (image, category), group in located.items()]
    samples["detect"] = [
        Sample(f"{image:012d}", image,
               {"objects": [{"name": b.name, "box": b.box} for b in group[:max_boxes]], "source": str(image)})
        for image, group in detected.items()]
    for task, groups in (("locate", located), ("detect", detected)):
        if task in tasks:
            skipped["over_max_boxes"] += sum(max(0, len(group) - max_boxes) for group in groups.values())
    return photos, samples


def _load(path, option: str) -> dict:
    if path is None:
        raise ValueError(f"{option} FILE is needed by the chosen --tasks")
    if not Path(path).is_file():
        raise ValueError(f"{option}: no file {path}")
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    for field in ("images", "annotations", "categories") if option == "--instances" else ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(field), list):
            raise ValueError(f"{path} has no list {field!r}: is it COCO's own file for {option}?")
    return content


def _photos(path, content: dict) -> dict[int, Photo]:
    photos = {}
    for entry in content["images"]:
        image, name, width, height = _fields(path, "image", entry, id=int, file_name=str, width=int, height=int)
        if image in photos:
            raise ValueError(f"{path}: image id {image} comes twice")
        if not is_inside(name):
            raise ValueError(f"{path}: image {image} has file_name {name!r}, which leaves the directory of --images: "
                             f"give a name inside it")
        if not (1 <= width < 2**31 and 1 <= height < 2**31) or image < 0:
            raise ValueError(f"{path}: image {image} has size {width} x {height}: give its size in pixels")
        photos[image] = Photo(name, width, height)
    return photos


def _texts(path, content: dict, used, skipped: dict) -> list[tuple[int, int, str]]:
    """(image id, annotation id, caption with white space made single) of the photos that are used."""
    known = {entry["id"] for entry in content["images"]}
    texts = []
    for entry in content["annotations"]:
        number, image, caption = _fields(path, "annotation", entry, id=int, image_id=int, caption=str)
        _check_image(path, number, image, known)
        if image in used and not is_unicode(caption):
            skipped["does_not_fit"] = skipped.get("does_not_fit", 0) + 1
        elif image in used and caption.strip():
            texts.append((image, number, " ".join(caption.split())))
        elif image in used:
            skipped["empty_caption"] += 1
    return texts


def _boxes(path, content: dict, used, skipped: dict) -> list[Box]:
    """The usable boxes of the photos that are used; every annotation is checked."""
    photos = _photos(path, content)
    names = dict(_fields(path, "category", entry, id=int, name=str) for entry in content["categories"])
    boxes = []
    for entry in content["annotations"]:
        number, image, category, bbox = _fields(path, "annotation", entry, id=int, image_id=int, category_id=int,
                                                bbox=list)
        _check_image(path, number, image, photos)
        if category not in names:
            raise ValueError(f"{path}: annotation {number}: category_id {category} is not in \"categories\" "
                             f"({len(names)} ids, {min(names, default=None)} to {max(names, default=None)}): "
                             f"remove the annotation or add the category")
        if len(bbox) != 4 or not all(map(_is_finite, bbox)):
            raise ValueError(f"{path}: annotation {number}: bbox {bbox!s:.200} is not [x, y, width, height] in pixels")
        box, area = _normalised(bbox, photos[image])
        if image not in used:
            continue
        if entry.get("iscrowd"):
            skipped["crowd"] += 1
        elif box[0] >= box[2] or box[1] >= box[3]:
            skipped["degenerate"] += 1
        elif not is_unicode(names[category]):
            skipped["does_not_fit"] = skipped.get("does_not_fit", 0) + 1
        else:
            boxes.append(Box(image, number, category, names[category], box, area))
    return boxes


def _is_finite(value) -> bool:
    """Whether a value of JSON is a number that a float can be: its integers have no end."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _normalised(bbox, photo: Photo) -> tuple[list[float], float]:
    """[x0, y0, x1, y1] clipped and divided by the photo's size, and the clipped box's area in pixels."""
    x, y, width, height = bbox
    x0, x1 = (min(max(v, 0), photo.width) for v in (x, x + width))
    y0, y1 = (min(max(v, 0), photo.height) for v in (y, y + height))
    box = [x0 / photo.width, y0 / photo.height, x1 / photo.width, y1 / photo.height]
    return [round(v, 6) for v in box], (x1 - x0) * (y1 - y0)


def _fields(path, kind: str, entry, **types) -> list:
    """The values of the named fields; ValueError when one is absent or of another type."""
    for name, expected in types.items():
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, expected):
            found = json.dumps(entry)
            raise ValueError(f"{path}: {kind} without a valid {name!r} ({expected.__name__} expected): "
                             f"{found if len(found) < 200 else found[:200] + ' ...'}")
    return [entry[name] for name in types]


def _check_image(path, annotation: int, image: int, known) -> None:
    if image not in known:
        raise ValueError(f"{path}: annotation {annotation}: image_id {image} is not in \"images\" "
                         f"({len(known)} images): remove the annotation or add the image")


def _check_photos(directory: Path, photos: list[Photo]) -> None:
    if not directory.is_dir():
        raise ValueError(f"--images: no directory {directory}")
    missing = [photo.file_name for photo in photos if not (directory / photo.file_name).is_file()]
    if missing:
        raise ValueError(f"--images: {len(missing)} of {len(photos)} photographs are not in {directory}, first "
                         f"{missing[0]}: download them, or remove them from the annotation files")
    other = next((photo.file_name for photo in photos if Path(photo.file_name).suffix.lower() not in SUFFIXES), None)
    if other is not None:
        raise ValueError(f"{directory / other}: only {', '.join(SUFFIXES)} are read: convert it")


def _write(directory: Path, task: str, samples: list[Sample], photos, images: Path, options: dict, resize, size: int,
           progress) -> dict:
    from dsvlm.data.manifest import load_manifest
    from dsvlm.data.shard import ShardWriter

    with ShardWriter(directory, TASKS[task], options | {"task": task}, size) as writer:
        for sample in samples if progress is None else progress(samples, desc=task):
            ext, data = _image(images, photos[sample.image], resize)
            record = json.dumps(sample.record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            writer.write(sample.key, {ext: data, "json": record.encode("utf-8")})
    manifest = load_manifest(directory)
    return {"samples": manifest.samples, "shards": len(manifest.names), "bytes": sum(manifest.bytes),
            "hash": manifest.hash}


def _image(directory: Path, photo: Photo, resize: int | None) -> tuple[str, bytes]:
    """(extension, bytes) of a photo, its size checked against the annotation file's."""
    from dsvlm.data.index import image_size

    path = directory / photo.file_name
    data = path.read_bytes()
    found = image_size(data)
    if found != (photo.width, photo.height):
        what = "does not decode" if found == (0, 0) else f"is {found[0]} x {found[1]} pixels"
        raise ValueError(f"{path} {what}, {photo.width} x {photo.height} expected by the annotation file: "
                         f"download it again")
    return resized(path, data, found, resize)
