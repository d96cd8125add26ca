"""Recipes with experts: what cannot be meant is refused, and older runs keep their identity."""

import copy

import pytest

from dsvlm.config import apply_override, load_recipe, parse_recipe
from tests.dist.recipes import DECODERS, RAW


def parsed(*overrides):
    raw = copy.deepcopy(RAW)
    raw["model"]["decoder"]["config"] = dict(DECODERS["opt"])
    raw["model"]["moe"] = {"where": ["vision"], "layers": "every 1"}
    for override in overrides:
        apply_override(raw, override)
    return parse_recipe(raw)


@pytest.mark.parametrize("overrides, words", [
    (["model.moe.where=[vison]"], ["model.moe.where", "did you mean 'vision'"]),
    (["model.moe.where=[]"], ["model.moe.where", "empty"]),
    (["model.moe.experts=1"], ["model.moe.experts", "between 2"]),
    (["model.moe.k=9"], ["model.moe.k", "9"]),
    (["model.moe.layers=second"], ["model.moe.layers", "'second'", "every N"]),
    (["model.moe.layers=every 2"], ["model.moe.layers", "'every 2'", "none of the 1 ", "model.vision", "every 1"]),
    (["model.moe.layers=last 3"], ["model.moe.layers", "'last 3'", "none of the 1 blocks", "vision out of model.moe"]),
    (["model.moe.layers=every 3", "model.moe.where=[decoder]"], ["none of the 2 blocks", "model.decoder"]),
    (["model.moe.where=[decoder]", "model.decoder.config.num_hidden_layers=two"], ["num_hidden_layers", "'two'"]),
    (["model.moe.policy=random"], ["model.moe.policy", "bpr"]),
    (["model.moe.group=batch"], ["model.moe.group", "unit"]),
    (["model.moe.image.importence=1"], ["model.moe.image.importence", "importance"]),
    (["model.moe.renormalize=true"], ["model.moe.renormalize", "raise k"]),
    (["model.moe.image.load=0.1"], ["model.moe.image.load", "model.moe.noise"]),
    (["model.moe.text.global_entropy=0.1"], ["model.moe.text.tau", "0.0"]),
    (["model.moe.image={global_entropy: 0.1, tau: 3.0}"], ["tau", "20.1 experts of 8"]),
    (["train.expert_parallel=true", "train.zero=3"], ["train.expert_parallel", "zero 2"]),
    (["train.expert_parallel=true", "model.moe=null"], ["train.expert_parallel", "no experts"]),
    (["train.expert_parallel=true", "model.moe.capacity_factor=0"], ["capacity_factor above 0"]),
    (["train.expert_parallel=true", "model.moe.where=[decoder]"], ["vision or connector alone"]),
])  # fmt: skip
def test_errors_name_path_value_and_remedy(overrides, words):
    with pytest.raises(ValueError) as error:
        parsed(*overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("overrides", [
    ["model.moe.layers=every 2", "model.moe.where=[connector]"],
    ["model.moe.layers=every 2", "model.moe.where=[decoder]"],
    ["model.moe.layers=every 2", "model.vision.pretrained=somewhere"],
    ["model.moe.layers=every 9", "model.moe.where=[decoder]", "model.decoder.config={hidden_size: 16}"],
])  # fmt: skip
def test_layers_are_counted_where_the_recipe_has_them(overrides):
    """Those of a checkpoint, or of Hugging Face's defaults, are counted when the model is built."""
    parsed(*overrides)


def test_t5_takes_none():
    raw = copy.deepcopy(RAW)
    raw["model"] |= {"decoder": {"kind": "t5", "config": DECODERS["t5"]}, "moe": {"where": ["decoder"]}}
    with pytest.raises(ValueError, match="decoders of kind t5 take no experts"):
        parse_recipe(raw)


def test_identity():
    """Experts are part of it; the cut into units only where its samples compete; a model without them has none."""
    assert not any("moe" in path for path in load_recipe("quickstart").identity())
    assert parsed().identity() != parsed("model.moe.experts=4").identity() != parsed("model.moe=null").identity()
    cuts = ("train.micro_batch=5", "schedule.rounds=packed", "train.micro_tokens=200")
    for cut in cuts:
        assert parsed().identity() == parsed(cut).identity()
        assert parsed("model.moe.group=unit").identity() != parsed("model.moe.group=unit", cut).identity()
    assert parsed().identity() == parsed("train.expert_parallel=true", "train.zero=2").identity()
