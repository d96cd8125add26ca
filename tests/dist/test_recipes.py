"""The shipped recipes of published schedules: their shares, and a few updates on 2 ranks with ZeRO-3."""

import json
import math
from collections import Counter

import pytest

from dsvlm.config import load_recipe
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.schedule.digest import digest
from dsvlm.train.build import plan_run

SAMPLES = {"caption": 40, "question": 70, "count": 10, "locate": 33, "relation": 17}
SMALL = (
    "schedule.samples=16", "schedule.steps=6", "optim.warmup=1", "train.log_every=1", "train.micro_batch=8",
    "model.vision.config.hidden_size=16", "model.decoder.config.num_hidden_layers=1",
    "model.decoder.config={hidden_size: 16, word_embed_proj_dim: 16, ffn_dim: 16, num_hidden_layers: 1, "
    "num_attention_heads: 2, max_position_embeddings: 96}",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Drawn scenes with another number of samples for each task."""
    root = tmp_path_factory.mktemp("scenes")
    for task, samples in SAMPLES.items():
        make_scenes(root, samples=samples, val_samples=0, tasks=(task,))
    return root


def small(name, scenes, *overrides):
    return load_recipe(name, [f"data.root={scenes}", *SMALL, *overrides])


def drawn(recipe, steps):
    plan = plan_run(recipe).plan
    tasks = [block.task for step in steps for block in plan.window(step).blocks]
    return {list(recipe.tasks)[task]: number for task, number in Counter(tasks).items()}


def test_unit_has_its_probabilities_in_every_cycle(scenes):
    recipe = small("scenes-unit", scenes)
    percent = {"locate": 20 + 7, "question": 26, "relation": 12, "caption": 25, "count": 10}
    assert sum(percent.values()) == 100
    for cycle in (0, 1, 7):
        assert drawn(recipe, range(100 * cycle, 100 * cycle + 100)) == percent
    plan = plan_run(recipe).plan
    order = [plan.window(step).blocks[0].task for step in range(200)]
    assert order[:100] != order[100:]


def test_mtdnn_uses_every_batch_once_in_a_cycle(scenes):
    """ceil(samples / batch) updates of each task in an epoch of all, shuffled over the whole list."""
    recipe = small("scenes-mtdnn", scenes)
    batches = {task: -(-samples // 16) for task, samples in SAMPLES.items()}
    cycle = sum(batches.values())
    assert drawn(recipe, range(cycle)) == drawn(recipe, range(5 * cycle, 6 * cycle)) == batches


@pytest.mark.parametrize("name", ["scenes-unit", "scenes-mtdnn"])
def test_a_few_updates(pools, scenes, tmp_path, name):
    recipe = small(name, scenes, f"output={tmp_path}")
    assert recipe.train.zero == 3
    assert pools(2).run("train_until", recipe=recipe, stop=6) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    planned = plan_run(recipe)
    windows = [planned.plan.window(step) for step in range(6)]
    assert [row["digest"] for row in rows] == [digest(planned.identity, window) for window in windows]
    for window, row in zip(windows, rows, strict=True):
        task = list(recipe.tasks)[window.blocks[0].task]
        assert list(row["task_loss"]) == [task] and row["samples"] == 16 and row["masked"] == 0
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
