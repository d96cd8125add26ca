"""COCO's JSON files become shards: what is written, and every error a user can make."""

import copy
import json
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsvlm.data.convert import choose_tasks
from dsvlm.data.convert.coco import TASKS, convert_coco
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.transforms import decode_image

MINI = Path(os.environ.get("DSVLM_COCO_MINI", Path(__file__).resolve().parents[2] / "../shared/data/coco_mini"))
IMAGES = [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 50},
          {"id": 8, "file_name": "b.png", "width": 40, "height": 80},
          {"id": 9, "file_name": "unused.jpg", "width": 10, "height": 10}]
CAPTIONS = {"images": IMAGES, "annotations": [
    {"id": 1, "image_id": 7, "caption": " A dog \n on  a sofa. "}, {"id": 2, "image_id": 8, "caption": "Caf\u00e9"},
    {"id": 3, "image_id": 8, "caption": " "}]}
INSTANCES = {"images": IMAGES, "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}], "annotations": [
    {"id": 11, "image_id": 7, "category_id": 18, "bbox": [10, 5, 20, 10], "iscrowd": 0},
    {"id": 12, "image_id": 7, "category_id": 18, "bbox": [90, 40, 30.5, 30], "iscrowd": 0},      # clipped
    {"id": 13, "image_id": 7, "category_id": 1, "bbox": [0, 0, 100, 50], "iscrowd": 0},
    {"id": 14, "image_id": 7, "category_id": 1, "bbox": [0, 0, 50, 50], "iscrowd": 1},
    {"id": 15, "image_id": 8, "category_id": 1, "bbox": [40, 0, 10, 10], "iscrowd": 0},           # outside
    {"id": 16, "image_id": 8, "category_id": 1, "bbox": [5, 5, 0, 10], "iscrowd": 0}]}


@pytest.fixture
def coco(tmp_path):
    """Writes a tiny COCO; returns convert(captions=..., instances=..., **options)."""
    (tmp_path / "images").mkdir()
    for name, size in (("a.jpg", (100, 50)), ("b.png", (40, 80))):
        Image.linear_gradient("L").resize(size).save(tmp_path / "images" / name)

    def convert(captions=CAPTIONS, instances=INSTANCES, out="out", **options):
        for name, content in (("captions", captions), ("instances", instances)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        files = {"captions": tmp_path / "captions.json", "instances": tmp_path / "instances.json"}
        return convert_coco(tmp_path / "images", tmp_path / out, **(files | options))

    convert.path = tmp_path
    return convert


def records(directory):
    reader = ShardReader(load_manifest(directory))
    return {reader.key(i): reader.record(i) for i in range(len(reader))}


def changed(content, field, index, **values):
    content = copy.deepcopy(content)
    content[field][index] |= values
    return content


def test_records(coco):
    report = coco()
    assert report["skipped"] == {"crowd": 1, "degenerate": 2, "empty_caption": 1, "over_max_boxes": 0}
    assert {task: report["tasks"][task]["samples"] for task in TASKS} == {
        "caption": 2, "categorize": 3, "locate": 2, "detect": 1}
    out = coco.path / "out"
    assert {task: load_manifest(out / task).type for task in TASKS} == TASKS
    assert records(out / "caption") == {
        "000000000007-1": {"caption": "A dog on a sofa.", "source": "1"},
        "000000000008-2": {"caption": "Caf\u00e9", "source": "2"}}
    first, clipped, large = [0.1, 0.1, 0.3, 0.3], [0.9, 0.8, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]
    assert records(out / "categorize") == {
        "000000000007-11": {"box": first, "name": "dog", "source": "11"},
        "000000000007-12": {"box": clipped, "name": "dog", "source": "12"},
        "000000000007-13": {"box": large, "name": "person", "source": "13"}}
    assert records(out / "locate") == {
        "000000000007-18": {"name": "dog", "boxes": [first, clipped], "source": "7"},
        "000000000007-1": {"name": "person", "boxes": [large], "source": "7"}}
    assert records(out / "detect") == {"000000000007": {"source": "7", "objects": [
        {"name": "person", "box": large}, {"name": "dog", "box": first}, {"name": "dog", "box": clipped}]}}


def test_images_are_copied_or_resized(coco):
    coco(tasks=("caption",))
    reader = ShardReader(load_manifest(coco.path / "out/caption"))
    copies = {reader.key(i): reader.image(i) for i in range(2)}
    assert copies["000000000007-1"] == (coco.path / "images/a.jpg").read_bytes()
    assert copies["000000000008-2"] == (coco.path / "images/b.png").read_bytes()
    coco(tasks=("caption",), out="small", resize=20)
    manifest = load_manifest(coco.path / "small/caption")
    reader = ShardReader(manifest)
    sizes = {reader.key(i): Image.open(BytesIO(reader.image(i))).size for i in range(2)}
    assert sizes == {"000000000007-1": (40, 20), "000000000008-2": (20, 40)}
    assert manifest.preprocessing["resize"] == 20 and manifest.members == ("jpg", "json")
    coco(tasks=("caption",), out="large", resize=64)
    reader = ShardReader(load_manifest(coco.path / "large/caption"))
    assert (100, 50) in {Image.open(BytesIO(reader.image(i))).size for i in range(2)}       # never enlarged


def test_sixteen_bit_photographs_are_not_white(coco):
    ramp = np.linspace(3000, 63000, 40 * 80).astype(np.uint16).reshape(80, 40)
    Image.fromarray(ramp).save(coco.path / "images/b.png")
    coco(tasks=("caption",), resize=20)
    reader = ShardReader(load_manifest(coco.path / "out/caption"))
    small, = (reader.image(i) for i in range(2) if reader.key(i) == "000000000008-2")
    low, high = Image.open(BytesIO(small)).convert("L").getextrema()
    assert low < 30 and high > 220


def test_max_boxes_keeps_the_largest(coco):
    report = coco(tasks=("locate", "detect"), max_boxes=1)
    assert report["skipped"]["over_max_boxes"] == 1 + 2
    assert records(coco.path / "out/detect")["000000000007"]["objects"] == [{"name": "person", "box": [0, 0, 1, 1]}]
    assert records(coco.path / "out/locate")["000000000007-18"]["boxes"] == [[0.1, 0.1, 0.3, 0.3]]


def test_seed_draws_the_order_and_limit_the_photos(coco):
    orders, limited = set(), set()
    for seed in range(8):
        coco(tasks=("caption",), seed=seed, out=f"all{seed}")
        coco(tasks=("caption",), seed=seed, out=f"two{seed}", limit=2)
        orders.add(tuple(records(coco.path / f"all{seed}/caption")))
        limited.add(frozenset(records(coco.path / f"two{seed}/caption")))
    dog, cafe = "000000000007-1", "000000000008-2"
    assert orders == {(dog, cafe), (cafe, dog)}
    assert {dog} in limited and {cafe} in limited               # the third photo of the two has no caption
    report = coco(tasks=("caption",), seed=3, out="again")
    assert report["tasks"]["caption"]["hash"] == load_manifest(coco.path / "all3/caption").hash


def test_texts_that_are_no_unicode_are_counted(coco):
    half = "half of a pair: \ud83d"
    report = coco(changed(CAPTIONS, "annotations", 0, caption=half), changed(INSTANCES, "categories", 1, name=half))
    assert report["skipped"] == {"crowd": 1, "degenerate": 2, "empty_caption": 1, "over_max_boxes": 0,
                                 "does_not_fit": 1 + 2}
    assert {task: report["tasks"][task]["samples"] for task in TASKS} == {
        "caption": 1, "categorize": 1, "locate": 1, "detect": 1}


@pytest.mark.parametrize("message, options", [
    ("captions.json is not JSON", {"captions": '{"images": ['}),
    ("captions.json has no list 'annotations'", {"captions": {"images": []}}),
    ("instances.json has no list 'categories'", {"instances": {"images": [], "annotations": []}}),
    ("has no list 'images'", {"captions": "[]"}),
    ("annotation 2: image_id 99 is not in \"images\"", {"captions": changed(CAPTIONS, "annotations", 1, image_id=99)}),
    ("annotation 11: image_id 99 is not", {"instances": changed(INSTANCES, "annotations", 0, image_id=99)}),
    ("annotation 12: category_id 5 is not in \"categories\" .2 ids, 1 to 18",
     {"instances": changed(INSTANCES, "annotations", 1, category_id=5)}),
    ("annotation 13: bbox .1, 2. is not", {"instances": changed(INSTANCES, "annotations", 2, bbox=[1, 2])}),
    ("annotation 13: bbox .*inf", {"instances": changed(INSTANCES, "annotations", 2, bbox=[0, 0, 1, float("inf")])}),
    ("annotation 13: bbox .0, 1.5, 10+",
     {"instances": changed(INSTANCES, "annotations", 2, bbox=[0, 1.5, 10**400, 1])}),
    ("image 7 has file_name '../a.jpg', which leaves the directory of --images: give a name",
     {"captions": changed(CAPTIONS, "images", 0, file_name="../a.jpg")}),
    ("image 7 has file_name '/a.jpg', which leaves", {"captions": changed(CAPTIONS, "images", 0, file_name="/a.jpg")}),
    ("image 7 has size 100 x 10+", {"captions": changed(CAPTIONS, "images", 0, height=10**400)}),
    ("annotation without a valid 'caption' .str", {"captions": changed(CAPTIONS, "annotations", 0, caption=None)}),
    ("image without a valid 'width' .int", {"captions": changed(CAPTIONS, "images", 0, width="100")}),
    ("image id 7 comes twice", {"captions": changed(CAPTIONS, "images", 1, id=7)}),
    ("of different datasets", {"captions": changed(CAPTIONS, "images", 0, width=101)}),
    ("1 of 2 photographs are not in .*, first gone.jpg",
     {"captions": changed(CAPTIONS, "images", 0, file_name="gone.jpg"), "tasks": ("caption",)}),
    ("task 'detect' is empty", {"instances": INSTANCES | {"annotations": []}, "tasks": ("caption", "detect")}),
    ("task 'caption' is empty", {"captions": CAPTIONS | {"annotations": []}}),
    ("--captions FILE is needed", {"captions": CAPTIONS, "tasks": ("caption",)}),
    ("--max-boxes 0", {"max_boxes": 0}),
    ("--limit -3: choose at least 1", {"limit": -3}),
    ("--shard-mb 0: choose more than 0", {"shard_mb": 0}),
    ("--shard-mb nan", {"shard_mb": float("nan")}),
    ("a.jpg is 100 x 50 pixels, 50 x 100 expected",
     {"captions": changed(CAPTIONS, "images", 0, width=50, height=100), "tasks": ("caption",)}),
])
def test_errors_leave_nothing(coco, message, options):
    def convert():
        if "FILE is needed" in message:
            return convert_coco(coco.path / "images", coco.path / "out", tasks=("caption",))
        return coco(**options)

    with pytest.raises(ValueError, match=message):
        convert()
    assert not (coco.path / "out").exists() or list((coco.path / "out").rglob("*.*")) == []


def test_errors_of_files(coco):
    coco(tasks=("caption",))
    with pytest.raises(ValueError, match="--images: no directory"):
        convert_coco(coco.path / "absent", coco.path / "x", captions=coco.path / "captions.json", tasks=("caption",))
    with pytest.raises(ValueError, match="--captions: no file"):
        convert_coco(coco.path / "images", coco.path / "x", captions=coco.path / "absent.json", tasks=("caption",))
    with pytest.raises(ValueError, match="already holds a shard set"):
        coco(tasks=("detect", "caption"))
    assert not (coco.path / "out/detect").exists()
    (coco.path / "images/a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.jpg does not decode, 100 x 50 expected"):
        coco(tasks=("caption",), out="bad")


def test_a_photograph_that_is_damaged_further_on(coco):
    path = coco.path / "images/b.png"
    noise = np.random.default_rng(0).integers(0, 255, (80, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    head, _, rest = path.read_bytes().partition(b"IDAT")
    half = b"IDAT" + rest[:4000]
    whole = head[:-4] + struct.pack(">I", 4000) + half + struct.pack(">I", zlib.crc32(half)) + struct.pack(">I", 100)
    path.write_bytes(whole + b"I\0AT" + rest[4000:])
    with pytest.raises(ValueError, match="b.png does not decode .*: download it again"):
        coco(tasks=("caption",), resize=20)


def test_task_names():
    assert choose_tasks("detect, caption,detect", TASKS) == ("detect", "caption")
    with pytest.raises(ValueError, match="unknown task 'categorise': did you mean 'categorize'"):
        choose_tasks("caption,categorise", TASKS)
    with pytest.raises(ValueError, match="unknown task 'xyz': choose from caption, categorize, locate, detect"):
        choose_tasks("xyz", TASKS)
    with pytest.raises(ValueError, match="empty"):
        choose_tasks(",", TASKS)


@pytest.mark.skipif(not (MINI / "annotations").is_dir(), reason=f"no COCO sample at {MINI} (set DSVLM_COCO_MINI)")
def test_coco_mini(tmp_path):
    annotations = MINI / "annotations"
    report = convert_coco(MINI / "train2017", tmp_path, captions=annotations / "captions_train2017.json", resize=64,
                          instances=annotations / "instances_train2017.json", max_boxes=1000, shard_mb=1)
    counts = {task: entry["samples"] for task, entry in report["tasks"].items()}
    assert report["photos"] == 80 and counts["caption"] == 400 and counts["detect"] == 80
    assert counts["categorize"] + report["skipped"]["crowd"] + report["skipped"]["degenerate"] == 739
    assert report["skipped"]["over_max_boxes"] == 0
    content = json.loads((annotations / "instances_train2017.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    kept = [a for a in content["annotations"] if not a["iscrowd"]]
    assert counts["locate"] == len({(a["image_id"], a["category_id"]) for a in kept})
    located, detected = records(tmp_path / "locate"), records(tmp_path / "detect")
    assert sum(len(r["boxes"]) for r in located.values()) == sum(len(r["objects"]) for r in detected.values()) == 731
    photos = {entry["id"]: entry for entry in content["images"]}
    truth = {a["id"]: a for a in kept}
    for record in records(tmp_path / "categorize").values():
        annotation = truth[int(record["source"])]
        photo = photos[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        pixels = [v * s for v, s in zip(record["box"], (photo["width"], photo["height"]) * 2, strict=True)]
        assert pixels == pytest.approx([x, y, x + width, y + height], abs=0.02)
        assert record["name"] == names[annotation["category_id"]]
        assert 0 <= record["box"][0] < record["box"][2] <= 1 and 0 <= record["box"][1] < record["box"][3] <= 1
    reader = ShardReader(load_manifest(tmp_path / "caption"))
    assert len(reader.manifest.names) > 1 and decode_image(reader.image(399), 32).shape == (3, 32, 32)
