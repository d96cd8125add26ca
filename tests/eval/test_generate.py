"""Answers come in the order of the questions, whatever the batches, and never beyond the model's positions."""

import json

import numpy as np
import pytest
import torch

from dsvlm.cli import run
from dsvlm.data.boxes import encode_box
from dsvlm.data.collate import Row, collate
from dsvlm.data.encode import encode_sample
from dsvlm.data.sample import Image, Sample, Text
from dsvlm.eval import generate
from dsvlm.eval.generate import Room, answers, head_answers, question_batch
from dsvlm.tasks.conversation import Conversation

PROMPTS = ("what shape is red?", "where is the blue circle?", "what colour is the triangle?", "red", "is it green?")


def questions(count: int = 7):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, 3, 20, 20), dtype=np.uint8)
    return [((Image(), Text(PROMPTS[i % len(PROMPTS)])), image) for i, image in enumerate(images)]


def test_batches_do_not_change_answers(loaded):
    _, codec, model = loaded
    alone = [answers(model, codec, [question], 8, 1)[0] for question in questions()]
    assert len(set(alone)) > 3, "a test on constant answers shows nothing"
    for size in (2, 3, 7):
        assert answers(model, codec, questions(), 8, size) == alone


def test_a_long_prompt_does_not_cut_the_answers_beside_it(loaded, monkeypatch):
    _, codec, model = loaded
    monkeypatch.setattr(codec, "eos_id", -1)  # nothing but room ends an answer
    image = questions(1)[0][1]
    asked = [((Image(), Text(" ".join(["red"] * count))), image) for count in (1, 3, 40, 2, 3, 30)]
    alone = [answers(model, codec, [question], 100, 1)[0] for question in asked]
    assert len(set(map(len, alone))) > 3, "a test on answers of one length shows nothing"
    for size in (2, 6):
        assert answers(model, codec, asked, 100, size) == alone


def test_the_question_is_the_training_row_up_to_the_answer(loaded):
    _, codec, model = loaded
    segments = (Image(), Text("what shape is red?"))
    trained = encode_sample(Sample((*segments, Text("circle", loss=True))), codec, 48, False)
    asked = question_batch(codec, [(segments, questions(1)[0][1])], Room.of(model), 20).tokens[0].tolist()
    first = next(i for i, t in enumerate(trained.targets) if t >= 0)
    assert asked == trained.tokens[: first + 1]


def test_a_conversation_is_asked_for_its_last_answer_behind_the_row_of_training(loaded):
    _, codec, model = loaded
    said = ["what shape is red?", "circle", "and blue?", "square"]
    record = {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]}
    kind = Conversation("ask {text}")
    trained = encode_sample(kind.sample(record), codec, 48, False)
    batch = question_batch(codec, [(kind.question(record), questions(1)[0][1])], Room.of(model), 20)
    assert batch.tokens[0].tolist() == trained.ids[: trained.silent[-1][1]] and batch.tokens[0].tolist()[-1] != 2
    assert answers(model, codec, [(kind.question(record), questions(1)[0][1])], 3, 1)


def test_an_answer_stays_within_the_positions(loaded):
    _, codec, model = loaded
    room = Room.of(model)
    assert room.text == 64 - 5  # positions less the tokens of one image
    words = " ".join(["red"] * 40)
    batch = question_batch(codec, [((Image(), Text(words)), questions(1)[0][1])], room, 20)
    assert room.answer(batch.tokens.shape[1], 100) == room.text - batch.tokens.shape[1] < 100
    assert answers(model, codec, [((Image(), Text(words)), questions(1)[0][1])], 100, 1)
    with pytest.raises(ValueError, match="longer than 58 tokens"):
        answers(model, codec, [((Image(), Text(words * 2)), questions(1)[0][1])], 100, 1)


def test_head_answers_are_what_the_forward_counts_as_correct(loaded):
    _, codec, model = loaded
    pooled = []
    model.heads.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))

    def correct(label: int) -> list[bool]:
        rows = [
            Row(encode_sample(Sample(segments, label), codec, 48, False), image, 1.0, 0, 0, head=0)
            for segments, image in questions()
        ]
        with torch.no_grad():
            return model(collate(rows, image_size=20, pad_id=codec.pad_id))["correct"].tolist()

    correct(0)
    head = model.heads.bank[0]
    margin = head(pooled[0]).diff(dim=1).median()  # so that both classes are answers
    head.bias.data[0] += margin - 1e-6
    found = head_answers(model, codec, questions(), 0, 3)
    assert set(found) == {"0", "1"}
    for label in (0, 1):
        assert correct(label) == [answer == str(label) for answer in found]


@pytest.fixture
def image(tmp_path):
    from PIL import Image as Pil

    path = tmp_path / "image.png"
    Pil.new("RGB", (40, 20), (200, 0, 0)).save(path)
    return path


def test_command_prints_the_answer_and_its_boxes(run_dir, image, tmp_path, capsys, monkeypatch):
    box = (0.1875, 0.3125, 0.6875, 0.8125)  # bins 1, 2, 5, 6 of 8
    monkeypatch.setattr(generate, "answers", lambda *_: [f"red {encode_box(box, 8)}"])
    drawn = tmp_path / "drawn.png"
    assert run(["generate", str(run_dir), str(image), "where?", "--draw", str(drawn)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "red <loc_1><loc_2><loc_5><loc_6>", "box 0.1875 0.3125 0.6875 0.8125  pixels 8 6 28 16"
    ]  # fmt: skip
    assert run(["generate", str(run_dir), str(image), "where?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "answer": "red <loc_1><loc_2><loc_5><loc_6>", "boxes": [{"box": list(box), "pixels": [8, 6, 28, 16]}]
    }  # fmt: skip
    from PIL import Image as Pil

    pixels = np.asarray(Pil.open(drawn))
    assert pixels.shape == (160, 320, 3)  # enlarged 8 times
    frame = (pixels == (255, 0, 200)).all(axis=2)
    rows, columns = frame.nonzero()
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (60, 50, 220, 130)


def test_command_asks_about_a_region_as_training_does(run_dir, image, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(generate, "answers", lambda model, codec, questions, *_: asked.extend(questions) or ["red"])
    assert run(["generate", str(run_dir), str(image), "what is in the region <loc_1><loc_2><loc_5><loc_6>?"]) == 0
    [(segments, _)] = asked
    assert segments == (
        Image(), Text("what is in the region"), Text("<loc_1><loc_2><loc_5><loc_6>"), Text("?")
    )  # fmt: skip


def test_command_goes_on_with_a_conversation(run_dir, image, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(generate, "answers", lambda model, codec, questions, *_: asked.extend(questions) or ["red"])
    assert run(["generate", str(run_dir), str(image), "what?", "red", "sure?"]) == 0
    assert asked[0][0] == (Image(), Text("what?"), Text("red", loss=True), Text("sure?"))
    assert run(["generate", str(run_dir), str(image), "what?", "red"]) == 2
    assert "prompt: 2 texts; give a question, or questions and answers in turn" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, message", [
    ("absent.png", None, "absent.png: No such file"), ("text.png", b"no image", "text.png: the image does not decode"),
])  # fmt: skip
def test_an_image_that_cannot_be_read_is_one_line(run_dir, tmp_path, capsys, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    assert run(["generate", str(run_dir), str(tmp_path / name), "what?"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
