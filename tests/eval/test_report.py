"""The report is one file without anything from outside, escapes what models write, and draws what it says."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from dsvlm.cli import run
from dsvlm.eval.charts import MAX_BUCKETS, Series, extremes, line_chart, linear_ticks, log_ticks, smooth, thinned
from dsvlm.eval.evaluate import evaluate
from dsvlm.eval.gallery import readable, verdict
from dsvlm.eval.report import write_report

VOID = ("meta", "img", "line", "rect", "polyline")


class Page(HTMLParser):
    """Counts elements and checks that they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.links, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes).get("class", "")))
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def count(self, tag: str, style: str = "") -> int:
        return sum(t == tag and (not style or style in s.split()) for t, s in self.seen)


@pytest.fixture
def copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run")


def test_report_is_self_contained_and_whole(copy, capsys):
    evaluate(copy, samples=10)
    assert run(["report", str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    text = (copy / "report.html").read_text()
    page = Page(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.count("figure", "card") == 24 and page.count("polyline", "smooth") == 3 + 4
    rows = [json.loads(line) for line in (copy / "eval_samples.jsonl").read_text().splitlines()]
    shown = [row for row in rows if row["task"] == "locate"][:8]
    assert page.count("rect", "true") == sum(len(row["true_boxes"]) for row in shown) > 0
    assert page.count("rect", "predicted") == sum(len(row["boxes"]) for row in shown + rows[:8])
    said = " ".join(page.text)
    for word in ("1 rank, ZeRO-0, fp32", "question", "locate", "pair", "mean IoU", "text tokens per second"):
        assert word in said


def test_text_of_models_and_recipes_is_escaped(copy):
    evaluate(copy, samples=10)
    path = copy / "eval_samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"answer": "<script>alert(1)</script>", "question": "a < b & c", "truth": '"><b>'}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(copy).read_text()
    assert Page(text).count("script") == 0
    for escaped in ("&lt;script&gt;alert(1)&lt;/script&gt;", "a &lt; b &amp; c", "&quot;&gt;&lt;b&gt;"):
        assert escaped in text


def test_a_run_that_was_not_evaluated(copy):
    (copy / "eval.json").unlink(missing_ok=True)
    text = write_report(copy).read_text()
    assert "Not evaluated yet" in text and Page(text).count("figure") == 0


def test_a_run_without_updates(copy, capsys):
    (copy / "metrics.jsonl").unlink()
    assert run(["report", str(copy)]) == 2
    assert "holds no update yet" in capsys.readouterr().err


def test_a_diverged_task_leaves_the_others_a_curve(copy):
    path = copy / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["task_loss"]["question"] = math.nan
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Page(write_report(copy).read_text()).count("polyline", "smooth") == 2 + 4


@pytest.mark.parametrize("loss", [math.nan, None])
def test_a_run_of_which_every_loss_is_lost_has_a_report(copy, loss):
    path = copy / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["task_loss"] = dict.fromkeys(row["task_loss"], loss)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(copy).read_text())
    assert page.count("polyline", "smooth") == 4 and "No update has a finite loss" in " ".join(page.text)


def test_experts_have_charts_by_layer_and_modality(copy):
    path = copy / "metrics.jsonl"
    assert "Expert routing" not in write_report(copy).read_text()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:  # the first window had no image
        both = ("vision0.image", "decoder1.text")
        row |= {"moe_success": dict.fromkeys(both, 0.875), "moe_busiest": dict.fromkeys(both, 1.25)}
        row["moe_load"] = dict.fromkeys(both, [0.3, 0.7])
        row["moe_bad_tokens"] = dict.fromkeys(both, 0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(copy).read_text())
    assert "NaN" not in " ".join(page.text)
    assert page.count("div", "tile") == 4 + 4 and page.text.count("87.5%") == page.text.count("1.25") == 2
    assert "busiest expert's load, decoder1.text" in page.text
    for row in rows[1:3]:
        row["moe_bad_tokens"]["decoder1.text"] = 7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(copy).read_text())
    assert "14 tokens had logits that are NaN or infinite, from step 1 on." in page.text


def test_skipped_updates_are_told_where_there_are_some(copy):
    path = copy / "metrics.jsonl"
    assert "no finite gradient" not in write_report(copy).read_text()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["skipped"] = 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ", 1 skipped: no finite gradient" in write_report(copy).read_text()


def test_verdicts():
    assert verdict("exact", 1.0)[0] == "right" and verdict("exact", 0.0)[0] == "wrong"
    assert verdict("mean_iou", 0.5) == ("right", "&#10003; right, IoU 0.50")
    assert verdict("word_f1", 0.99)[0] == "partly" and verdict("f1", 0.2)[0] == "wrong"


def test_boxes_are_readable():
    box = "<loc_1><loc_2><loc_3><loc_4>"
    assert readable(box) == "1 box" and readable(box * 2) == "2 boxes"
    assert readable(f"red circle {box} blue square{box}") == "red circle [box] blue square [box]"
    assert readable("<loc_1>") == "0 boxes" and readable("a cat") == "a cat"


def test_smoothing_keeps_lines_and_does_not_lag():
    line = [float(i) for i in range(500)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([1.0, 5.0]) == [1.0, 5.0]


def test_thinning_keeps_spikes_and_the_end():
    xs = list(range(10_000))
    ys = [0.0] * 10_000
    ys[7_777] = 9.0
    assert max(y for _, y in extremes(xs, ys)) == 9.0 and len(extremes(xs, ys)) <= 2 * MAX_BUCKETS
    points = thinned(xs, ys)
    assert len(points) <= MAX_BUCKETS + 1 and points[-1] == (9_999, 0.0)


@pytest.mark.parametrize("ys, scale", [([4.0, 0.01], "log scale"), ([4.0, 1.0], "loss<"), ([0.0, 0.0], "loss<")])
def test_scale_suits_the_values(ys, scale):
    chart = line_chart([Series("a", [0, 1], ys)], "update", "loss")
    assert scale in chart
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.-]+)", re.search(r'smooth s0" points="([^"]+)', chart)[1])]
    assert heights[0] <= heights[1] and all(12 <= y <= 298 for y in heights)


def test_ticks():
    assert linear_ticks(1500) == [0, 500, 1000, 1500] and linear_ticks(0.9) == [0, 0.2, 0.4, 0.6, 0.8]
    assert log_ticks(0.15, 12) == [0.2, 0.5, 1, 2, 5, 10]
