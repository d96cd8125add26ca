"""Padding: share of computed tokens that are useful, by how windows are cut: `python -m benchmarks.padding [--json]`.

Drawn lengths, no images, no model: the same numbers on every machine. Useful: tokens of samples / those of padded rows.
Step: padded tokens of a micro-step's ranks, mean / busiest; 1 - step is the share of time that ranks are idle.
The windows are the same for all cuts and numbers of ranks.
"""

import argparse
import json
import time
from functools import partial

import numpy as np

from dsvlm.schedule.lengths import deal_by_length, token_shares
from dsvlm.schedule.plan import Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal
from dsvlm.train.lengths import bucket_edges, joint_histogram

SAMPLES = 20_000  # of each task
IMAGE = 576  # tokens of one image, 336 px in patches of 14
MICRO_BATCH = 16
MICRO_TOKENS = 8192
WINDOW = 1024  # samples
STEPS = 8
BUCKETS = 16  # the default of train.buckets
MIXTURE = "caption + text, 1 : 3"
GOALS = {(MIXTURE, "buckets"): 0.88, (MIXTURE, "packed"): 0.97}


def draw_lengths() -> dict[str, list[tuple[int, np.ndarray]]]:
    """Each data set's tasks: share of a window's samples, length of every sample, [samples] int64."""
    draw = np.random.default_rng(0)
    text = np.clip(np.exp(draw.normal(5.3, 0.6, SAMPLES)), 1, 2048).astype(np.int64)
    caption = IMAGE + np.clip(np.exp(draw.normal(2.9, 0.5, SAMPLES)), 1, 128).astype(np.int64)
    return {
        "vqa, lognormal(5.3, 0.6)": [(1, text)], "caption, 576 image tokens": [(1, caption)],
        MIXTURE: [(1, caption), (3, text)],
    }  # fmt: skip


def make_schedule(shares: list[int], window: int) -> Schedule:
    """Windows of all tasks mixed in a random order: strategy 1 of multi-task training."""
    shards = (1000,) * (SAMPLES // 1000)
    streams = (Stream(f"task{i}", shards, window * share // sum(shares), 1) for i, share in enumerate(shares))
    return Schedule(0, "mixed", tuple(streams))


def measure(shares: list[int], tasks: list[np.ndarray], window_size: int, world_size: int, steps: int) -> list[dict]:
    """One row per cut: useful and step shares over some windows, and the time that a rank takes to deal one."""
    schedule = make_schedule(shares, window_size)
    plan = Plan(schedule)
    histogram = joint_histogram(schedule, [np.bincount(lengths) for lengths in tasks])
    by_length = partial(
        deal_by_length, schedule=schedule, world_size=world_size, micro_tokens=MICRO_TOKENS,
        edges=[bucket_edges(histogram, BUCKETS)] * len(tasks),
    )  # fmt: skip
    cuts = {
        "random batches": lambda window, lengths: deal(window, schedule, world_size, MICRO_BATCH),
        "buckets": lambda window, lengths: by_length(window, lengths=lengths, pack=[False] * len(tasks)),
        "packed": lambda window, lengths: by_length(window, lengths=lengths, pack=[True] * len(tasks)),
    }
    totals, spent = {name: np.zeros(3, np.int64) for name in cuts}, {name: [] for name in cuts}
    rounds = dict.fromkeys(cuts, 0)
    for step in range(steps):
        window = plan.window(step)
        task, ordinal = window.take(np.arange(len(window)))
        _, sample = plan.locate_all(task, ordinal)
        lengths = np.choose(task, [one[sample] for one in tasks])
        for name, cut in cuts.items():
            start = time.perf_counter()
            dealt = cut(window, lengths)
            spent[name].append(time.perf_counter() - start)
            rounds[name] += len(dealt)
            totals[name] += token_shares(dealt, lengths)
    return [
        {
            "cut": name, "useful": useful / padded, "step": padded / waited, "product": useful / waited,
            "micro_steps": rounds[name] / steps, "deal_ms": 1e3 * float(np.median(spent[name])),
        }
        for name, (useful, padded, waited) in ((name, total.tolist()) for name, total in totals.items())
    ]  # fmt: skip


def table(window: int, world_sizes: list[int], steps: int) -> list[dict]:
    rows = []
    for data, tasks in draw_lengths().items():
        for world_size in world_sizes:
            for row in measure(*map(list, zip(*tasks, strict=True)), window, world_size, steps):
                goal = GOALS.get((data, row["cut"]))
                met = None if goal is None else row["useful"] >= goal
                rows.append({"data": data, "world_size": world_size, **row, "goal": goal, "met": met})
    return rows


def render(rows: list[dict]) -> str:
    lines = ["| data | W | cut | useful | step | useful x step | micro-steps | deal, ms | goal |", "|" + "---|" * 9]
    for row in rows:
        goal = "" if row["goal"] is None else f">= {row['goal']} {'met' if row['met'] else 'MISSED'}"
        shares = " | ".join(f"{row[name]:.3f}" for name in ("useful", "step", "product"))
        lines.append(
            f"| {row['data']} | {row['world_size']} | {row['cut']} | {shares} | {row['micro_steps']:.1f} | "
            f"{row['deal_ms']:.2f} | {goal} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=__doc__.splitlines()[0])
    parser.add_argument("--world-sizes", default="1,8,64", metavar="W,W", help="default 1,8,64")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"samples of a window (default {WINDOW})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"windows of each (default {STEPS})")
    parser.add_argument("--json", action="store_true", help="print the rows as one line of JSON")
    args = parser.parse_args()
    rows = table(args.window, [int(text) for text in args.world_sizes.split(",")], args.steps)
    print(json.dumps(rows) if args.json else render(rows))


if __name__ == "__main__":
    main()
