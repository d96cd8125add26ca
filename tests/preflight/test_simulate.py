"""One node's reads are those that the ranks of the run make, located without those of the others."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvlm.cli import run
from dsvlm.config import load_recipe
from dsvlm.data.cached import GAP, LONGEST, coalesce
from dsvlm.data.manifest import Manifest
from dsvlm.preflight.node import NodeReads, distinct, node_reads
from dsvlm.preflight.simulate import Cluster, Store, render, simulate
from dsvlm.schedule.plan import Plan, Schedule, Stream
from dsvlm.train.build import make_deal, make_loader, plan_run
from tests.dist.recipes import STRATEGIES

KEYS = {"recipe", "world_size", "nodes", "node", "ranks", "steps", "tasks", "execution", "reads", "cache", "store",
        "findings"}  # fmt: skip


def plain(items, **_):
    return items


def large(planned, samples: int, block: int = 64, shards: int = 100):
    """A run of two tasks of shards with 1,000 samples of 64 KiB each, of which there are no files."""
    empty = {field.name: () for field in fields(Manifest)}
    manifest = Manifest(**empty | {
        "path": Path("none"), "type": "caption", "samples": 1000 * shards,
        "names": tuple(f"{i}.tar" for i in range(shards)), "sizes": (1000,) * shards, "bytes": (65_536_000,) * shards,
        "preprocessing": {}, "hash": "0", "url": None,
    })  # fmt: skip
    names = list(planned.recipe.tasks)[:2]
    streams = tuple(Stream(name, manifest.sizes, samples, samples) for name in names)
    made = Schedule(0, "accumulate", streams, block=block)
    train = replace(planned.recipe.train, micro_batch=64)
    recipe = replace(planned.recipe, tasks={name: planned.recipe.tasks[name] for name in names}, train=train)
    return replace(planned, recipe=recipe, manifests=dict.fromkeys(names, manifest), schedule=made, plan=Plan(made))


def reads_of(planned, ranks, world_size, steps):
    deal = make_deal(planned, None, world_size)
    dealt = ((window, deal(window)) for window in map(planned.plan.window, steps))
    return node_reads(planned.plan, planned.manifests.values(), dealt, ranks, steps)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reads_are_those_of_the_loaders(recipe, codec, strategy):
    overrides = [f"{path.replace('__', '.')}={value}" for path, value in STRATEGIES[strategy].items()]
    planned = plan_run(load_recipe(recipe, overrides))
    reads = reads_of(planned, range(1, 3), 4, range(3))
    columns = (reads.step, reads.rank, reads.task, reads.sample)
    found = sorted(zip(*(column.tolist() for column in columns), strict=True))
    wanted = []
    for rank in (1, 2):
        loader = make_loader(planned, codec, 40, rank, 4)
        for step in range(3):
            wanted += [(step, rank, draft.task, draft.sample) for draft in loader.window(step).drafts]
    assert found == sorted(wanted) and len(found) > 5


@pytest.mark.parametrize("world_size", [1, 3, 8, 13, 64])
def test_nodes_share_the_window(planned, world_size):
    cluster = Cluster(world_size, 3)
    items = [reads_of(planned, replace(cluster, node=node).ranks, world_size, range(2)).item
             for node in range(cluster.nodes)]  # fmt: skip
    whole = reads_of(planned, range(1), 1, range(2))
    assert sorted(np.concatenate(items).tolist()) == sorted(whole.item.tolist())
    assert len(whole.item) == sum(len(planned.plan.window(step)) for step in range(2))


def test_only_the_node_is_located(planned, monkeypatch):
    planned, asked = large(planned, samples=16_384 * 8), []
    locate = Plan.locate_all
    monkeypatch.setattr(Plan, "locate_all", lambda plan, tasks, ordinals: (
        asked.append(len(tasks)), locate(plan, tasks, ordinals))[1])  # fmt: skip
    report = simulate(planned, Cluster(16_384), Store(30, 200, 100), range(5), plain)
    assert sum(asked) == 5 * 2 * 8 * 8  # steps, tasks, ranks of the node, samples of a rank
    assert report["nodes"] == 2048 and report["reads"]["samples"] == {"mean": 128.0, "max": 128.0}


def reads(extents):
    """NodeReads of samples (step, rank, shard, start, stop), in the order that node_reads gives."""
    step, rank, shard, start, stop = (np.array(column) for column in zip(*sorted(extents), strict=True))
    nothing = np.zeros(len(step), np.int64)
    return NodeReads(range(3), step, rank, nothing, nothing, np.arange(len(step)), shard, start.astype(float),
                     stop.astype(float), nothing, np.zeros(1), np.zeros(1, bool))  # fmt: skip


# Samples of 100 KB at multiples of it: neighbours touch, others are more than GAP apart.
SAMPLES = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1), st.integers(0, 60)), min_size=1)


@given(SAMPLES)
@settings(max_examples=50)
def test_requests_are_those_of_the_reader(samples):
    size = 100_000
    assert GAP < size < 60 * size < LONGEST
    found = reads([(step, rank, shard, row * size, (row + 1) * size) for step, rank, shard, row in samples])
    requests, length = found.requests(np.ones(len(samples), bool))
    for step in range(3):
        groups = {key[:3] for key in samples if key[0] == step}
        ranges = [part for key in groups
                  for part in coalesce((row * size, (row + 1) * size, 0) for *k, row in samples if tuple(k) == key)]
        assert requests[step] == len(ranges)
        assert length[step] == sum(stop - start for start, stop, _ in ranges)


def test_distinct_rows():
    rows = np.random.default_rng(0).integers([10**9, -3, 0], [10**9 + 5, 2, 3], (200, 3)).T
    wanted, counts = np.unique(rows, axis=1, return_counts=True)
    first, found = distinct(*rows)
    assert first.tolist() == wanted[0].tolist() and found.tolist() == counts.tolist()
    assert [part.tolist() for part in distinct(*rows[:, :0])] == [[], []]


def test_requests_bridge_small_gaps_and_stay_short():
    near = reads([(0, 0, 0, 0, 1000), (0, 0, 0, 1000 + GAP // 2, 2000 + GAP // 2), (0, 0, 0, 10**6, 10**6 + 1)])
    requests, length = near.requests(np.ones(3, bool))
    assert requests.tolist() == [2, 0, 0] and length[0] == 2000 + GAP // 2 + 1
    assert near.requests(np.array([False, False, True]))[0].tolist() == [1, 0, 0]
    assert near.requests(np.zeros(3, bool))[0].tolist() == [0, 0, 0]
    ranks = reads([(0, 0, 0, 0, 1000), (0, 1, 0, 1000, 2000), (1, 1, 0, 2000, 3000)])
    assert ranks.requests(np.ones(3, bool))[0].tolist() == [2, 1, 0]  # each rank, and each step, asks for itself
    long = reads([(0, 0, 0, i * 2**20, (i + 1) * 2**20) for i in range(20)])
    assert long.requests(np.ones(20, bool))[0][0] == 3  # of 8 MiB at most


def test_a_node_that_runs_fillers_alone_reads_nothing(recipe, capsys):
    """19 samples a window, the last of 10 nodes of 8 ranks."""
    command = ["data", "simulate", str(recipe), "--world-size", "80", "--node", "9", "--steps", "0:3"]
    assert run([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["reads"]["samples"]["max"] == report["store"]["requests"]["max"] == report["cache"]["samples"] == 0
    assert "stay empty" in report["findings"][0] and run(command) == 1


def test_blocks_make_reads_long(planned):
    """64 consecutive samples of a rank are one request where the permutation keeps them together."""
    one, many = (
        simulate(large(planned, 8 * 64, block), Cluster(8), Store(30, 200, 1), range(4), plain)["store"]
        for block in (64, 1)
    )
    assert one["requests"]["mean"] < 40 and many["requests"]["mean"] > 900
    assert one["samples_per_request"] > 25 and many["samples_per_request"] < 1.2


def test_padding_counts_rows():
    made = replace(reads([(0, 0, 0, i, i + 1) for i in range(5)]), unit=np.array([0, 0, 1, 1, 3]),
                   widths=np.array([0, 16, 0, 8]), packed=np.array([False, True, False, False]))  # fmt: skip
    # unit 0: 2 rows of 5; unit 1: one row of 16; unit 2: a filler; unit 3: one row of 8
    assert made.padding(np.array([3, 5, 6, 7, 4])) == (25, 10 + 16 + 8)


def test_padding_is_told_when_lengths_are_known(recipe, tmp_path, capsys):
    out = ["--set", f"output={tmp_path}/run", "--world-size", "2", "--steps", "0:4"]
    assert run(["data", "simulate", str(recipe), *out]) == 0
    assert "not known: no lengths" in capsys.readouterr().out
    tokens = ["--set", "train.micro_tokens=96"]
    assert run(["data", "simulate", str(recipe), *out, *tokens]) == 1
    assert "finding: train.micro_tokens" in capsys.readouterr().out
    made = []
    try:
        assert run(["data", "lengths", str(recipe), *out[:2], "--json"]) == 0
        made = [Path(row["file"]) for row in json.loads(capsys.readouterr().out)]
        assert run(["data", "simulate", str(recipe), *out, "--json"]) == 0
        plain_cut = json.loads(capsys.readouterr().out)["execution"]["useful_share"]
        assert run(["data", "simulate", str(recipe), *out, *tokens, "--json"]) == 0
        assert 0.5 < plain_cut < json.loads(capsys.readouterr().out)["execution"]["useful_share"] <= 1
    finally:
        for path in made:
            path.unlink()


def test_store(planned):
    planned = large(planned, samples=8 * 64)  # 1,024 samples of 64 KiB a step: 67.1 MB
    report = simulate(planned, Cluster(8), Store(30, 200, 1, 1.0), range(4), plain)["store"]
    most, size = report["requests"]["max"], report["bytes"]["max"]
    assert size == pytest.approx(1024 * 65536) and report["streams"] == 2 * 16 * 8  # of each task and rank
    assert report["streams_needed"] == np.ceil(most * 0.03 + size / 200e6) and report["keeps_up"]
    assert report["node_mb_per_s"] == report["job_mb_per_s"] == pytest.approx(67.1, abs=0.1)
    assert report["least_step_seconds"] == pytest.approx((most * 0.03 + size / 200e6) / 256)
    slow = simulate(planned, Cluster(8), Store(30, 0.2, 1, 1.0), range(4), plain)
    assert not slow["store"]["keeps_up"] and "does not keep up" in slow["findings"][0]
    assert "raise train.micro_batch" in slow["findings"][0]  # 64, as schedule.block
    short = simulate(large(planned, 8 * 64, block=1), Cluster(8), Store(30, 0.2, 1, 1.0), range(4), plain)
    assert "raise schedule.block" in short["findings"][0]


def test_without_a_cache_every_member_is_a_request(planned):
    planned = large(planned, samples=8 * 64)
    planned.manifests.update((name, replace(m, members=("json", "png"))) for name, m in planned.manifests.items())
    report = simulate(planned, Cluster(8), Store(30, 200, 0, 1.0), range(4), plain)
    store = report["store"]
    assert store["requests"] == {"mean": 2048.0, "max": 2048.0} and store["samples_per_request"] == 0.5
    assert store["streams"] == 8 and not store["keeps_up"] and "set data.remote_cache_mb" in report["findings"][0]


def test_requests_at_a_time_are_those_of_the_jobs(planned):
    """A worker fetches one job's samples of a task: 2,500 of a rank are three jobs, which two workers share."""
    planned = large(planned, samples=2500)
    for workers, streams, ahead in ((0, 16, 0), (2, 32, 2), (8, 48, 2)):
        recipe = replace(planned.recipe, data=replace(planned.recipe.data, workers=workers))
        store = simulate(replace(planned, recipe=recipe), Cluster(1), Store(30, 200, 1), range(2), plain)["store"]
        assert store["streams"] == 2 * streams and store["windows_ahead"] == ahead


def test_a_remote_set_without_workers_waits(planned):
    planned = large(planned, samples=64)
    planned.manifests.update((name, replace(m, url="https://host/set")) for name, m in planned.manifests.items())
    report = simulate(planned, Cluster(1), Store(30, 200, 1), range(2), plain)
    assert report["findings"][0].startswith("data.workers: 0 reads nothing ahead")
    assert "steps take that time longer" in render(report)
    data = replace(planned.recipe.data, workers=1)
    report = simulate(replace(planned, recipe=replace(planned.recipe, data=data)), Cluster(1), Store(30, 200, 1),
                      range(2), plain)  # fmt: skip
    assert not report["findings"] and "up to 2 steps ahead" in render(report)


def test_cache(planned):
    planned = large(planned, samples=2000, shards=4)  # two steps are an epoch
    cold = simulate(planned, Cluster(1), Store(30, 200, 0), range(4), plain)["cache"]
    assert cold["hit_share_next_use"] == cold["hit_share_last_use"] == 0
    half = simulate(planned, Cluster(1), Store(30, 200, 250), range(4), plain)["cache"]
    assert half["samples"] == 4000 and half["different"] == 8000
    assert 0.2 < half["hit_share_next_use"] <= 0.25 and half["hit_share_last_use"] < 0.15
    warm = simulate(planned, Cluster(1), Store(30, 200, 500), range(4), plain)
    assert warm["cache"]["hit_share_next_use"] == warm["cache"]["hit_share_last_use"] == 0.5
    assert warm["store"]["bytes"]["mean"] == pytest.approx(0.5 * warm["reads"]["bytes"]["mean"])


def test_command(recipe, capsys):
    arguments = ["data", "simulate", str(recipe), "--world-size", "12", "--steps", "0:4", "--step-seconds", "1"]
    code = run([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert set(report) == KEYS and list(report["tasks"]) == ["odd", "question", "locate", "match"]
    assert set(report["execution"]) == {"samples", "micro_steps", "fillers", "idle_share", "useful_share"}
    assert report["tasks"]["odd"] == {"samples": 6, "taken": 24, "epochs": 4.0, "steps_per_epoch": 1.0}
    assert (report["nodes"], report["ranks"], report["execution"]["samples"]) == (2, 8, 19)
    # Four blocks of 6, 6, 4 and 3 samples on 12 ranks each: most ranks wait.
    assert code == 1 and report["execution"]["idle_share"] > 0.5
    assert "set schedule.rounds=packed" in report["findings"][0]
    assert run(arguments) == 1
    told = capsys.readouterr().out
    assert "it keeps up" in told and "finding: " in told and "node 0 of 2, with 8 of 12 ranks" in told
    assert run([*arguments[:4], "1", "--steps", "0:4"]) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["--world-size", "0"], "--world-size 0: use at least 1"),
    (["--world-size", str(10**19)], f"--world-size {10**19}: use at least 1 and at most 2147483648"),
    (["--world-size", "16", "--ranks-per-node", "0"], "--ranks-per-node 0"),
    (["--world-size", "16", "--node", "2"], "--node 2: 16 ranks, 8 on a node, make nodes 0 to 1"),
    (["--world-size", "1", "--latency-ms", "-1"], "--latency-ms -1.0"),
    (["--world-size", "1", "--mb-per-s", "0"], "--mb-per-s 0.0"),
    (["--world-size", "1", "--step-seconds", "nan"], "--step-seconds nan"),
    (["--world-size", "1", "--cache-mb", "-5"], "--cache-mb -5"),
    (["--world-size", "1", "--steps", "4:9"], "the recipe has 4 steps"),
    (["--world-size", "1", "--set", "tasks.odd.samples=0"], "tasks.odd.samples"),
])  # fmt: skip
def test_errors(recipe, capsys, arguments, message):
    assert run(["data", "simulate", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err
