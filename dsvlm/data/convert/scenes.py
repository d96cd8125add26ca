"""Embedded data: coloured shapes at known places, drawn with Pillow, as five tasks; every draw is a seeded hash."""

import argparse
import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from dsvlm.data.convert import choose_tasks, shard_bytes

CANVAS = 64                                           # scenes are laid out in units; --size only sets the pixels
# The first three differ within a patch of 10 pixels; circle, square and triangle take a small model longer to tell.
SHAPES = ("square", "ring", "cross", "circle", "triangle")
COLOURS = {"red": (226, 40, 40), "green": (40, 190, 60), "blue": (50, 90, 235), "yellow": (240, 215, 50),
           "purple": (165, 60, 200), "cyan": (60, 215, 225), "white": (240, 240, 240), "brown": (140, 85, 40)}
BACKGROUND = (24, 24, 28)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TASKS = {"caption": "caption", "question": "vqa", "count": "vqa", "locate": "locate", "relation": "vqa"}
VAL_SHARE = 8                                         # one layout in eight belongs to val
CELL = 8                                              # layouts that differ by less than a cell count as the same
MAX_OVERLAP = 0.06                                    # of the smaller box
SUPERSAMPLE = 4


class Item(NamedTuple):
    """One object: its name and its square box on the canvas, in units."""

    colour: str
    shape: str
    x: int
    y: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> list[float]:
        """[x0, y0, x1, y1], normalised by the canvas."""
        return [round(v / CANVAS, 6) for v in (self.x, self.y, self.x + self.width, self.y + self.width)]


class Draws:
    """Random integers from a counter: the n-th draw is a hash of (key, n), so no library's stream is involved."""

    def __init__(self, *key):
        self._key = "/".join(map(str, key)).encode("ascii")
        self._count = 0
        self._block = b""

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        position = self._count % 8 * 8
        if position == 0:
            self._block = hashlib.blake2b(b"%s#%d" % (self._key, self._count), digest_size=64).digest()
        self._count += 1
        return int.from_bytes(self._block[position:position + 8], "little") * n >> 64

    def choose(self, items, count: int) -> list:
        """`count` items: distinct while there are enough, otherwise drawn with repetition."""
        if count > len(items):
            return [items[self.below(len(items))] for _ in range(count)]
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


def make_scenes(out, *, size: int = 40, objects: int = 2, colours: int = 4, shapes: int = 3, samples: int = 12000,
                val_samples: int = 400, seed: int = 0, tasks=tuple(TASKS), shard_mb: float = 4, progress=None) -> dict:
    """Write OUT/train/TASK and OUT/val/TASK as shard sets; a scene and its like are in train or in val, never in both.

    size: pixels of the square image's side. objects: at most this many in a scene. colours, shapes: how many there are.
    samples, val_samples: per task.
    progress: callable(iterable, desc=str) -> iterable.
    Returns {"train" | "val": {task: {"samples", "shards", "bytes", "hash"}}}.
    """
    from dsvlm.data.manifest import load_manifest
    from dsvlm.data.shard import ShardWriter, check_free

    _check(size, objects, colours, shapes, tasks)
    for name, value in (("samples", samples), ("val-samples", val_samples)):
        if value < 0:
            raise ValueError(f"--{name} {value}: choose at least 0")
    shard_size = shard_bytes(shard_mb)
    palette = (tuple(COLOURS)[:colours], SHAPES[:shapes])
    work = [(split, task, number) for split, number in (("train", samples), ("val", val_samples)) if number
            for task in tasks]
    for split, task, _ in work:
        check_free(Path(out, split, task))
    report: dict = {}
    for split, task, number in work:
        options = {"generator": "scenes", "version": 1, "split": split, "task": task, "size": size,
                   "objects": objects, "colours": colours, "shapes": shapes, "seed": seed}
        directory = Path(out, split, task)
        numbers = range(number)
        with ShardWriter(directory, TASKS[task], options, shard_size) as writer:
            for i in numbers if progress is None else progress(numbers, desc=f"{split}/{task}"):
                scene, record = draw_sample(seed, split, task, i, objects, palette)
                writer.write(f"{split}-{task}-{i:06d}", {"png": draw_png(scene, size), "json": _dump(record)})
        manifest = load_manifest(directory)
        report.setdefault(split, {})[task] = {"samples": manifest.samples, "shards": len(manifest.names),
                                              "bytes": sum(manifest.bytes), "hash": manifest.hash}
    return report


def draw_sample(seed: int, split: str, task: str, number: int, objects: int, palette) -> tuple[list[Item], dict]:
    """Sample `number` of a task: the first drawn scene that belongs to the split and suits the task, and its record.

    palette: (colours, shapes) to choose from.
    """
    draws = Draws("dsvlm-scenes-1", seed, split, task, number)
    least = 2 if task == "relation" else 1
    while True:
        scene, count = None, least + draws.below(objects - least + 1)
        while scene is None:                          # the count stays, or crowded scenes would be rare
            scene = draw_scene(draws, count, objects, palette)
        if split_of(scene) == split:
            record = describe(task, scene, draws)
            if record is not None:
                return scene, record


def draw_scene(draws: Draws, count: int, objects: int, palette) -> list[Item] | None:
    """`count` objects that hardly overlap, from left to right; None when they found no room."""
    scale = min(1.0, (2 / objects) ** 0.5)            # more objects, smaller objects
    least, most = round(27 * scale), round(36 * scale)
    scene: list[Item] = []
    names = zip(*(draws.choose(words, count) for words in palette), strict=True)
    for colour, shape in names:
        width = least + draws.below(most - least + 1)
        for _ in range(20):
            item = Item(colour, shape, draws.below(CANVAS - width + 1), draws.below(CANVAS - width + 1), width)
            if all(_overlap(item, other) <= MAX_OVERLAP for other in scene):
                scene.append(item)
                break
        else:
            return None
    return sorted(scene, key=lambda item: (2 * item.x + item.width, 2 * item.y + item.width, item))


def split_of(scene: list[Item]) -> str:
    """`train` or `val`, by the hash of the scene's layout."""
    digest = hashlib.blake2b(layout(scene).encode("ascii"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") % VAL_SHARE == 0 else "train"


def layout(scene: list[Item]) -> str:
    """The canonical description: each object's name and the cell of its centre, sorted."""
    cells = ((i.name, (2 * i.x + i.width) // (2 * CELL), (2 * i.y + i.width) // (2 * CELL)) for i in scene)
    return ";".join(f"{name}@{x},{y}" for name, x, y in sorted(cells))


def describe(task: str, scene: list[Item], draws: Draws) -> dict | None:
    """The record of one task for a scene; None when the scene has no unambiguous one."""
    if task == "caption":
        return {"caption": ", ".join(f"a {item.name}" for item in scene)}
    if task == "count":
        return {"question": "how many objects are there?", "answer": NUMBERS[len(scene)]}
    if task == "locate":
        name = scene[draws.below(len(scene))].name
        return {"name": name, "boxes": [item.box for item in scene if item.name == name]}
    if task == "question":
        return _question(scene, draws)
    return _relation(scene, draws)


def draw_png(scene: list[Item], size: int) -> bytes:
    """The scene as an anti-aliased RGB PNG of size x size pixels."""
    from PIL import Image, ImageDraw

    side = size * SUPERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for item in scene:
        x0, y0, x1, y1 = (v * side / CANVAS for v in (item.x, item.y, item.x + item.width, item.y + item.width))
        x1, y1 = x1 - 1, y1 - 1                       # Pillow's bounds are inclusive
        fill = COLOURS[item.colour]
        if item.shape == "circle":
            draw.ellipse((x0, y0, x1, y1), fill=fill)
        elif item.shape == "square":
            draw.rectangle((x0, y0, x1, y1), fill=fill)
        elif item.shape == "ring":
            draw.ellipse((x0, y0, x1, y1), outline=fill, width=round((x1 - x0) / 4))
        elif item.shape == "cross":
            third = (x1 - x0) / 3
            draw.rectangle((x0 + third, y0, x1 - third, y1), fill=fill)
            draw.rectangle((x0, y0 + third, x1, y1 - third), fill=fill)
        else:
            draw.polygon([((x0 + x1) / 2, y0), (x1, y1), (x0, y1)], fill=fill)
    data = BytesIO()
    image.reduce(SUPERSAMPLE).save(data, "PNG")
    return data.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dsvlm data convert scenes`."""
    parser.add_argument("--out", type=Path, required=True, help="directory to write OUT/train/TASK and OUT/val/TASK to")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma separated (default: %(default)s)")
    parser.add_argument("--size", type=int, default=40, help="side of the images in pixels (default: 40)")
    parser.add_argument("--objects", type=int, default=2, help="most objects in a scene (default: 2)")
    parser.add_argument("--colours", type=int, default=4, help=f"1 to {len(COLOURS)} (default: 4)")
    parser.add_argument("--shapes", type=int, default=3, help=f"1 to {len(SHAPES)} (default: 3)")
    parser.add_argument("--samples", type=int, default=12000, help="training samples per task (default: 12000)")
    parser.add_argument("--val-samples", type=int, default=400, help="validation samples per task (default: 400)")
    parser.add_argument("--shard-mb", type=float, default=4, help="size of a shard in MiB (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default: 0)")


def run(args: argparse.Namespace, progress=None) -> dict:
    """Run `dsvlm data convert scenes`; returns the report."""
    return make_scenes(args.out, size=args.size, objects=args.objects, colours=args.colours, shapes=args.shapes,
                       samples=args.samples, val_samples=args.val_samples, seed=args.seed, shard_mb=args.shard_mb,
                       tasks=choose_tasks(args.tasks, tuple(TASKS)), progress=progress)


def _question(scene: list[Item], draws: Draws) -> dict | None:
    shapes, colours = [item.shape for item in scene], [item.colour for item in scene]
    item = scene[draws.below(len(scene))]
    if draws.below(2):
        alike, question, answer = shapes.count(item.shape), f"what colour is the {item.shape}?", item.colour
    else:
        alike, question, answer = colours.count(item.colour), f"what shape is {item.colour}?", item.shape
    return {"question": question, "answer": answer} if alike == 1 else None


def _relation(scene: list[Item], draws: Draws) -> dict | None:
    item, other = draws.choose(scene, 2)
    names = [i.name for i in scene]
    if names.count(item.name) > 1 or names.count(other.name) > 1:
        return None
    dx = 2 * item.x + item.width - 2 * other.x - other.width         # twice the distance of the centres
    dy = 2 * item.y + item.width - 2 * other.y - other.width
    if min(abs(dx), abs(dy)) * 2 > max(abs(dx), abs(dy)):            # no axis dominates
        return None
    answer = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    return {"question": f"where is the {item.name} relative to the {other.name}?", "answer": answer}


def _overlap(a: Item, b: Item) -> float:
    """Intersection of two boxes as a share of the smaller one."""
    x = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    y = min(a.y + a.width, b.y + b.width) - max(a.y, b.y)
    return x * y / min(a.width, b.width) ** 2 if x > 0 and y > 0 else 0.0


def _dump(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")


def _check(size: int, objects: int, colours: int, shapes: int, tasks) -> None:
    for name, value, low, high in (("size", size, 16, 4096), ("objects", objects, 1, len(NUMBERS) - 1),
                                   ("colours", colours, 1, len(COLOURS)), ("shapes", shapes, 1, len(SHAPES))):
        if not low <= value <= high:
            raise ValueError(f"scenes: {name} = {value}: choose {low} to {high}")
    if "relation" in tasks and objects < 2:
        raise ValueError("scenes: task 'relation' needs two objects in a scene: choose objects >= 2 or leave it out")
