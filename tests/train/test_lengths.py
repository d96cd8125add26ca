"""Side files of lengths: what they say is what the loader makes; made once, found again, refused when damaged."""

import json
import pickle
import shutil

import numpy as np
import pytest

from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.lengths import Lengths, count_lengths, write_lengths
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.schedule.mixture import Phase
from dsvlm.schedule.plan import Schedule, Stream
from dsvlm.train import lengths as train_lengths
from dsvlm.train.build import make_loader, make_sources, make_tokenizer, plan_run
from dsvlm.train.lengths import beside_shards, find_lengths, image_tokens, lengths_record, make_lengths, open_lengths
from dsvlm.train.loop import window_fingerprint
from tests.dist.recipes import STRATEGIES, tiny

SAMPLES = 24


def to_json(record):
    return json.dumps(record, sort_keys=True).encode()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tasks with and without images; `lines` has a sample that is too long, `match` one with a label of no class."""
    root = tmp_path_factory.mktemp("lengths")
    make_scenes(root, samples=SAMPLES, val_samples=1, tasks=("caption", "question", "locate"))
    source = ShardReader(load_manifest(root / "train/caption"))
    with ShardWriter(root / "train/lines", "vqa") as lines, ShardWriter(root / "train/match", "pair") as match:
        for i in range(SAMPLES):
            answer = "very " * (200 if i == 5 else i % 7) + "red"
            lines.write(f"l{i}", {"json": to_json({"question": f"how red is {i}?", "answer": answer})})
            pair = {"text": source.record(i)["caption"], "label": 7 if i == 3 else i % 3}
            match.write(f"m{i}", {"png": source.image(i), "json": to_json(pair)})
    return root


@pytest.fixture(scope="module")
def codec(root):
    return make_tokenizer(plan_run(tiny(root)))


def planned_at(root, tmp_path, **changes):
    return plan_run(tiny(root, output=str(tmp_path), train__micro_tokens=96, **changes))


def shard_directories(planned):
    return {name: manifest.path for name, manifest in planned.manifests.items()}


@pytest.mark.parametrize("decoder", ["opt", "t5"])
def test_lengths_are_the_loaders(root, codec, tmp_path, decoder):
    """Every sample that the loader reads has the lengths of the file, masked ones and those without images too."""
    planned = planned_at(root, tmp_path, decoder=decoder)
    made = make_lengths(planned, codec, dict.fromkeys(planned.manifests, tmp_path))
    assert set(made) == set(planned.manifests)
    tables = list(open_lengths(planned, codec).values())
    loader = make_loader(planned, codec, 40, 0, 1)
    seen, masked = set(), 0
    for step in range(9):  # the smallest task has 3 samples in a window, and 24 in all
        window = loader.window(step)
        for draft in window.drafts:
            assert tables[draft.task].table[draft.sample].tolist() == [len(draft.text.tokens), draft.text.images]
            seen.add((draft.task, draft.sample))
            masked += bool(draft.reason)
        for unit, batch in zip(window.units, loader.batches(window, [1.0] * 4), strict=True):
            assert len(batch.tokens) == len(unit)
            images = np.bincount(batch.image_row[batch.image_row >= 0], minlength=len(unit))
            positions = images * image_tokens(planned.recipe) + batch.lengths.numpy()
            assert positions.max() <= batch.width <= 96 // len(unit)
    assert len(seen) == 4 * SAMPLES and masked


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pack", [False, True])
def test_windows_stay_what_they_are(root, codec, tmp_path, strategy, pack):
    """W = 1, 2, 3: plan, samples, masked samples and counts are those of the plain cut; units fit their budget."""
    changes = STRATEGIES[strategy] | {f"tasks__{name}__pack": pack for name in ("lines", "question", "locate", "match")}
    by_length = planned_at(root, tmp_path, **changes)
    plain = plan_run(tiny(root, **STRATEGIES[strategy]))
    assert by_length.identity == plain.identity
    make_lengths(by_length, codec, dict.fromkeys(by_length.manifests, tmp_path))
    names = list(by_length.recipe.tasks)
    single = make_loader(plain, codec, 40, 0, 1)
    for world_size in (1, 2, 3):
        loaders = [make_loader(by_length, codec, 40, rank, world_size) for rank in range(world_size)]
        for step in (0, 5):
            windows = [loader.window(step) for loader in loaders]
            drafts = [draft for window in windows for draft in window.drafts]
            wanted = single.window(step)
            assert window_fingerprint(names, drafts) == window_fingerprint(names, wanted.drafts)
            assert sum(window.counts for window in windows).tolist() == wanted.counts.tolist()
            assert sorted(d.reason or "" for d in drafts) == sorted(d.reason or "" for d in wanted.drafts)
            assert len({len(window.units) for window in windows}) == 1
            for window in windows:
                for index, unit in enumerate(window.units):
                    rows, width = window.shape(index)
                    assert (rows is not None) == (pack and bool(unit))
                    assert (1 if pack else len(unit)) * width <= 96


def test_made_next_to_the_shards_and_found_there(root, codec, tmp_path, monkeypatch):
    planned = planned_at(root, tmp_path)
    assert set(find_lengths(planned, codec).values()) == {None}
    with pytest.raises(ValueError, match=r"task lines: no lengths-\w{16}.npy on .*dsvlm data lengths"):
        open_lengths(planned, codec)
    made = make_lengths(planned, codec, shard_directories(planned))
    try:
        assert [path.parent for path in made.values()] == list(shard_directories(planned).values())
        assert all(not left.name.startswith(".") for path in made.values() for left in path.parent.iterdir())
        monkeypatch.setattr(train_lengths, "count_lengths", None)  # nothing is counted twice
        assert make_lengths(planned, codec, shard_directories(planned)) == {}
        train_lengths.make_run_lengths(planned, codec)
        found = open_lengths(planned, codec)
        assert {name: table.path for name, table in found.items()} == made
        again = pickle.loads(pickle.dumps(found["lines"]))
        assert (again.table == found["lines"].table).all()
        # What a row depends on names the file.
        for changes in ({"text__max_length": 60}, {"tasks__locate__prompt": "find {name}"}, {"decoder": "t5"}):
            other = find_lengths(planned_at(root, tmp_path, **changes), codec)
            assert other["locate"] is None
    finally:
        for path in made.values():
            path.unlink()


def test_a_node_with_copies_of_its_own_is_told_what_to_copy(root, codec, tmp_path):
    """Rank 0's node has the side files beside its shards, another one has the shards alone."""
    theirs = shutil.copytree(root, tmp_path / "theirs")
    first, other = planned_at(root, tmp_path / "run"), planned_at(theirs, tmp_path / "run")
    made = make_lengths(first, codec, shard_directories(first))
    try:
        train_lengths.make_run_lengths(first, codec)  # rank 0 has nothing to make
        with pytest.raises(ValueError, match="task lines: no .* copy it from the node that has it") as error:
            open_lengths(other, codec)
        assert made["lines"].name in str(error.value) and str(theirs / "train/lines") in str(error.value)
        for name, path in made.items():
            shutil.copy(path, other.manifests[name].path)
        assert lengths_record(open_lengths(other, codec)) == lengths_record(open_lengths(first, codec))
    finally:
        for path in made.values():
            path.unlink()


def test_what_takes_too_long_at_a_start_is_refused(root, codec, tmp_path, monkeypatch):
    """96 samples; the others wait for 30 minutes, of which half may be spent."""
    monkeypatch.setattr(train_lengths, "RATE", 0.1)
    slow = planned_at(root, tmp_path)
    with pytest.raises(ValueError, match=r"96 samples \(lines, .*about 16 minutes.*data lengths RECIPE --workers N"):
        train_lengths.make_run_lengths(slow, codec)
    assert not list(tmp_path.glob("**/lengths-*"))
    train_lengths.make_run_lengths(planned_at(root, tmp_path, data__workers=2), codec)
    assert len(list(slow.recipe.run_dir.glob("lengths-*"))) == 4
    train_lengths.make_run_lengths(slow, codec)  # nothing is left to count


def test_remote_shards(root, codec, tmp_path):
    """They are not written to: lengths are made in the run directory, also beforehand."""
    options = {"data__remote_cache": str(tmp_path / "cache"), "train__micro_tokens": 96}
    remote = plan_run(tiny(f"file://{root}", output=str(tmp_path / "run"), **options))
    assert all(manifest.url for manifest in remote.manifests.values())
    made = make_lengths(remote, codec, beside_shards(remote))
    assert {path.parent for path in made.values()} == {tmp_path / "run"}
    local = planned_at(root, tmp_path / "run")
    for name, lengths in open_lengths(local, codec).items():  # the same manifest, so the same file
        assert lengths.path == made[name]
        (source,) = [source for source in make_sources(local) if source.name == name]
        assert (lengths.table == count_lengths(source, codec, 64, encoder_decoder=False)).all()


def test_edges_of_tasks_together_at_any_size():
    """Shares of many phases, and millions of samples of one length: the edges are those of one phase and of less."""
    histograms = [np.bincount(np.full(40, length)) for length in (300, 500)]

    def edges(times, phases):
        streams = tuple(Stream(name, (40 * times,), 1, 1) for name in "ab")
        table = tuple(Phase(step, (30_000 - step % 2, 10_000 + step % 2)) for step in range(phases))
        made = Schedule(0, "mixed", streams, phases=table)
        joint = train_lengths.joint_histogram(made, [histogram * times for histogram in histograms])
        assert joint[300] / joint[500] == pytest.approx(3, rel=1e-3)
        return train_lengths.bucket_edges(joint, 1).tolist(), train_lengths.bucket_edges(joint, 2).tolist()

    assert edges(1, 1) == edges(10**6, 1000) == ([504], [304, 504])


def test_in_processes(root, codec, tmp_path):
    source = make_sources(planned_at(root, tmp_path))[0]
    alone = count_lengths(source, codec, 64, encoder_decoder=False)
    assert len(alone) == SAMPLES
    for workers in (0, 2):
        assert (count_lengths(source, codec, 64, encoder_decoder=False, workers=workers, chunk=9) == alone).all()


def test_round_trip(tmp_path):
    table = np.array([[3, 0], [65535, 2], [1, 1]], np.uint16)
    write_lengths(tmp_path / "a.npy", table)
    lengths = Lengths(tmp_path / "a.npy", 3)
    assert lengths.table.dtype == np.uint16 and (lengths.table == table).all()
    assert lengths.positions(np.array([1, 0, 1]), 5).tolist() == [65545, 3, 65545]
    histogram = lengths.histogram(5)
    assert len(histogram) == 65546 and np.flatnonzero(histogram).tolist() == [3, 6, 65545] and histogram.sum() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    write_lengths(tmp_path / "b.npy", table)
    assert lengths.hash() == Lengths(tmp_path / "b.npy", 3).hash()


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a file of lengths"),
    (lambda path: path.write_bytes(b"text"), "not a file of lengths"),
    (lambda path: path.write_bytes(b""), "not a file of lengths"),
    (lambda path: np.save(path, np.zeros((3, 2), np.int32)), r"uint16 \[3, 2\] expected, int32 \[3, 2\] found"),
    (lambda path: np.save(path, np.zeros((4, 2), np.uint16)), r"uint16 \[3, 2\] expected, uint16 \[4, 2\] found"),
    (lambda path: np.save(path, np.array([None])), "not a file of lengths"),
])  # fmt: skip
def test_damaged(tmp_path, damage, message):
    path = tmp_path / "lengths.npy"
    write_lengths(path, np.zeros((3, 2), np.uint16))
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        Lengths(path, 3)
    assert str(path) in str(error.value)
