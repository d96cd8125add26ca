"""Validation images with what the model answered and what is true, as HTML cards."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape

from dsvlm.config import Recipe
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.eval.evaluate import validation_reader

CARDS = 8  # samples shown per task
LONGEST = 320  # pixels of an embedded image's longer side
GRADED = {"mean_iou": "IoU", "word_f1": "F1", "f1": "F1"}  # metrics that grade an answer instead of accepting it
RIGHT_FROM = {"mean_iou": 0.5}  # score from which an answer counts as right; 1 for the others
LOCATIONS = re.compile(r"(?:\s*<loc_\d+>)+")

BOXES = {"true_boxes": ("true", "true box"), "asked_boxes": ("asked", "region asked about"),
         "boxes": ("predicted", "predicted box")}  # field of a row -> style, name


def gallery(recipe: Recipe, name: str, metric: str, rows: Sequence[dict]) -> str:
    """The first rows of a task as a grid of cards.

    rows: lines of eval_samples.jsonl of this task.
    """
    reader = validation_reader(recipe, name)
    shown = rows[:CARDS]
    cards = "".join(card(reader, metric, row) for row in shown)
    return f'{legend(shown)}<div class="cards">{cards}</div>'


def legend(rows: Sequence[dict]) -> str:
    """The kinds of boxes that these rows draw."""
    kinds = [kind for field, kind in BOXES.items() if any(row[field] for row in rows)]
    items = "".join(f'<span><i class="swatch {style}"></i>{name}</span>' for style, name in kinds)
    return f'<p class="legend">{items}</p>' if items else ""


def card(reader: ShardReader, metric: str, row: dict) -> str:
    kind, label = verdict(metric, row["score"])
    return (
        f'<figure class="card">{picture(reader, row)}<figcaption>'
        f'<p class="question">{escape(readable(row["question"]))}</p>'
        f'<p><b>true</b> {escape(row["truth"])}</p>'
        f'<p><b>answer</b> {escape(readable(row["answer"])) or "<em>nothing</em>"}</p>'
        f'<p class="verdict {kind}">{label}</p></figcaption></figure>'
    )


def verdict(metric: str, score: float) -> tuple[str, str]:
    """(right | partly | wrong, what to print)."""
    right = score >= RIGHT_FROM.get(metric, 1.0)
    kind = "right" if right else "partly" if metric in GRADED and score >= 0.5 else "wrong"
    sign = {"right": "&#10003;", "partly": "&#8776;", "wrong": "&#10007;"}[kind]
    return kind, f"{sign} {kind}" + (f", {GRADED[metric]} {score:.2f}" if metric in GRADED else "")


def readable(text: str) -> str:
    """A text with `[box]` for every four location tokens; of an answer that is nothing else, their number."""
    if LOCATIONS.fullmatch(text):
        count = text.count("<") // 4
        return f"{count} box{'es' * (count != 1)}"
    return LOCATIONS.sub(lambda match: " [box]" * (match[0].count("<") // 4), text).strip()


def picture(reader: ShardReader, row: dict) -> str:
    """The image with its boxes over it; nothing for a sample without image."""
    try:
        data = reader.image(row["sample"])
    except BadSample:
        data = None  # damaged since the evaluation
    if data is None:
        return ""
    outlines = "".join(
        outline(box, kind)
        for field, (kind, _) in BOXES.items()
        for box in row[field]
    )
    overlay = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none">{outlines}</svg>' if outlines else ""
    return f'<div class="picture"><img alt="" src="{data_url(data)}">{overlay}</div>'


def outline(box: Sequence[float], kind: str) -> str:
    x0, y0, x1, y1 = box
    place = f'x="{x0:.4f}" y="{y0:.4f}" width="{x1 - x0:.4f}" height="{y1 - y0:.4f}"'
    return f'<rect class="halo" {place}/><rect class="{kind}" {place}/>'


def data_url(data: bytes) -> str:
    """An image for embedding: its own bytes when it is small, otherwise a JPEG of at most LONGEST pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        kind = Image.MIME[image.format]
        if max(image.size) > LONGEST:
            image = image.convert("RGB")
            image.thumbnail((LONGEST, LONGEST))
            buffer, kind = io.BytesIO(), "image/jpeg"
            image.save(buffer, "JPEG", quality=85)
            data = buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
