"""Recipes as files: every key once, text, and values that JSON can hold; or one line that names file and place."""

import copy
import datetime

import pytest
import yaml

from dsvlm.config import apply_override, load_recipe, parse_recipe
from tests.dist.recipes import DECODERS, RAW

LOOP = {}
LOOP["itself"] = LOOP


@pytest.fixture
def raw():
    raw = copy.deepcopy(RAW)
    raw["model"]["decoder"]["config"] = dict(DECODERS["opt"])
    return raw


@pytest.mark.parametrize("text, message", [
    (b"seed: 1\nname: a\nseed: 2\n", "line 3: the key 'seed' is in line 1 already"),
    (b"tasks:\n  a: {type: vqa, type: pair}\n", "line 2: the key 'type' is in line 2 already"),
    (b"base: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "line 2: the key '<<' is in line 2 already"),
    (b"tasks:\n  on: {type: vqa}\n", "line 2: the key 'on' is no text; put it in quotes"),
    (b"model:\n  1.5: 2\n", "line 2: the key '1.5' is no text"),
    (b"model:\n  0x1: 2\n", "line 2: the key '0x1' is no text"),
    (b"model: {1: 2, '1': 3}\n", "line 1: the key '1' is in line 1 already"),
    (b"? [a]\n: 1\n", "line 1: the key a sequence is no text"),
    (b"name: 2020-01-01\n", "line 1: '2020-01-01' is of type timestamp"),
    (b"seed: 2020-13-99\n", "line 1: '2020-13-99' is of type timestamp"),
    (b"seed: !!binary aGVsbG8=\n", "line 1: 'aGVsbG8=' is of type binary"),
    (b"seed: !!set {a, b}\n", "line 1: a mapping is of type set"),
    (b"seed: !!bool perhaps\n", "does not fit its tag"),
    (b"seed: !!int ''\n", "does not fit its tag"),
    (b"a: " + b"[" * 3000 + b"]" * 3000, "brackets are nested too deeply"),
    (b"name: caf\xe9\n", "unacceptable character"),
    (b"name: a\0\n", "unacceptable character"),
    (b"name: [\n", "line 2: "),
])  # fmt: skip
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "ours.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="^recipe .*ours.yaml: not valid YAML: ") as error:
        load_recipe(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("{kind: annealed, kind: temperature}", "'kind' is in line 1 already"), ("{yes: 1}", "'yes' is no text"),
    ("2020-01-01", "of type timestamp"), ("[" * 3000, "nested too deeply"),
])  # fmt: skip
def test_overrides_are_read_the_same_way(raw, text, message):
    with pytest.raises(ValueError, match="^--set schedule.mixture: value .* is not valid YAML: ") as error:
        apply_override(raw, f"schedule.mixture={text}")
    assert message in str(error.value) and len(str(error.value)) < 300


def test_integers_are_keys_as_json_has_them(raw):
    """Transformers' own files write them so, and a run's recipe.yaml reads the same."""
    apply_override(raw, "model.decoder.config.id2label={0: cat, -1: none, 10: dog}")
    recipe = parse_recipe(raw)
    assert recipe.model.decoder.config["id2label"] == {"0": "cat", "-1": "none", "10": "dog"}
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))).identity() == recipe.identity()
    apply_override(raw, "tasks.lines={1: 2}")
    with pytest.raises(ValueError, match="^tasks.lines.1: unknown key"):
        parse_recipe(raw)


def test_merges_may_replace_keys(tmp_path, raw):
    """A key of its own beside those it merges in is what YAML's merges are for."""
    path = tmp_path / "ours.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\n")
    with pytest.raises(ValueError, match="^a: unknown key"):
        load_recipe(path)


@pytest.mark.parametrize("value, words", [
    (LOOP, ["extra.itself.itself", "nested more than 32 deep, or holds itself"]),
    (datetime.date(2020, 1, 1), ["extra", "no value that JSON can hold"]), (b"x", ["extra: b'x'"]),
    ([1, {2}], ["extra[1]: {2}"]), (float("nan"), ["extra: nan", "finite"]), ({"a": {1: 2}}, ["extra.a: the key 1"]),
])  # fmt: skip
def test_free_parts_hold_what_json_can(raw, value, words):
    raw["model"]["vision"] = {"config": raw["model"]["vision"]["config"] | {"extra": value}}
    with pytest.raises(ValueError, match="^model.vision.config.extra") as error:
        parse_recipe(raw)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("value", [True, "\uff11\uff12", b"1", 10**400, [1.0], datetime.date(2020, 1, 1)])
def test_what_is_no_number(raw, value):
    raw["tasks"]["question"]["weight"] = value
    with pytest.raises(ValueError, match="^tasks.question.weight: expected a number, found"):
        parse_recipe(raw)


def test_names_of_tasks_are_text(raw):
    raw["tasks"][1] = raw["tasks"]["question"]
    with pytest.raises(ValueError, match="a key of tasks: expected text, found 1"):
        parse_recipe(raw)
