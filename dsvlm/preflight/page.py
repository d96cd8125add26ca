"""The page of `dsvlm data preview`: tables, histograms and cards, in the style of the report, all in one file."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from dsvlm.data.files import write_file
from dsvlm.data.sample import Box
from dsvlm.eval.gallery import outline
from dsvlm.eval.report import page
from dsvlm.preflight.histogram import histogram
from dsvlm.preflight.pieces import Piece
from dsvlm.preflight.samples import READ, Shown, TaskView
from dsvlm.preflight.style import SHEET

EXACT = 128  # pixels of a side up to which an image is embedded without loss
MASKED_CARDS = 12

LEGEND = (
    "<h2>How to read the samples</h2>"
    '<p class="legend"><span><i class="mark prompt">prompt</i>is read</span>'
    '<span><i class="mark learnt">target</i>is read and predicted: the loss is here</span>'
    '<span><i class="mark control">&lt;s&gt;</i>control token</span>'
    '<span><i class="swatch asked"></i>box in the prompt</span>'
    '<span><i class="swatch true"></i>box to write, as its tokens say</span>'
    '<span><i class="swatch stored"></i>the same box as stored</span></p>'
)


def render_page(title: str, note: str, facts: dict[str, str], rows: dict[str, dict], views: Sequence[TaskView],
                limit: int | None) -> str:  # fmt: skip
    """One page. facts: name -> text; rows: task -> its summary; limit: text.max_length, None without a vocabulary."""
    sections = [heading(title, note, facts)]
    if rows:
        sections.append(summary_table(rows))
    sections += [LEGEND, *(task_section(view, limit) for view in views)]
    sections.append(masked_section(views))
    return page(f"{title}: what the model will see", sections, SHEET)


def write_page(out: Path, html: str) -> None:
    """Writes a page whole or not at all, and touches no other file; half a surrogate pair is spelt out."""
    write_file(out, html.encode("utf-8", "backslashreplace"))


def heading(title: str, note: str, facts: dict[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<h1>{escape(title)}</h1>\n<p class='note'>{escape(note)}</p>\n<dl>{items}</dl>"


def summary_table(rows: dict[str, dict]) -> str:
    head = ("task", "samples", "epochs", "text tokens, mean", "longest", "targets, mean", "too long", "masked",
            "useful positions")  # fmt: skip
    cells = "".join(f"<th{' class=number' if i else ''}>{name}</th>" for i, name in enumerate(head))
    body = "".join(summary_row(name, row) for name, row in rows.items())
    return (
        "<h2>Tasks</h2><p class='note'>Useful positions: the share of the places in the batches, of images and text, "
        "that is not padding.</p>"
        f"<div class='scroll'><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def summary_row(name: str, row: dict) -> str:
    useful = row["useful_share"]
    bar = "&ndash;"
    if useful is not None:
        bar = f"{useful:.1%}<div class='bar'><i style='width:{100 * useful:.1f}%'></i></div>"
    cells = [
        f"{row['samples']:,}", f"{row['epoch']:.2f}", f"{row['mean_tokens']:.1f}", f"{row['max_tokens']:,}",
        f"{row['mean_targets']:.1f}", f"{row['too_long_share']:.1%}", f"{row['masked']:,}", bar,
    ]  # fmt: skip
    body = "".join(f"<td class='number'>{cell}</td>" for cell in cells)
    return f"<tr><td><strong>{escape(name)}</strong></td>{body}</tr>"


def task_section(view: TaskView, limit: int | None) -> str:
    kind, prompt = type(view.kind).__name__.lower(), escape(view.kind.prompt)
    head = f"<h2>{escape(view.name)} <small>{kind}, prompt &ldquo;{prompt}&rdquo;</small></h2>"
    if not view.shown:
        return f"{head}<p class='note'>No sample in these steps: try more of them, for example --steps 0:50.</p>"
    charts = ""
    if view.lengths and limit is not None:
        some = f"the first {view.read:,} of {view.planned:,} samples" if view.read < view.planned else "all samples"
        drawn = (
            histogram(view.lengths, f"text tokens of {some}", limit, f"text.max_length {limit}"),
            histogram(view.targets, "tokens in the loss"),
        )
        charts = f"<div class='charts'>{''.join(f'<div class=panel>{chart}</div>' for chart in drawn)}</div>"
    cards = "".join(card(shown) for shown in view.shown)
    return f'{head}{charts}<div class="cards wide">{cards}</div>'


def masked_section(views: Sequence[TaskView]) -> str:
    found = [(view.name, shown) for view in views for shown in view.masked]
    if not found:
        return ""
    more = f" The first {MASKED_CARDS} of {len(found)} are shown." if len(found) > MASKED_CARDS else ""
    cards = "".join(card(shown, name) for name, shown in found[:MASKED_CARDS])
    return (
        "<h2>Masked samples</h2><p class='note'>They keep their place in the window and teach nothing: the model gets "
        f"a row of weight 0. Looked for among the first {READ:,} samples of each task.{more}</p>"
        f'<div class="cards wide">{cards}</div>'
    )


def card(shown: Shown, task: str = "") -> str:
    masked = f"<p class='wrong'><b>masked</b> {escape(shown.reason)}</p>" if shown.reason else ""
    place, parts = shown.place, [escape(task)] if task else []
    if place.step is not None:
        parts += [f"step {place.step}", f"epoch {place.epoch}, position {place.position:,}"]
    parts.append(f"sample {place.sample:,}")
    return (
        f'<figure class="card{" masked" if shown.reason else ""}">{picture(shown)}<figcaption>{masked}{texts(shown)}'
        f"<p class='where'>{escape(place.where)}<br>{', '.join(parts)}</p></figcaption></figure>"
    )


def texts(shown: Shown) -> str:
    """The running text, its counts, and the tokens one by one."""
    if not shown.read:
        return ""
    start = "<span class='image'>image</span>" if shown.images else ""
    running = f"<p class='text'>{start}{running_text(shown.read)}</p>"
    if shown.written:
        running += f"<p class='text'><b>answer</b> {running_text(shown.written, boxes(shown.read))}</p>"
    if shown.label is not None:
        running += f"<p><b>class to predict</b> <i class='mark learnt'>{shown.label}</i></p>"
    tokens = [*shown.read, *shown.written]
    if tokens[0].id is None:
        return running
    learnt = sum(piece.learnt for piece in tokens) + (shown.label is not None)
    counts = f"{len(tokens)} text + {shown.images} image tokens, {learnt} in the loss"
    listed = "".join(
        f"<span class='mark {style(piece)}'>{escape(piece.name)}<small>{piece.id}</small></span>" for piece in tokens
    )
    return f"{running}<details><summary>{counts}</summary><p class='tokens'>{listed}</p></details>"


def running_text(pieces: Sequence[Piece], first_box: int = 0) -> str:
    """The text with a mark around every token, and the four tokens of a box in a frame with the box's number."""
    parts, number, index = [], first_box, 0
    while index < len(pieces):
        four = pieces[index : index + 4]
        if len(four) == 4 and all(piece.kind == "location" for piece in four) or four[0].kind == "box":
            number += 1
            size = 1 if four[0].kind == "box" else 4
            inside = "".join(map(mark, four[:size])) if size == 4 else ""
            parts.append(f"<span class='box {style(four[0])}'><b>{number}</b>{inside}</span>")
            index += size
        else:
            parts.append(mark(four[0]))
            index += 1
    return "".join(parts)


def boxes(pieces: Iterable[Piece]) -> int:
    """Boxes that a prompt holds, so that those of the answer are numbered from there."""
    return sum(piece.kind == "location" for piece in pieces) // 4


def mark(piece: Piece) -> str:
    text = piece.name.removeprefix("<loc_").removesuffix(">") if piece.kind == "location" else piece.text
    told = "" if piece.id is None else f' title="{escape(piece.name)}, id {piece.id}"'
    space = " " * (len(text) - len(text.lstrip(" ")))  # outside, so that a mark begins with its word
    return f"{space}<span class='t {style(piece)}'{told}>{escape(text[len(space):])}</span>"


def style(piece: Piece) -> str:
    return f"{piece.kind} {'learnt' if piece.learnt else 'prompt'}"


def picture(shown: Shown) -> str:
    """The image as the model gets it, with numbered boxes: those of the prompt first, then those to write."""
    if shown.pixels is None:
        return "<div class='picture none'><span>no image</span></div>"
    numbered = [(box, "asked") for box in shown.asked] + [(box, "true") for box in shown.wanted]
    drawn = [outline(box, kind) for box, kind in numbered] + [stored(box) for box in shown.stored]
    tags = "".join(tag(box, kind, number) for number, (box, kind) in enumerate(numbered, 1))
    overlay = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none">{"".join(drawn)}</svg>{tags}' if drawn else ""
    return f'<div class="picture"><img alt="" src="{data_url(shown.pixels)}">{overlay}</div>'


def stored(box: Box) -> str:
    """A thin line over the frame of the same box as its tokens say: what the location tokens round away."""
    x0, y0, x1, y1 = box
    return f'<rect class="stored" x="{x0:.4f}" y="{y0:.4f}" width="{x1 - x0:.4f}" height="{y1 - y0:.4f}"/>'


def tag(box: Box, kind: str, number: int) -> str:
    above, left = " above" if box[1] > 0.1 else "", min(box[0], 0.93)
    return f'<b class="tag {kind}{above}" style="left:{100 * left:.1f}%;top:{100 * box[1]:.1f}%">{number}</b>'


def data_url(pixels: np.ndarray) -> str:
    """pixels: uint8 [3, P, P]; small ones as PNG, without loss, larger ones as JPEG."""
    from PIL import Image

    kind, options = ("PNG", {}) if pixels.shape[1] <= EXACT else ("JPEG", {"quality": 90})
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
