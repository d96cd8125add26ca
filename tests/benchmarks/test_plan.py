"""The plan's benchmark in small: it runs, it computes a rank's whole share, and its digest check finds who differs."""

import pytest

from benchmarks import plan as benchmark
from dsvlm.schedule.plan import STRATEGIES, Plan


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_share_of_rank(strategy):
    schedule = benchmark.schedule_of(strategy, 4, 16)
    assert benchmark.share_of_rank(Plan(schedule), b"identity", 4, 1, 7) == 8  # 16 samples of each of 8 tasks
    us, micro_steps = benchmark.micro_step_us(strategy, 4, 16, 0.001)
    assert us > 0 and micro_steps == 8


def test_record(monkeypatch):
    monkeypatch.setattr(benchmark, "WORLDS", (1, 16))
    rows = benchmark.record_rows(1)
    assert [row.what.rpartition(", ")[2] for row in rows] == ["W = 1", "W = 16"] * 2
    assert all(row.value > 0 and row.met is None and "O(chunks)" in row.note for row in rows)
    assert "rank 0 records, per_rank, 32 micro-steps" in benchmark.grid(rows).splitlines()[2]
    assert all(row.goal == "<= 100 us" for row in benchmark.plan_rows(1, 0.001))


def test_cut_by_length(monkeypatch):
    """The whole window is cut: four times the ranks have four times the samples, in as many micro-steps."""
    monkeypatch.setattr(benchmark, "CUT_WORLDS", (2, 8))
    rows = benchmark.length_rows(1, samples=16)
    assert [row.what.split(",")[0] for row in rows] == ["buckets", "buckets", "packed", "packed"]
    assert ["window of 256 samples, W = 2" in row.what for row in rows] == [True, False, True, False]
    assert all(row.value > 0 and row.goal in (None, "") and "O(window)" in row.note for row in rows)
    _, micro_steps, samples = benchmark.cut_by_length_ms(True, 8, 16)
    assert micro_steps >= benchmark.TASKS and samples == 8 * 8 * 16


def test_resume():
    rows = benchmark.resume_rows(1, shards=20, shard=100)
    assert [row.what.split()[3] for row in rows] == ["0%", "99%"] and all(row.value > 0 for row in rows)


def test_agreement():
    assert benchmark.agreement(20, lambda rank: False)[2] is None
    total, longest, message = benchmark.agreement(20, lambda rank: rank in (8, 9))
    assert 0 < longest <= total and "'seed' is -1 on ranks 8-9, but" in message


def test_grid(monkeypatch):
    monkeypatch.setattr(benchmark, "WORLDS", (1, 2))
    monkeypatch.setattr(benchmark, "STRATEGIES", ("accumulate", "mixed"))
    lines = benchmark.grid(benchmark.plan_rows(1, 0.001)).splitlines()
    assert len(lines) == 2 + 2 * 2 and lines[0].endswith("| W = 1 | W = 2 |")
    assert lines[2].startswith("| accumulate, 32 micro-steps in a window | ")
