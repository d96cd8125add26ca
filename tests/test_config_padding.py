"""What the checks of a recipe say about cutting windows by length."""

import copy

import pytest

from dsvlm.config import apply_override, parse_recipe
from dsvlm.config_checks import check_room

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 40, "patch_size": 10}
RAW = {
    "name": "padding", "text": {"vocab_size": 64, "max_length": 48}, "schedule": {"steps": 3},
    "model": {"vision": {"config": SIZES}, "decoder": {"kind": "opt", "config": {"hidden_size": 16}}},
    "tasks": {name: {"type": "vqa", "shards": name, "samples": 2} for name in ("one", "two")},
    "train": {"micro_tokens": 65},
}  # fmt: skip


def parsed(*overrides):
    raw = copy.deepcopy(RAW)
    for override in overrides:
        apply_override(raw, override)
    return parse_recipe(raw)


@pytest.mark.parametrize("overrides, message", [
    (["train.micro_tokens=64"], "micro_tokens: 64 cannot hold a row of 17 image tokens and 48 text .* at least 65"),
    (["train.micro_tokens=-1"], "train.micro_tokens: -1 must be at least 0"),
    (["train.buckets=0"], "train.buckets: 0 must be at least 1"),
    (["train.micro_tokens=0", "tasks.two.pack=true"], "tasks.two.pack: .* is train.micro_tokens; set it"),
    (["tasks.one.pack=true", "model.decoder.kind=t5"], "tasks.one.pack: an encoder-decoder"),
    (["tasks.two.pack=true", "schedule.rounds=packed"], "tasks.one.pack: false, but tasks.two.pack is true"),
    (["tasks.one.pack=true", "schedule.strategy=mixed"], "tasks.two.pack: false, but tasks.one.pack is true"),
    (["text.max_length=70000", "model.decoder.kind=mpt"], "text.max_length: 70000 must be between"),
])  # fmt: skip
def test_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        parsed(*overrides)


def test_allowed():
    assert parsed().train.micro_tokens == 65
    assert parsed("tasks.two.pack=true").tasks["two"].pack
    assert parsed("tasks.one.pack=true", "tasks.two.pack=true", "schedule.strategy=mixed").tasks["one"].pack
    assert parsed("model.vision={pretrained: clip}", "train.micro_tokens=48").train.micro_tokens == 48


def test_identity_stays():
    """Cutting by length may be switched on, changed and off while a run goes on."""
    assert parsed().identity() == parsed("train.micro_tokens=0").identity()
    assert parsed().identity() == parsed("tasks.one.pack=true", "train.buckets=3").identity()


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_row_has_a_position_for_each_token(kind):
    """Also where positions are no table: an evaluation would have no room for an answer."""
    overrides = ["train.micro_tokens=0", f"model.decoder.kind={kind}"]
    check_room(parsed(*overrides, "model.decoder.config.max_position_embeddings=65"))
    with pytest.raises(ValueError, match=r"text.max_length: 48 tokens after 17 image tokens .*embeddings \(64\)"):
        check_room(parsed(*overrides, "model.decoder.config.max_position_embeddings=64"))
    check_room(parsed(*overrides, "model.decoder.pretrained=somewhere", "text.tokenizer=somewhere"))
