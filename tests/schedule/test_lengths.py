"""Dealing by length: every sample once, units within their budget and of like cost, edges and rows as good as said."""

import time
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from benchmarks.padding import MIXTURE, table
from dsvlm.schedule.lengths import balanced_rows, deal_by_length, optimal_edges, token_shares
from dsvlm.schedule.plan import Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal, idle_share

steady = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=40)


def padded_tokens(lengths, edges):
    return sum(min(edge for edge in edges if edge >= length) for length in lengths)


@steady
@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 4), st.sampled_from((1, 4, 8)))
def test_edges_are_optimal(lengths, buckets, multiple):
    """No choice of edges, tried one by one, pads fewer tokens."""
    edges = optimal_edges(np.bincount(lengths), buckets, multiple)
    assert 1 <= len(edges) <= buckets and (np.diff(edges) > 0).all() and (edges % multiple == 0).all()
    last = max(multiple, -(-max(lengths) // multiple) * multiple)
    assert edges[-1] == last
    others = range(multiple, last, multiple)
    choices = [chosen for count in range(min(buckets, len(others) + 1)) for chosen in combinations(others, count)]
    assert padded_tokens(lengths, edges) == min(padded_tokens(lengths, (*chosen, last)) for chosen in choices)


def test_edges_of_long_histograms():
    """2,048 candidates, 16 buckets: soon done; the more buckets, the less padding."""
    histogram = np.random.default_rng(0).integers(1, 1000, 16384)
    start = time.perf_counter()
    padding = []
    for buckets in (1, 4, 16):
        edges = optimal_edges(histogram, buckets, 8)
        padding.append(int((edges[np.searchsorted(edges, np.arange(16384))] * histogram).sum()))
    assert time.perf_counter() - start < 10
    assert padding[0] > 1.5 * padding[1] > 1.6 * padding[2]


@st.composite
def dealt(draw, schedules, pack):
    """(schedule, window, world size, micro_tokens, lengths, edges, rounds) of a small drawn case."""
    schedule = draw(schedules())
    window = Plan(schedule).window(draw(st.integers(0, 50)))
    tasks = range(len(schedule.streams))
    seed = draw(st.integers(0, 2**32))
    longest = draw(st.integers(1, 60))
    lengths = np.random.default_rng(seed).integers(1, longest + 1, len(window))
    edges = [optimal_edges(np.bincount(lengths), draw(st.integers(1, 5)), draw(st.sampled_from((1, 8)))) for _ in tasks]
    micro_tokens = draw(st.integers(longest, 8 * longest))
    world_size = draw(st.integers(1, 17))
    rounds = deal_by_length(
        window, schedule, world_size, micro_tokens=micro_tokens, lengths=lengths, edges=edges, pack=[pack] * len(tasks)
    )
    return schedule, window, world_size, micro_tokens, lengths, edges, rounds


def check_rounds(schedule, window, world_size, micro_tokens, rounds):
    """What packed units and bucketed ones share. Returns the units of all rounds."""
    units = [part.unit(rank) for part in rounds for rank in range(world_size)]
    # Every sample of the window once (invariants 1, 3 and 18), the same number of micro-steps on all ranks (2).
    assert sorted(np.concatenate([unit.places for unit in units]).tolist()) == list(range(len(window)))
    whole = schedule.rounds == "packed" or schedule.strategy in ("mixed", "per_rank")
    for part in rounds:
        counts = [len(part.unit(rank).places) for rank in range(world_size)]
        assert (part.samples, part.largest, part.units) == (sum(counts), max(counts), sum(n > 0 for n in counts))
        assert counts[0] > 0 and [n > 0 for n in counts] == sorted([n > 0 for n in counts], reverse=True)
        assert part.padded.max() <= micro_tokens
        if whole:
            assert part.task is None
        else:
            assert {int(one) for r in range(world_size) for one in window.take(part.unit(r).places)[0]} == {part.task}
            block = [p.samples for p in rounds if p.task == part.task]
            fillers = sum(world_size - p.units for p in rounds if p.task == part.task)
            assert fillers == max(0, len(block) * world_size - sum(block))
    return units


@steady
@given(st.data())
def test_buckets(schedules, data):
    case = data.draw(dealt(schedules, pack=False))
    schedule, window, world_size, micro_tokens, lengths, edges, rounds = case
    units = check_rounds(schedule, window, world_size, micro_tokens, rounds)
    task = window.task
    tokens = [int(t) for part in rounds for t in part.tokens]
    padded = [int(t) for part in rounds for t in part.padded]
    for unit, useful, cost in zip(units, tokens, padded, strict=True):
        assert unit.rows is None and useful == lengths[unit.places].sum()
        assert cost == len(unit.places) * unit.width
        if len(unit.places):
            # The bucket of its longest sample, and no more (invariant 18).
            pairs = zip(task[unit.places], lengths[unit.places], strict=True)
            buckets = [edges[one][np.searchsorted(edges[one], length)] for one, length in pairs]
            assert unit.width == min(max(buckets), micro_tokens) >= lengths[unit.places].max()
        else:
            assert unit.width == 0
    assert token_shares(rounds, lengths) == (sum(tokens), sum(padded), sum(world_size * p.padded.max() for p in rounds))
    assert idle_share(rounds) == 1 - Fraction(*token_shares(rounds, lengths)[1:])


def best_cut(costs, units):
    """Least largest cost of a cut of descending widths into so many consecutive units, by trying all."""
    n = len(costs)
    cuts = combinations(range(1, n), min(units, n) - 1)
    return min(max(costs[a] * (b - a) for a, b in zip((0, *cut), (*cut, n), strict=True)) for cut in cuts)


@steady
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 3), st.integers(9, 40))
def test_buckets_are_balanced(widths, world_size, micro_tokens):
    """The fewest rounds, and among their cuts one whose costliest unit is the cheapest."""
    schedule = one_task(len(widths))
    window = Plan(schedule).window(0)
    rounds = deal_by_length(
        window, schedule, world_size, micro_tokens=micro_tokens, lengths=np.array(widths),
        edges=[np.arange(1, 10)], pack=[False],
    )  # fmt: skip
    ordered = sorted(widths, reverse=True)
    assert max(part.padded.max() for part in rounds) == best_cut(ordered, len(rounds) * world_size)
    if len(rounds) > 1:
        assert best_cut(ordered, (len(rounds) - 1) * world_size) > micro_tokens


@steady
@given(st.data())
def test_packing(schedules, data):
    schedule, window, world_size, micro_tokens, lengths, _, rounds = data.draw(dealt(schedules, pack=True))
    units = check_rounds(schedule, window, world_size, micro_tokens, rounds)
    for unit in units:
        total = int(lengths[unit.places].sum())
        assert unit.width == min(-(-total // 8) * 8, micro_tokens) >= total
        if len(unit.places):
            assert unit.rows.tolist() == [0] * len(unit.places)
        else:
            assert unit.rows is None
    useful, padded, _ = token_shares(rounds, lengths)
    assert useful == lengths.sum() and padded == sum(unit.width for unit in units)


@pytest.mark.parametrize("world_size, samples, rounds", [(1, 3, 3), (2, 6, 3), (2, 5, 3), (4, 4, 1), (4, 5, 2)])
def test_packing_has_no_round_too_many(world_size, samples, rounds):
    """Of samples of 6 tokens only one fits into 10, whatever the tokens add up to."""
    schedule = one_task(samples)
    options = {"micro_tokens": 10, "lengths": np.full(samples, 6), "edges": [np.array([6])], "pack": [True]}
    assert len(deal_by_length(Plan(schedule).window(0), schedule, world_size, **options)) == rounds


@steady
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9))
def test_rows_are_balanced(lengths, rows):
    row, sums = balanced_rows(np.array(lengths), rows)
    assert sums.tolist() == [sum(n for n, r in zip(lengths, row, strict=True) if r == index) for index in range(rows)]
    # Graham's bound, against a bound from below of the best: the mean, the longest, and two of rows + 1 samples.
    ordered = sorted(lengths, reverse=True)
    least = max(sum(lengths) / rows, ordered[0], sum(ordered[rows - 1 : rows + 1]) if len(lengths) > rows else 0)
    assert sums.max() <= 4 / 3 * least


def one_task(samples, **settings):
    return Schedule(0, "accumulate", (Stream("only", (1000,), samples, 1),), **settings)


def test_sample_that_is_too_long():
    schedule = one_task(3)
    with pytest.raises(ValueError, match=r"task 'only'.* 65 tokens.*train.micro_tokens \(64\)"):
        deal_by_length(
            Plan(schedule).window(0), schedule, 2, micro_tokens=64, lengths=np.array([3, 65, 4]),
            edges=[np.array([72])], pack=[False],
        )  # fmt: skip


def test_one_long_and_many_short():
    """Four ranks: the long sample is a unit of its own, the short ones share the others."""
    schedule = one_task(13)
    lengths = np.array([8] * 6 + [32] + [8] * 6)
    window = Plan(schedule).window(0)
    options = {"micro_tokens": 32, "lengths": lengths, "edges": [np.array([8, 32])]}
    for pack in (False, True):
        (part,) = deal_by_length(window, schedule, 4, pack=[pack], **options)
        assert part.padded.tolist() == part.tokens.tolist() == [32, 32, 32, 32]
        assert part.unit(0).places.tolist() == [6]
    plain = deal(window, schedule, 4, 4)
    assert token_shares(plain, lengths) == (128, 8 * 4 + 32 * 3 + 8 * 3 + 8 * 3, 4 * 96)


def test_costs_at_many_ranks():
    """16,384 ranks, 8 samples each: a rank deals a window in well under a second, and asks for its own units only."""
    world_size = 16384
    schedule = one_task(8 * world_size)
    window = Plan(schedule).window(0)
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(5.3, 0.6, len(window))), 1, 2000).astype(np.int64)
    edges = [optimal_edges(np.bincount(lengths), 16, 8)]
    for pack, limit in ((False, 0.25), (True, 1.5)):
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            rounds = deal_by_length(
                window, schedule, world_size, micro_tokens=4096, lengths=lengths, edges=edges, pack=[pack]
            )
            spent.append(time.perf_counter() - start)
        assert min(spent) < limit, spent
        useful, padded, waited = token_shares(rounds, lengths)
        assert useful / padded > (0.97 if pack else 0.88)
        assert padded / waited > 0.9


def test_goals():
    """What the benchmark says of one number of ranks: about half is useful in random batches of captions and text."""
    found = {row["cut"]: row for row in table(1024, [8], 2) if row["data"] == MIXTURE}
    assert found["random batches"]["useful"] < 0.55
    assert found["buckets"]["useful"] >= 0.88 and found["packed"]["useful"] >= 0.97
    assert min(found["buckets"]["step"], found["packed"]["step"]) > 0.95 > 0.75 > found["random batches"]["step"]
