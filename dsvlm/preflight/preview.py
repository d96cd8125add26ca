"""`dsvlm data preview`: a page of what the model will see, and the same figures as JSON."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsvlm.data.tokenizer import TextCodec
from dsvlm.preflight.inputs import ImageShape, image_shape, open_codec
from dsvlm.preflight.page import render_page, write_page
from dsvlm.preflight.samples import TaskView, Viewer
from dsvlm.train.build import Planned, make_deal
from dsvlm.train.lengths import find_lengths


def preview(planned: Planned, steps: range, samples: int, out: Path, tokenizer: str | None, progress) -> dict:
    """Writes the page of `steps` with `samples` of each task; returns its figures, JSON types only.

    tokenizer: directory of another vocabulary than the run's; progress: callable(iterable, desc=, unit=) -> iterable.
    """
    recipe, shape = planned.recipe, image_shape(planned.recipe)
    codec, source = open_codec(planned, tokenizer)
    views = Viewer(planned, codec, shape).view(steps, samples, progress)
    shares = useful_shares(planned, codec, views, steps)
    tasks = {view.name: task_summary(view, planned, steps, share) for view, share in zip(views, shares, strict=True)}
    span = f"steps {steps.start} to {steps.stop - 1}" if len(steps) > 1 else f"step {steps.start}"
    note = f"What the model will see in {span}, before anything is trained."
    limit = recipe.text.max_length
    html = render_page(recipe.name, note, facts(planned, codec, source, shape), tasks, views, limit)
    write_page(out, html)
    masked = [
        {"task": view.name, "reason": shown.reason, **shown.place.to_dict()} for view in views for shown in view.masked
    ]
    return {"page": str(out), "recipe": recipe.name, "steps": [steps.start, steps.stop], "tokenizer": source,
            "tasks": tasks, "masked": masked}  # fmt: skip


def facts(planned: Planned, codec: TextCodec, source: str, shape: ImageShape) -> dict[str, str]:
    recipe = planned.recipe
    sizes = sorted({len(planned.plan.window(step)) for step in range(min(4, recipe.schedule.steps))})
    return {
        "strategy": f"{recipe.schedule.strategy}, {len(recipe.tasks)} tasks",
        "samples of an update": " or ".join(f"{size:,}" for size in sizes),
        "updates": f"{recipe.schedule.steps:,}",
        "vocabulary": f"{codec.size:,} tokens, {codec.bins} of them locations; {source}",
        "images": f"{shape.pixels} x {shape.pixels} pixels, {shape.tokens} tokens",
        "text": f"at most {recipe.text.max_length} tokens",
        "decoder": recipe.model.decoder.kind + (" (reads, then writes)" if recipe.model.decoder.kind == "t5" else ""),
        "micro-batch": f"{recipe.train.micro_tokens} positions" if recipe.train.micro_tokens
        else f"{recipe.train.micro_batch} samples",
    }  # fmt: skip


def task_summary(view: TaskView, planned: Planned, steps: range, useful: float | None) -> dict:
    """Figures of one task over the steps; lengths are of the samples whose text was read."""
    limit, lengths = planned.recipe.text.max_length, np.array(view.lengths or [0])
    size = next(stream.size for stream in planned.schedule.streams if stream.name == view.name)
    return {
        "type": planned.recipe.tasks[view.name].type,
        "samples": view.planned, "epoch": view.planned / size, "read": view.read,
        "mean_tokens": float(lengths.mean()), "max_tokens": int(lengths.max()),
        "mean_targets": float(np.mean(view.targets or [0])),
        "too_long_share": float((lengths > limit).mean()), "masked": len(view.masked),
        "useful_share": useful,
    }  # fmt: skip


def useful_shares(
    planned: Planned, codec: TextCodec, views: Sequence[TaskView], steps: range
) -> list[float | None]:
    """Of the positions that one rank computes for each task, the share that is not padding; None where not known.

    Known only where all samples of the steps were read, and windows that are cut by length have their side files.
    """
    if planned.recipe.train.micro_tokens and None in find_lengths(planned, codec).values():
        return [None] * len(views)
    if any(view.read < view.planned for view in views):
        return [None] * len(views)
    deal, widths = make_deal(planned, codec, 1), [iter(view.widths) for view in views]
    sums = np.zeros((2, len(views)))
    for step in steps:
        window = planned.plan.window(step)
        tasks = window.task
        lengths = np.array([next(widths[task]) for task in tasks.tolist()])
        for round_ in deal(window):
            places, rows, width = round_.unit(0)
            if len(places):
                taken = row_positions(lengths[places], rows, width)
                np.add.at(sums, (slice(None), tasks[places]), [lengths[places], taken])
    return [float(useful / taken) if taken else None for useful, taken in sums.T]


def row_positions(lengths: np.ndarray, rows: np.ndarray | None, width: int) -> np.ndarray:
    """Positions that each sample of a unit takes up with its part of the padding, [n] float64."""
    rows = np.arange(len(lengths)) if rows is None else rows
    filled = np.bincount(rows, lengths)
    return max(width, filled.max()) * lengths / filled[rows]
