"""The preview of a shard set alone: its samples before there is a recipe, and so before there are tokens."""

from pathlib import Path

import numpy as np

from dsvlm.data.encode import UNFIT
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.sample import Boxes, Sample
from dsvlm.data.transforms import decode_image
from dsvlm.preflight.page import render_page
from dsvlm.preflight.pieces import segment_pieces
from dsvlm.preflight.samples import Place, Shown, TaskView
from dsvlm.tasks import TASK_TYPES, TaskType
from dsvlm.train.checkpoint import write_file

PIXELS = 224  # of a side, as there is no model that says how many


def preview_shards(directory: str, samples: int, out: Path, progress) -> dict:
    """Writes the page of a shard set's first `samples`; returns its figures, JSON types only."""
    manifest = load_manifest(directory)
    reader, kind = ShardReader(manifest), TASK_TYPES[manifest.type]()
    view = TaskView(manifest.type, kind, manifest.samples)
    for sample in progress(range(min(samples, len(reader))), desc="preview", unit="sample"):
        shown = show(reader, kind, sample)
        view.shown.append(shown)
        if shown.reason:
            view.masked.append(shown)
    note = "The first samples of a shard set, as its task type tells them; a recipe's preview shows tokens too."
    facts = {
        "type": manifest.type, "samples": f"{manifest.samples:,}", "shards": f"{len(manifest.names):,}",
        "size": f"{sum(manifest.bytes) / 1e6:,.1f} MB", "shown at": f"{PIXELS} x {PIXELS} pixels",
    }  # fmt: skip
    write_file(out, render_page(Path(directory).name, note, facts, {}, [view], None).encode())
    masked = [{"task": manifest.type, "reason": shown.reason, **shown.place.to_dict()} for shown in view.masked]
    return {"page": str(out), "directory": str(directory), "shown": len(view.shown), "masked": masked}


def show(reader: ShardReader, kind: TaskType, sample: int) -> Shown:
    place, made, pixels, reason = Place(None, None, None, sample, reader.where(sample)), Sample(()), None, None
    try:
        pixels = image(reader, sample)
        made = kind.sample(reader.record(sample))
    except UNFIT as error:
        reason = error.reason if isinstance(error, BadSample) else f"its record does not fit the task: {error!r}"
    boxes = [segment for segment in made.segments if isinstance(segment, Boxes)]
    asked, wanted = ([box for part in boxes if part.loss is loss for box in part.boxes] for loss in (False, True))
    return Shown(place, pixels, segment_pieces(made), [], asked, wanted, [], reason=reason, label=made.label)


def image(reader: ShardReader, sample: int) -> np.ndarray | None:
    data = reader.image(sample)
    return None if data is None else decode_image(data, PIXELS)
