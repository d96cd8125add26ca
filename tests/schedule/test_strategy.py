"""Dealing: the window is the same for every world size, rounds hold one task, and few ranks idle."""

import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsvlm.schedule.plan import STRATEGIES, Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal, idle_share

steady = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=30)
micro_batches = st.integers(1, 20)


def one_task(samples, rounds="task"):
    return Schedule(0, "accumulate", (Stream("only", (1000,), samples, 1),), rounds)


def sizes(schedule, world_size, micro_batch):
    rounds = deal(Plan(schedule).window(0), schedule, world_size, micro_batch)
    return [[stop - start for start, stop in part.spans] for part in rounds]


@steady
@given(st.data())
def test_world_invariance(schedules, live, data):
    """All W from 1 to 17, any micro-batch: the same samples in the same order, each on one rank (invariant 1)."""
    schedule = data.draw(schedules())
    step = data.draw(st.integers(0, 500))
    window = Plan(schedule).window(step)
    alone = live(Plan(schedule), window, deal(window, schedule, 1, len(window)))
    assert len(alone) == len(window)
    for world_size in range(1, 18):
        rounds = deal(window, schedule, world_size, data.draw(micro_batches))
        places = [place for part in rounds for span in part.spans for place in range(*span)]
        assert places == list(range(len(window)))
    assert live(Plan(schedule), Plan(schedule).window(step), rounds) == alone


@steady
@given(st.data())
def test_rounds(schedules, data):
    """What a round promises: one task, at most micro_batch samples, near-equal units, fillers last (invariant 2)."""
    schedule = data.draw(schedules())
    window = Plan(schedule).window(data.draw(st.integers(0, 50)))
    world_size, micro_batch = data.draw(st.integers(1, 17)), data.draw(micro_batches)
    rounds = deal(window, schedule, world_size, micro_batch)
    packed = schedule.rounds == "packed" or schedule.strategy in ("mixed", "per_rank")
    task = window.task
    for part in rounds:
        counts = [stop - start for start, stop in part.spans]
        assert len(counts) == world_size and 1 <= counts[0] and max(counts) <= micro_batch
        assert part.spans == tuple(part.span(rank) for rank in range(world_size))
        for rank, span in enumerate(part.spans):
            unit = part.unit(rank)
            assert unit.places.dtype == np.int64 and unit.places.tolist() == list(range(*span))
            assert unit.rows is None and unit.width == 0
        assert (part.samples, part.largest, part.units) == (sum(counts), max(counts), sum(n > 0 for n in counts))
        assert [n > 0 for n in counts] == sorted([n > 0 for n in counts], reverse=True)
        if packed:
            assert part.task is None
            assert part is rounds[-1] or min(counts) > 0
        else:
            assert {one for start, stop in part.spans for one in task[start:stop].tolist()} == {part.task}
            assert max(counts) - min(counts) <= 1
    if schedule.strategy != "mixed":
        units = [set(task[start:stop].tolist()) for part in rounds for start, stop in part.spans if stop > start]
        assert all(len(tasks) == 1 for tasks in units)


@steady
@given(st.data())
def test_packed_is_tight(schedules, data):
    """Packed: as few rounds as micro_batch allows; ranks idle only if the window has too few samples to cut."""
    schedule = replace(data.draw(schedules()), rounds="packed")
    window = Plan(schedule).window(0)
    world_size, micro_batch = data.draw(st.integers(1, 17)), data.draw(micro_batches)
    rounds = deal(window, schedule, world_size, micro_batch)
    counts = [len(window)] if schedule.strategy == "mixed" else [block.count for block in window.blocks]
    fewest = sum(-(-count // micro_batch) for count in counts)
    assert len(rounds) == -(-fewest // world_size)
    units = sum(part.units for part in rounds)
    assert units == min(len(rounds) * world_size, len(window))
    # No smaller largest unit was possible with that many units.
    largest = max(part.largest for part in rounds)
    assert largest == 1 or sum(-(-count // (largest - 1)) for count in counts) > units


@steady
@given(st.data())
def test_resume_with_another_world(schedules, live, data):
    """Up to any cut with W1, then a new process with W2: the stream of an uninterrupted run (invariant 4)."""
    schedule = data.draw(schedules())
    steps = 4
    cut = data.draw(st.integers(0, steps))

    def stream(plan, some_steps, world_size):
        micro_batch = data.draw(micro_batches)
        windows = [plan.window(step) for step in some_steps]
        return [live(plan, window, deal(window, schedule, world_size, micro_batch)) for window in windows]

    first, second, whole = (data.draw(st.integers(1, 17)) for _ in range(3))
    resumed = stream(Plan(schedule), range(cut), first) + stream(Plan(schedule), range(cut, steps), second)
    assert resumed == stream(Plan(schedule), range(steps), whole)


@pytest.mark.parametrize(
    "samples, world_size, micro_batch, expected",
    [
        (64, 3, 16, [[11, 11, 11], [11, 10, 10]]),
        (64, 4, 16, [[16, 16, 16, 16]]),
        (65, 4, 16, [[9, 8, 8, 8], [8, 8, 8, 8]]),
        (5, 4, 1, [[1, 1, 1, 1], [1, 0, 0, 0]]),
        (3, 5, 8, [[1, 1, 1, 0, 0]]),
        (6, 4, 8, [[2, 2, 1, 1]]),
    ],
)
def test_balanced_cut(samples, world_size, micro_batch, expected):
    assert sizes(one_task(samples), world_size, micro_batch) == expected
    assert sizes(one_task(samples, "packed"), world_size, micro_batch) == expected


def test_packed_straddles_tasks():
    streams = (Stream("a", (99,), 5, 1), Stream("b", (99,), 9, 1), Stream("c", (99,), 2, 1))
    packed = Schedule(0, "accumulate", streams, rounds="packed")
    assert sizes(packed, 4, 4) == [[2, 2, 1, 3], [2, 2, 2, 2]]
    assert sizes(replace(packed, rounds="task"), 4, 4) == [[2, 1, 1, 1], [3, 2, 2, 2], [1, 1, 0, 0]]


def test_idle_share():
    window, schedule = Plan(one_task(6)).window(0), one_task(6)
    assert idle_share(deal(window, schedule, 4, 8)) == Fraction(1, 4)  # [2, 2, 1, 1] of 4 x 2 places
    assert idle_share(deal(window, schedule, 3, 8)) == 0
    assert idle_share(deal(window, schedule, 12, 8)) == Fraction(1, 2)


@pytest.mark.parametrize("world_size, micro_batch, field", [(0, 4, "world_size"), (2, 0, "micro_batch")])
def test_refusals(world_size, micro_batch, field):
    with pytest.raises(ValueError, match=f"{field} is 0: use at least 1"):
        deal(Plan(one_task(6)).window(0), one_task(6), world_size, micro_batch)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_large_world_is_lazy(strategy):
    """One rank of 16,384 with a window of 4 M samples: no work proportional to either (0.1 s of CPU is ample)."""
    streams = tuple(Stream(f"task{index}", (10_000,) * 100, 2**19, 1) for index in range(8))
    schedule = Schedule(1, strategy, streams, samples=2**22, chunk=16 if strategy == "per_rank" else 0)
    plan = Plan(schedule)
    began = time.process_time()
    window = plan.window(123_456)
    rounds = deal(window, schedule, 16_384, 16)
    task, ordinal = window.span(*rounds[-1].span(9_999))
    elapsed = time.process_time() - began
    assert elapsed < 0.1
    assert len(window) == 2**22 and len(rounds) == 16 and len(ordinal) == 16
    for one in np.unique(task).tolist():
        plan.locate(one, ordinal[task == one])
