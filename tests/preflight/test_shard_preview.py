"""The preview of a shard set masks what training masks, and leaves other files alone."""

import io
import json
import sys

import pytest
from PIL import Image

from dsvlm.cli import run
from dsvlm.data.encode import encode_record
from dsvlm.data.manifest import MANIFEST
from dsvlm.data.reader import BadSample
from dsvlm.data.shard import ShardWriter
from dsvlm.preflight.page import write_page
from dsvlm.tasks import TASK_TYPES

BOX = [0.1, 0.2, 0.5, 0.9]
RECORDS = {
    "caption": [{"caption": "a dog"}, {"caption": None}, {"caption": 5}, {"caption": ["a"]}, {"caption": ""}, {},
                {"caption": "half of a pair: \ud83d"}, {"caption": "caf\u00e9"}],
    "locate": [{"name": "dog", "boxes": [BOX]}, {"name": "dog", "boxes": [[100, 50, 300, 200]]},
               {"name": "dog", "boxes": [[float("nan")] * 4]}, {"name": "dog", "boxes": []},
               {"name": "dog", "boxes": [list("abcd")]}, {"name": "dog", "boxes": [BOX[:3]]}, {"boxes": [BOX]},
               {"name": "dog", "boxes": [[0, 0, 1, 1], BOX]}],
    "classify": [{"box": [0.5, 0.5, 0.5, 0.6], "name": "dog"}, {"box": BOX, "name": "dog"}, {"box": BOX, "name": None}],
    "pair": [{"text": "dog", "label": float("inf")}, {"text": "dog", "label": 1}, {"text": "dog", "label": -1}],
}  # fmt: skip
DOG = {"caption": "a dog"}


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def preview(tmp_path, capsys):
    """Writes a set of (record, image or None) and previews it: (exit code, masked sample -> reason)."""

    def previewed(kind, samples):
        with ShardWriter(tmp_path / "set", kind) as writer:
            for i, (record, image) in enumerate(samples):
                members = {"json": json.dumps(record).encode()} | ({} if image is None else {"png": image})
                writer.write(f"s{i}", members)
        out = str(tmp_path / "page.html")
        code = run(["data", "preview", str(tmp_path / "set"), "--samples", "20", "--out", out, "--json"])
        return code, {entry["sample"]: entry["reason"] for entry in json.loads(capsys.readouterr().out)["masked"]}

    return previewed


@pytest.mark.parametrize("kind", RECORDS)
def test_what_training_masks_is_masked(preview, codec, kind):
    expected = {}
    for i, record in enumerate(RECORDS[kind]):
        try:
            encode_record(record, TASK_TYPES[kind]().sample, codec, 64, encoder_decoder=False, classes=3)
        except BadSample as error:
            expected[i] = error.reason
    code, masked = preview(kind, [(record, png()) for record in RECORDS[kind]])
    assert code == 1 and masked.keys() == expected.keys() and len(expected) in range(1, len(RECORDS[kind]))


def test_samples_of_a_set_with_images_need_one(preview, tmp_path):
    code, masked = preview("caption", [(DOG, png()), (DOG, None), (DOG, b"no image")])
    assert code == 1 and masked.keys() == {1, 2} and masked[1] == "it has no image"
    assert "it has no image" in (tmp_path / "page.html").read_text()


def test_samples_of_a_set_without_images_need_none(preview):
    assert preview("caption", [(DOG, None)] * 2) == (0, {})


def test_an_unknown_type_is_named(preview, tmp_path, capsys):
    preview("caption", [(DOG, png())])
    path = tmp_path / "set" / MANIFEST
    path.write_text(path.read_text().replace('"caption"', '"captoin"'))
    assert run(["data", "preview", str(tmp_path / "set"), "--out", str(tmp_path / "page.html")]) == 2
    assert "its task type 'captoin' is none of caption" in capsys.readouterr().err


def test_no_other_file_is_touched(preview, tmp_path):
    (tmp_path / "page.tmp").write_text("mine")
    preview("caption", [(DOG, png())])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.tmp", "set"]
    assert (tmp_path / "page.tmp").read_text() == "mine"


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *paths: sys.exit("no"))
    with pytest.raises(SystemExit):
        write_page(tmp_path / "page.html", "<p>")
    assert list(tmp_path.iterdir()) == []


def test_half_of_a_pair_is_spelt_out(tmp_path):
    write_page(tmp_path / "page.html", "<p>\ud83d")
    assert (tmp_path / "page.html").read_text() == "<p>\\ud83d"
