"""The plan: pure, exact over epochs, without gaps, balanced; and refusals that say what to change."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsvlm.schedule.mixture import NEVER, Mixture
from dsvlm.schedule.mixture import Phase as MixturePhase
from dsvlm.schedule.plan import STRATEGIES, Plan, Schedule, Stream

steady = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=60)

STREAMS = (Stream("caption", (5, 3, 0, 7, 4), 6, 3), Stream("vqa", (11,), 2, 1), Stream("locate", (9, 9), 4, 2))
SCHEDULE = Schedule(7, "accumulate", STREAMS, block=3, group=2, samples=8, chunk=2)


def with_strategy(strategy, **changes):
    return replace(SCHEDULE, strategy=strategy, **{"chunk": 8 if strategy == "unified" else 2, **changes})


GOLDEN = {  # (task, ordinal) of step 1,000,003
    "accumulate": (
        [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2],
        [6000018, 6000019, 6000020, 6000021, 6000022, 6000023, 2000006, 2000007, 4000012, 4000013, 4000014, 4000015],
    ),
    "mixed": (
        [2, 2, 0, 0, 1, 1, 0, 0, 0, 2, 0, 2],
        [4000013, 4000014, 6000023, 6000021, 2000006, 2000007, 6000019, 6000022, 6000018, 4000012, 6000020, 4000015],
    ),
    "unified": (
        [2, 2, 2, 2, 2, 2, 2, 2],
        [2666672, 2666673, 2666674, 2666675, 2666676, 2666677, 2666678, 2666679],
    ),
    "per_rank": (
        [1, 1, 0, 0, 1, 1, 2, 2],
        [1333336, 1333337, 4000012, 4000013, 1333338, 1333339, 2666676, 2666677],
    ),
}
GOLDEN_SAMPLES = [[12, 13, 14, 14, 8, 9], [3, 4, 5, 0, 1, 2], [6, 7, 8, 3, 4, 5]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_golden(strategy):
    window = Plan(with_strategy(strategy)).window(1_000_003)
    assert (window.task.tolist(), window.ordinal.tolist()) == GOLDEN[strategy]


def test_golden_samples():
    plan = Plan(SCHEDULE)
    assert [plan.locate(task, np.arange(17, 23) + 10**9)[1].tolist() for task in range(3)] == GOLDEN_SAMPLES


def content(window):
    return window.step, window.blocks, window.order_key, window.task.tolist(), window.ordinal.tolist()


@steady
@given(st.data())
def test_pure(schedules, data):
    """A window does not depend on what was asked before; a span is a slice of the whole."""
    schedule = data.draw(schedules())
    plan = Plan(schedule)
    asked = data.draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=6))
    for step in asked:
        window = plan.window(step)
        assert content(window) == content(Plan(schedule).window(step))
        start = data.draw(st.integers(0, len(window)))
        stop = data.draw(st.integers(start, len(window)))
        task, ordinal = window.span(start, stop)
        assert task.dtype == np.int32 and ordinal.dtype == np.int64
        assert np.array_equal(task, window.task[start:stop]) and np.array_equal(ordinal, window.ordinal[start:stop])


@steady
@given(st.data())
def test_locate_pure(schedules, data):
    """Ordinals may be located in any order and any grouping, across epochs, and leave a bounded cache behind."""
    schedule = data.draw(schedules())
    task = data.draw(st.integers(0, len(schedule.streams) - 1))
    plan, size = Plan(schedule), schedule.streams[task].size
    ordinals = np.array(data.draw(st.lists(st.integers(0, 5 * size - 1), min_size=1, max_size=20)))
    epoch, sample = plan.locate(task, ordinals)
    for one in range(len(ordinals)):
        alone = Plan(schedule).locate(task, ordinals[one : one + 1])
        assert (alone[0][0], alone[1][0]) == (epoch[one], sample[one])
    assert np.array_equal(epoch, ordinals // size)
    assert all(len(recent) <= 3 for recent in plan._recent.values())


@steady
@given(st.data())
def test_take_and_locate_all(schedules, data):
    """Any places of a window, in any order: what the whole window says of them; each located as its task alone is."""
    schedule = data.draw(schedules())
    plan = Plan(schedule)
    window = plan.window(data.draw(st.integers(0, 2000)))
    places = np.array(data.draw(st.lists(st.integers(0, len(window) - 1), max_size=30)), np.int64)
    task, ordinal = window.take(places)
    assert task.dtype == np.int32 and ordinal.dtype == np.int64
    assert np.array_equal(task, window.task[places]) and np.array_equal(ordinal, window.ordinal[places])
    epoch, sample = plan.locate_all(task, ordinal)
    assert epoch.dtype == sample.dtype == np.int64 and len(epoch) == len(sample) == len(places)
    for one in range(len(places)):
        alone = Plan(schedule).locate(int(task[one]), ordinal[one : one + 1])
        assert (alone[0][0], alone[1][0]) == (epoch[one], sample[one])


@steady
@given(st.data())
def test_ordinals_have_no_gap(schedules, data):
    """Over steps 0, 1, 2, ... the ordinals of each task are 0, 1, 2, ... (invariant 7)."""
    schedule = data.draw(schedules())
    plan = Plan(schedule)
    windows = [plan.window(step) for step in range(data.draw(st.integers(1, 12)))]
    task = np.concatenate([window.task for window in windows])
    ordinal = np.concatenate([window.ordinal for window in windows])
    for one in range(len(schedule.streams)):
        own = ordinal[task == one]
        assert np.array_equal(np.sort(own), np.arange(len(own)))
        if schedule.strategy != "mixed":
            assert np.array_equal(own, np.arange(len(own)))


def complete_epochs(schedule, steps):
    """Gather the windows of some steps; check every complete epoch of every task, and return how many there were."""
    plan = Plan(schedule)
    windows = [plan.window(step) for step in range(steps)]
    task = np.concatenate([window.task for window in windows])
    ordinal = np.concatenate([window.ordinal for window in windows])
    complete = []
    for one, stream in enumerate(schedule.streams):
        epoch, sample = plan.locate(one, ordinal[task == one])
        complete.append(len(epoch) // stream.size)
        for number in np.unique(epoch).tolist():
            own = sample[epoch == number]
            assert len(np.unique(own)) == len(own) and own.max() < stream.size
            assert number >= complete[-1] or len(own) == stream.size
    return complete


@steady
@given(st.data())
def test_coverage(schedules, data):
    """Any shard sizes, block, group: the windows hold each sample of a task once per epoch (invariant 3)."""
    complete_epochs(data.draw(schedules()), 30)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_coverage_of_several_epochs(strategy):
    assert min(complete_epochs(with_strategy(strategy), 40)) >= 3


def test_epochs_differ():
    plan = Plan(replace(SCHEDULE, block=1))
    first, second = (plan.locate(0, np.arange(19) + 19 * epoch)[1].tolist() for epoch in (0, 1))
    other_seed = Plan(replace(SCHEDULE, block=1, seed=8)).locate(0, np.arange(19))[1].tolist()
    assert len({tuple(order) for order in (first, second, other_seed, range(19))}) == 4


def test_same_shards_two_tasks():
    """Two tasks over equal shard sets go through them in different orders."""
    plan = Plan(replace(SCHEDULE, streams=(Stream("a", (50, 50), 1, 1), Stream("b", (50, 50), 1, 1))))
    assert not np.array_equal(plan.locate(0, np.arange(100))[1], plan.locate(1, np.arange(100))[1])


@steady
@given(quotas=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99), start=st.integers(0, 200))
def test_cycles_balance(quotas, seed, start):
    """Exact at cycle ends, within q(1 - q/Q) inside (invariant 6), and equal to counting from slot 0."""
    mixture, length = Mixture(tuple(quotas), seed), sum(quotas)
    task, occurrence = mixture.slots(0, start + 3 * length)
    counts = np.zeros(len(quotas), np.int64)
    for slot, (one, number) in enumerate(zip(task.tolist(), occurrence.tolist(), strict=True)):
        assert number == counts[one]
        counts[one] += 1
        for own, quota in zip(counts.tolist(), quotas, strict=True):
            # |own - slots * q / Q| <= q * (1 - q / Q), in integers
            assert abs(own * length - (slot + 1) * quota) <= quota * (length - quota)
        if (slot + 1) % length == 0:
            assert np.array_equal(counts, (slot + 1) // length * np.array(quotas))
    part = mixture.slots(start, start + length)
    assert np.array_equal(part[0], task[start : start + length])
    assert np.array_equal(part[1], occurrence[start : start + length])


def test_cycles_are_shuffled():
    task, _ = Mixture((4, 4, 4), 3).slots(0, 12 * 20)
    assert len({tuple(cycle) for cycle in task.reshape(20, 12).tolist()}) == 20


def test_strategies_compose_as_named():
    accumulate, mixed = (Plan(with_strategy(name)).window(3) for name in ("accumulate", "mixed"))
    assert accumulate.task.tolist() == [0] * 6 + [1] * 2 + [2] * 4
    assert accumulate.ordinal.tolist() == [18, 19, 20, 21, 22, 23, 6, 7, 12, 13, 14, 15]
    pairs = list(zip(mixed.task.tolist(), mixed.ordinal.tolist(), strict=True))
    assert sorted(pairs) == list(zip(accumulate.task.tolist(), accumulate.ordinal.tolist(), strict=True))
    assert sorted(pairs) != pairs and pairs != list(zip(mixed.task, mixed.ordinal - 6, strict=True))
    unified = [Plan(with_strategy("unified")).window(step) for step in range(6)]
    assert all(len(window) == 8 and len(window.blocks) == 1 for window in unified)
    assert sorted(window.blocks[0].task for window in unified) == [0, 0, 0, 1, 2, 2]
    per_rank = Plan(with_strategy("per_rank")).window(0)
    assert [block.count for block in per_rank.blocks] == [2] * 4
    drawn = [block.task for step in range(3) for block in Plan(with_strategy("per_rank")).window(step).blocks]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [0, 0, 0, 1, 2, 2]


def test_mixed_order_changes_with_step():
    plan = Plan(with_strategy("mixed"))
    assert len({tuple(plan.window(step).task.tolist()) for step in range(10)}) > 5


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"strategy": "acumulate"}, ["strategy", "acumulate", "did you mean 'accumulate'"]),
        ({"rounds": "pack"}, ["rounds", "'pack'", "did you mean 'packed'"]),
        ({"seed": -1}, ["seed", "-1", "at least 0"]),
        ({"seed": 1.5}, ["seed", "1.5", "integer"]),
        ({"block": 0}, ["block", "0", "at least 1"]),
        ({"group": True}, ["group", "True", "integer"]),
        ({"streams": ()}, ["streams", "empty"]),
        ({"streams": (STREAMS[0], STREAMS[0])}, ["'caption'", "twice"]),
        ({"streams": (replace(STREAMS[0], samples=0),)}, ["'caption'", "samples", "0", "at least 1"]),
        ({"streams": (replace(STREAMS[0], quota=0),), "strategy": "per_rank"}, ["'caption'", "quota", "at least 1"]),
        ({"streams": (replace(STREAMS[1], shard_sizes=(0, 0)),)}, ["'vqa'", "0 samples", "remove"]),
        ({"streams": (replace(STREAMS[1], shard_sizes=(4, -2)),)}, ["'vqa'", "shard 1", "-2"]),
        ({"strategy": "unified", "samples": 0, "chunk": 0}, ["schedule.samples", "at least 1"]),
        ({"strategy": "unified", "chunk": 2}, ["chunk", "2", "one chunk"]),
        ({"strategy": "per_rank", "chunk": 3}, ["chunk", "3", "divide", "8", "samples = 6"]),
        ({"strategy": "per_rank", "chunk": 9}, ["chunk", "9", "divide", "samples = 9"]),
        ({"strategy": "per_rank", "chunk": 0}, ["chunk", "at least 1"]),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(ValueError) as error:
        replace(SCHEDULE, **changes)
    assert all(word in str(error.value) for word in words), error.value


def test_unused_settings_are_free():
    """What a strategy does not use is not checked: quotas in accumulate, samples of a stream in unified."""
    replace(SCHEDULE, streams=(replace(STREAMS[0], quota=0),), samples=0, chunk=0)
    unified = replace(SCHEDULE, streams=(replace(STREAMS[0], samples=0),), strategy="unified", chunk=0)
    assert len(Plan(unified).window(0)) == 8
    assert set(STRATEGIES) == {"accumulate", "mixed", "unified", "per_rank"}


def uses(plan, steps):
    """{(task, sample): (epoch, step) of every use, in order}"""
    found = {}
    for step in range(steps):
        window = plan.window(step)
        epochs, samples = plan.locate_all(window.task, window.ordinal)
        for task, epoch, sample in zip(window.task.tolist(), epochs.tolist(), samples.tolist(), strict=True):
            found.setdefault((task, sample), []).append((epoch, step))
    return {pair: sorted(times) for pair, times in found.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("phases", [(), (0, 5, 9)], ids=["one phase", "three phases"])
def test_next_use_is_the_step_at_which_a_sample_comes_again(strategy, phases):
    shares = ((6, 2, 4), (2, 0, 6), (1, 1, 1))
    table = tuple(map(MixturePhase, phases, shares)) if phases else ()
    plan = Plan(with_strategy(strategy, phases=table))
    slack = 0 if strategy in ("accumulate", "mixed") else 14  # a cycle's slots, of one chunk or more a step
    compared = 0
    for (task, sample), times in uses(plan, 60).items():
        for (epoch, _), (_, later) in zip(times, times[1:], strict=False):
            [step] = plan.next_use(np.array([task]), np.array([epoch]), np.array([sample]))
            assert abs(step - later) <= slack
            compared += 1
    assert compared > 100


def test_a_task_that_has_ended_is_never_used_again():
    plan = Plan(with_strategy("accumulate", phases=(MixturePhase(0, (6, 2, 4)), MixturePhase(3, (6, 0, 4)))))
    assert plan.next_use(np.array([1, 1]), np.array([0, 0]), np.array([3, 8])).tolist() == [NEVER, NEVER]
