"""The benchmark command on the tiniest inputs: it runs, its inputs are the same every time, and its counts can fail."""

import argparse
import json
import os

import pytest

from benchmarks import contest, coverage, data, measure
from benchmarks.endtoend import make_tokenizer
from benchmarks.inputs import PIXELS, VERSION, counts, make_inputs, write_set
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.transforms import decode_image

SIZE = data.Size(
    samples=32, repeats=1, warm=1, timed=2, epochs=(1, 2), huge=(10, 40), indexed=1000, seconds=0.01
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    work = tmp_path_factory.mktemp("inputs")
    left = work / f"inputs-v{VERSION}-{SIZE.samples}.part-{os.getpid()}/caption/.partial"
    left.mkdir(parents=True)  # by a run that was killed
    (left.parent / "manifest.json").write_text("{}")
    found = make_inputs(work, SIZE.samples).root
    make_tokenizer(found)
    return found


def test_inputs_are_the_same_bytes_in_uneven_shards(root, tmp_path):
    write_set(tmp_path, "caption", SIZE.samples)
    manifest = load_manifest(tmp_path / "caption")
    assert manifest.hash == load_manifest(root / "caption").hash
    assert manifest.samples == counts(SIZE.samples)["caption"]
    assert len(set(manifest.sizes)) > 1
    image = ShardReader(manifest).image(0)
    assert 20_000 < len(image) < 90_000
    assert decode_image(image, PIXELS).std() > 5


def test_rows_of_raw_reading_and_state(root, tmp_path):
    rows = data.measure("a", root, tmp_path, SIZE)
    assert all(row.value > 0 for row in rows)
    assert any("share of bare pread" in row.what and row.met is not None for row in rows)
    report = {
        "date": "today", "publishable": False, "load": [0, 0], "seconds": 1, "size": vars(SIZE),
        "machine": measure.machine(), "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
    text = data.render(json.loads(json.dumps(report)))
    assert all(row.what in text for row in rows) and "Not publishable" in text


def test_our_contestant_gives_images_without_end(root):
    args = argparse.Namespace(
        root=root, tasks="caption,text", workers=0, batch=16, url=None, cache="", block=1, name=contest.OURS
    )
    found = contest.timed(contest.open_contestant(args), warm=1, count=30)
    assert found["rate"] > 0 and found["cpu"] > 0


def test_coverage_counts_what_a_wrong_cut_loses_and_repeats(root, monkeypatch):
    assert coverage.count_ours(root, 3)[:3] == (0, 0, 0)

    def lossy(window, schedule, world_size, micro_batch):
        rounds = deal(window, schedule, world_size, micro_batch)
        return rounds[:1] + rounds[:-1]

    deal = coverage.deal
    monkeypatch.setattr(coverage, "deal", lossy)
    lost, repeated, _, _ = coverage.count_ours(root, 3)
    assert lost > 0 and repeated > 0


def test_repeats_are_interleaved_and_compared_pairwise():
    calls = []
    found = measure.interleaved({"a": lambda: calls.append("a") or 4.0, "b": lambda: calls.append("b") or 2.0}, 2)
    assert calls == ["a", "b", "a", "b"]
    assert measure.ratios(found, "a", "b") == [2.0, 2.0]
