"""Digest and fingerprint: equal where runs are equal, different where anything differs."""

import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsvlm.schedule import digest as module
from dsvlm.schedule.digest import combine, digest, fingerprint, identity_bytes, mark
from dsvlm.schedule.mixture import Mixture
from dsvlm.schedule.mixture import Phase as MixturePhase
from dsvlm.schedule.plan import STRATEGIES, Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal

steady = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=40)

STREAMS = (Stream("caption", (5, 3, 0, 7, 4), 6, 3), Stream("vqa", (11,), 2, 1), Stream("locate", (9, 9), 4, 2))
MANIFESTS = ("aa", "bb", "cc")


def schedule_of(strategy):
    return Schedule(7, strategy, STREAMS, block=3, group=2, samples=8, chunk=8 if strategy == "unified" else 2)


def digest_of(schedule, step, recipe="r", manifests=MANIFESTS):
    return digest(identity_bytes(schedule, recipe, manifests), Plan(schedule).window(step))


GOLDEN = {
    ("accumulate", 0): "50528c6d89bc5739d3c8a36f1055b012",
    ("accumulate", 1): "7acbe485e3d5dc601c770361ad8c151c",
    ("accumulate", 1000003): "98b347734d4cf28367115185108afdf0",
    ("mixed", 0): "810aeb73d006878d92113c9f45463a89",
    ("mixed", 1): "442a6466cab6ca27dbc5901a495f1633",
    ("mixed", 1000003): "b93d13a495772e3be40d94b6806abcc9",
    ("unified", 0): "71b29d230b12324c9856d3afbb0febaf",
    ("unified", 1): "8ebdaf36044e417d6579bc6186f542f8",
    ("unified", 1000003): "28c3bc7ff8db3375c44f767a0abae9dd",
    ("per_rank", 0): "95610c26de25128e8605da8e0b472cba",
    ("per_rank", 1): "ea547a566d09c911d8760300bdfbe884",
    ("per_rank", 1000003): "b1da4a7974a4984de1ad4672ef212fcb",
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("step", [0, 1, 1_000_003])
def test_golden(strategy, step):
    """Committed digests, and (for accumulate) the same from the documented bytes."""
    assert digest_of(schedule_of(strategy), step) == GOLDEN[strategy, step]
    if strategy != "accumulate":
        return
    streams = [
        {"name": s.name, "share": s.samples, "shards": list(s.shard_sizes), "manifest": m}
        for s, m in zip(STREAMS, MANIFESTS, strict=True)
    ]
    numbers = {"version": 1, "seed": 7, "block": 3, "group": 2, "samples": 0, "chunk": 0}
    described = {**numbers, "recipe": "r", "strategy": strategy, "streams": streams}
    identity = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=32).digest()
    blocks = [number for index, s in enumerate(STREAMS) for number in (index, step * s.samples, s.samples)]
    data = struct.pack("<6Q", 1, 32, step, 3, 0, 0) + identity + struct.pack("<9q", *blocks)
    assert hashlib.blake2b(data, digest_size=16).hexdigest() == GOLDEN[strategy, step]


PERTURBED = {
    "seed": lambda s: replace(s, seed=8),
    "strategy": lambda s: schedule_of(STRATEGIES[STRATEGIES.index(s.strategy) - 1]),
    "block": lambda s: replace(s, block=4),
    "group": lambda s: replace(s, group=3),
    "task samples": lambda s: replace(s, streams=(replace(STREAMS[0], samples=7), *STREAMS[1:])),
    "quota": lambda s: replace(s, streams=(replace(STREAMS[0], quota=4), *STREAMS[1:])),
    "shard sizes": lambda s: replace(s, streams=(replace(STREAMS[0], shard_sizes=(5, 3, 7, 4)), *STREAMS[1:])),
    "task name": lambda s: replace(s, streams=(replace(STREAMS[0], name="Caption"), *STREAMS[1:])),
    "task order": lambda s: replace(s, streams=STREAMS[::-1]),
    "samples": lambda s: replace(s, samples=6, chunk=6 if s.strategy == "unified" else 2),
    "chunk": lambda s: replace(s, chunk=0 if s.strategy == "unified" else 4),
    "rounds": lambda s: replace(s, rounds="packed"),
}
FREE = {  # what a strategy does not depend on
    "accumulate": {"quota", "samples", "chunk", "rounds"},
    "mixed": {"quota", "samples", "chunk", "rounds"},
    "unified": {"task samples", "chunk", "rounds"},
    "per_rank": {"task samples", "rounds"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("field", PERTURBED)
def test_digest_detects(strategy, field):
    """Any change of what the order depends on changes the digest of every step; nothing else does (invariant 14)."""
    schedule = schedule_of(strategy)
    other = PERTURBED[field](schedule)
    for step in (0, 5):
        same = digest_of(schedule, step) == digest_of(other, step)
        assert same == (field in FREE[strategy])


def test_digest_detects_data_recipe_step_and_version(monkeypatch):
    schedule = schedule_of("accumulate")
    digests = [
        digest_of(schedule, 0),
        digest_of(schedule, 1),
        digest_of(schedule, 0, recipe="R"),
        digest_of(schedule, 0, manifests=("aa", "bb", "cd")),
        digest_of(schedule, 0, manifests=("bb", "aa", "cc")),
    ]
    monkeypatch.setattr(module, "SCHEDULE_VERSION", 2)
    digests.append(digest_of(schedule, 0))
    assert len(set(digests)) == len(digests)
    assert all(len(value) == 32 and int(value, 16) >= 0 for value in digests)


LARGE = replace(schedule_of("per_rank"), samples=4000)  # 2000 chunks
LARGE_GOLDEN = {  # of windows of many chunks, from before these were drawn when asked for
    0: ("ea4fce56c56f9875825b7bf58a63ba66", "3253ca47bc728f58b45f23f7635e571f"),
    7: ("1f681bb86369070a6c0f6fbf5490b941", "ea8bbaf52026ee2cbba9f32126740cde"),
    1_000_003: ("665ed4e99b168334f45fc8561690c7ad", "066ade4ade424923fc67f5e539e654da"),
}
PHASES = (MixturePhase(0, (3, 1, 2)), MixturePhase(5, (0, 4, 1)), MixturePhase(1_000_000, (2, 0, 7)))


def mark_of(schedule, step, recipe="r", manifests=MANIFESTS):
    return mark(identity_bytes(schedule, recipe, manifests), Plan(schedule).window(step))


@pytest.mark.parametrize("step", LARGE_GOLDEN)
def test_golden_of_many_chunks(step):
    assert (digest_of(LARGE, step), digest_of(replace(LARGE, phases=PHASES), step)) == LARGE_GOLDEN[step]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mark_of_a_small_window(strategy):
    """It is the digest: ranks compare every block."""
    for step in (0, 1_000_003):
        assert mark_of(schedule_of(strategy), step) == GOLDEN[strategy, step]
    assert mark_of(replace(LARGE, samples=2048), 3) == digest_of(replace(LARGE, samples=2048), 3)


@pytest.mark.parametrize("field", [field for field in PERTURBED if field != "strategy"])  # no other has many chunks
def test_mark_of_many_chunks_detects(field):
    """As the digest does, in every step."""
    other = PERTURBED[field](LARGE)
    other = replace(other, samples=3996 if field == "samples" else 2000 * other.chunk)
    for step in (0, 5):
        assert (mark_of(LARGE, step) == mark_of(other, step)) == (field in FREE["per_rank"])


def test_mark_of_many_chunks_detects_data_recipe_step_phases_and_version(monkeypatch):
    marks = [
        mark_of(LARGE, 0), mark_of(LARGE, 1), digest_of(LARGE, 0), mark_of(LARGE, 0, recipe="R"),
        mark_of(LARGE, 0, manifests=("aa", "bb", "cd")), mark_of(LARGE, 0, manifests=("bb", "aa", "cc")),
        mark_of(replace(LARGE, phases=PHASES), 0), mark_of(replace(LARGE, phases=PHASES[:2]), 0),
    ]  # fmt: skip
    assert marks[0] == mark_of(LARGE, 0)
    monkeypatch.setattr(module, "SCHEDULE_VERSION", 2)
    marks.append(mark_of(LARGE, 0))
    assert len(set(marks)) == len(marks)


def other_plans():
    """Plans of another order than LARGE's, and in how many of 40 steps at least that is seen, whatever the identity."""
    yield Plan(replace(LARGE, seed=8)), 40
    yield Plan(replace(LARGE, streams=(replace(STREAMS[0], quota=4), *STREAMS[1:]))), 40
    yield Plan(replace(LARGE, phases=(MixturePhase(0, (3, 1, 2)), MixturePhase(1, (3, 1, 2))))), 39
    yield Plan(replace(LARGE, phases=(MixturePhase(0, (1, 3, 2)), MixturePhase(1, (3, 1, 2))))), 40


@pytest.mark.parametrize("number", range(4))
def test_mark_detects_another_order(number):
    """With the identity of the same run: what is drawn is compared, not only what should be."""
    identity = identity_bytes(LARGE, "r", MANIFESTS)
    right, (other, least) = Plan(LARGE), list(other_plans())[number]
    seen = [mark(identity, right.window(step)) != mark(identity, other.window(step)) for step in range(40)]
    assert sum(seen) >= least


@pytest.mark.parametrize("every, steps", [(2, 5), (16, 20)])
def test_mark_detects_a_part_of_the_order(every, steps, monkeypatch):
    """One cycle of a few in which two slots are exchanged: seen within some steps."""
    identity, draw = identity_bytes(LARGE, "r", MANIFESTS), Mixture.draw
    right = [mark(identity, Plan(LARGE).window(step)) for step in range(steps)]

    def exchanged(self, cycle):
        task, occurrence = draw(self, cycle)
        for part in (task, occurrence):
            first = np.where(cycle % every == 0, 5, 0)
            part[:, 0], part[np.arange(len(part)), first] = part[np.arange(len(part)), first], part[:, 0].copy()
        return task, occurrence

    monkeypatch.setattr(Mixture, "draw", exchanged)
    assert any(mark(identity, Plan(LARGE).window(step)) != right[step] for step in range(steps))


def test_numpy_sizes_are_the_same_run():
    sizes = tuple(np.array(STREAMS[0].shard_sizes, np.uint32))
    schedule = replace(schedule_of("mixed"), streams=(replace(STREAMS[0], shard_sizes=sizes), *STREAMS[1:]))
    assert digest_of(schedule, 3) == digest_of(schedule_of("mixed"), 3)


def crc_of(task, sample):
    return (np.asarray(sample) * 2654435761 + task * 97) % 2**32


def fingerprint_of(schedule, step, world_size, micro_batch):
    """Sum over ranks, as a run makes it: each rank sums its own units, then int64 sums wrap in an all-reduce."""
    plan = Plan(schedule)
    window = plan.window(step)
    total = np.zeros(1, np.int64)
    for rank in range(world_size):
        own = 0
        for part in deal(window, schedule, world_size, micro_batch):
            task, ordinal = window.span(*part.span(rank))
            for one in np.unique(task).tolist():
                epoch, sample = plan.locate(one, ordinal[task == one])
                own = combine([own, fingerprint(schedule.streams[one].name, epoch, sample, crc_of(one, sample))])
        total += np.array([own], np.uint64).view(np.int64)
    return combine(total)


@steady
@given(st.data())
def test_fingerprint_world_invariance(schedules, data):
    schedule = data.draw(schedules())
    step = data.draw(st.integers(0, 99))
    alone = fingerprint_of(schedule, step, 1, 10_000)
    for world_size in data.draw(st.lists(st.integers(1, 17), min_size=3, max_size=3)):
        assert fingerprint_of(schedule, step, world_size, data.draw(st.integers(1, 9))) == alone


def test_fingerprint_detects():
    """One sample swapped, dropped, repeated, damaged, of another epoch or task changes it; another order does not."""
    epoch, sample, crc = np.zeros(6, np.int64), np.array([4, 8, 1, 9, 3, 7]), np.arange(6, dtype=np.uint32)
    base = fingerprint("vqa", epoch, sample, crc)
    order = np.array([3, 1, 5, 0, 2, 4])
    assert fingerprint("vqa", epoch, sample[order], crc[order]) == base
    swapped, damaged, later = sample.copy(), crc.copy(), epoch.copy()
    swapped[2], damaged[5], later[1] = 2, 2**32 - 1, 1
    drop, repeat = np.delete(np.arange(6), 3), np.array([0, 1, 2, 3, 4, 4])
    others = [
        fingerprint("vqa", epoch, swapped, crc),
        fingerprint("vqa", epoch, sample, damaged),
        fingerprint("vqa", later, sample, crc),
        fingerprint("caption", epoch, sample, crc),
        fingerprint("vqa", epoch[drop], sample[drop], crc[drop]),
        fingerprint("vqa", epoch[repeat], sample[repeat], crc[repeat]),
        fingerprint("vqa", epoch, sample, crc[::-1]),
    ]
    assert len({base, *others}) == 8


def test_fingerprint_golden():
    crc = np.array([1, 2**32 - 1], np.uint32)
    assert fingerprint("vqa", np.array([0, 3]), np.array([5, 2**40]), crc) == FINGERPRINT
    assert fingerprint("vqa", np.zeros(0), np.zeros(0), np.zeros(0)) == 0
    assert combine([2**64 - 1, 3, -1]) == 1


FINGERPRINT = 3534124966565773120  # by plain Python integers
