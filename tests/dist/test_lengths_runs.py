"""A run that is cut by length: the same run, whichever way its windows are cut, also when that changes at a resume."""

import json

import numpy as np
import pytest

from tests.dist.recipes import tiny

STEPS = 12
SAME = ("step", "digest", "fingerprint", "samples", "masked", "targets", "tokens", "lr")
BUCKETS = {"train__micro_tokens": 128, "train__buckets": 4}
PACKED = BUCKETS | {f"tasks__{name}__pack": True for name in ("lines", "question", "locate", "match")}


@pytest.fixture(scope="module")
def recipe(data_root, tmp_path_factory):
    """`recipe(name, **changes)`: a run in a directory of that name."""
    root = tmp_path_factory.mktemp("by-length")

    def named(name, **changes):
        fixed = {"schedule__steps": STEPS, "schedule__strategy": "mixed", "train__zero": 1, "train__log_every": 1}
        return tiny(data_root, output=str(root / name), **fixed | changes)

    return named


def told(recipe):
    return [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(pools, recipe):
    assert pools(2).run("train_until", recipe=recipe("plain"), stop=STEPS) == [0, 0]
    return told(recipe("plain"))


def compare(rows, wanted):
    for row, other in zip(rows, wanted, strict=True):
        assert [row[name] for name in SAME] == [other[name] for name in SAME]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    # Buckets must not bias: the losses of updates spread as those of the plain order do.
    spread = [np.std(np.diff([row["loss"] for row in some])) for some in (rows, wanted)]
    assert 1 / 1.01 < spread[0] / spread[1] < 1.01


@pytest.mark.parametrize("name, changes", [("buckets", BUCKETS), ("packed", PACKED)])
def test_same_run(pools, recipe, plain, name, changes):
    changed = recipe(name, **changes)
    assert pools(2).run("train_until", recipe=changed, stop=STEPS) == [0, 0]
    rows = told(changed)
    compare(rows, plain)
    assert len(list(changed.run_dir.glob("lengths-*.npy"))) == 4
    useful = [np.mean([row["useful_tokens"] for row in some]) for some in (rows, plain)]
    assert useful[0] > useful[1] + 0.05
    assert all(0 < share <= 1 for row in rows for share in row["task_useful_tokens"].values())


def test_switched_at_resumes(pools, recipe, plain):
    """Plain on two ranks, packed on one, buckets on three."""
    assert pools(2).run("train_until", recipe=recipe("switched"), stop=3) == [0, 0]
    assert pools(1).run("train_until", recipe=recipe("switched", train__zero=0, **PACKED), stop=7) == [3]
    assert pools(3).run("train_until", recipe=recipe("switched", **BUCKETS), stop=STEPS) == [7, 7, 7]
    compare(told(recipe("switched")), plain)


def test_ranks_with_other_lengths(pools, recipe):
    """They would cut windows in other ways, and wait for each other forever: they say so instead."""
    hashes = [{"lengths of task locate": letter * 64} for letter in "ab"]
    for message in pools(2).run("disagree", record=hashes[0], other=hashes[1], rank=1):
        assert "lengths of task locate" in message and "rank 1" in message
