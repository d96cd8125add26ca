"""The plan and the digest check at large world sizes: `python -m benchmarks.plan [--json]`.

One rank's share is computed, as the rank itself does it: window, deal, its units' places, their samples, the mark that
ranks compare. Rank 0 also records the digest of each window, which is O(blocks): for per_rank it has rows of its own.
Where windows are cut by length (train.micro_tokens) every rank looks at the lengths of the whole window: that part is
O(window), so it grows with W where the window does, and has rows of its own.
Processor time, so that other processes on the machine do not count.
"""

import argparse
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.measure import Row, machine, markdown, progress, spread
from benchmarks.padding import BUCKETS, MICRO_TOKENS, draw_lengths
from dsvlm.config import load_recipe
from dsvlm.schedule.agreement import difference, merge, summarise
from dsvlm.schedule.digest import digest, identity_bytes, mark
from dsvlm.schedule.lengths import deal_by_length
from dsvlm.schedule.permutation import EpochOrder
from dsvlm.schedule.plan import STRATEGIES, Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal
from dsvlm.train.lengths import bucket_edges, window_positions

TASKS, SHARDS, SHARD = 8, 1_000, 10_000  # 8 tasks of 1,000 shards of 10,000 samples
MICRO_BATCH = 16
WORLDS = (64, 256, 1_024, 4_096, 16_384)
CUT_WORLDS = (64, 1_024, 16_384)  # of the rows that are O(window)
NODE = 8  # ranks of a node
HOP = 0.005  # seconds: what one message between nodes is taken to cost in the modelled figure


def schedule_of(strategy: str, world_size: int, samples: int) -> Schedule:
    """samples: per rank and task in a window."""
    streams = tuple(Stream(f"task{i}", (SHARD,) * SHARDS, samples * world_size, i + 1) for i in range(TASKS))
    total = samples * world_size * TASKS
    drawn = {"unified": {"samples": total}, "per_rank": {"samples": total, "chunk": MICRO_BATCH}}.get(strategy, {})
    return Schedule(seed=3, strategy=strategy, streams=streams, block=1, group=16, **drawn)


def share_of_rank(plan: Plan, identity: bytes, world_size: int, rank: int, step: int) -> int:
    """What a rank computes for a window; the number of its micro-steps."""
    window = plan.window(step)
    rounds = deal(window, plan.schedule, world_size, MICRO_BATCH)
    places = np.concatenate([one.unit(rank).places for one in rounds])
    plan.locate_all(*window.take(places))
    mark(identity, window)
    return len(rounds)


def micro_step_us(strategy: str, world_size: int, samples: int, seconds: float) -> tuple[float, int]:
    """Microseconds of a micro-step, over consecutive windows and so with new epochs as they come; micro-steps each."""
    schedule = schedule_of(strategy, world_size, samples)
    plan, identity = Plan(schedule), identity_bytes(schedule, "recipe", ["manifest"] * TASKS)
    step, micro_steps = 1_000, 0
    share_of_rank(plan, identity, world_size, world_size // 3, step)
    start = time.process_time()
    while (spent := time.process_time() - start) < seconds:
        step += 1
        micro_steps += share_of_rank(plan, identity, world_size, world_size // 3, step)
    return spent / micro_steps * 1e6, micro_steps // (step - 1_000)


def plan_rows(repeats: int, seconds: float) -> list[Row]:
    rows = []
    for samples in (64, 16):
        for strategy in STRATEGIES:
            found = {world: [] for world in WORLDS}
            for _ in range(repeats):
                for world in WORLDS:
                    us, each = micro_step_us(strategy, world, samples, seconds)
                    found[world].append(us)
            for world, values in found.items():
                what = f"{strategy}, {each} micro-steps in a window, W = {world:,}"
                rows.append(spread("plan of a rank, per micro-step", what, values, "us", goal="<= 100 us",
                                   met=statistics.median(values) <= 100))  # fmt: skip
            progress(rows[-1].what)
    return rows


def recorded_us(world_size: int, samples: int, windows: int = 4) -> tuple[float, int]:
    """Microseconds of a micro-step that the digest of per_rank's windows takes; micro-steps each."""
    schedule = schedule_of("per_rank", world_size, samples)
    plan, identity = Plan(schedule), identity_bytes(schedule, "recipe", ["manifest"] * TASKS)
    micro_steps = len(deal(plan.window(1_000), schedule, world_size, MICRO_BATCH))
    start = time.process_time()
    for step in range(1_000, 1_000 + windows):
        digest(identity, plan.window(step))
    return (time.process_time() - start) / windows / micro_steps * 1e6, micro_steps


def record_rows(repeats: int) -> list[Row]:
    """What the digest costs the one rank that records it."""
    rows = []
    for samples in (64, 16):
        for world in WORLDS:
            runs = [recorded_us(world, samples) for _ in range(repeats)]
            what = f"digest that rank 0 records, per_rank, {runs[0][1]} micro-steps in a window, W = {world:,}"
            rows.append(spread("digest of a step where it is recorded (rank 0), per micro-step", what,
                               [run[0] for run in runs], "us", note="O(chunks): no goal"))  # fmt: skip
        progress(rows[-1].what)
    return rows


class DrawnLengths:
    """Lengths of a task's samples, drawn; as `dsvlm.data.lengths.Lengths`."""

    def __init__(self, table: np.ndarray):
        self.table = table

    def positions(self, samples: np.ndarray, image_tokens: int) -> np.ndarray:
        return self.table[samples % len(self.table)]


def cut_by_length_ms(pack: bool, world_size: int, samples: int) -> tuple[float, int, int]:
    """Milliseconds of a micro-step whose window is cut by length, micro-steps of the window, and its samples."""
    schedule = schedule_of("accumulate", world_size, samples)
    plan, identity = Plan(schedule), identity_bytes(schedule, "recipe", ["manifest"] * TASKS)
    ((_, table),) = next(iter(draw_lengths().values()))
    lengths, edges = (DrawnLengths(table),) * TASKS, (bucket_edges(np.bincount(table), BUCKETS),) * TASKS
    plan.locate_all(*plan.window(1_000).take(np.arange(TASKS * samples * world_size)))  # the epochs' orders are known
    start = time.process_time()
    window = plan.window(1_000)
    rounds = deal_by_length(
        window, schedule, world_size, micro_tokens=MICRO_TOKENS, lengths=window_positions(plan, window, lengths, 0),
        edges=edges, pack=(pack,) * TASKS,
    )  # fmt: skip
    places = np.concatenate([one.unit(world_size // 3).places for one in rounds])
    plan.locate_all(*window.take(places))
    digest(identity, window)
    return (time.process_time() - start) / len(rounds) * 1e3, len(rounds), len(window)


def length_rows(repeats: int, samples: int = MICRO_BATCH) -> list[Row]:
    """What ranks do, every one of them, for windows that are cut by length; samples: per rank and task in a window."""
    rows = []
    for name, pack in (("buckets", False), ("packed", True)):
        for world in CUT_WORLDS:
            runs = [cut_by_length_ms(pack, world, samples) for _ in range(repeats)]
            what = f"{name}, {runs[0][1]} micro-steps in a window of {runs[0][2]:,} samples, W = {world:,}"
            values = [run[0] for run in runs]
            rows.append(spread("plan with micro_tokens, per micro-step", what, values, "ms", note="O(window): no goal"))
        progress(rows[-1].what)
    return rows


def epoch_rows(repeats: int) -> list[Row]:
    """What the first sample of an epoch costs more than others."""
    sizes = np.full(SHARDS, SHARD + 1)  # so that every shard ends in a short block
    rows = []
    for block in (1, 64):
        values = [timed(lambda key=key, block=block: EpochOrder(sizes, block, 16, key)) for key in range(repeats * 10)]
        rows.append(spread("order of a new epoch", f"{SHARDS:,} shards, block {block}", np.array(values) * 1e6, "us"))
    return rows


def resume_rows(repeats: int, shards: int = 10_000, shard: int = 100_000) -> list[Row]:
    """From the numbers of a recipe to the sample ids of the first window, in a new plan."""
    sizes = (shard,) * shards
    found: dict[float, list[float]] = {0.0: [], 0.99: []}
    for _ in range(repeats):
        for share, seconds in found.items():
            schedule = Schedule(3, "accumulate", (Stream("task", sizes, 16_384, 1),))
            step = int(share * shards * shard) // 16_384
            seconds.append(timed(lambda s=schedule, step=step: share_of_rank(Plan(s), b"identity", 256, 99, step)))
    return [
        spread("resume", f"first samples at {share:.0%} of {shards * shard:,} in {shards:,} shards",
               np.array(seconds) * 1e3, "ms")
        for share, seconds in found.items()
    ]  # fmt: skip


def agreement(world_size: int, other: Callable[[int], bool]) -> tuple[float, float, str | None]:
    """(processor seconds of all ranks, seconds on the longest way, message), as messages go: pickled, node, leaders."""
    recipe = load_recipe("quickstart", [])
    manifests = {f"manifest of task {name}": f"{index:064x}" for index, name in enumerate(recipe.tasks)}
    record = {**recipe.identity(), **recipe.execution(), **manifests, "code version": "0.1.0+0123456789ab"}
    records = {False: record, True: record | {"seed": -1}}
    node_seconds, leaders = [], []
    for first in range(0, world_size, NODE):
        start = time.process_time()
        ranks = range(first, min(first + NODE, world_size))
        sent = [pickle.dumps(summarise(rank, records[other(rank)])) for rank in ranks]
        leaders.append(pickle.dumps(merge(map(pickle.loads, sent))))
        node_seconds.append(time.process_time() - start)
    start = time.process_time()
    message = difference(merge(map(pickle.loads, leaders)))
    root = time.process_time() - start
    return sum(node_seconds) + root, max(node_seconds) + root, message


def digest_rows(repeats: int, world_size: int = 16_384) -> list[Row]:
    odd = {
        "all agree": lambda rank: False,
        "one rank differs": lambda rank: rank == world_size * 3 // 5,
        "one node differs": lambda rank: rank // NODE == world_size // NODE // 3,
        "every other rank differs": lambda rank: rank % 2 == 1,
    }
    rows = []
    for what, other in odd.items():
        runs = [agreement(world_size, other) for _ in range(repeats)]
        assert all((run[2] is None) == (what == "all agree") for run in runs)
        seconds = [run[0] for run in runs]
        longest = statistics.median(run[1] for run in runs)
        # In and out of a node and of the root; the root takes the leaders' messages one after the other.
        modelled = longest + 4 * HOP + world_size // NODE * HOP / 100
        rows.append(spread(
            f"digest check of {world_size:,} ranks, {NODE} on a node", what, seconds, "s", goal="<= 2 s",
            met=statistics.median(seconds) <= 2,
            note=f"all ranks' work in one process; longest way {longest:.3f} s, modelled with {HOP * 1e3:g} ms a hop "
            f"and {HOP * 10:g} ms a message at the root {modelled:.2f} s",
        ))  # fmt: skip
        progress(rows[-1].what)
    return rows


def grid(rows: list[Row]) -> str:
    """The rows of the plan, which come world by world, as one line for each strategy and window."""
    lines = ["| plan of a rank, us per micro-step | " + " | ".join(f"W = {world:,}" for world in WORLDS) + " |",
             "|---|" + "---:|" * len(WORLDS)]  # fmt: skip
    for first in range(0, len(rows), len(WORLDS)):
        line = rows[first : first + len(WORLDS)]
        lines.append(f"| {line[0].what.rpartition(',')[0]} | " + " | ".join(f"{row.value:,.0f}" for row in line) + " |")
    return "\n".join(lines)


def timed(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="processor time of each figure of the plan")
    args = parser.parse_args(argv)
    plan = plan_rows(args.repeats, args.seconds) + record_rows(args.repeats)
    rows = length_rows(args.repeats) + epoch_rows(args.repeats)
    rows += resume_rows(args.repeats) + digest_rows(args.repeats)
    if args.json:
        print(json.dumps({"machine": machine(), "rows": [row.to_dict() for row in [*plan, *rows]]}))
    else:
        print(f"{grid(plan)}\n\n{markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
