"""Checkpoints that a run begins from: the same by their content, wherever they lie."""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dsvlm.config import parse_recipe
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.files import write_file
from dsvlm.data.tokenizer import load_tokenizer
from dsvlm.eval.load import load_run
from dsvlm.train.build import make_model, make_tokenizer, plan_run
from dsvlm.train.checkpoint import RunState, directory_of, entry_of
from dsvlm.train.pretrained import begin_model
from dsvlm.train.rundir import check_start, open_run, prepare_run, read_run
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


def alter(tokenizer):
    path = tokenizer / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"][-1][1] -= 1.0
    path.write_text(json.dumps(definition))


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
    expected = r"model.vision.pretrained: model.safetensors is not the file that the run began with \(crc32"
    with pytest.raises(ValueError, match=expected):
        prepare_run(plan_run(recipe))
    (recipe.run_dir / "checkpoints/step_00000001").mkdir(parents=True)
    (recipe.run_dir / "checkpoints/step_00000001/COMPLETE.json").write_text('{"files": {}}')
    with pytest.raises(ValueError, match=expected):
        load_run(recipe.run_dir)


def test_pixels_are_normalised_as_the_tower_was_trained(root, tmp_path):
    """OpenAI's statistics, unless a checkpoint has its own, which are then part of the run."""
    codec, path = load_tokenizer(root / "tokenizer", RAW["text"]["bins"]), root / "clip-1/preprocessor_config.json"
    made = {}
    for name, mean in (("none", None), ("same", OPENAI_CLIP_MEAN), ("own", [0.5, 0.25, 0.5])):
        if mean:
            path.write_text(json.dumps({"image_mean": mean, "image_std": OPENAI_CLIP_STD}))
        recipe = recipe_of(root, tmp_path / name)
        begin(recipe)
        made[name] = make_model(recipe, codec).vision.mean, read_run(recipe.run_dir)["pretrained"]
    assert made["none"] == made["same"] and made["none"][0] == list(OPENAI_CLIP_MEAN)
    assert made["own"][0] == [0.5, 0.25, 0.5]
    assert "preprocessor_config.json" in made["own"][1]["model.vision.pretrained"]
    with pytest.raises(ValueError, match="preprocessor_config.json is not the file that the run began with"):
        prepare_run(plan_run(recipe_of(root, tmp_path / "same")))
    path.write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    with pytest.raises(ValueError, match="tells no mean and deviation of 3 channels"):
        make_model(recipe, codec)


def test_another_tokenizer_is_another_run(root, tmp_path):
    recipe = recipe_of(root, tmp_path / "run")
    begin(recipe)
    alter(root / "tokenizer")
    with pytest.raises(ValueError, match="is not the tokenizer that .*run began with"):
        prepare_run(plan_run(recipe))


def test_a_copy_of_a_tokenizer_splits_texts_as_it_does(root, tmp_path):
    """Transformers reads `legacy` of a LLaMA tokenizer and does not write it."""
    path = root / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    recipe = recipe_of(root, tmp_path / "run")
    begin(recipe)
    prepare_run(plan_run(recipe))
    kept, given = open_run(plan_run(recipe))[0], load_tokenizer(root / "tokenizer", recipe.text.bins)
    assert kept.hash() == given.hash()
    given.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", recipe.text.bins).hash() != given.hash(), "else nothing is shown here"


def test_a_run_that_knew_its_checkpoints_by_path_says_so(root, tmp_path):
    recipe = recipe_of(root, tmp_path / "run")
    begin(recipe)
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["recipe"]["model.vision.pretrained"] = str(root / "clip-1")
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="knew checkpoints and tokenizers by their paths.*model.start_from: .*run"):
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


def test_positions_of_a_checkpoint_bound_the_text(root, tmp_path):
    """Without a word before, the first sample that is too long would end the run."""
    sizes = DECODERS["opt"] | {"max_position_embeddings": 40}
    OPTForCausalLM(OPTConfig(**sizes, vocab_size=64)).save_pretrained(root / "opt")
    codec = load_tokenizer(root / "tokenizer", RAW["text"]["bins"])
    recipe = recipe_of(root, tmp_path / "run")
    opt = replace(recipe.model, decoder=replace(recipe.model.decoder, kind="opt", pretrained=str(root / "opt")))
    with pytest.raises(ValueError, match=r"text.max_length: 64 tokens after 5 image tokens .* \(40\); lower .* to 35"):
        make_model(replace(recipe, model=opt), codec)
    make_model(replace(recipe, model=opt, text=replace(recipe.text, max_length=35)), codec)


def stage_of(root, output, start_from, **model):
    """Two stages as LLaVA's: the connector alone, then LoRA on the decoder too."""
    recipe = recipe_of(root, output).to_dict()
    recipe["model"] |= {"start_from": start_from and str(start_from), **model}
    return parse_recipe(recipe)


def save_weights(recipe, names="^connector", seed=3):
    """A checkpoint of a run, as if it had trained the parameters of these names; what it holds."""
    begin(recipe)
    codec = load_tokenizer(recipe.run_dir / "tokenizer", recipe.text.bins)
    generator, model = torch.Generator().manual_seed(seed), make_model(recipe, codec)
    tensors = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if re.search(names, name)
    }
    directory = directory_of(recipe.run_dir, 1)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "weights-00000-of-00001.safetensors")
    write_file(directory / "state.json", json.dumps(asdict(RunState(1, 0, "", 1, ""))).encode())
    files = {path.name: entry_of(path) for path in directory.iterdir()}
    write_file(directory / "COMPLETE.json", json.dumps({"format": 1, "step": 1, "files": files}).encode())
    return tensors


@pytest.mark.parametrize("names", ["^connector", "^connector|^decoder.*(q_proj|down_proj)"])
def test_a_second_stage_begins_with_the_weights_of_the_first(root, tmp_path, names):
    first = stage_of(root, tmp_path / "first", None, freeze=["^vision", "^decoder"])
    trained = save_weights(first, names)
    second = stage_of(root, tmp_path / "second", first.run_dir, lora={"targets": ["q_proj"], "r": 2})
    codec = load_tokenizer(root / "tokenizer", second.text.bins)
    model = dict(begin_model(second, codec).named_parameters())
    plain = dict(make_model(second, codec).named_parameters())
    for name, parameter in model.items():
        expected = trained.get(name.replace(".base_layer.", "."), plain[name].data)
        assert torch.equal(parameter.data, expected), name
    begin(second)
    moved = shutil.move(first.run_dir, tmp_path / "moved")
    begin(stage_of(root, tmp_path / "second", moved, lora={"targets": ["q_proj"], "r": 2}))
    assert second.identity() != stage_of(root, "", None, lora={"targets": ["q_proj"], "r": 2}).identity()
    save_weights(stage_of(root, tmp_path / "other", None, freeze=["^vision", "^decoder"]), seed=4)
    with pytest.raises(ValueError, match="model.start_from: COMPLETE.json is not the file that the run began with"):
        begin(stage_of(root, tmp_path / "second", tmp_path / "other", lora={"targets": ["q_proj"], "r": 2}))


def test_a_third_stage_needs_the_run_that_the_second_began_with(root, tmp_path):
    lora = {"lora": {"targets": ["q_proj"], "r": 2}}
    first = stage_of(root, tmp_path / "first", None, freeze=["^vision", "^decoder"])
    save_weights(first, "^connector")
    second = stage_of(root, tmp_path / "second", first.run_dir, freeze=["^vision", "^connector"], **lora)
    save_weights(second, "lora", seed=4)
    third = stage_of(root, tmp_path / "third", second.run_dir, **lora)
    save_weights(stage_of(root, tmp_path / "other", None, freeze=["^vision", "^decoder"]), seed=5)
    shutil.move(first.run_dir, tmp_path / "kept")
    with pytest.raises(ValueError, match="model.start_from: .*first holds no complete checkpoint"):
        begin(third)
    shutil.move(tmp_path / "other", first.run_dir)
    (second.run_dir / "kept.yaml").write_bytes((second.run_dir / "recipe.yaml").read_bytes())
    (second.run_dir / "recipe.yaml").unlink()  # as a checkpoint that was copied with its tokenizer
    begin(third)
    shutil.rmtree(third.run_dir)
    shutil.move(second.run_dir / "kept.yaml", second.run_dir / "recipe.yaml")
    with pytest.raises(ValueError, match="second froze a part of what it began with, which is not in .*step_00000001"):
        begin(third)


def test_a_start_that_is_damaged_is_one_error(root, tmp_path):
    first = stage_of(root, tmp_path / "first", None, freeze=["^vision", "^decoder"])
    save_weights(first)
    [path] = first.run_dir.glob("checkpoints/*/weights-*.safetensors")
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    second = stage_of(root, tmp_path / "second", first.run_dir)
    with pytest.raises(ValueError, match="model.start_from: .*safetensors is damaged"):
        begin_model(second, load_tokenizer(root / "tokenizer", second.text.bins))


def test_a_tokenizer_may_have_chat_templates_in_a_folder(root, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    tokenizer.chat_template = {"default": "{{ messages }}", "other": "{{ messages }}"}
    tokenizer.save_pretrained(root / "tokenizer")
    assert any(path.is_dir() for path in (root / "tokenizer").iterdir())
    recipe = recipe_of(root, tmp_path / "run")
    begin(recipe)
    open_run(plan_run(recipe))


def test_rows_of_location_tokens_must_have_been_trained_somewhere(root, tmp_path):
    """Of a checkpoint that has rows to spare, too, and after an earlier run that kept them as they were."""
    vocab = load_tokenizer(root / "tokenizer", RAW["text"]["bins"]).size
    plain = json.loads((root / "tokenizer/tokenizer.json").read_text())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<loc_")]
    (root / "llama/tokenizer.json").write_text(json.dumps(plain))
    shutil.copy(root / "tokenizer/tokenizer_config.json", root / "llama")

    def attempt(name, start_from=None, **model):
        recipe = stage_of(root, tmp_path / name, start_from, **model).to_dict()
        recipe["tasks"]["question"] |= {"type": "classify"}
        recipe = parse_recipe(recipe)
        codec = load_tokenizer(root / "llama", recipe.text.bins)
        assert codec.size == vocab
        return lambda: begin_model(recipe, codec)

    lora, ends = {"lora": {"targets": ["q_proj"], "r": 2}}, ["embed_tokens", "lm_head"]
    message = "has not learnt these tokens.*task question .*add 'decoder.model.embed_tokens.weight', 'decoder.lm_head"
    with pytest.raises(ValueError, match=message):
        attempt("alone", **lora)()
    attempt("alone", **lora, train=ends)()
    frozen = {"freeze": ["^vision", "^decoder"]}
    save_weights(stage_of(root, tmp_path / "connector", None, **frozen), "^connector")
    save_weights(stage_of(root, tmp_path / "rows", None, **frozen, train=ends), "embed_tokens|lm_head")
    with pytest.raises(ValueError, match=message):
        attempt("second", tmp_path / "connector", **lora)()
    attempt("second", tmp_path / "rows", **lora)()
    shutil.copy(root / "tokenizer/tokenizer.json", root / "llama")  # as a checkpoint that was trained with boxes
    attempt("alone", **lora)()


def test_a_second_stage_with_the_adapters_of_the_first(root, tmp_path, monkeypatch):
    lora = {"lora": {"targets": ["q_proj"], "r": 2}, "train": [r"base_layer\.weight$"]}
    trained = save_weights(stage_of(root, tmp_path / "first", None, **lora), "q_proj")
    assert any("base_layer" in name for name in trained) and any("lora" in name for name in trained)
    monkeypatch.chdir(tmp_path / "first/checkpoints")
    second = stage_of(root, tmp_path / "second", "step_00000001", **lora)
    model = dict(begin_model(second, load_tokenizer(root / "tokenizer", second.text.bins)).named_parameters())
    assert all(torch.equal(model[name].data, tensor) for name, tensor in trained.items())


def test_a_third_stage_begins_with_what_the_second_froze(root, tmp_path):
    """The second one's checkpoints do not hold it: it is in those of the first."""
    first = stage_of(root, tmp_path / "first", None, freeze=["^vision", "^decoder"])
    connector = save_weights(first)
    second = stage_of(root, tmp_path / "second", first.run_dir, freeze=["^vision", "^connector"])
    trained = save_weights(second, "q_proj", seed=4)
    third = stage_of(root, tmp_path / "third", second.run_dir)
    codec = load_tokenizer(root / "tokenizer", third.text.bins)
    for name, parameter in begin_model(third, codec).named_parameters():
        assert (name not in connector | trained) or torch.equal(parameter.data, (connector | trained)[name]), name
    begin(third)
    record = read_run(third.run_dir)["pretrained"]
    assert record["model.start_from"] != record["model.start_from of its start"]
    del record["model.start_from of its start"]  # as versions that knew the second alone began: it stays so
    model = dict(begin_model(third, codec, record=record).named_parameters())
    assert not any(torch.equal(model[name].data, connector[name]) for name in connector if name.endswith("weight"))
    (third.run_dir / "run.json").write_text(json.dumps(read_run(third.run_dir) | {"pretrained": record}))
    prepare_run(plan_run(third))
    assert read_run(third.run_dir)["pretrained"] == record
    shutil.rmtree(first.run_dir)
    save_weights(first, seed=5)
    with pytest.raises(ValueError, match="second froze a part of what it began with, which is not in .*first/check"):
        begin(stage_of(root, tmp_path / "fourth", second.run_dir))


def test_a_start_that_does_not_fit_is_refused(root, tmp_path):
    first = stage_of(root, tmp_path / "first", None, freeze=["^vision", "^decoder"])
    codec = load_tokenizer(root / "tokenizer", first.text.bins)
    with pytest.raises(ValueError, match="model.start_from: .*first holds no complete checkpoint"):
        check_start(plan_run(stage_of(root, tmp_path / "second", first.run_dir)))
    save_weights(first, "^vision")
    step = first.run_dir / "checkpoints/step_00000001"
    small = VISION | {"hidden_size": 8, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"model.start_from: .* holds vision\S+ \[.*\], and this model has"):
        begin_model(stage_of(root, tmp_path / "second", step, vision={"config": small}), codec)
    alter(first.run_dir / "tokenizer")
    with pytest.raises(ValueError, match="it has another vocabulary than this run; set text.tokenizer: .*first/tok"):
        begin_model(stage_of(root, tmp_path / "second", step), codec)


def test_heads_are_those_of_their_tasks(root, tmp_path):
    """The bank knows heads by their number: in another order, each task would begin with the other's."""
    heads = {name: {"type": "pair", "shards": "-", "samples": 1, "classes": 2} for name in ("match", "same")}
    first = stage_of(root, tmp_path / "first", None)
    save_weights(first, "^connector")
    write_file(first.run_dir / "recipe.yaml", yaml.safe_dump(first.to_dict() | {"tasks": heads}).encode())
    codec = load_tokenizer(root / "tokenizer", first.text.bins)

    def begun(*names):
        recipe = stage_of(root, tmp_path / "second", first.run_dir).to_dict()
        return begin_model(parse_recipe(recipe | {"tasks": TASKS | {name: heads["match"] for name in names}}), codec)

    begun("match", "same", "third")
    begun("renamed", "same")
    with pytest.raises(ValueError, match="heads of match, same in this order, and now it is same, match: match would"):
        begun("same", "match")
