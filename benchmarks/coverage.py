"""Row h: correctness as figures: samples lost and repeated, and micro-steps whose ranks disagree on the task."""

import os
import random
from collections import Counter
from functools import partial
from pathlib import Path

from benchmarks.contest import planned_run
from benchmarks.measure import Row
from dsvlm.data.manifest import load_manifest
from dsvlm.schedule.strategy import deal

WORLD_SIZES = (1, 2, 3, 4, 5, 8)
TASKS = ("caption", "vqa", "text")
BATCH = 32


def measure_coverage(root: Path) -> list[Row]:
    """One row per loader: the worst of the world sizes, and what happened at each."""
    loaders = {"dsvlm": partial(count_ours, root)}
    try:
        import webdataset

        loaders["webdataset, split_by_node"] = partial(count_webdataset, webdataset, root)
    except ImportError:
        pass
    rows = []
    for name, count in loaders.items():
        counts = {world_size: count(world_size) for world_size in WORLD_SIZES}
        wrong = max(lost + repeated for lost, repeated, _, _ in counts.values())
        note = "; ".join(
            f"W = {size}: {lost:,} lost, {repeated:,} repeated, {disagree:,} of {steps:,}"
            for size, (lost, repeated, disagree, steps) in counts.items()
        )
        met = not any(lost + repeated + disagree for lost, repeated, disagree, _ in counts.values())
        goal = {"goal": "0", "met": met} if name == "dsvlm" else {}
        what = f"{name}: samples of an epoch lost or repeated, micro-steps with different tasks on ranks"
        rows.append(Row("h", what, wrong, "samples", **goal, note=note))
    return rows


def count_ours(root: Path, world_size: int) -> tuple[int, int, int, int]:
    """What all ranks together read until each task's first epoch is over, by the plan and the deal of training."""
    planned = planned_run(root, list(TASKS), 0, BATCH)
    cut = partial(deal, schedule=planned.schedule, world_size=world_size, micro_batch=BATCH)
    sizes = [stream.size for stream in planned.schedule.streams]
    windows = max(-(-size // stream.samples) for size, stream in zip(sizes, planned.schedule.streams, strict=True))
    seen: list[Counter] = [Counter() for _ in TASKS]
    disagree = steps = 0
    for step in range(windows):
        window = planned.plan.window(step)
        for micro_step in cut(window):
            found = set()
            for rank in range(world_size):
                tasks, ordinals = window.take(micro_step.unit(rank).places)
                epochs, samples = planned.plan.locate_all(tasks, ordinals)
                found |= set(tasks.tolist())
                first = epochs == 0
                for task in set(tasks.tolist()):
                    seen[task].update(samples[first & (tasks == task)].tolist())
            disagree += len(found) > 1
            steps += 1
    lost = sum(size - len(counter) for size, counter in zip(sizes, seen, strict=True))
    return lost, sum(counter.total() - len(counter) for counter in seen), disagree, steps


def count_webdataset(wds, root: Path, world_size: int) -> tuple[int, int, int, int]:
    """One epoch of each task: shards split by node; ranks stop together when the first has no batch left.

    For the mixture each rank draws the tasks of its batches by RandomMix, as documented. Partial batches are kept.
    """
    ranks = [{task: batches_of(wds, root, task, rank, world_size) for task in TASKS} for rank in range(world_size)]
    lost = 0
    for task in TASKS:
        shortest = min(len(batches[task]) for batches in ranks)
        lost += load_manifest(root / task).samples - sum(sum(batches[task][:shortest]) for batches in ranks)
    drawn = []
    for rank, batches in enumerate(ranks):
        random.seed(f"{world_size}/{rank}")  # RandomMix draws from the process's generator
        lengths = [len(batches[task]) for task in TASKS]
        streams = [[task] * length for task, length in zip(TASKS, lengths, strict=True)]
        drawn.append(list(wds.RandomMix(streams, lengths)))
    steps = min(map(len, drawn))
    disagree = sum(len({tasks[step] for tasks in drawn}) > 1 for step in range(steps))
    return lost, 0, disagree, steps


def batches_of(wds, root: Path, task: str, rank: int, world_size: int) -> list[int]:
    """Samples of each batch of one rank; webdataset learns from the environment which rank it is."""
    urls = [str(root / task / name) for name in load_manifest(root / task).names]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        dataset = wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False)
        return list(dataset.map(lambda sample: 1).batched(BATCH, collation_fn=len))
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
