"""Agreement of ranks: what a message names, and summaries that may be merged in any grouping."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsvlm.schedule.agreement import compare, difference, merge, summarise

steady = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=60)

RECORD = {"version": "0.1.0", "seed": 7, "recipe": "r", "manifests": ["aa", "bb"], "plan": "p", "micro_batch": 8}


def test_compare_agrees():
    assert compare([RECORD] * 4) is None
    assert compare([dict(RECORD) for _ in range(4)]) is None


@pytest.mark.parametrize("field", RECORD)
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_compare_names_field_ranks_and_values(field, rank):
    records = [dict(RECORD) for _ in range(4)]
    records[rank][field] = "other"
    message = compare(records)
    usual = {0: "ranks 1-3", 2: "ranks 0-1, 3", 3: "ranks 0-2"}[rank]
    assert f"{field!r} is 'other' on rank {rank}, but {RECORD[field]!r} on {usual}" in message
    assert "different too" not in message


def test_compare_reports_the_first_cause_and_missing_fields():
    other = {**RECORD, "seed": 8, "plan": "q"}
    message = compare([RECORD, other])
    assert "'seed' is 8 on rank 1, but 7 on rank 0" in message and "(different too: plan)" in message
    older = {field: value for field, value in RECORD.items() if field != "micro_batch"}
    assert "'micro_batch' is '(missing)' on rank 1" in compare([RECORD, older])
    three = compare([{"seed": seed} for seed in (7, 8, 7, 9, 7)])
    assert "'seed' is 8 on rank 1, 9 on rank 3, but 7 on ranks 0, 2, 4" in three
    many = compare([{"seed": 7} if rank % 2 else {"seed": 8} for rank in range(64)])
    assert len(many) < 300 and "..." in many


def test_compare_of_many_values_is_short():
    message = compare([{"host": rank // 2} for rank in range(1000)])
    assert len(message) < 600 and "491 other values on 982 ranks" in message and "but 0 on ranks 0-1." in message


@steady
@given(st.data())
def test_merged_in_any_grouping(data):
    """Nodes of any size, also of one rank, with fields missing: the message that all records give."""
    values = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2))
    records = data.draw(st.lists(values, min_size=1, max_size=24))
    nodes, rest = [], [summarise(rank, record) for rank, record in enumerate(records)]
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        nodes, rest = [*nodes, merge(rest[:size])], rest[size:]
    message = difference(merge(nodes))
    assert message == compare(records)
    assert (message is None) == (len({repr(sorted(record.items())) for record in records}) == 1)


@pytest.mark.parametrize("odd", [range(0), range(9999, 10_000), range(4000, 4008), range(0, 16_384, 2)])
def test_large_job(odd):
    """16,384 ranks on nodes of 8: what any process handles stays small, and who differs is named."""
    records = [{**RECORD, "seed": 8} if rank in odd else RECORD for rank in range(16_384)]
    nodes = []
    for low in range(0, 16_384, 8):
        nodes.append(merge(summarise(rank, records[rank]) for rank in range(low, low + 8)))
        assert len(nodes[-1]) <= 2 and sum(map(len, nodes[-1].values())) <= 8
    message = difference(merge(nodes))
    expected = {0: None, 1: "'seed' is 8 on rank 9999,", 8: "'seed' is 8 on ranks 4000-4007,"}
    if len(odd) in expected:
        assert (message is None) == (expected[len(odd)] is None) and (not message or expected[len(odd)] in message)
    else:
        assert "'seed' is 7 on ranks 1, 3, 5, 7, 9, 11, 13, 15, ..., but 8 on ranks 0, 2," in message
