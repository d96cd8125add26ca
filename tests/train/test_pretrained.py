"""Checkpoints that a run begins from: the same by their content, wherever they lie."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dsvlm.config import parse_recipe
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.tokenizer import load_tokenizer
from dsvlm.eval.load import load_run
from dsvlm.train.build import make_model, make_tokenizer, plan_run
from dsvlm.train.rundir import check_start, prepare_run
from tests.dist.recipes import DECODERS, RAW, VISION

TASKS = {"question": {"type": "vqa", "shards": "train/question", "samples": 6}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, a tower, a LLaMA and a tokenizer for both."""
    root = tmp_path_factory.mktemp("pretrained")
    make_scenes(root / "data", samples=12, val_samples=4, tasks=("question",))
    raw = RAW | {"tasks": TASKS, "data": {"root": str(root / "data")}, "model": RAW["model"]}
    codec = make_tokenizer(plan_run(parse_recipe(raw | {"model": model_of(None, root)})))
    codec.save(root / "tokenizer")
    for seed in (1, 2):
        torch.manual_seed(seed)
        CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(root / f"clip-{seed}")
    LlamaForCausalLM(LlamaConfig(**DECODERS["llama"], vocab_size=codec.size)).save_pretrained(root / "llama")
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def model_of(tower, root):
    if tower is None:
        return {"vision": {"config": VISION}, "decoder": {"kind": "llama", "config": DECODERS["llama"]}}
    return {
        "vision": {"pretrained": str(root / tower)},
        "decoder": {"kind": "llama", "pretrained": str(root / "llama")},
        "freeze": ["^vision"],
    }


def recipe_of(root, output, tower="clip-1", **text):
    text = RAW["text"] | {"tokenizer": str(root / "tokenizer")} | text
    where = {"data": {"root": str(root / "data")}, "output": str(output)}
    return parse_recipe(RAW | where | {"text": text, "tasks": TASKS, "model": model_of(tower, root)})


def begin(recipe):
    """A run with an update behind it."""
    prepare_run(plan_run(recipe))
    (recipe.run_dir / "metrics.jsonl").write_text('{"step": 0}\n')


def test_a_run_goes_on_with_its_checkpoints_at_another_place(root, tmp_path):
    begin(recipe_of(root, tmp_path / "run"))
    moved = shutil.move(root, tmp_path / "moved")
    recipe = recipe_of(moved, tmp_path / "run")
    prepare_run(plan_run(recipe))
    assert recipe.identity_hash() == recipe_of(root, tmp_path / "run").identity_hash()
    shutil.rmtree(moved / "tokenizer")  # the run has a copy
    prepare_run(plan_run(recipe))


def test_other_weights_at_the_same_place_are_another_run(root, tmp_path):
    """Frozen, they are in no checkpoint of the run: it would go on with others without a word."""
    recipe = recipe_of(root, tmp_path / "run")
    begin(recipe)
    shutil.rmtree(root / "clip-1")
    shutil.move(root / "clip-2", root / "clip-1")
    expected = r"model.vision.pretrained: model.safetensors in .*clip-1 is not the file that the run began with \(crc32"
    with pytest.raises(ValueError, match=expected):
        prepare_run(plan_run(recipe))
    (recipe.run_dir / "checkpoints/step_00000001").mkdir(parents=True)
    (recipe.run_dir / "checkpoints/step_00000001/COMPLETE.json").write_text('{"files": {}}')
    with pytest.raises(ValueError, match=expected):
        load_run(recipe.run_dir)


def test_another_tokenizer_is_another_run(root, tmp_path):
    recipe = recipe_of(root, tmp_path / "run")
    begin(recipe)
    path = root / "tokenizer/tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"][-1][1] -= 1.0
    path.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="is not the tokenizer that .*run began with"):
        prepare_run(plan_run(recipe))


def test_a_checkpoint_that_is_missing_is_named_before_ranks_start(root, tmp_path):
    with pytest.raises(ValueError, match="model.vision.pretrained: .*nowhere holds no config.json"):
        check_start(plan_run(recipe_of(root, tmp_path / "run", tower="nowhere")))
    assert not (tmp_path / "run").exists()


def test_the_kind_of_a_checkpoint_is_told(root, tmp_path):
    codec = load_tokenizer(root / "tokenizer", RAW["text"]["bins"])
    with pytest.raises(ValueError, match="type 'llama', expected clip or clip_vision_model$"):
        make_model(recipe_of(root, tmp_path / "run", tower="llama"), codec)
    recipe = recipe_of(root, tmp_path / "run")
    opt = replace(recipe.model, decoder=replace(recipe.model.decoder, kind="opt"))
    with pytest.raises(ValueError, match="type 'llama', expected opt; set model.decoder.kind: llama"):
        make_model(replace(recipe, model=opt), codec)
