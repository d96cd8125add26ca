"""A run that a controller steers: interrupted, and gone on with on the same or other ranks, it is the same run."""

import json

import pytest

from tests.dist.recipes import tiny

STEPS = 26
CONTROLLER = {"kind": "stop_and_go", "every": 2, "gap": 3, "gain": 0.03, "patience": 0, "loss": 0.02}
SAME = ("step", "digest", "fingerprint", "samples", "targets", "lr", "stopped")


@pytest.fixture(scope="module")
def recipe(data_root, tmp_path_factory):
    """`recipe(name, zero)`: a controlled run in a directory of that name."""
    root = tmp_path_factory.mktemp("controlled")

    def named(name, zero=1, workers=0):
        return tiny(
            data_root, output=str(root / name), schedule__steps=STEPS, schedule__strategy="mixed",
            schedule__controller=CONTROLLER, train__micro_batch=64, train__zero=zero, train__log_every=1,
            data__workers=workers,
        )  # fmt: skip

    return named


def told(recipe):
    return [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(pools, recipe):
    assert pools(2).run("train_until", recipe=recipe("straight"), stop=STEPS) == [0, 0]
    return told(recipe("straight"))


def test_tasks_stop_and_go(straight):
    """What the others are about: tasks stop, leave updates out, and one goes on later; every update has samples."""
    stopped = [set(row["stopped"]) for row in straight]
    assert any(before - after for before, after in zip(stopped, stopped[1:], strict=False))
    assert len(set.union(*stopped)) > 1
    whole = straight[0]["samples"]
    assert {row["samples"] < whole for row, names in zip(straight, stopped, strict=True) if names} >= {True}
    assert all(row["samples"] == whole for row, names in zip(straight, stopped, strict=True) if not names)
    assert all(row["samples"] for row in straight)


def test_interrupted_on_the_same_ranks(pools, recipe, straight):
    """In the middle of an interval, with a task stopped: bit for bit."""
    assert straight[9]["stopped"] and not straight[9]["step"] % 2 == 0
    assert pools(2).run("train_until", recipe=recipe("same"), stop=9) == [0, 0]
    assert pools(2).run("train_until", recipe=recipe("same"), stop=STEPS) == [9, 9]
    clock = ("seconds", "tokens_per_s", "data_wait")
    for row, wanted in zip(told(recipe("same")), straight, strict=True):
        assert {**row, **dict.fromkeys(clock)} == {**wanted, **dict.fromkeys(clock)}


def test_interrupted_and_gone_on_with_on_other_ranks(pools, recipe, straight):
    """Digests, samples and decisions are equal on 1 rank without ZeRO; losses up to rounding.

    Its worker reads ahead what the controller then leaves out: fingerprints are of the samples that were trained on.
    """
    assert pools(2).run("train_until", recipe=recipe("other"), stop=7) == [0, 0]
    assert pools(1).run("train_until", recipe=recipe("other", zero=0, workers=1), stop=STEPS) == [7]
    for row, wanted in zip(told(recipe("other")), straight, strict=True):
        assert [row[name] for name in SAME] == [wanted[name] for name in SAME]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    state = recipe("other").run_dir / f"checkpoints/step_{STEPS:08d}/state.json"
    assert json.loads(state.read_text())["controller"] and state.stat().st_size < 1000
