"""The figures of an evaluation are those of its answers; damaged samples are counted, not scored."""

import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import PIL.Image
import pytest

from dsvlm.cli import run
from dsvlm.data.boxes import encode_box
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.data.transforms import DECODERS, make_decoder
from dsvlm.eval import evaluate as module
from dsvlm.eval.evaluate import evaluate, read_samples, render
from dsvlm.eval.load import load_decoder
from dsvlm.eval.report import write_report
from dsvlm.export import card
from dsvlm.tasks import TASK_TYPES

DAMAGED = 2


def records(run_dir, split: str, task: str) -> list[dict]:
    reader = ShardReader(load_manifest(run_dir.parent / "data" / split / task))
    return [reader.record(i) for i in range(len(reader))]


@pytest.fixture
def result(run_dir) -> dict:
    return evaluate(run_dir, samples=10)


def test_files_hold_what_is_returned(run_dir, result):
    assert json.loads((run_dir / "eval.json").read_text()) == result
    rows = [json.loads(line) for line in (run_dir / "eval_samples.jsonl").read_text().splitlines()]
    assert Counter(row["task"] for row in rows) == {"question": 9, "locate": 10, "pair": 10}
    assert result["step"] == 3 and result["settings"]["image_size"] == 20
    for name, task in result["tasks"].items():
        scores = [row["score"] for row in rows if row["task"] == name]
        assert task["metrics"][task["metric"]] == pytest.approx(sum(scores) / len(scores))


def test_damaged_samples_are_left_out_and_counted(run_dir, result):
    assert {name: (task["samples"], task["skipped"]) for name, task in result["tasks"].items()} == {
        "question": (9, 1), "locate": (10, 0), "pair": (10, 0)
    }  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "eval_samples.jsonl").read_text().splitlines()]
    assert DAMAGED not in [row["sample"] for row in rows if row["task"] == "question"]
    assert "skipped, not usable: question 1" in render(result)


def write_set(run_dir, out, task_type: str, records: list[dict]):
    """A shard set of these records, all with the same image."""
    image = ShardReader(load_manifest(run_dir.parent / "data/val/question")).image(0)
    with ShardWriter(out, task_type) as writer:
        for number, record in enumerate(records):
            writer.write(f"record{number}", {"json": json.dumps(record).encode(), "png": image})
    return ShardReader(load_manifest(out))


BOX = [0.1, 0.1, 0.5, 0.6]


@pytest.mark.parametrize("task_type, good, bad", [
    ("classify", {"name": "red", "box": BOX}, {"name": "red", "box": [0.1, 0.1, 0.1, 0.6]}),
    ("classify", {"name": "red", "box": BOX}, {"name": "red", "box": [0.1, 0.1]}),
    ("locate", {"name": "red", "boxes": [BOX]}, {"name": "red", "boxes": [[0.5, 0.1, 0.1, 0.6]]}),
    ("locate", {"name": "red", "boxes": [BOX]}, {"name": "red", "boxes": []}),
    ("vqa", {"question": "red?", "answer": "yes"}, {"question": "red " * 100, "answer": "yes"}),
    ("vqa", {"question": "red?", "answer": "yes"}, {"question": "red?", "answer": 5}),
    ("pair", {"text": "red", "label": 1}, {"text": "red", "label": "red"}),
])  # fmt: skip
def test_a_record_that_cannot_be_asked_or_scored_is_left_out(run_dir, loaded, tmp_path, task_type, good, bad):
    recipe, codec, model = loaded
    reader = write_set(run_dir, tmp_path, task_type, [good, bad, good])
    kept = read_samples(reader, TASK_TYPES[task_type](), 3, codec, model, load_decoder(run_dir, recipe, model))
    assert [(sample.number, sample.record) for sample in kept] == [(0, good), (2, good)]


def test_an_evaluation_with_such_records_ends_and_counts_them(run_dir, tmp_path):
    good = {"question": "what shape is red?", "answer": "square"}
    for split in ("train", "val"):
        write_set(run_dir, tmp_path / split, "vqa", [{"question": "red " * 100, "answer": 5}, good, {"answer": "x"}])
    copy = shutil.copytree(run_dir, tmp_path / "run")
    recipe = (copy / "recipe.yaml").read_text()
    for split in ("train", "val"):
        assert f"{split}/question" in recipe
        recipe = recipe.replace(f"{split}/question", str(tmp_path / split))
    (copy / "recipe.yaml").write_text(recipe)
    question = evaluate(copy, ["question"])["tasks"]["question"]
    assert (question["samples"], question["skipped"], question["chance"]) == (1, 2, 1.0)


def test_without_a_usable_sample_there_is_no_score(run_dir, tmp_path, monkeypatch):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    monkeypatch.setattr(module, "read_samples", lambda *_: [])
    result = evaluate(copy, ["locate"], samples=4)
    locate = result["tasks"]["locate"]
    assert (locate["metrics"], locate["samples"]) == ({"mean_iou": None, "iou_above_half": None}, 0)
    table = render(result)
    assert "0.000" not in table and "skipped, not usable: locate 4" in table
    assert "| locate | mean_iou | - |  | 0 |" in card.evaluation(result)
    assert "IoU &ndash; on 0 samples" in write_report(copy).read_text()


def test_a_shard_set_that_cannot_be_read_is_no_skipped_sample(run_dir, loaded, tmp_path):
    recipe, codec, model = loaded
    reader = write_set(run_dir, tmp_path, "vqa", [{"question": "red?", "answer": "yes"}])
    (tmp_path / "shard-000000.arrow").write_bytes(b"another")
    with pytest.raises(ValueError, match="sha256"):
        read_samples(reader, TASK_TYPES["vqa"](), 1, codec, model, load_decoder(run_dir, recipe, model))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("scaling", [False, True])
def test_images_are_decoded_as_the_run_decoded_them(run_dir, loaded, tmp_path, decoder, scaling):
    recipe, _, model = loaded
    recipe = replace(recipe, data=replace(recipe.data, dct_scaling=scaling))
    run = json.loads((run_dir / "run.json").read_text()) | {"decoder": decoder}
    (tmp_path / "run.json").write_text(json.dumps(run))
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    data = io.BytesIO()
    PIL.Image.fromarray(noise).save(data, "JPEG")
    size = model.config.vision_settings["image_size"]
    pixels = {key: make_decoder(key[0], size, key[1])(data.getvalue()) for key in product(DECODERS, (False, True))}
    found = load_decoder(tmp_path, recipe, model)(data.getvalue())
    assert np.array_equal(found, pixels[decoder, scaling])
    assert not np.array_equal(found, pixels[decoder, not scaling])


def test_true_answers_score_one(run_dir, monkeypatch):
    def answer_truly(recipe, codec, model, name, samples, bar):
        if name == "locate":
            return ["".join(encode_box(box, 8) for box in s.record["boxes"]) for s in samples]
        return [str(s.record["answer"] if name == "question" else s.record["label"]) for s in samples]

    monkeypatch.setattr(module, "answer_task", answer_truly)
    tasks = evaluate(run_dir)["tasks"]
    assert tasks["question"]["metrics"]["exact"] == tasks["pair"]["metrics"]["accuracy"] == 1.0
    assert 0.6 < tasks["locate"]["metrics"]["mean_iou"] < 1.0  # 8 bins per axis cost that much


def test_chance_is_the_likeliest_training_label(run_dir, result):
    likely = Counter(r["label"] for r in records(run_dir, "train", "pair")).most_common(1)[0][0]
    shown = records(run_dir, "val", "pair")[:10]
    assert result["tasks"]["pair"]["chance"] == sum(r["label"] == likely for r in shown) / 10
    assert result["tasks"]["locate"]["chance"] is None


def test_command_prints_json_or_a_table(run_dir, capsys):
    assert run(["eval", str(run_dir), "--tasks", "pair", "--samples", "3", "--ema", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["tasks"]) == ["pair"] and result["weights"] == "ema" and result["tasks"]["pair"]["samples"] == 3
    assert run(["eval", str(run_dir), "--tasks", "pair", "--samples", "3"]) == 0
    head, row = capsys.readouterr().out.splitlines()[1:3]
    assert head.split() == ["task", "type", "metric", "score", "chance", "samples"]
    assert row.split()[:3] == ["pair", "pair", "accuracy"] and len(row.split()) == 6


@pytest.mark.parametrize("arguments, message", [
    (["--tasks", "questoin"], "no task 'questoin' (did you mean 'question'?)"),
    (["--samples", "0"], "--samples: 0 must be at least 1"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(run_dir, capsys, arguments, message):
    assert run(["eval", str(run_dir), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_validation_set_is_named(run_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(run_dir.parent / "data"), "nowhere"))
    assert run(["eval", str(copy)]) == 2
    assert "task question: no directory nowhere/val/question" in capsys.readouterr().err
