"""The whole run in a few numbers, for `dsvlm plan`: epochs, idle ranks, padding, shards and reads at any world size."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from dsvlm.config import Recipe
from dsvlm.preflight.lengths import Cut
from dsvlm.preflight.node import NodeReads, distinct, node_reads
from dsvlm.preflight.simulate import UNCUT, useful_share
from dsvlm.preflight.table import table
from dsvlm.schedule.plan import Schedule, Stream
from dsvlm.schedule.preview import preview
from dsvlm.schedule.strategy import idle_share
from dsvlm.train.build import Planned, plan_run
from dsvlm.train.rundir import check_new_run

STEPS, RANKS = 16, 8  # at most so many of each are located; counts, epochs and the idle share come from all
SAMPLES = 2**20  # that are located, or are in windows that are cut by length: both take time in proportion


def plan_summary(recipe: Recipe, world_size: int, steps: range) -> tuple[list[dict], dict]:
    """Return the rows of some steps and the summary of the whole run; no sample is read."""
    planned = plan_run(recipe)
    check_new_run(recipe)
    cut = Cut(planned, world_size)
    rows = preview(planned.plan, planned.schedule, world_size, cut.deal, steps, planned.identity)
    return rows, summarise(planned, cut, world_size)


def summarise(planned: Planned, cut: Cut, world_size: int) -> dict:
    """Return the summary of a run as JSON types.

    "exact" tells whether the figures of "execution" hold for all steps, not for those of "looked_at" alone.
    """
    steps = planned.recipe.schedule.steps
    taken = planned.plan.cursors(steps)
    by_length = planned.recipe.train.micro_tokens > 0 and cut.tables is not None
    ranks = spread(world_size, RANKS)
    each = int(taken.sum()) // steps if by_length else int(taken.sum()) * len(ranks) // (steps * world_size)
    looked = spread(steps, min(STEPS, SAMPLES // max(1, each) + 1))
    reads = []
    for step in looked:
        window = planned.plan.window(step)
        dealt = [(window, cut.deal(window))]
        reads.append(node_reads(planned.plan, planned.manifests.values(), dealt, ranks, range(step, step + 1)))
    exact = planned.recipe.train.micro_tokens == 0 and planned.plan.control is None
    parts = phases(planned, steps) if exact else [(step, 1) for step in looked]
    step_bytes = sum(
        count * sum(manifest.bytes) / manifest.samples / steps
        for manifest, count in zip(planned.manifests.values(), taken.tolist(), strict=True)
    )
    useful = [useful_share(planned, one, cut.tables) for one in reads]
    requests = sum(float(one.requests(np.ones(len(one.task), bool))[0].sum()) for one in reads)
    requests *= taken.sum() / steps / sum(len(one.task) for one in reads)
    return {
        "recipe": planned.recipe.name, "steps": steps, "world_size": world_size,
        "strategy": planned.schedule.strategy, "phases": len(planned.schedule.table),
        "tasks": {
            stream.name: task_row(stream, int(taken[index]), steps)
            | shards_open([shards_of(one, index) for one in reads])
            | {"shards_open_bound": shards_bound(stream, planned.schedule.group, most(planned.schedule, index))}
            for index, stream in enumerate(planned.schedule.streams)
        },
        "execution": execution(planned, cut.deal, parts, world_size) | {"exact": exact},
        "padding": None if None in useful else {"useful_share": float(np.mean(useful))},
        "reads": {
            "bytes": step_bytes, "bytes_per_rank": step_bytes / world_size,
            "requests": float(requests), "requests_per_rank": float(requests) / world_size,
        },
        "looked_at": {"steps": looked, "ranks": ranks},
        "findings": findings(planned, cut),
    }  # fmt: skip


def findings(planned: Planned, cut: Cut) -> list[str]:
    """Where the run will be another than these figures say."""
    found = []
    if planned.recipe.train.micro_tokens and cut.tables is None:
        found.append(UNCUT)
    if planned.plan.control is not None:
        found.append(
            "schedule.controller: which tasks stop is decided by their losses; all of this is as if none ever did"
        )
    return found


def spread(stop: int, number: int) -> list[int]:
    """At most `number` integers below `stop`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, stop - 1, min(stop, number)).astype(np.int64)).tolist()


def phases(planned: Planned, steps: int) -> list[tuple[int, int]]:
    """(step, steps like it) for every kind of window: within a phase all are cut alike; drawn ones are throughout."""
    starts = [phase.start for phase in planned.schedule.table if phase.start < steps]
    return [(0, steps)] if planned.schedule.cyclic else [(low, high - low) for low, high in pairwise([*starts, steps])]


def execution(planned: Planned, deal: Callable, parts: list[tuple[int, int]], world_size: int) -> dict:
    """Means over the steps that `parts` stand for."""
    rows = []
    for step, _ in parts:
        window = planned.plan.window(step)
        rounds = deal(window)
        fillers = sum(world_size - one.units for one in rounds)
        rows.append((len(window), len(rounds), fillers, len(window) / float(1 - idle_share(rounds))))
    samples, rounds, fillers, places = np.average(rows, axis=0, weights=[times for _, times in parts]).tolist()
    return {
        "samples": samples, "micro_steps": rounds, "most_micro_steps": max(row[1] for row in rows),
        "fillers": fillers, "idle_share": 1 - samples / places,
    }  # fmt: skip


def task_row(stream: Stream, taken: int, steps: int) -> dict:
    return {
        "samples": stream.size, "shards": len(stream.shard_sizes), "taken": taken, "samples_per_step": taken / steps,
        "epochs": taken / stream.size, "seen_at_most": math.ceil(taken / stream.size),
        "steps_per_epoch": steps * stream.size / taken if taken else None,
    }  # fmt: skip


def shards_open(parts: list[np.ndarray]) -> dict:
    """Mean and most over the ranks and steps that have samples of the task."""
    counts = np.concatenate(parts)
    return {
        "shards_open": float(counts.mean()) if len(counts) else None, "most_shards_open": int(counts.max(initial=0))
    }  # fmt: skip


def shards_of(reads: NodeReads, task: int) -> np.ndarray:
    """Shards of a task that each rank with samples of it reads from. reads: of one step."""
    here = reads.task == task
    return np.unique(distinct(reads.rank[here], reads.shard[here])[0], return_counts=True)[1]


def most(schedule: Schedule, task: int) -> int:
    """Samples of a task that one window may hold."""
    share = max(phase.shares[task] for phase in schedule.table)
    return min(share, 1) * schedule.samples if schedule.cyclic else share


def shards_bound(stream: Stream, group: int, count: int) -> int:
    """How many shards `count` consecutive samples can lie in: whole groups, and the short one that ends an epoch."""
    shards = len(stream.shard_sizes)
    least = sum(sorted(stream.shard_sizes)[:group])  # samples of the smallest group there can be
    if not count or not least:
        return shards if count else 0
    return min(shards, group * (1 + -(-count // least)) + shards % group)


def render(summary: dict) -> str:
    """Return the summary as text."""
    execution, reads = summary["execution"], summary["reads"]
    rows = [["task", "samples", "per step", "epochs", "steps per epoch", "seen at most", "shards", "open at once"]]
    for name, task in summary["tasks"].items():
        each, held = task["steps_per_epoch"], task["shards_open"]
        rows.append([
            name, f"{task['samples']:,}", f"{task['samples_per_step']:,.1f}", f"{task['epochs']:,.2f}",
            "-" if each is None else f"{each:,.4g}", f"{task['seen_at_most']:,} x", f"{task['shards']:,}",
            f"{'-' if held is None else format(held, '.1f')} (bound {task['shards_open_bound']})",
        ])  # fmt: skip
    about = "" if execution["exact"] else " (of the steps looked at)"
    looked = summary["looked_at"]
    share = summary["padding"] and summary["padding"]["useful_share"]
    return "\n".join([
        f"{summary['recipe']}: {summary['steps']:,} steps on {summary['world_size']:,} ranks, {summary['strategy']}"
        + (f", {summary['phases']} phases" if summary["phases"] > 1 else ""),
        "",
        *table(rows),
        "",
        f"step     {execution['samples']:,.0f} samples, {execution['micro_steps']:,.1f} micro-steps, "
        f"{execution['idle_share']:.1%} of the places idle, {execution['fillers']:,.1f} filler units{about}",
        "padding  " + ("not known: no lengths yet (dsvlm data lengths)" if share is None
                       else f"{share:.1%} of the positions that are computed are useful"),
        f"reads    {reads['requests']:,.0f} requests and {reads['bytes'] / 1e6:,.1f} MB a step; of each rank "
        f"{reads['requests_per_rank']:,.1f} and {reads['bytes_per_rank'] / 1e6:,.2f} MB",
        f"open shards, padding and requests: from {len(looked['steps'])} steps and {len(looked['ranks'])} ranks, "
        "evenly spread",
        "open at once: shards of a task that a rank reads from in a step",
        *(f"finding: {text}" for text in summary["findings"]),
    ])  # fmt: skip
