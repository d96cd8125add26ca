"""Ranks that disagree, or of which one cannot go on, raise one error together, before any ZeRO collective."""

import pytest

from dsvlm.train.build import plan_run
from dsvlm.train.loop import start_record
from tests.dist.recipes import tiny


@pytest.mark.parametrize(
    "change, field",
    [
        ({"seed": 6}, "seed"),
        ({"tasks__question__samples": 7}, "tasks.question.samples"),
        ({"tasks__question__quota": 3}, "tasks.question.quota"),
        ({"tasks__locate__shards": "val/locate"}, "tasks.locate.shards"),
        ({"schedule__block": 4}, "schedule.block"),
        ({"train__micro_batch": 4}, "train.micro_batch"),
        ({"train__zero": 2}, "train.zero"),
    ],
)
def test_field_is_named_on_all_ranks(pools, data_root, change, field):
    record, other = (start_record(plan_run(tiny(data_root, **c))) for c in ({}, change))
    messages = pools(3).run("disagree", record=record, other=other, rank=1)
    assert len(set(messages)) == 1
    assert field in messages[0] and "1" in messages[0]


@pytest.mark.parametrize("field", ["manifest of task locate", "code version", "schedule version"])
def test_manifest_and_versions(pools, data_root, field):
    record = start_record(plan_run(tiny(data_root)))
    assert field in record
    messages = pools(2).run("disagree", record=record, other=record | {field: "another"}, rank=0)
    assert len(set(messages)) == 1 and field in messages[0] and "another" in messages[0]


def test_agreement_is_silent(pools, data_root):
    record = start_record(plan_run(tiny(data_root)))
    assert pools(2).run("disagree", record=record, other=record, rank=0) == ["", ""]


def test_a_window_that_differs_is_named(pools):
    record, other = {"step": 3, "plan": "aa"}, {"step": 3, "plan": "ab"}
    messages = pools(3).run("enter_window_differs", record=record, other=other, rank=2)
    assert len(set(messages)) == 1 and "'plan' is 'ab' on rank 2, but 'aa' on ranks 0-1" in messages[0]


LAYOUTS = [("a", "a", "a"), ("a", "a", "b"), ("a", "b", "b"), ("a", "b", "c"), ("a", "b", "a")]


@pytest.mark.parametrize("hosts", LAYOUTS[1:])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_two_levels_name_the_rank(pools, hosts, rank):
    """Through nodes of one and two ranks and their leaders."""
    record = {"seed": 5, "plan": "x"}
    messages = pools(3).run("disagree", record=record, other=record | {"seed": 6}, rank=rank, hosts=hosts)
    assert len(set(messages)) == 1 and f"'seed' is 6 on rank {rank}, but 5 on ranks" in messages[0]


@pytest.mark.parametrize("hosts", LAYOUTS)
def test_two_levels_agree(pools, hosts):
    assert pools(3).run("disagree", record={"a": 1}, other={"a": 1}, rank=0, hosts=hosts) == ["", "", ""]
    for rank, answer in enumerate(pools(3).run("exchange", hosts=hosts)):
        assert answer == {
            "counts": [6, 30], "stop": True, "share": [1.5], "first": None if rank else "done",
            "gathered": [] if rank else [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        }  # fmt: skip


@pytest.mark.parametrize("step", [1, 2])  # within the run, and at its last update, before it is saved
def test_a_disk_that_is_full_ends_all_ranks(pools, data_root, tmp_path, step):
    recipe = tiny(data_root, output=str(tmp_path / "run"), schedule__steps=3, train__log_every=1)
    for message in pools(2).run("error_of_a_full_disk", recipe=recipe, step=step):
        assert "run/metrics.jsonl cannot be written: No space left on device; make room" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_what_all_ranks_raise_one_of_them_tells(pools, rank):
    assert pools(2).run("teller", rank=rank) == [True, False]


@pytest.mark.parametrize("hosts", [("a", "a", "a"), ("a", "a", "b")])
def test_one_rank_cannot_read(pools, hosts):
    messages = pools(3).run("enter_window_error", rank=1, hosts=hosts)
    assert len(set(messages)) == 1 and "rank 1" in messages[0] and "shard-000001" in messages[0]
