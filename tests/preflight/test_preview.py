"""The preview shows what the loader sends, marks the loss, draws the boxes and names what is masked."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dsvlm.cli import run
from dsvlm.config import load_recipe
from dsvlm.data.boxes import iou
from dsvlm.data.encode import IGNORE, Encoded
from dsvlm.preflight.histogram import histogram
from dsvlm.preflight.inputs import image_shape, open_codec
from dsvlm.preflight.pieces import text_pieces
from dsvlm.preflight.preview import row_positions, useful_shares
from dsvlm.preflight.samples import Viewer
from dsvlm.train.build import make_loader, make_tokenizer, plan_run
from tests.preflight.conftest import HOSTILE

VOID = ("meta", "img", "br")
MASKED = {"odd1": "is longer than text.max_length (64)", "odd2": "does not fit the task", "odd3": "does not decode"}


class Page(HTMLParser):
    """Elements of a page as (tag, classes), its links and its text; checks that all are closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.seen, self.links, self.texts = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.seen.append((tag, tuple(found.get("class", "").split())))
        self.links += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def count(self, tag: str, *classes: str) -> int:
        return sum(t == tag and set(classes) <= set(c) for t, c in self.seen)


@pytest.fixture(scope="module")
def written(recipe, tmp_path_factory):
    """(exit code, report, page) of the command."""
    import contextlib

    out, told = tmp_path_factory.mktemp("page") / "preview.html", io.StringIO()
    with contextlib.redirect_stdout(told):
        code = run(["data", "preview", str(recipe), "--out", str(out), "--steps", "0:1", "--json"])
    report = json.loads(told.getvalue())
    assert report["page"] == str(out)
    return code, report, out.read_text()


@pytest.fixture(scope="module")
def views(recipe):
    planned = plan_run(load_recipe(recipe))
    codec = make_tokenizer(planned)
    found = Viewer(planned, codec, image_shape(planned.recipe)).view(range(1), 6, lambda items, **_: items)
    return {view.name: view for view in found}


@pytest.fixture(scope="module")
def sent(recipe):
    """(draft, its row of the batch, its image or None) of every sample of window 0, by (task, sample)."""
    planned = plan_run(load_recipe(recipe))
    loader = make_loader(planned, make_tokenizer(planned), 40, 0, 1)
    window, found = loader.window(0), {}
    for unit, batch in zip(window.units, loader.batches(window, [1.0] * 4), strict=True):
        for row, draft in enumerate(unit):
            image = batch.pixels[batch.image_row == row]
            targets = batch.targets[row][: batch.lengths[row]].tolist()
            row_sent = (batch.tokens[row][: batch.lengths[row]].tolist(), targets, image.numpy())
            found[loader.sources[draft.task].name, draft.sample] = (draft, *row_sent)
    return found


def test_report(written):
    code, report, _ = written
    assert code == 1, "masked samples are findings"
    assert set(report) == {"page", "recipe", "steps", "tokenizer", "tasks", "masked"}
    assert list(report["tasks"]) == ["odd", "question", "locate", "match"]
    assert set(report["tasks"]["odd"]) == {
        "type", "samples", "epoch", "read", "mean_tokens", "max_tokens", "mean_targets", "too_long_share", "masked",
        "useful_share",
    }  # fmt: skip
    odd = report["tasks"]["odd"]
    assert (odd["samples"], odd["epoch"], odd["masked"], odd["too_long_share"]) == (6, 1.0, 3, 1 / 5)
    assert odd["max_tokens"] > 64 and 0 < odd["useful_share"] <= 1
    assert {entry["where"].split(":")[1] for entry in report["masked"]} == set(MASKED)
    for entry in report["masked"]:
        assert set(entry) == {"task", "reason", "step", "epoch", "position", "sample", "where"}
        assert MASKED[entry["where"].split(":")[1]] in entry["reason"]


def test_page_is_whole_and_harmless(written):
    page = Page(written[2])
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "b>", "iframe", "link"} & {tag for tag, _ in page.seen}
    assert "<script" not in written[2] and "http" not in written[2]
    assert '"x"' in "".join(page.texts)  # what the hostile caption says, as text
    assert re.sub(r"\s", "", HOSTILE) in re.sub(r"\s", "", "".join(page.texts))
    assert page.count("figure", "card") == 6 + 6 + 4 + 3 + 3  # of each task, and the masked ones again
    assert page.count("figure", "masked") == 3 + 3
    for reason in MASKED.values():
        assert reason in "".join(page.texts)
    assert "text.max_length 64" in written[2]


def test_marks_are_the_loss(views, sent, codec):
    for name in ("question", "locate", "odd"):
        for shown in views[name].shown:
            if shown.reason:
                continue
            _, tokens, targets, _ = sent[name, shown.place.sample]
            assert [piece.id for piece in shown.read] == tokens
            learnt = [piece.id for piece in shown.read if piece.learnt]
            assert learnt == [target for target in targets if target != IGNORE]
            assert shown.read[-1].id == codec.eos_id and shown.read[-1].learnt and shown.read[-1].kind == "control"
            assert not shown.read[0].learnt
    read = views["question"].shown[0].read
    assert "".join(piece.text for piece in read if piece.kind == "text").split() == codec.decode(
        [piece.id for piece in read]
    ).split()


def test_marks_in_the_page(written, views):
    page = Page(written[2])
    shown = [s for view in views.values() for s in [*view.shown, *view.masked]]
    pieces = [piece for s in shown for piece in s.read]
    # Each token twice: in the running text, and in the list below.
    assert page.count("span", "mark", "learnt") + page.count("span", "mark", "prompt") == len(pieces)
    assert page.count("span", "t", "learnt") == sum(piece.learnt for piece in pieces)


def test_a_masked_sample_shows_what_was_too_long(views):
    shown = {s.place.where.split(":")[1]: s for s in views["odd"].shown}
    assert shown["odd1"].reason and sum(piece.learnt for piece in shown["odd1"].read) > 64
    assert not shown["odd2"].read and shown["odd2"].pixels is not None
    assert shown["odd3"].reason and not shown["odd3"].pixels.any() and shown["odd3"].read
    assert shown["odd0"].reason is None


def test_boxes(written, views, codec):
    page, boxes = Page(written[2]), 0
    for shown in views["locate"].shown:
        boxes += len(shown.stored)
        assert len(shown.wanted) == len(shown.stored) and not shown.asked
        for wanted, stored in zip(shown.wanted, shown.stored, strict=True):
            assert np.abs(np.subtract(wanted, stored)).max() <= 0.5 / codec.bins + 1e-6 and iou(wanted, stored) > 0.3
    assert boxes >= 4
    assert page.count("rect", "true") == page.count("rect", "stored") == page.count("b", "tag", "true") == boxes
    assert page.count("span", "box", "learnt") == boxes


def test_images_are_what_is_sent(written, views, sent):
    links = Page(written[2]).links
    drawn = {Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))).tobytes() for link in links}
    for name, view in views.items():
        for shown in view.shown:
            image = sent[name, shown.place.sample][3]
            assert (shown.pixels == image[0]).all()
            assert image[0].transpose(1, 2, 0).tobytes() in drawn


def test_places(views, sent):
    for name, view in views.items():
        for shown in view.shown:
            draft = sent[name, shown.place.sample][0]
            assert (shown.place.step, shown.place.epoch, shown.place.position) == (0, draft.epoch, draft.ordinal)


def test_useful_share_is_that_of_the_batches(recipe):
    planned = plan_run(load_recipe(recipe))
    codec, shape = open_codec(planned)[0], image_shape(planned.recipe)
    views = Viewer(planned, codec, shape).view(range(2), 1, lambda items, **_: items)
    shares = useful_shares(planned, codec, views, range(2))
    loader, sums = make_loader(planned, codec, 40, 0, 1), np.zeros((2, 4))
    for step in range(2):
        window = loader.window(step)
        for batch in loader.batches(window, [1.0] * 4):
            lengths = batch.lengths.numpy() + shape.tokens  # every sample has an image
            sums[:, batch.task[0]] += lengths.sum(), len(lengths) * lengths.max()
    assert shares == pytest.approx((sums[0] / sums[1]).tolist())
    assert shape.tokens == 5


def test_padding_of_packed_rows():
    assert row_positions(np.array([3, 5]), None, 0).tolist() == [5, 5]
    assert row_positions(np.array([3, 5]), np.array([0, 0]), 16).tolist() == [6, 10]


def test_encoder_decoder(codec):
    text = Encoded([7, 8, codec.eos_id, 9, codec.eos_id], 3, codec.pad_id, None, 1)
    read, written = text_pieces(text, codec)
    assert [piece.id for piece in read] == [7, 8, codec.eos_id] and not any(piece.learnt for piece in read)
    assert [piece.id for piece in written] == [9, codec.eos_id] and all(piece.learnt for piece in written)


def test_histogram():
    drawn = histogram([3, 3, 5, 9], "tokens", 8, "limit 8")
    assert re.findall(r'class="(column[^"]*)".*?<title>([^<]*)</title>', drawn) == [
        ("column", "3: 2"), ("column", "5: 1"), ("column over", "9: 1"),
    ]  # fmt: skip
    assert "limit 8" in drawn and "limit" not in histogram([3], "tokens", 100, "limit 100")
    wide = re.findall(r"<title>([^:]*): (\d+)</title>", histogram(range(1000), "tokens"))
    assert sum(int(count) for _, count in wide) == 1000 and len(wide) <= 48


def test_shard_set(recipe, tmp_path, capsys):
    out = tmp_path / "set.html"
    assert run(["data", "preview", str(recipe.parent / "train/locate"), "--samples", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = Page(out.read_text())
    assert page.count("figure", "card") == 3 and page.count("rect", "true") >= 3
    assert page.count("span", "box", "learnt") == page.count("rect", "true")
    assert run(["data", "preview", str(recipe.parent / "train/odd"), "--out", str(out)]) == 1
    told = capsys.readouterr().out
    assert "odd3: the image does not decode" in told and "odd2: its record does not fit" in told
    assert "<script" not in out.read_text()


def test_many_masked_samples_are_counted(recipe, tmp_path, capsys):
    short = ["--set", "text.max_length=16", "--steps", "0:4", "--out", str(tmp_path / "short.html")]
    assert run(["data", "preview", str(recipe), *short]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22 and "more, which --json lists" in lines[20]


@pytest.mark.parametrize("out", ["none/x.html", "."])
def test_the_page_that_cannot_be_written_is_named(recipe, tmp_path, capsys, out):
    assert run(["data", "preview", str(recipe), "--out", str(tmp_path / out)]) == 2
    assert f"--out {tmp_path / out}: no file can be written there" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing"], "no recipe 'nothing'"),
    (["RECIPE", "--steps", "3:1"], "--steps 3:1: expected A:B"),
    (["RECIPE", "--steps", "\u00b2:3"], "--steps \u00b2:3: expected A:B"),
    (["RECIPE", "--steps", "90:91"], "the recipe has 4 steps"),
    (["RECIPE", "--samples", "0"], "--samples 0"),
    (["RECIPE", "--tokenizer", "/no/such"], "/no/such is not a directory"),
    (["RECIPE", "--set", "tasks.odd.shards=train/od"], "task odd: no directory"),
    (["SHARDS", "--steps", "0:1"], "give a recipe"),
])  # fmt: skip
def test_errors(recipe, tmp_path, capsys, arguments, message):
    names = {"RECIPE": str(recipe), "SHARDS": str(recipe.parent / "train/odd")}
    out = tmp_path / "x.html"
    assert run(["data", "preview", *(names.get(a, a) for a in arguments), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
