"""The loader of one rank, in its own process: damage touches nothing else, blocks are used again, orders are free."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvlm.data.blocks import Blocks, BlockView
from dsvlm.data.index import ShardIndex
from dsvlm.data.loader import Cache, Loader
from dsvlm.schedule.strategy import Unit, deal
from tests.data.loading import everything, loader_of, scenes

STEPS = range(3)  # a little less than two epochs of one task, one of the other
SAMPLES = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def loaders(root) -> dict[tuple[int, int], Loader]:
    """By (world size, rank)."""
    first = loader_of(root)
    def loader(world, rank):
        def dealer(window):
            return deal(window, first.deal.keywords["schedule"], world, 3)

        config = replace(first.config, rank=rank, world_size=world)
        return Loader(first.plan, dealer, first.sources, first.codec, config)

    return {(world, rank): loader(world, rank) for world in (1, 3) for rank in range(world)}


@contextmanager
def damaged(root, members):
    """Flips a byte of each of the members (task, row, extension); yields where; puts them right again."""
    undo, where = [], set()
    for task, row, extension in members:
        shard = root / f"train/{task}/shard-000000.tar"
        index = ShardIndex(shard.with_suffix(".arrow"))
        offset, size, _ = index.member(row, extension)
        undo.append((shard, offset + (row * 7919) % size))
        where.add((task, f"shard-000000.tar:{index.key(row)}"))
    flip_all(undo)
    try:
        yield where
    finally:
        flip_all(undo)


def flip_all(places):
    for shard, offset in places:
        with shard.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))


def rows_of(loader: Loader):
    """Of each unit: what names its samples, and by that name what the model would see."""
    shapes, rows, journal = [], {}, []
    for step in STEPS:
        window = loader.window(step)
        shapes.append([[(d.task, d.epoch, d.sample) for d in unit] for unit in window.units])
        for unit, batch in zip(window.units, loader.batches(window, [1.0, 1.0]), strict=True):
            images = dict(zip(batch.image_row.tolist(), batch.pixels, strict=True))
            for i, draft in enumerate(unit):
                text = repr([t[i, : batch.lengths[i]].tolist() for t in (batch.tokens, batch.targets)])
                seen = hash((int(batch.keys[i]), text, images[i].numpy().tobytes()))
                rows[draft.task, draft.epoch, draft.sample] = (seen, bool(batch.weight[i]))
        journal += loader.journal(window)
    return shapes, rows, journal


@pytest.fixture(scope="module")
def intact(loaders):
    return {place: rows_of(loader) for place, loader in loaders.items()}


@settings(max_examples=20, deadline=None)
@given(members=st.sets(st.tuples(
    st.sampled_from(["question", "locate"]), st.integers(0, SAMPLES - 1), st.sampled_from(["png", "json"])
)))  # fmt: skip
def test_damage_touches_only_the_samples_it_is_in(root, loaders, intact, members):
    """Invariant 12: units keep their samples on every rank, others are the same bytes, the journal has the set."""
    with damaged(root, members) as where:
        for place, loader in loaders.items():
            shapes, rows, journal = rows_of(loader)
            assert shapes == intact[place][0]
            assert [len(units) for units in shapes] == [len(units) for units in intact[place[0], 0][0]]
            sources = loader.sources
            names = {name: (sources[name[0]].name, sources[name[0]].reader.where(name[2])) for name in rows}
            bad = {name for name in rows if names[name] in where}
            assert sorted((line["task"], line["where"]) for line in journal) == sorted(names[name] for name in bad)
            assert all(rows[name] == intact[place][1][name] for name in rows if name not in bad)
            assert not any(rows[name][1] for name in bad)


def test_order_of_calls_changes_nothing(root, loaders):
    loader = loaders[1, 0]
    forward, some = everything(loader, [0, 1, 2]), everything(loader, [2])
    loader.forget()
    assert everything(loader, [0]) + everything(loader, [1]) + some == forward
    window = loader.window(1)
    first, second = ([b.pixels for b in loader.batches(window, [1.0, 1.0])] for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("units", "at_once"), [(1, 1), (2, 4000)])
def test_what_is_done_in_one_go_changes_nothing(loaders, monkeypatch, units, at_once):
    """Texts of several units are arranged together, images of a job read together: up to other limits, the same."""
    loader = loaders[1, 0]
    expected = everything(loader, STEPS)
    assert max(len(loader.window(step).units) for step in STEPS) > units
    monkeypatch.setattr("dsvlm.data.loader.UNITS", units)
    monkeypatch.setattr("dsvlm.data.jobs.AT_ONCE", at_once)
    loader.forget()
    assert everything(loader, STEPS) == expected


def test_blocks_are_used_again_when_nobody_shows_them():
    blocks = Blocks()
    view = BlockView(blocks.file)
    start, array = blocks.take(5000)
    array[:] = 7
    shown = torch.from_numpy(array.reshape(50, 100)[3:])
    del array
    other, _ = blocks.take(5000)
    assert other != start and view.show(start, 5000).tolist() == [7] * 5000
    view.show(start, 5000)[:] = 9
    assert shown.unique().tolist() == [9]
    del shown
    size = blocks.size
    assert blocks.take(8000)[0] == start and blocks.size == size
    assert blocks.take(9000)[0] >= size
    blocks.close()


def test_cache_keeps_what_came_first():
    cache = Cache(10)
    cache.put("a", 1, 6)
    cache.put("b", 2, 6)
    cache.put("c", 3, 4)
    assert cache.items == {"a": 1, "c": 3} and not cache.room(1)


def test_a_window_without_images_or_samples_has_the_signature_of_others(loaders):
    loader = loaders[1, 0]
    window = loader.window(0)
    window.units[:] = [[]]
    [batch] = loader.batches(window, [1.0, 1.0])
    assert batch.pixels.shape == (1, 3, 40, 40) and batch.weight.tolist() == [0.0]
    assert np.array_equal(batch.image_row, [-1])


def test_units_may_pick_any_places_and_share_rows(loaders):
    class Picked:
        def unit(self, rank):
            return Unit(np.array([5, 0, 9]), np.array([0, 0, 1]), 60)

    plain = loaders[1, 0]
    loader = Loader(plain.plan, lambda window: (Picked(),), plain.sources, plain.codec, plain.config)
    window, whole = loader.window(1), plain.window(1).drafts
    [batch] = loader.batches(window, [1.0, 1.0])
    assert batch.row.tolist() == [0, 0, 1] and batch.width == 60
    assert [(d.task, d.ordinal) for d in window.drafts] == [(whole[i].task, whole[i].ordinal) for i in (5, 0, 9)]
    assert batch.keys.tolist() == [plain.key(whole[i]) for i in (5, 0, 9)]
    assert window.counts.sum() == sum(d.text.count for d in window.drafts)
