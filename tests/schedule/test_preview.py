"""The preview of a plan: numbers that add up, JSON types, one line per step."""

import json
from functools import partial

from dsvlm.schedule import preview as preview_module
from dsvlm.schedule.digest import digest, identity_bytes
from dsvlm.schedule.mixture import Phase
from dsvlm.schedule.plan import Plan, Schedule, Stream
from dsvlm.schedule.preview import preview, render
from dsvlm.schedule.strategy import deal

STREAMS = (Stream("caption", (5, 7), 6, 3), Stream("vqa", (11,), 2, 1))


def rows_of(strategy, world_size=4, **settings):
    schedule = Schedule(7, strategy, STREAMS, **settings)
    identity = identity_bytes(schedule, "r", ("aa", "bb"))
    cut = partial(deal, schedule=schedule, world_size=world_size, micro_batch=2)
    return preview(Plan(schedule), schedule, world_size, cut, range(1, 4), identity), schedule, identity


def test_rows():
    rows, schedule, identity = rows_of("accumulate")
    assert json.loads(json.dumps(rows)) == rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0] == {
        "step": 1,
        "tasks": {"caption": 6, "vqa": 2},
        "epochs": {
            "caption": {"epoch": 1, "position": 0, "size": 12},
            "vqa": {"epoch": 0, "position": 4, "size": 11},
        },
        "micro_steps": 2,
        "units": 6,
        "fillers": 2,
        "idle_share": 1 / 3,
        "digest": digest(identity, Plan(schedule).window(1)),
    }


def test_digest_does_not_depend_on_the_world():
    for strategy in ("accumulate", "mixed", "unified", "per_rank"):
        settings = {"samples": 8, "chunk": 8 if strategy == "unified" else 2}
        digests = [[row["digest"] for row in rows_of(strategy, world, **settings)[0]] for world in (1, 3, 8)]
        assert digests[0] == digests[1] == digests[2]


def test_chunks_of_a_task_add_up():
    rows, *_ = rows_of("per_rank", samples=8, chunk=2)
    assert [sum(row["tasks"].values()) for row in rows] == [8, 8, 8]
    assert rows[-1]["epochs"]["caption"] == {"epoch": 2, "position": 0, "size": 12}  # 4 cycles of 3 chunks of 2


def test_render():
    rows, *_ = rows_of("accumulate")
    lines = render(rows).splitlines()
    assert len(lines) == 4 and lines[0].split()[0] == "step"
    assert lines[1].endswith("caption 6 (1+0/12), vqa 2 (0+4/11)")
    assert "33.3 %" in lines[1] and rows[0]["digest"] in lines[1]


def test_many_tasks_go_on_below_each_other():
    rows, *_ = rows_of("accumulate")
    names = [f"task-{index}" for index in range(40)]
    for row in rows:
        row["tasks"], row["epochs"] = dict.fromkeys(names, 1000), dict.fromkeys(names, row["epochs"]["vqa"])
    text = render(rows)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120 and len({len(line) - len(line.lstrip()) for line in lines}) == 2
    assert all(text.count(f"{name} 1000 (0+") == 3 for name in names) and text.count(",") == 3 * 39


def test_windows_that_are_cut_alike_are_counted_once(monkeypatch):
    counted, share = [], preview_module.idle_share
    monkeypatch.setattr(preview_module, "idle_share", lambda rounds: counted.append(rounds) or share(rounds))
    for strategy, phases in (("accumulate", ()), ("mixed", (Phase(0, (6, 2)), Phase(2, (5, 1)))), ("per_rank", ())):
        settings = {"samples": 8, "chunk": 2} if strategy == "per_rank" else {}
        rows, schedule, _ = rows_of(strategy, phases=phases, **settings)
        for row in rows:
            rounds = deal(Plan(schedule).window(row["step"]), schedule, 4, 2)
            assert (row["units"], row["idle_share"]) == (sum(part.units for part in rounds), float(share(rounds)))
        assert len(counted) == (2 if phases else 1)
        counted.clear()
