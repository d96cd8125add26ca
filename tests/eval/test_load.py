"""A run is loaded whole, with the weights asked for, or not at all."""

import shutil

import pytest
import torch

from dsvlm.eval.load import latest_checkpoint, load_run
from dsvlm.train.checkpoint import read_tensors


@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_the_weights_are_those_of_the_checkpoint(run_dir, kind):
    _, _, model = load_run(run_dir, kind)
    saved = dict(read_tensors(latest_checkpoint(run_dir), kind))
    parameters = dict(model.named_parameters())
    assert saved.keys() == parameters.keys() and not model.training
    for name, tensor in saved.items():
        assert torch.equal(parameters[name], tensor), name


def test_averaged_weights_are_others(run_dir):
    tensors = [dict(read_tensors(latest_checkpoint(run_dir), kind)) for kind in ("weights", "ema")]
    assert not all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        load_run(tmp_path)


def test_a_run_without_a_complete_checkpoint(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    next(copy.glob("checkpoints/*/COMPLETE.json")).unlink()
    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        load_run(copy)


def test_a_run_without_averages(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("ema: 0.5", "ema: 0.0"))
    with pytest.raises(ValueError, match="keeps no averaged weights"):
        load_run(copy, "ema")
