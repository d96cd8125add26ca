"""`dsvlm data simulate`: what a run of many ranks will ask of its store, known without a GPU and without its data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from dsvlm.preflight.eviction import misses_by_last_use, misses_by_next_use
from dsvlm.preflight.node import NodeReads, node_reads
from dsvlm.schedule.strategy import deal, idle_share
from dsvlm.train.build import Planned

PART = 4 * 2**20  # bytes of the pieces of a shard that the cache keeps
STREAMS = 16  # requests that a node has under way at once
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
    waste: list[dict] = []
    dealt = deal_steps(planned, cluster, progress(steps, desc="simulate", unit="step"), waste)
    reads = node_reads(planned.plan, planned.manifests.values(), dealt, cluster.ranks, steps)
    cache, fetched, requests = through_cache(reads, store)
    report = {
        "recipe": planned.recipe.name,
        "world_size": cluster.world_size, "nodes": cluster.nodes, "node": cluster.node, "ranks": len(cluster.ranks),
        "steps": [steps.start, steps.stop],
        "tasks": tasks_of(planned),
        "micro_steps": mean([row["micro_steps"] for row in waste]),
        "fillers": mean([row["fillers"] for row in waste]),
        "idle_share": mean([row["idle_share"] for row in waste]),
        "reads": spread(reads),
        "cache": cache,
        "store": demand(store, cluster, requests, fetched),
    }  # fmt: skip
    return report | {"findings": findings(report, store)}


def deal_steps(planned: Planned, cluster: Cluster, steps, waste: list[dict]) -> Iterator[tuple]:
    """(window, rounds) of each step; what of the rounds is wasted is appended to `waste`."""
    dealer = partial(
        deal, schedule=planned.schedule, world_size=cluster.world_size, micro_batch=planned.recipe.train.micro_batch
    )
    for step in steps:
        window = planned.plan.window(step)
        rounds = dealer(window)
        fillers = sum(cluster.world_size - round_.units for round_ in rounds)
        waste.append({"micro_steps": len(rounds), "fillers": fillers, "idle_share": float(idle_share(rounds))})
        yield window, rounds


def tasks_of(planned: Planned) -> dict:
    """Samples of each task and its position at the end of the run."""
    steps, found = planned.recipe.schedule.steps, {}
    last = planned.plan.window(steps - 1)
    for stream in planned.schedule.streams:
        found[stream.name] = {"samples": stream.size}
    for task, first, count in last.table.tolist():
        stream = planned.schedule.streams[task]
        epochs = (first + count) / stream.size
        found[stream.name] |= {"epochs": epochs, "steps_per_epoch": steps / epochs}
    return found


def spread(reads: NodeReads) -> dict:
    """What the node's samples are on the store, before any cache: figures per step."""
    size = reads.stop - reads.start
    runs = reads.requests()
    return {
        "samples": summary(reads.per_step(reads.step)),
        "bytes": summary(reads.per_step(reads.step, size)),
        "requests": summary(reads.per_step(reads.step[runs])),
        "shards": summary(reads.shards_open()),
    }


def through_cache(reads: NodeReads, store: Store) -> tuple[dict, np.ndarray, np.ndarray]:
    """What the cache keeps out of the store; (report, bytes fetched in each step, requests of each step)."""
    step, part = reads.parts(PART)
    capacity = store.cache_mb * 2**20 // PART
    missed = misses_by_next_use(part, capacity)
    report = {
        "mb": store.cache_mb, "part_bytes": PART, "parts": int(capacity),
        "touched": summary(reads.per_step(step)),
        "different": int(len(np.unique(part))),
        "hit_share_next_use": 1 - mean(missed),
        "hit_share_last_use": 1 - mean(misses_by_last_use(part, capacity)),
    }  # fmt: skip
    requests = reads.per_step(step[missed])
    return report, requests * float(PART), requests


def demand(store: Store, cluster: Cluster, requests: np.ndarray, size: np.ndarray) -> dict:
    """What the node asks of the store, and how many requests must be under way at once in its busiest step."""
    seconds = store.seconds(requests, size)
    found = {
        "latency_ms": store.latency_ms, "mb_per_s": store.mb_per_s, "step_seconds": store.step_seconds,
        "bytes": summary(size), "requests": summary(requests),
        "least_step_seconds": float(seconds.max()) / STREAMS, "at_streams": STREAMS,
    }  # fmt: skip
    if store.step_seconds:
        streams = math.ceil(float(seconds.max()) / store.step_seconds)
        rate = float(size.mean()) / store.step_seconds / 1e6
        found |= {"streams": streams, "node_mb_per_s": rate, "job_mb_per_s": rate * cluster.nodes,
                  "keeps_up": streams <= STREAMS}  # fmt: skip
    return found


def findings(report: dict, store: Store) -> list[str]:
    return []


def render(report: dict) -> str:
    """Return the report of `simulate` as text."""
    import json
    return json.dumps(report, indent=1)


def mean(values) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def summary(values: np.ndarray) -> dict:
    """Mean and largest of figures per step."""
    return {"mean": float(values.mean()), "max": float(values.max())}
