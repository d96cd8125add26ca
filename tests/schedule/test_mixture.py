"""Phases: shares change, cursors do not break; and what a schedule without phases was, it stays."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvlm.schedule.controller import StopAndGo
from dsvlm.schedule.digest import digest, identity_bytes
from dsvlm.schedule.mixture import Mixture, Phase
from dsvlm.schedule.plan import STRATEGIES, Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal

steady = settings(derandomize=True, deadline=None, database=None, phases=[HypothesisPhase.generate], max_examples=60)

STREAMS = (Stream("caption", (5, 3, 0, 7, 4), 6, 3), Stream("vqa", (11,), 2, 1), Stream("locate", (9, 9), 4, 2))
PHASES = (Phase(0, (3, 1, 2)), Phase(5, (0, 4, 1)), Phase(1_000_000, (2, 0, 7)))


def schedule_of(strategy, phases=PHASES):
    return Schedule(7, strategy, STREAMS, block=3, group=2, samples=8, chunk=8 if strategy == "unified" else 2,
                    phases=phases)  # fmt: skip


@st.composite
def phased(draw, schedules, strategies=STRATEGIES):
    """A schedule with 1 to 5 phases within its first 30 steps; shares may be 0."""
    schedule = draw(schedules(strategies))
    starts = sorted({0, *draw(st.lists(st.integers(1, 25), max_size=4))})
    shares = st.tuples(*[st.integers(0, 6)] * len(schedule.streams)).filter(any)
    return replace(schedule, phases=tuple(Phase(start, draw(shares)) for start in starts))


GOLDEN = {  # rows of the windows of steps 7 and 1,000,003; digests of both
    "accumulate": (
        [[1, 13, 4], [2, 12, 1]],
        [[0, 21, 2], [2, 1000026, 7]],
        ["f2089aceb89b6f2fe9c841069712ecd4", "44d504de1c0337c1894a388692c57f17"],
    ),
    "mixed": (
        [[1, 13, 4], [2, 12, 1]],
        [[0, 21, 2], [2, 1000026, 7]],
        ["6ff4899d367e205bda89a0705ab19020", "74991387d4b3949e7748f515a93a46a8"],
    ),
    "unified": (
        [[1, 16, 8]],
        [[2, 1600032, 8]],
        ["e00569787048b32332841995272e4d45", "85e4273d3a099fe26ac229e5a2597935"],
    ),
    "per_rank": (
        [[1, 20, 2], [1, 22, 2], [1, 24, 2], [1, 26, 2]],
        [[2, 1600022, 2], [2, 1600024, 2], [0, 26, 2], [2, 1600026, 2]],
        ["fbc68b100be01a9f3ba12fea850d03df", "84bb8aa761c12291b892373e2f5991e1"],
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_golden(strategy):
    schedule = schedule_of(strategy)
    windows = [Plan(schedule).window(step) for step in (7, 1_000_003)]
    identity = identity_bytes(schedule, "r", ("aa", "bb", "cc"))
    found = *(window.table.tolist() for window in windows), [digest(identity, window) for window in windows]
    assert found == GOLDEN[strategy]


def before(blocks, tasks):
    """Samples of each task among some blocks."""
    return np.bincount([block.task for block in blocks], [block.count for block in blocks], tasks).astype(np.int64)


@steady
@given(st.data())
def test_cursors_are_exact_over_phases(schedules, data):
    """Ordinals of each task are 0, 1, 2, ... over the phases' edges, paused or not (invariant 7)."""
    schedule = data.draw(phased(schedules))
    plan, tasks = Plan(schedule), len(schedule.streams)
    blocks, asked = [], []
    for step in range(data.draw(st.integers(1, 32))):
        assert np.array_equal(plan.cursors(step), before(blocks, tasks))
        window = plan.window(step)
        assert len(window) > 0 and (window.counts > 0).all()
        blocks += window.blocks
        asked.append(window.table)
    ordinals = {task: 0 for task in range(tasks)}
    for task, first, count in blocks:
        assert first == ordinals[task]
        ordinals[task] += count
    # Any order of calls, a new plan each time or one for all: the same bytes (invariant 5).
    for step in data.draw(st.permutations(range(len(asked)))):
        assert plan.window(step).table.tobytes() == asked[step].tobytes()
        assert Plan(schedule).window(step).table.tobytes() == asked[step].tobytes()


@steady
@given(st.data())
def test_a_phase_has_its_shares(schedules, data):
    """accumulate, mixed: each window has exactly the shares of its phase."""
    schedule = data.draw(phased(schedules, ("accumulate", "mixed")))
    for step in range(30):
        shares = [phase.shares for phase in schedule.phases if phase.start <= step][-1]
        assert np.array_equal(before(Plan(schedule).window(step).blocks, len(shares)), shares)


@steady
@given(st.data())
def test_cycles_balance_in_every_phase(schedules, data):
    """unified, per_rank: exact at cycle ends, within q(1 - q/Q) inside; cycles begin with their phase (invariant 6)."""
    schedule = data.draw(phased(schedules, ("unified", "per_rank")))
    plan, steps = Plan(schedule), 40
    for phase, stop in zip(schedule.phases, [p.start for p in schedule.phases[1:]] + [steps], strict=True):
        drawn = [block.task for step in range(phase.start, stop) for block in plan.window(step).blocks]
        counts, quotas, length = np.zeros(len(phase.shares), np.int64), np.array(phase.shares), sum(phase.shares)
        for slot, task in enumerate(drawn, 1):
            counts[task] += 1
            assert (np.abs(counts * length - slot * quotas) <= quotas * (length - quotas)).all()
            assert slot % length or np.array_equal(counts, slot // length * quotas)


@steady
@given(st.data())
def test_a_later_phase_changes_nothing_before_it(schedules, data):
    """Changed weights from step N on: what was trained until then stays what it was."""
    schedule = data.draw(schedules())
    start = data.draw(st.integers(1, 20))
    shares = data.draw(st.tuples(*[st.integers(0, 6)] * len(schedule.streams)).filter(any))
    later = replace(schedule, phases=(*schedule.table, Phase(start, shares)))
    old, new = Plan(schedule), Plan(later)
    for step in range(start):
        assert new.window(step).table.tobytes() == old.window(step).table.tobytes()
        assert new.window(step).order_key == old.window(step).order_key
    assert np.array_equal(new.cursors(start), old.cursors(start))


@steady
@given(st.data())
def test_every_world_size_runs_the_same_samples(schedules, live, data):
    """In windows from which a phase or a controller leaves tasks out, too (invariant 1)."""
    schedule = data.draw(phased(schedules))
    plan = Plan(schedule)
    if not schedule.cyclic:
        plan = Plan(schedule, StopAndGo(every=1, patience=0, gap=3))
        for step in range(data.draw(st.integers(0, 10))):
            losses = 1 + np.arange(len(schedule.streams)) * 0.9**step
            plan.control.observe(step, losses, np.ones_like(losses))
    step = plan.control.state.start if plan.control else data.draw(st.integers(0, 30))
    window = plan.window(step)
    alone = live(plan, window, deal(window, schedule, 1, len(window)))
    assert len(alone) == len(window)
    for world_size in data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)):
        assert live(plan, window, deal(window, schedule, world_size, data.draw(st.integers(1, 9)))) == alone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_phases_are_part_of_the_identity(strategy):
    """Each start and share changes every digest; without phases the identity has no field for them."""
    phases = (Phase(0, (3, 1, 2)), Phase(5, (0, 4, 1)))
    changed = [(), phases[:1], phases, (phases[0], Phase(6, (0, 4, 1))), (phases[0], Phase(5, (1, 4, 1)))]
    digests = {
        digest(identity_bytes(schedule, "r", ("aa", "bb", "cc")), Plan(schedule).window(0))
        for schedule in (schedule_of(strategy, each) for each in changed)
    }
    assert len(digests) == len(changed)


@steady
@given(st.data())
def test_slots_at_random_places(data):
    """The kept cycle is never another one's: any sequence of ranges equals fresh answers; `before` counts them."""
    quotas = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    mixture, start = Mixture(quotas, 3, 17), data.draw(st.sampled_from((0, 17)))
    assert Mixture(quotas, 3, start).key == mixture.key or start == 0
    for _ in range(5):
        low = data.draw(st.integers(0, 100))
        high = data.draw(st.integers(low + 1, low + 40))
        for part, fresh in zip(mixture.slots(low, high), Mixture(quotas, 3, 17).slots(low, high), strict=True):
            assert np.array_equal(part, fresh) and len(part) == high - low
        drawn = Mixture(quotas, 3, 17).slots(0, high)[0]
        assert np.array_equal(mixture.before(high), np.bincount(drawn, minlength=len(quotas)))


@pytest.mark.parametrize(
    "phases, words",
    [
        ((Phase(1, (1, 1, 1)),), ["[1]", "begin at step 0"]),
        ((Phase(0, (1, 1, 1)), Phase(5, (1, 1, 1)), Phase(5, (2, 1, 1))), ["[0, 5, 5]", "ascend"]),
        ((Phase(0, (1, 1)),), ["2 shares", "3 tasks"]),
        ((Phase(0, (1, 1, 1)), Phase(3, (0, 0, 0))), ["every share is 0", "step 3"]),
        ((Phase(0, (1, -1, 1)),), ["'vqa'", "-1", "at least 0"]),
        ((Phase(0, (1, 0.5, 1)),), ["'vqa'", "0.5", "integer"]),
    ],
)
@pytest.mark.parametrize("strategy", ["accumulate", "unified"])
def test_refusals(strategy, phases, words):
    with pytest.raises(ValueError) as error:
        schedule_of(strategy, phases)
    assert all(word in str(error.value) for word in words), error.value


def test_random_access_is_cheap():
    """A step far in a run of many phases needs its own cycle only, and the next one nothing new."""
    phases = tuple(Phase(1000 * index, (1 + index % 3, 2, 5)) for index in range(200))
    plan = Plan(schedule_of("unified", phases))
    first = plan.window(10**9)
    assert plan._blocks._current[1]._held[1] - plan._blocks._current[1]._held[0] == 1
    drawn = plan._blocks._current[1]._held[2]
    assert plan.window(10**9 + 1).table[0, 1] > 0 and first.table[0, 1] > 10**9
    assert plan._blocks._current[1]._held[2] is drawn
