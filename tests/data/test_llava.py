"""LLaVA's instruction data become shards: what is written, what is left out, and every error a user can make."""

import json

import pytest
from PIL import Image

from dsvlm.cli import run
from dsvlm.data.convert.llava import convert_llava
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from tests.data.test_turns import said

TALKS = [
    {"id": "a", "image": "coco/a.jpg", "conversations": said("<image>\nWhat?", "A caf\u00e9.", "Why?", "Look.")},
    {"id": 7, "conversations": said("Hi", "Hello")},
    {"id": "a", "image": "b.png", "conversations": said("<image>", "grey")},  # ids come twice in LLaVA's file
    {"id": "odd", "conversations": said("no answer")},
    {"id": "half", "conversations": said("a", "\ud800")},
]


@pytest.fixture
def llava(tmp_path):
    (tmp_path / "images/coco").mkdir(parents=True)
    for name, size in (("coco/a.jpg", (100, 50)), ("b.png", (40, 80))):
        Image.linear_gradient("L").resize(size).save(tmp_path / "images" / name)

    def convert(talks=TALKS, out="out", name="talks.json", **options):
        (tmp_path / name).write_text(talks if isinstance(talks, str) else json.dumps(talks))
        return convert_llava(tmp_path / name, tmp_path / out, **{"images": tmp_path / "images"} | options)

    convert.path = tmp_path
    return convert


def records(directory) -> dict:
    reader = ShardReader(load_manifest(directory))
    assert reader.manifest.type == "conversation"
    return {reader.key(i): (reader.record(i), reader.image(i)) for i in range(len(reader))}


def test_images_and_text_become_sets_of_their_own(llava):
    report = llava()
    assert {name: found["samples"] for name, found in report["tasks"].items()} == {"image": 2, "text": 1}
    assert sorted(report["skipped"].values()) == [1, 1]
    image, text = records(llava.path / "out/image"), records(llava.path / "out/text")
    assert set(image) == {"000000000", "000000002"}
    assert text == {"000000001": ({"conversations": TALKS[1]["conversations"], "source": 7}, None)}
    record, data = image["000000000"]
    assert record["conversations"] == TALKS[0]["conversations"] and record["source"] == "a"
    assert data == (llava.path / "images/coco/a.jpg").read_bytes()
    again = llava(out="again")
    assert again == report and llava(out="other", seed=1)["tasks"] != report["tasks"]


def test_other_spellings(llava):
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    lines = [{"messages": messages, "image": None, "images": ["b.png"]}, {"messages": messages, "image": ""}]
    report = llava("\n".join(map(json.dumps, lines)) + "\n", name="talks.jsonl", resize=20)
    assert {name: found["samples"] for name, found in report["tasks"].items()} == {"image": 1, "text": 1}
    (record, data), = records(llava.path / "out/image").values()
    assert record == {"conversations": messages, "source": None} and data[:2] == b"\xff\xd8"


def test_limit_and_missing_images(llava):
    assert sum(found["samples"] for found in llava(limit=2)["tasks"].values()) == 2
    (llava.path / "images/b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images .* first b\.png: .*--skip-missing"):
        llava(out="strict")
    report = llava(out="less", skip_missing=True)
    assert report["skipped"]["its image is missing"] == 1 and report["tasks"]["image"]["samples"] == 1


@pytest.mark.parametrize("talks, options, words", [
    ("{", {}, "is not JSON"), ("{}", {}, "no list of objects"), ("[1]", {}, "no list of objects"),
    ([TALKS[3]], {}, "no conversation is left.*alternate"), (TALKS, {"images": None}, "--images DIR"),
    (TALKS, {"images": "/nowhere"}, "no directory"), (TALKS, {"limit": 0}, "--limit 0"),
    ([TALKS[0] | {"image": "../a.jpg"}], {}, "entry 0 .*inside"), ([TALKS[0] | {"image": "/a.jpg"}], {}, "inside"),
    ([TALKS[0] | {"image": ["b.png", "coco/a.jpg"]}], {}, "no conversation.*several images"),
    ([TALKS[0] | {"image": 7}], {}, "no conversation.*no name of a file"),
])  # fmt: skip
def test_errors_come_before_anything_is_written(llava, talks, options, words):
    with pytest.raises(ValueError, match=words):
        llava(talks, **options)
    assert not (llava.path / "out").exists()


def test_an_image_that_does_not_decode_leaves_nothing(llava):
    (llava.path / "images/b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png does not decode"):
        llava()
    assert not (llava.path / "out/image/manifest.json").exists()


def test_the_command_says_what_was_left_out(llava, capsys):
    llava(out="first")
    command = ["data", "convert", "llava", str(llava.path / "talks.json"), "--images", str(llava.path / "images")]
    assert run([*command, "--out", str(llava.path / "second")]) == 0
    told = capsys.readouterr().out
    assert "second/image: 2 samples" in told and "second/text: 1 samples" in told
    assert "skipped, questions and answers do not alternate, from a question to an answer: 1" in told
    assert run(["data", "verify", str(llava.path / "second/image"), "--decode"]) == 0
