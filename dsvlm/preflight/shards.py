"""The preview of a shard set alone: its samples before there is a recipe, and so before there are tokens."""

import sys
from pathlib import Path

import numpy as np

from dsvlm.data.boxes import encode_box
from dsvlm.data.index import has_images
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.reading import LoaderConfig, Reading, Source
from dsvlm.data.sample import Boxes, Sample, Text
from dsvlm.preflight.page import render_page, write_page
from dsvlm.preflight.pieces import segment_pieces
from dsvlm.preflight.samples import Place, Shown, TaskView
from dsvlm.tasks import TASK_TYPES, TaskType

PIXELS = 224  # of a side, as there is no model that says how many
BINS = 256  # of location tokens: a box that fits some number of them fits any


class Spelling:
    """Stands for a vocabulary where there is none: ids are bytes, and what no vocabulary takes, it does not take."""

    bos_id = eos_id = pad_id = 0

    def encode(self, segment: Text | Boxes, first: bool) -> list[int]:
        if isinstance(segment, Boxes):
            return list("".join(encode_box(box, BINS) for box in segment.boxes).encode())
        try:
            return list(segment.text.encode())
        except (AttributeError, UnicodeEncodeError):
            raise TypeError(f"{segment.text!r:.80} is no text in Unicode") from None


def preview_shards(directory: str, samples: int, out: Path, progress) -> dict:
    """Writes the page of a shard set's first `samples`; returns its figures, JSON types only."""
    manifest = load_manifest(directory)
    if manifest.type not in TASK_TYPES:
        raise ValueError(f"{manifest.path}: its task type {manifest.type!r} is none of {', '.join(TASK_TYPES)}: "
                         "convert or index it with one of these")  # fmt: skip
    kind = TASK_TYPES[manifest.type]()
    source = Source(manifest.type, ShardReader(manifest), kind.sample, images=has_images(manifest), classes=sys.maxsize)
    config = LoaderConfig(seed=0, rank=0, world_size=1, micro_batch=1, image_size=PIXELS, max_length=sys.maxsize,
                          encoder_decoder=False)  # fmt: skip
    reading = Reading([source], Spelling(), config)  # what training reads samples with: it masks what training masks
    view = TaskView(manifest.type, kind, manifest.samples)
    for sample in progress(range(min(samples, manifest.samples)), desc="preview", unit="sample"):
        shown = show(reading, kind, sample)
        view.shown.append(shown)
        if shown.reason:
            view.masked.append(shown)
    note = "The first samples of a shard set, as its task type tells them; a recipe's preview shows tokens too."
    facts = {
        "type": manifest.type, "samples": f"{manifest.samples:,}", "shards": f"{len(manifest.names):,}",
        "size": f"{sum(manifest.bytes) / 1e6:,.1f} MB", "shown at": f"{PIXELS} x {PIXELS} pixels",
    }  # fmt: skip
    write_page(out, render_page(Path(directory).name, note, facts, {}, [view], None))
    masked = [{"task": manifest.type, "reason": shown.reason, **shown.place.to_dict()} for shown in view.masked]
    return {"page": str(out), "directory": str(directory), "shown": len(view.shown), "masked": masked}


def show(reading: Reading, kind: TaskType, sample: int) -> Shown:
    source, found = reading.sources[0], reading.text(0, sample)
    made = Sample(()) if found.row is None else kind.sample(source.reader.record(sample))
    pixels, reason = None, found.reason
    if source.images:
        pixels = np.zeros((3, PIXELS, PIXELS), np.uint8)
        reason = reading.image(0, sample, pixels) or reason
    boxes = [segment for segment in made.segments if isinstance(segment, Boxes)]
    asked, wanted = ([box for part in boxes if part.loss is loss for box in part.boxes] for loss in (False, True))
    place = Place(None, None, None, sample, source.reader.where(sample))
    return Shown(place, pixels, segment_pieces(made), [], asked, wanted, [], reason=reason, label=made.label)
