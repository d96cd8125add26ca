"""`dsvlm data simulate`: what a run of many ranks will ask of its store, known without a GPU and without its data."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsvlm.data.index import has_images
from dsvlm.data.lengths import Lengths
from dsvlm.data.loader import FETCHES, WINDOWS_AHEAD
from dsvlm.data.manifest import Manifest, is_url
from dsvlm.data.remote import CONCURRENT
from dsvlm.preflight.eviction import misses_by_last_use, misses_by_next_use
from dsvlm.preflight.lengths import Cut
from dsvlm.preflight.node import NodeReads, distinct, node_reads
from dsvlm.preflight.table import table
from dsvlm.schedule.strategy import idle_share
from dsvlm.train.build import Planned
from dsvlm.train.lengths import image_tokens

UNCUT = "train.micro_tokens: cut by samples here, for lengths are not known yet: see dsvlm data lengths"
IDLE = 0.1  # share of places without a sample that is worth a word


@dataclass(frozen=True)
class Cluster:
    """The machines of a run, and the one node that is looked at."""

    world_size: int
    ranks_per_node: int = 8
    node: int = 0

    def __post_init__(self):
        for name, value in (("world-size", self.world_size), ("ranks-per-node", self.ranks_per_node)):
            if value < 1:
                raise ValueError(f"--{name} {value}: use at least 1")
        if not 0 <= self.node < self.nodes:
            raise ValueError(
                f"--node {self.node}: {self.world_size} ranks, {self.ranks_per_node} on a node, make nodes 0 to "
                f"{self.nodes - 1}"
            )

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)

    @property
    def ranks(self) -> range:
        first = self.node * self.ranks_per_node
        return range(first, min(first + self.ranks_per_node, self.world_size))


@dataclass(frozen=True)
class Store:
    """An object store as a node sees it: every request waits `latency_ms`, then flows at `mb_per_s` (10^6 bytes).

    cache_mb: of the node (2^20 bytes); step_seconds: time of an update, None = not known.
    """

    latency_ms: float
    mb_per_s: float
    cache_mb: int
    step_seconds: float | None = None

    def __post_init__(self):
        limits = {"latency_ms": 0, "mb_per_s": 0.001, "cache_mb": 0, "step_seconds": 0.001}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: use a number of at least {least}")

    def seconds(self, requests: np.ndarray, size: np.ndarray) -> np.ndarray:
        """What requests of `size` bytes in all take when they come one after the other."""
        return requests * self.latency_ms / 1e3 + size / (self.mb_per_s * 1e6)


def simulate(planned: Planned, cluster: Cluster, store: Store, steps: range, progress) -> dict:
    """What one node reads in `steps`, what its cache saves, and whether the store keeps up; JSON types only.

    progress: callable(iterable, desc=, unit=) -> iterable. "findings": a sentence for each thing to change.
    """
    cut = Cut(planned, cluster.world_size)
    waste: list[dict] = []
    dealt = deal_steps(planned, cut.deal, cluster, progress(steps, desc="simulate", unit="step"), waste)
    reads = node_reads(planned.plan, planned.manifests.values(), dealt, cluster.ranks, steps)
    cache, missed = through_cache(reads, store)
    workers = planned.recipe.data.workers
    if store.cache_mb:
        (requests, size), streams = reads.requests(missed), fetch_streams(reads, workers)
    else:
        (requests, size), streams = member_requests(reads, planned), reader_streams(reads, workers)
    report = {
        "recipe": planned.recipe.name,
        "world_size": cluster.world_size, "nodes": cluster.nodes, "node": cluster.node, "ranks": len(cluster.ranks),
        "steps": [steps.start, steps.stop],
        "tasks": tasks_of(planned),
        "execution": {key: mean([row[key] for row in waste]) for key in waste[0]}
        | {"useful_share": useful_share(planned, reads, cut.tables)},
        "reads": {
            "samples": summary(reads.per_step(reads.step)),
            "bytes": summary(reads.per_step(reads.step, reads.bytes)),
            "shards": summary(reads.shards_open()),
        },
        "cache": cache,
        "store": demand(store, cluster, requests, size, streams)
        | {"windows_ahead": WINDOWS_AHEAD if workers else 0,
           "samples_per_request": int(missed.sum()) / max(1.0, float(requests.sum()))},
    }  # fmt: skip
    return report | {"findings": findings(report, planned)}


def deal_steps(planned: Planned, deal: Callable, cluster: Cluster, steps, waste: list[dict]) -> Iterator[tuple]:
    """(window, rounds) of each step; what of the rounds is wasted is appended to `waste`."""
    for step in steps:
        window = planned.plan.window(step)
        rounds = deal(window)
        fillers = sum(cluster.world_size - round_.units for round_ in rounds)
        waste.append({"samples": len(window), "micro_steps": len(rounds), "fillers": fillers,
                      "idle_share": float(idle_share(rounds))})  # fmt: skip
        yield window, rounds


def tasks_of(planned: Planned) -> dict:
    """Each task's samples, how often the whole run goes through them, and the steps that an epoch takes."""
    steps = planned.recipe.schedule.steps
    taken = planned.plan.cursors(steps).tolist()
    return {
        stream.name: {
            "samples": stream.size, "taken": count, "epochs": count / stream.size,
            "steps_per_epoch": steps * stream.size / count if count else None,
        }
        for stream, count in zip(planned.schedule.streams, taken, strict=True)
    }  # fmt: skip


def useful_share(planned: Planned, reads: NodeReads, lengths: Sequence[Lengths] | None) -> float | None:
    """Of the positions that the node computes, the share that is not padding; None when lengths are not known."""
    if lengths is None:
        return None
    useful, computed = reads.padding(reads.positions(lengths, image_tokens(planned.recipe)))
    return useful / max(1, computed)


def through_cache(reads: NodeReads, store: Store) -> tuple[dict, np.ndarray]:
    """(what the cache of the node keeps out of the store, samples that miss it: [n] bool).

    It evicts by next use, as the run does; by last use is for comparison. The cache holds samples, as if all were of
    one size: ranges that hold several are counted by their samples.
    """
    size = mean(reads.bytes)
    capacity = int(store.cache_mb * 2**20 / size) if size else 0  # of a node whose ranks run fillers alone
    missed = misses_by_next_use(reads.item, capacity)
    report = {
        "mb": store.cache_mb, "samples": capacity, "reads": len(reads.item),
        "different": len(np.unique(reads.item)),
        "hit_share_next_use": 1 - mean(missed),
        "hit_share_last_use": 1 - mean(misses_by_last_use(reads.item, capacity)),
    }  # fmt: skip
    return report, missed


def fetch_streams(reads: NodeReads, workers: int) -> np.ndarray:
    """Requests that the node has under way at a time in each step, [steps] int64, while windows are fetched.

    Each rank's samples of a task are hinted in jobs, and a process asks for those of a task by CONCURRENT threads.
    """
    step, samples = distinct(reads.step, reads.rank, reads.task)
    processes = np.minimum(max(1, workers), -(-samples // FETCHES))
    return reads.per_step(step, processes * CONCURRENT).astype(np.int64)


def member_requests(reads: NodeReads, planned: Planned) -> tuple[np.ndarray, np.ndarray]:
    """(requests, bytes) of each step without a cache: a text and an image are read when they are needed, one by one."""
    members = np.array([1 + has_images(manifest) for manifest in planned.manifests.values()])
    return reads.per_step(reads.step, members[reads.task]), reads.per_step(reads.step, reads.bytes)


def reader_streams(reads: NodeReads, workers: int) -> np.ndarray:
    """Processes of the node that read, [steps] int64."""
    return reads.per_step(distinct(reads.step, reads.rank)[0]) * max(1, workers)


def demand(store: Store, cluster: Cluster, requests: np.ndarray, size: np.ndarray, streams: np.ndarray) -> dict:
    """What the node asks of the store in a step, and how many requests must be under way at once in the busiest one.

    requests, size, streams: [steps], requests, their bytes, and how many of them are under way at once.
    """
    seconds, streams = store.seconds(requests, size), np.maximum(1, streams)
    busiest = int((seconds / streams).argmax())
    found = {
        "latency_ms": store.latency_ms, "mb_per_s": store.mb_per_s, "requests": summary(requests),
        "bytes": summary(size), "streams": int(streams[busiest]), "step_seconds": store.step_seconds,
        "least_step_seconds": float(seconds[busiest] / streams[busiest]),
    }  # fmt: skip
    if store.step_seconds is not None:
        needed = math.ceil(float(seconds[busiest]) / store.step_seconds)
        rate = float(size.mean()) / store.step_seconds / 1e6
        found |= {"streams_needed": needed, "node_mb_per_s": rate, "job_mb_per_s": rate * cluster.nodes,
                  "keeps_up": needed <= found["streams"]}  # fmt: skip
    return found


def findings(report: dict, planned: Planned) -> list[str]:
    """What a user should change, or know, before the run."""
    found, store, idle = [], report["store"], report["execution"]["idle_share"]
    train = planned.recipe.train
    by_length, shorter = train.micro_tokens > 0, planned.schedule.block < train.micro_batch
    if by_length and report["execution"]["useful_share"] is None:
        found.append(UNCUT)
    if not store["windows_ahead"] and any(map(is_remote, planned.manifests.values())):
        found.append(
            f"data.workers: 0 reads nothing ahead: the busiest step waits {store['least_step_seconds']:.2f} s for the "
            "store before it computes; set data.workers"
        )
    if not store.get("keeps_up", True) and not report["cache"]["mb"]:
        found.append(
            f"the store does not keep up: without a cache every text and image is a request of its own, "
            f"{store['requests']['max']:,.0f} in the busiest step; set data.remote_cache_mb"
        )
    elif not store.get("keeps_up", True):
        found.append(
            f"the store does not keep up: the busiest step needs {store['streams_needed']} requests at a time on a "
            f"node, which has {store['streams']}; let a step take {store['least_step_seconds']:.2f} s, make shards of "
            f"smaller images, or raise {'schedule.block' if shorter else 'train.micro_batch'}: a request holds "
            f"{store['samples_per_request']:.1f} samples"
        )
    if idle > IDLE and not by_length:  # units cut by length hold unlike numbers of samples, and cost the same
        straddle = planned.schedule.strategy == "accumulate" and planned.schedule.rounds == "task"
        found.append(
            f"{idle:.0%} of the places for samples stay empty: raise tasks.*.samples, "
            + ("set schedule.rounds=packed, " if straddle else "") + "or use fewer ranks"
        )  # fmt: skip
    return found


def is_remote(manifest: Manifest) -> bool:
    return any(is_url(manifest.shard(number)) for number in range(len(manifest.names)))


def render(report: dict) -> str:
    """Return the report of `simulate` as text."""
    execution, reads, cache, store = (report[key] for key in ("execution", "reads", "cache", "store"))
    last = report["steps"][1] - 1
    lines = [
        f"{report['recipe']}: node {report['node']} of {report['nodes']}, with {report['ranks']} of "
        f"{report['world_size']} ranks, over steps {report['steps'][0]} to {last}, from manifests alone",
        "",
        *table([
            ["task", "samples", "epochs", "steps per epoch"],
            *([name, f"{task['samples']:,}", f"{task['epochs']:.2f}", show(task["steps_per_epoch"])]
              for name, task in report["tasks"].items()),
        ]),
        "",
        f"update       {execution['samples']:,.0f} samples, {execution['micro_steps']:.1f} micro-steps, "
        f"{execution['idle_share']:.1%} of the places idle, {execution['fillers']:,.0f} filler units",
        f"padding      {useful(report)}",
        "",
        *table([
            ["the node, per step", "mean", "most"],
            ["samples", *both(reads["samples"])],
            ["MB of samples", *both(reads["bytes"], 1e6)],
            ["shards read", *both(reads["shards"])],
            ["requests to the store", *both(store["requests"])],
            ["MB from the store", *both(store["bytes"], 1e6)],
        ]),
        "",
        f"cache        {cache['mb']:,} MB hold {cache['samples']:,} samples, of {cache['different']:,} different ones "
        "read",
        f"             hits: {cache['hit_share_next_use']:.1%} by next use, as the run evicts, "
        f"{cache['hit_share_last_use']:.1%} by last use",
        f"store        {store['latency_ms']:g} ms, {store['mb_per_s']:g} MB/s a stream: the busiest step takes "
        f"{store['least_step_seconds']:.3f} s with {store['streams']} requests at a time, "
        f"of {store['samples_per_request']:.1f} samples each",
        "             " + (f"windows are read up to {store['windows_ahead']} steps ahead" if store["windows_ahead"]
                           else "nothing is read ahead (data.workers: 0): steps take that time longer"),
    ]  # fmt: skip
    if store["step_seconds"] is not None:
        lines.append(
            f"             steps of {store['step_seconds']:g} s need {store['streams_needed']} at a time and "
            f"{store['node_mb_per_s']:,.1f} MB/s on the node, {store['job_mb_per_s']:,.1f} MB/s in all: "
            + ("it keeps up" if store["keeps_up"] else "it does NOT keep up")
        )
    return "\n".join([*lines, *(f"finding: {text}" for text in report["findings"])])


def useful(report: dict) -> str:
    share = report["execution"]["useful_share"]
    return "not known: no lengths" if share is None else f"{share:.1%} of the positions that are computed are useful"


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def both(values: dict, unit: float = 1) -> list[str]:
    return [f"{values[key] / unit:,.2f}".rstrip("0").rstrip(".") for key in ("mean", "max")]


def mean(values) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def summary(values: np.ndarray) -> dict:
    """Mean and largest of figures per step."""
    return {"mean": float(values.mean()), "max": float(values.max())}
