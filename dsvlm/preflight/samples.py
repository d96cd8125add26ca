"""The first samples of a plan as the model will see them, through the run's own reading, encoding and decoding."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dsvlm.data.boxes import decode_boxes
from dsvlm.data.encode import Encoded, encode_record, masked_sample
from dsvlm.data.reader import BadSample
from dsvlm.data.reading import Reading
from dsvlm.data.sample import Box
from dsvlm.data.tokenizer import TextCodec
from dsvlm.preflight.inputs import ImageShape
from dsvlm.preflight.pieces import Piece, text_pieces
from dsvlm.tasks import TaskType
from dsvlm.train.build import Planned, loader_config, make_sources, task_types

READ = 1000  # samples of a task whose text is read for its lengths


@dataclass(frozen=True)
class Place:
    """Where a sample stands: in the run (step, epoch, position in the epoch) and in its shard set (sample, where)."""

    step: int | None
    epoch: int | None
    position: int | None
    sample: int
    where: str

    def to_dict(self) -> dict:
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class Shown:
    """One sample of the page.

    pixels: uint8 [3, P, P] or None; read, written: tokens; asked, wanted: boxes of prompt and target as their tokens
    say; stored: boxes of the record; images: image tokens; reason: why it is masked; label: class of a head-bank task.
    """

    place: Place
    pixels: np.ndarray | None
    read: list[Piece]
    written: list[Piece]
    asked: list[Box]
    wanted: list[Box]
    stored: list[Box]
    images: int = 0
    reason: str | None = None
    label: int | None = None


@dataclass
class TaskView:
    """One task: how many samples the steps hold, lengths of those whose text was read, and the samples shown.

    lengths, targets: [texts] of text tokens and targets, samples above text.max_length among them; widths: [read] of
    positions (images and text) that a sample really takes, masked ones too.
    """

    name: str
    kind: TaskType
    planned: int
    read: int = 0
    lengths: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    masked: list[Shown] = field(default_factory=list)


class Viewer:
    """Reads samples of a plan. codec: the run's vocabulary; shape: of the images it gives to the model."""

    def __init__(self, planned: Planned, codec: TextCodec, shape: ImageShape):
        self.planned, self.codec, self.shape = planned, codec, shape
        config = loader_config(planned.recipe, shape.pixels, rank=0, world_size=1)
        self.reading = Reading(make_sources(planned), codec.encoder(), config)
        self.masked = masked_sample(codec, config.encoder_decoder)
        self.kinds = list(task_types(planned.recipe).values())

    def view(self, steps: range, samples: int, progress) -> list[TaskView]:
        """The tasks over `steps`, with the first `samples` of each and all masked ones among the first READ."""
        table = np.concatenate([self.numbered(step) for step in steps])
        return [
            self.view_task(task, table[table[:, 1] == task], samples, progress)
            for task in range(len(self.reading.sources))
        ]

    def view_task(self, task: int, rows: np.ndarray, samples: int, progress) -> TaskView:
        """rows: [n, 3] int64, step, task and ordinal of the task's samples."""
        source = self.reading.sources[task]
        view = TaskView(source.name, self.kinds[task], len(rows))
        rows, size = rows[:READ], self.planned.schedule.streams[task].size
        found = zip(rows.tolist(), *(part.tolist() for part in self.planned.plan.locate(task, rows[:, 2])), strict=True)
        for (step, _, ordinal), epoch, sample in progress(list(found), desc=view.name, unit="sample"):
            self.look(view, task, Place(step, epoch, ordinal % size, sample, source.reader.where(sample)), samples)
        return view

    def numbered(self, step: int) -> np.ndarray:
        """[samples, 3] int64: step, task and ordinal of a window's samples."""
        window = self.planned.plan.window(step)
        tasks, ordinals = window.take(np.arange(len(window)))
        return np.stack([np.full(len(tasks), step), tasks, ordinals], axis=1)

    def look(self, view: TaskView, task: int, place: Place, samples: int) -> None:
        """Read one sample's text into a view; its image too when it is to be shown."""
        view.read += 1
        record, text, reason = self.text(task, place.sample)
        if text is not None:
            view.lengths.append(len(text.tokens) + len(text.answer or ()))
            view.targets.append(text.count)
        sent = self.masked if reason else text
        view.widths.append(len(sent.tokens) + len(sent.answer or ()) + sent.images * self.shape.tokens)
        if len(view.shown) < samples or reason:
            shown = self.show(task, place, record, text, reason)
            if len(view.shown) < samples:
                view.shown.append(shown)
            if shown.reason:
                view.masked.append(shown)

    def text(self, task: int, sample: int) -> tuple[dict, Encoded | None, str | None]:
        """(record, text, reason to mask it); the text of a sample that is only too long is there all the same."""
        source, config, found = self.reading.sources[task], self.reading.config, self.reading.text(task, sample)
        try:
            record = source.reader.record(sample)
            row = found.row or encode_record(
                record, source.sample, self.codec, sys.maxsize, images=source.images, classes=source.classes,
                encoder_decoder=config.encoder_decoder,
            )  # fmt: skip
        except BadSample:
            return {}, None, found.reason
        return record, row, found.reason

    def show(self, task: int, place: Place, record: dict, text: Encoded | None, reason: str | None) -> Shown:
        pixels = None
        if text is None or text.images:
            pixels = np.zeros((3, self.shape.pixels, self.shape.pixels), np.uint8)
            reason = self.reading.image(task, place.sample, pixels) or reason
        if text is None:
            return Shown(place, pixels, [], [], [], [], [], reason=reason)
        kind, bins = self.kinds[task], self.codec.bins
        prompt, target = split(text)
        read, written = text_pieces(text, self.codec)
        return Shown(
            place, pixels, read, written, decode_boxes(self.codec.decode(prompt), bins),
            kind.answer_regions(self.codec.decode(target), bins), kind.regions(record),
            text.images * self.shape.tokens, reason, text.label,
        )  # fmt: skip


def split(text: Encoded) -> tuple[Sequence[int], Sequence[int]]:
    """(ids of the prompt, ids of the target) of a row."""
    return text.ids[: text.prompt], text.ids[text.prompt :]
