"""Drawn scenes: what is asked is true, train and val never share a scene, the same seed gives the same bytes."""

import collections
import inspect
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dsvlm.data.convert.scenes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    TASKS,
    Draws,
    draw_png,
    draw_sample,
    layout,
    make_scenes,
    split_of,
)
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.transforms import decode_image
from dsvlm.tasks.vqa import Vqa

PALETTE = (tuple(COLOURS)[:4], SHAPES[:3])


def samples(task, count, split="train", objects=2, palette=PALETTE, seed=0):
    return [draw_sample(seed, split, task, i, objects, palette) for i in range(count)]


def test_default_scenes_are_as_promised():
    for scene, _ in samples("caption", 300):
        assert 1 <= len(scene) <= 2
        assert len({i.colour for i in scene}) == len({i.shape for i in scene}) == len(scene)
        assert all(i.colour in PALETTE[0] and i.shape in PALETTE[1] and 27 <= i.width <= 36 for i in scene)
        assert all(0 <= i.x <= 64 - i.width and 0 <= i.y <= 64 - i.width for i in scene)


def test_the_picture_shows_the_scene():
    """The middle of an object's box has its colour, but for a ring, and all coloured pixels lie in the boxes."""
    for scene, _ in samples("caption", 100, palette=(PALETTE[0], SHAPES)):
        pixels = np.asarray(Image.open(BytesIO(draw_png(scene, 128)))).astype(int)
        assert pixels.shape == (128, 128, 3)
        inside = np.zeros((128, 128), bool)
        for item in scene:
            x, y, side = 2 * item.x, 2 * item.y, 2 * item.width
            assert (tuple(pixels[y + side // 2, x + side // 2]) == COLOURS[item.colour]) == (item.shape != "ring")
            inside[y:y + side, x:x + side] = True
            coloured = (pixels == COLOURS[item.colour]).all(-1)
            rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            if len(scene) == 1:
                assert np.abs(np.array(found) - np.array(item.box) * 128).max() <= 4      # a triangle's tip is thin
        assert (pixels[~inside] == (24, 24, 28)).all()


@pytest.mark.parametrize("objects, colours", [(3, 4), (6, 8), (12, 2)])
def test_answers_are_true_and_unambiguous(objects, colours):
    palette = (tuple(COLOURS)[:colours], SHAPES[:3])
    for scene, record in samples("question", 60, objects=objects, palette=palette):
        word = record["question"].removeprefix("what colour is the ").removeprefix("what shape is ").rstrip("?")
        fitting = [i for i in scene if word in (i.colour, i.shape)]
        assert len(fitting) == 1
        assert record["answer"] == (fitting[0].colour if "colour" in record["question"] else fitting[0].shape)
    for scene, record in samples("count", 60, objects=objects, palette=palette):
        assert record == {"question": "how many objects are there?", "answer": NUMBERS[len(scene)]}
    for scene, record in samples("locate", 60, objects=objects, palette=palette):
        assert record["boxes"] == [i.box for i in scene if i.name == record["name"]] and record["boxes"]
    for scene, record in samples("relation", 60, objects=objects, palette=palette):
        first, second = record["question"].removeprefix("where is the ").rstrip("?").split(" relative to the ")
        (a,), (b,) = ([i for i in scene if i.name == name] for name in (first, second))
        dx, dy = a.x + a.width / 2 - b.x - b.width / 2, a.y + a.width / 2 - b.y - b.width / 2
        assert {"left": -dx, "right": dx, "above": -dy, "below": dy}[record["answer"]] >= 2 * min(abs(dx), abs(dy))
    for scene, record in samples("caption", 60, objects=objects, palette=palette):
        names = [name.removeprefix("a ") for name in record["caption"].split(", ")]
        assert names == [i.name for i in sorted(scene, key=lambda i: (i.x + i.width / 2, i.y + i.width / 2, i))]


@pytest.mark.parametrize("task", ["question", "count", "relation"])
def test_no_answer_dominates(task):
    """Guessing the commonest answer of each kind of question is right in about a third of three objects' scenes."""
    answers = collections.Counter()
    for _, record in samples(task, 600, objects=3):
        answers[" ".join(record["question"].split()[:2]), record["answer"]] += 1
    best = collections.Counter()
    for (question, _), count in answers.items():
        best[question] = max(best[question], count)
    assert sum(best.values()) / 600 <= 0.40


@pytest.mark.parametrize("task", ["question", "relation"])
def test_blind_guesses_rarely_hit_at_the_defaults(task):
    """What `dsvlm eval` will print as chance: to each question its commonest answer in training."""
    default = {name: p.default for name, p in inspect.signature(make_scenes).parameters.items()}
    palette = (tuple(COLOURS)[:default["colours"]], SHAPES[:default["shapes"]])
    train, val = ([record for _, record in samples(task, count, split, default["objects"], palette, default["seed"])]
                  for split, count in (("train", 5000), ("val", 400)))
    assert Vqa().chance(train, val) <= 0.35


def test_boxes_hardly_overlap():
    for scene, _ in samples("caption", 200, objects=12, palette=(tuple(COLOURS), SHAPES)):
        for n, a in enumerate(scene):
            for b in scene[:n]:
                x = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
                y = min(a.y + a.width, b.y + b.width) - max(a.y, b.y)
                assert max(x, 0) * max(y, 0) <= 0.06 * min(a.width, b.width) ** 2


def test_train_and_val_never_share_a_scene(tmp_path):
    make_scenes(tmp_path, samples=150, val_samples=60)
    layouts, pixels = {}, {}
    for split, count in (("train", 150), ("val", 60)):
        scenes = [scene for task in TASKS for scene, _ in samples(task, count, split)]
        assert {split_of(scene) for scene in scenes} == {split}
        layouts[split] = {layout(scene) for scene in scenes}
        readers = [ShardReader(load_manifest(tmp_path / split / task)) for task in TASKS]
        pixels[split] = {reader.image(i) for reader in readers for i in range(count)}
        assert pixels[split] == {draw_png(scene, 40) for scene in scenes}
    assert not layouts["train"] & layouts["val"] and not pixels["train"] & pixels["val"]


def test_layout_ignores_order_and_small_moves():
    (scene, _), = samples("relation", 1)
    moved = [i._replace(x=i.x // 8 * 8, y=i.y // 8 * 8, width=24) for i in scene]
    assert layout(moved) == layout(moved[::-1]) == layout([i._replace(x=i.x + 3) for i in moved])
    assert layout(moved) != layout([i._replace(x=i.x + 8) for i in moved])
    assert layout(moved) != layout([i._replace(colour="white") for i in moved])


def test_same_seed_same_bytes(tmp_path):
    reports = [make_scenes(tmp_path / name, samples=12, val_samples=3, seed=seed, tasks=("locate", "relation"))
               for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    assert reports[0] == reports[1]
    files = {name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
             for name in "ab"}
    assert files["a"] == files["b"] and len(files["a"]) == 4 * 4
    assert reports[0]["train"]["locate"]["hash"] != reports[2]["train"]["locate"]["hash"]
    assert reports[0]["val"]["relation"]["samples"] == 3


def test_draws_are_what_they_were():
    """Golden values: a change here changes everybody's data."""
    draws = Draws("golden", 0)
    assert [draws.below(100) for _ in range(10)] == [51, 28, 13, 80, 67, 23, 58, 5, 13, 33]
    counts = collections.Counter(draws.below(3) for _ in range(3000))
    assert all(900 < counts[i] < 1100 for i in range(3))
    assert sorted(draws.choose("abc", 3)) == ["a", "b", "c"] and len(draws.choose("ab", 5)) == 5


def test_shard_sets(tmp_path):
    report = make_scenes(tmp_path, samples=40, val_samples=0, size=24, shard_mb=0.03)
    assert list(report) == ["train"] and list(report["train"]) == list(TASKS)
    for task, task_type in TASKS.items():
        manifest = load_manifest(tmp_path / "train" / task)
        assert manifest.type == task_type and manifest.samples == 40 and len(manifest.names) > 1
        assert manifest.preprocessing["size"] == 24 and manifest.preprocessing["split"] == "train"
        assert decode_image(ShardReader(manifest).image(39), 24).shape == (3, 24, 24)
    with pytest.raises(ValueError, match="already holds a shard set"):
        make_scenes(tmp_path, samples=1, val_samples=1)
    assert not (tmp_path / "val").exists()


@pytest.mark.parametrize("options, message", [
    ({"size": 4}, "size = 4: choose 16 to 4096"),
    ({"objects": 13}, "objects = 13: choose 1 to 12"),
    ({"colours": 9}, "colours = 9: choose 1 to 8"),
    ({"objects": 1}, "'relation' needs two objects"),
    ({"samples": -1}, "--samples -1: choose at least 0"),
    ({"shard_mb": -4}, "--shard-mb -4: choose more than 0"),
])
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_scenes(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
