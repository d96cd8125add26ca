"""Recipes: strict reading, overrides, cross-field checks, and what belongs to a run's identity."""

import copy

import pytest

from dsvlm.config import RECIPES, apply_override, load_recipe, parse_recipe
from tests.dist.recipes import DECODERS, RAW


@pytest.fixture
def raw():
    raw = copy.deepcopy(RAW)
    raw["model"]["decoder"]["config"] = dict(DECODERS["opt"])
    return raw


@pytest.mark.parametrize(
    "override, words",
    [
        ("schedule.strtegy=mixed", ["schedule.strtegy", "did you mean 'strategy'"]),
        ("tasks.quesion.weight=2", ["quesion", "did you mean 'question'"]),
        ("tasks.question.wieght=2", ["tasks.question.wieght", "weight"]),
        ("train.micro_batch=two", ["train.micro_batch", "'two'", "integer"]),
        ("train.micro_batch=true", ["train.micro_batch", "integer"]),
        ("optim.lr=fast", ["optim.lr", "number", "'fast'"]),
        ("schedule.strategy=acumulate", ["'acumulate'", "did you mean 'accumulate'"]),
        ("tasks.question.samples=0", ["tasks.question.samples", "0", "at least 1"]),
        ("tasks.question.type=vqaa", ["tasks.question.type", "'vqa'"]),
        ("tasks.match.classes=0", ["tasks.match.classes", "at least 2"]),
        ("tasks.question.classes=3", ["tasks.question.classes", "pair"]),
        ("schedule.strategy=unified", ["schedule.samples", "unified"]),
        ("schedule.chunk=4", ["schedule.chunk", "remove"]),
        ("optim.warmup=99", ["optim.warmup", "99", "schedule.steps"]),
        ("model.vision.config.patch_size=15", ["patch_size", "15", "40"]),
        ("model.vision.config.num_attention_heads=3", ["num_attention_heads", "3", "16"]),
        ("model.decoder.kind=gpt", ["model.decoder.kind", "'gpt'"]),
        ("model.decoder.pretrained=somewhere", ["text.tokenizer"]),
        ("model.freeze=['(']", ["model.freeze", "'('"]),
        ("model.lora={targets: []}", ["model.lora.targets", "empty", "q_proj"]),
        ("train.zero=4", ["train.zero", "4"]),
        ("text.bins=1", ["text.bins", "1"]),
        ("seed=-1", ["seed", "-1"]),
        ("name=a/b", ["name", "a/b"]),
        ("tasks={}", ["tasks", "at least one"]),
        ("model={}", ["model.vision", "missing"]),
        ("schedule.steps", ["path=value"]),
        ("tasks.question.weight=.inf", ["tasks.question.weight", "inf", "between"]),
        ("tasks.question.weight=.nan", ["tasks.question.weight", "nan", "between"]),
        ("tasks.question.weight=1e300", ["tasks.question.weight", "1e+300", "between"]),
        ("tasks.question.weight=true", ["tasks.question.weight", "True", "number"]),
        ("model.embedding_std=.nan", ["model.embedding_std", "nan"]),
        ("model.embedding_std=-1", ["model.embedding_std", "-1.0"]),
        ("model.embedding_std=.inf", ["model.embedding_std", "inf"]),
        ("train.timeout=10000000000000", ["train.timeout", "10000000000000", "between 1 and 10000000"]),
        ("train.timeout=0", ["train.timeout", "0"]),
        ("data.worker_timeout=100000000", ["data.worker_timeout", "100000000"]),
        ("tasks.question.samples=2147483649", ["tasks.question.samples", "2147483649", "at most 2147483648"]),
        ("tasks.question.quota=2147483649", ["tasks.question.quota", "at most"]),
        ("schedule.steps=2147483649", ["schedule.steps", "at most"]),
        ("schedule.samples=2147483649", ["schedule.samples", "at most"]),
        ("schedule.chunk=-1", ["schedule.chunk", "-1", "at least 0"]),
        ("schedule.block=500000000000000000", ["schedule.block", "at most"]),
        ("schedule.group=2147483649", ["schedule.group", "at most"]),
        ("train.micro_tokens=2147483649", ["train.micro_tokens", "at most"]),
        ("train.micro_batch=2147483649", ["train.micro_batch", "at most"]),
        ("model.loss_chunk=2147483649", ["model.loss_chunk", "at most"]),
    ],
)
def test_errors_name_path_value_and_remedy(raw, override, words):
    with pytest.raises(ValueError) as error:
        apply_override(raw, override)
        parse_recipe(raw)
    for word in words:
        assert word in str(error.value)


def test_an_encoder_decoder_has_no_conversations(raw):
    raw["model"]["decoder"] = {"kind": "t5", "config": dict(DECODERS["t5"])}
    parse_recipe(raw)
    raw["tasks"]["question"]["type"] = "conversation"
    with pytest.raises(ValueError, match=r"tasks.question.type: conversation, .* \(t5\) writes one answer; use"):
        parse_recipe(raw)


def test_some_task_teaches(raw):
    for task in raw["tasks"].values():
        task["weight"] = 0
    with pytest.raises(ValueError, match=r"tasks.\*.weight: 0 for every task.*raise one"):
        parse_recipe(raw)
    raw["tasks"]["match"]["weight"] = 0.1
    parse_recipe(raw)


def test_long_runs_are_allowed(raw):
    apply_override(raw, "schedule.steps=1000000000")
    assert parse_recipe(raw).schedule.steps == 10**9


def test_overrides_have_their_types(raw):
    for override in ("tasks.question.weight=0.5", "optim.lr=1e-4", "model.freeze=[^vision]", "optim.betas=[0.8, 0.9]"):
        apply_override(raw, override)
    recipe = parse_recipe(raw)
    assert recipe.tasks["question"].weight == 0.5
    assert recipe.optim.lr == 1e-4 and recipe.optim.betas == (0.8, 0.9)
    assert recipe.model.freeze == ("^vision",)


def test_execution_settings_are_no_identity(raw):
    first = parse_recipe(raw).identity_hash()
    for override in (
        "train.micro_batch=7", "train.zero=1", "train.save_every=3", "data.root=elsewhere", "data.workers=2",
        "output=elsewhere", "schedule.rounds=packed", "model.loss_chunk=3", "model.gradient_checkpointing=true",
        "tasks.question.shards=moved/question",
    ):  # fmt: skip
        apply_override(raw, override)
        assert parse_recipe(raw).identity_hash() == first, override
    for override in ("seed=6", "tasks.question.samples=7", "optim.lr=2e-3", "train.dtype=bf16", "schedule.block=2"):
        changed = copy.deepcopy(raw)
        apply_override(changed, override)
        assert parse_recipe(changed).identity_hash() != first, override


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path.stem).name == path.stem


def test_unknown_recipe_and_yaml_tags(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        load_recipe("quickstrat")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(bad)
