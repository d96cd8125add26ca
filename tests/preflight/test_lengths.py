"""`dsvlm data lengths`: side files next to the shards, which a training then finds."""

import json

import pytest
import yaml

from dsvlm.cli import run
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.train.build import make_tokenizer, plan_run
from dsvlm.train.lengths import open_lengths
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
        assert 5 < row["mean"] <= row["longest"] <= row["edges"][-1] < row["longest"] + 8
    assert run(["data", "lengths", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("(found), 12 samples" in line for line in lines)
    from dsvlm.config import load_recipe

    planned = plan_run(load_recipe(recipe, ["train.micro_tokens=128"]))
    found = open_lengths(planned, make_tokenizer(planned))
    assert [str(table.path) for table in found.values()] == [row["file"] for row in first]
    assert not (tmp_path / "run").exists()


def test_workers(recipe, capsys):
    assert run(["data", "lengths", str(recipe), "--workers", "-1"]) == 2
    assert "--workers -1" in capsys.readouterr().err
