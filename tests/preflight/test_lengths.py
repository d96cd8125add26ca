"""`dsvlm data lengths`: side files next to the shards, which a training then finds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from dsvlm.cli import run
from dsvlm.config import load_recipe
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.preflight.lengths import Cut, lengths
from dsvlm.train.build import make_loader, make_tokenizer, plan_run
from dsvlm.train.lengths import image_tokens, open_lengths
from tests.dist.recipes import RAW, tiny


@pytest.fixture
def recipe(tmp_path):
    make_scenes(tmp_path, samples=12, val_samples=1, tasks=("question", "locate"))
    raw = tiny(tmp_path).to_dict()
    raw["tasks"] = {name: RAW["tasks"][name] for name in ("question", "locate")}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw | {"output": str(tmp_path / "run")}, sort_keys=False))
    return path


def test_command(recipe, tmp_path, capsys):
    assert run(["data", "lengths", str(recipe), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in first] == ["question", "locate"]
    for row in first:
        assert row["made"] and row["samples"] == 12 and row["file"].startswith(str(tmp_path / "train" / row["task"]))
        assert 5 < row["mean"] <= row["longest"] == row["edges"][-1]
    assert run(["data", "lengths", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("(found), 12 samples" in line for line in lines)
    planned = plan_run(load_recipe(recipe, ["train.micro_tokens=128"]))
    found = open_lengths(planned, make_tokenizer(planned))
    assert [str(table.path) for table in found.values()] == [row["file"] for row in first]
    assert not (tmp_path / "run").exists()


def test_workers(recipe, capsys):
    assert run(["data", "lengths", str(recipe), "--workers", "-1"]) == 2
    assert "--workers -1" in capsys.readouterr().err


def test_shards_that_cannot_be_written_to(recipe, tmp_path, capsys, monkeypatch):
    """Counting may take hours: it must not end in a refusal, nor must a start, which could not count in time."""
    there, closed = os.access, tmp_path / "train/question"
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and there(path, mode))
    assert run(["data", "lengths", str(recipe), "--json"]) == 0
    made = [Path(row["file"]).parent for row in json.loads(capsys.readouterr().out)]
    assert made == [tmp_path / "run", tmp_path / "train/locate"]
    planned = plan_run(load_recipe(recipe, ["train.micro_tokens=128"]))
    assert [table.path.parent for table in open_lengths(planned, make_tokenizer(planned)).values()] == made


@pytest.mark.parametrize("pack", [False, True])
def test_shares(recipe, pack):
    """What the plan says of padding is what the batches of all ranks have."""
    overrides = ["train.micro_tokens=128", *(f"tasks.{name}.pack={pack}" for name in ("question", "locate"))]
    planned = plan_run(load_recipe(recipe, overrides))
    window = planned.plan.window(0)
    cut = Cut(planned, 2)
    assert cut.shares(window, cut.deal(window)) == {}
    lengths(planned, 0)
    cut = Cut(planned, 2)
    shares = cut.shares(window, cut.deal(window))
    loaders = [make_loader(planned, make_tokenizer(planned), 40, rank, 2) for rank in (0, 1)]
    tokens = image_tokens(planned.recipe)
    useful, padded = 0, []
    for loader in loaders:
        batches = list(loader.batches(loader.window(0), [1.0, 1.0]))
        useful += sum(tokens * int((batch.image_row >= 0).sum()) + int(batch.lengths.sum()) for batch in batches)
        padded.append([batch.width * (1 if pack else len(batch.lengths)) for batch in batches])
    padded = np.array(padded)
    assert shares["useful_tokens"] == pytest.approx(useful / padded.sum())
    assert shares["waiting"] == pytest.approx(1 - padded.sum() / (2 * padded.max(axis=0).sum()))
    plain = plan_run(load_recipe(recipe))
    cut = Cut(plain, 2)
    assert 0 < cut.shares(window, cut.deal(window))["useful_tokens"] < shares["useful_tokens"]
