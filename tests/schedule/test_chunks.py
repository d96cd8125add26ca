"""Windows of many chunks: what is drawn of them is what the whole table says, and a rank draws its own share only."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvlm.schedule import mixture as mixtures
from dsvlm.schedule import plan as plans
from dsvlm.schedule.digest import digest, mark
from dsvlm.schedule.mixture import AHEAD, Chunks, Cycles, Drawn, Mixture, Phase
from dsvlm.schedule.plan import SMALL, STRATEGIES, Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal

steady = settings(derandomize=True, deadline=None, database=None, phases=[HypothesisPhase.generate], max_examples=60)


@st.composite
def drawn_schedules(draw, schedules):
    """A cyclic schedule of up to 60 chunks, in 1 to 4 phases within its first 30 steps; shares may be 0."""
    schedule = draw(schedules(("unified", "per_rank")))
    if schedule.strategy == "per_rank":
        schedule = replace(schedule, samples=schedule.chunk * draw(st.integers(1, 60)))
    starts = sorted({0, *draw(st.lists(st.integers(1, 25), max_size=3))})
    shares = st.tuples(*[st.integers(0, 6)] * len(schedule.streams)).filter(any)
    return replace(schedule, phases=tuple(Phase(start, draw(shares)) for start in starts))


@pytest.fixture(scope="module")
def lazy():
    """Function that gives a window which draws its chunks when asked, however few they are."""

    def window(plan, step):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plans, "SMALL", 0)
            found = plan.window(step)
        assert isinstance(found.source, Chunks)
        return found

    return window


@steady
@given(st.data())
def test_chunks_are_those_of_the_table(schedules, lazy, data):
    """Any chunks and places, any steps in any order, over phases, with little or much drawn ahead."""
    schedule = data.draw(drawn_schedules(schedules))
    plan = Plan(schedule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "AHEAD", data.draw(st.sampled_from((0, 40, AHEAD))))
        for step in data.draw(st.lists(st.one_of(st.integers(0, 30), st.integers(0, 10**9)), min_size=1, max_size=6)):
            whole, window = Plan(schedule).window(step), lazy(plan, step)
            assert (len(window), window.sizes, window.step) == (len(whole), whole.sizes, step)
            chunks = np.array(data.draw(st.lists(st.integers(0, len(whole.table) - 1), max_size=9)), np.int64)
            task, first = window.source.rows(chunks)
            assert np.array_equal(task, whole.table[chunks, 0]) and np.array_equal(first, whole.table[chunks, 1])
            places = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=30)), np.int64)
            for found, right in zip(window.take(places), whole.take(places), strict=True):
                assert found.dtype == right.dtype and np.array_equal(found, right)
            assert "table" not in vars(window) or len(places) >= len(whole.table)
            assert np.array_equal(window.table, whole.table) and window.blocks == whole.blocks
            assert digest(b"x", window) == digest(b"x", whole)
            assert np.array_equal(window.take(places)[1], whole.take(places)[1])  # from the table now


@steady
@given(st.data())
def test_a_sample_is_of_the_window(schedules, lazy, data):
    """Cursors before and after it, and whole cycles that begin or end in it; the same whatever was asked before."""
    schedule = data.draw(drawn_schedules(schedules))
    plan, tasks = Plan(schedule), len(schedule.streams)
    for step in data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6)):
        window = lazy(plan, step)
        sample = window.source.sample()
        assert np.array_equal(sample, lazy(Plan(schedule), step).source.sample())
        chunk = window.chunk
        assert np.array_equal(sample[:tasks] * chunk, Plan(schedule).cursors(step))
        assert np.array_equal(sample[tasks : 2 * tasks] * chunk, Plan(schedule).cursors(step + 1))
        phase = [phase for phase in schedule.phases if phase.start <= step][-1]
        first, length = (step - phase.start) * len(window.source), sum(phase.shares)
        task, occurrence = sample[2 * tasks :].reshape(2, -1, length)
        cycles = occurrence.min(axis=1, where=task == task[0, 0], initial=2**62) // phase.shares[task[0, 0]]
        assert ((first // length <= cycles) & (cycles <= (first + len(window.source) - 1) // length)).all()
        mixture = Mixture(phase.shares, schedule.seed, phase.start)
        assert np.array_equal(np.stack(mixture.draw(cycles)), np.stack([task, occurrence]))


def test_which_windows_draw_when_asked():
    streams = (Stream("a", (50,), 3000, 3), Stream("b", (7,), 3000, 5))
    for strategy in STRATEGIES:
        for chunks in (SMALL, SMALL + 1):
            chunk = 2 * chunks if strategy == "unified" else 2
            window = Plan(Schedule(1, strategy, streams, samples=2 * chunks, chunk=chunk)).window(9)
            many = strategy == "per_rank" and chunks > SMALL
            assert isinstance(window.source, Chunks) == many and ("table" in vars(window)) is False


def drawn_by_a_share(world_size, first, steps, monkeypatch):
    """(cycles, calls) that one rank draws for its share of some windows, and for their marks; 32 micro-steps each."""
    streams = tuple(Stream(f"task{index}", (10_000,) * 1000, 1, index + 1) for index in range(8))
    plan = Plan(Schedule(3, "per_rank", streams, samples=16 * 32 * world_size, chunk=16, group=16))
    drawn = []
    draw = Mixture.draw
    with monkeypatch.context() as patch:
        patch.setattr(Mixture, "draw", lambda self, cycle: drawn.append(len(cycle)) or draw(self, cycle))
        patch.setattr(Drawn, "table", None)
        for step in range(first, first + steps):
            window = plan.window(step)
            rounds = deal(window, plan.schedule, world_size, 16)
            assert len(rounds) == 32
            places = np.concatenate([part.unit(world_size // 3).places for part in rounds])
            assert len(window.take(places)[0]) == 512
            mark(b"identity", window)
            assert "table" not in vars(window)
    return sum(drawn), len(drawn)


def test_a_share_draws_a_bounded_number_of_cycles(monkeypatch):
    """Of a window of half a million chunks no more than of one 64 times smaller, and at any step of a run."""
    ahead, steps = AHEAD // 36, 40
    for world_size in (256, 16_384):
        for first in (0, 10**9):
            cycles, calls = drawn_by_a_share(world_size, first, steps, monkeypatch)
            assert 0 < cycles <= steps * (32 + 10) + 2 * ahead and calls <= 2 + steps // 4
    cycles, _ = drawn_by_a_share(16_384, 500, 1, monkeypatch)
    assert cycles <= 2 * ahead


def test_what_is_held_is_not_drawn_again():
    """Windows within one long cycle: it is drawn once for the chunks, and once for the samples."""
    streams = (Stream("a", (50,), 1, 40_000), Stream("b", (7,), 1, 20_000))
    plan = Plan(Schedule(1, "per_rank", streams, samples=2 * 1100, chunk=2))
    held = set()
    for step in range(20):
        window = plan.window(step)
        window.take(np.array([0, 700, 2199]))
        mark(b"identity", window)
        held.add(tuple(id(cycles._held[1]) for cycles in plan._blocks._current[2:]))
    assert len(held) == 1 and all(isinstance(cycles, Cycles) for cycles in plan._blocks._current[2:])
