"""Scores of a run on the validation sets of its tasks, with what guessing blindly would score beside them."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsvlm import __version__
from dsvlm.config import Recipe, nearest
from dsvlm.data.boxes import encode_box
from dsvlm.data.encode import UNFIT, encode_sample
from dsvlm.data.files import write_file
from dsvlm.data.manifest import check_files
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.sample import Boxes, Segment, Text
from dsvlm.data.tokenizer import TextCodec
from dsvlm.eval.generate import Room, answers, encode_question, head_answers
from dsvlm.eval.load import latest_checkpoint, load_decoder, load_run
from dsvlm.tasks import TaskType
from dsvlm.train.build import head_indexes, make_reader, task_manifest, task_types
from dsvlm.train.checkpoint import read_state

if TYPE_CHECKING:
    from dsvlm.model.git import GitVlm

CHANCE_RECORDS = 5000  # training records that the best blind guess is learnt from


@dataclass(frozen=True)
class Shown:
    """One usable validation sample; pixels: uint8 [3, P, P], or None for a sample without image."""

    number: int
    record: dict
    segments: tuple[Segment, ...]
    pixels: np.ndarray | None


def evaluate(
    run_dir: Path, tasks: Sequence[str] = (), samples: int | None = None, ema: bool = False, progress: bool = False
) -> dict:
    """Answers the first validation samples of each task and scores the answers; writes eval.json, eval_samples.jsonl.

    tasks: names, default all with a validation set; samples: per task, default the recipe's eval.samples.
    Returns what eval.json holds. Samples that cannot be asked or scored are left out and counted in `skipped`.
    """
    from tqdm import tqdm

    run_dir, weights = Path(run_dir), "ema" if ema else "weights"
    checkpoint = latest_checkpoint(run_dir)
    recipe, codec, model = load_run(run_dir, weights, checkpoint)
    chosen = choose_tasks(recipe, tasks)
    count = recipe.eval.samples if samples is None else samples
    if count < 1:
        raise ValueError(f"--samples: {count} must be at least 1")
    results, rows, decode = {}, [], load_decoder(run_dir, recipe, model)
    for name in chosen:
        reader = validation_reader(recipe, name)
        kind = task_types(recipe)[name]
        kept = read_samples(reader, kind, min(count, len(reader)), codec, model, decode)
        with tqdm(total=len(kept), desc=name, unit="sample", file=sys.stderr, disable=not progress) as bar:
            texts = answer_task(recipe, codec, model, name, kept, bar)
        records = [sample.record for sample in kept]
        metrics = kind.score(texts, records, codec.bins)
        results[name] = {
            "type": recipe.tasks[name].type, "metric": kind.metric, "prompt": kind.prompt, "samples": len(kept),
            "skipped": min(count, len(reader)) - len(kept),
            "metrics": metrics if kept else dict.fromkeys(metrics),  # without a sample there is no score, not 0
            "chance": chance(recipe, name, kind, records), "manifest": reader.manifest.hash,
        }  # fmt: skip
        rows += [row_of(name, kind, codec, reader, sample, text) for sample, text in zip(kept, texts, strict=True)]
    result = {
        "step": read_state(checkpoint).step, "weights": weights, "tasks": results,
        "settings": settings(recipe, model), "versions": versions(),
    }  # fmt: skip
    write_file(run_dir / "eval_samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_file(run_dir / "eval.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def choose_tasks(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The tasks to evaluate; ValueError for one that is unknown or has no validation set."""
    able = [name for name, task in recipe.tasks.items() if task.eval]
    for name in names:
        if name not in recipe.tasks:
            raise ValueError(f"--tasks: no task {name!r}{nearest(name, able)}; tasks: {', '.join(recipe.tasks)}")
        if name not in able:
            raise ValueError(f"--tasks: task {name} has no validation set; give tasks.{name}.eval in the recipe")
    if not able:
        raise ValueError("no task of this run has a validation set; give tasks.<name>.eval in the recipe")
    return [name for name in able if not names or name in names]


def validation_reader(recipe: Recipe, name: str) -> ShardReader:
    manifest = task_manifest(recipe, name, recipe.tasks[name].eval)
    try:
        check_files(manifest)
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from None
    return make_reader(recipe, manifest)


def read_samples(
    reader: ShardReader, kind: TaskType, count: int, codec: TextCodec, model: GitVlm, decode: Callable
) -> list[Shown]:
    """The usable ones among the first `count` samples: those that training could use, with a prompt that fits."""
    room, kept = Room.of(model), []
    for number in range(count):
        try:
            record, data = reader.record(number), reader.image(number)  # any other error is the whole shard set's
        except BadSample:
            continue  # dsvlm data verify names it; here it is only counted
        try:
            segments = kind.question(record)
            encode_question(codec, segments, room)
            encode_sample(kind.sample(record), codec, sys.maxsize, room.encoder_decoder)
            pixels = None if data is None else decode(data)
        except UNFIT:
            continue
        kept.append(Shown(number, record, segments, pixels))
    return kept


def answer_task(
    recipe: Recipe, codec: TextCodec, model: GitVlm, name: str, samples: Sequence[Shown], bar
) -> list[str]:
    questions = [(sample.segments, sample.pixels) for sample in samples]
    head = head_indexes(recipe)[list(recipe.tasks).index(name)]
    if head >= 0:
        return head_answers(model, codec, questions, head, recipe.eval.batch, bar)
    return answers(model, codec, questions, recipe.eval.max_new_tokens, recipe.eval.batch, bar)


def chance(recipe: Recipe, name: str, kind: TaskType, records: Sequence[dict]) -> float | None:
    """What the best guess without looking scores; None where the task type knows no such guess."""
    if type(kind).chance is TaskType.chance:
        return None
    reader = make_reader(recipe, task_manifest(recipe, name, recipe.tasks[name].shards))
    train = []
    for number in range(min(CHANCE_RECORDS, len(reader))):
        try:
            record = reader.record(number)
        except BadSample:
            continue
        try:
            kind.sample(record)
            kind.truth(record)
        except UNFIT:
            continue
        train.append(record)
    return kind.chance(train, records) if train and records else None


def row_of(name: str, kind: TaskType, codec: TextCodec, reader: ShardReader, sample: Shown, answer: str) -> dict:
    """One line of eval_samples.jsonl; score: the task's first metric on this sample alone."""
    return {
        "task": name, "sample": sample.number, "where": reader.where(sample.number),
        "question": as_text(sample.segments, codec.bins), "answer": answer, "truth": kind.truth(sample.record),
        "score": kind.score([answer], [sample.record], codec.bins)[kind.metric],
        "boxes": kind.answer_regions(answer, codec.bins), "true_boxes": kind.regions(sample.record),
        "asked_boxes": [box for s in sample.segments if isinstance(s, Boxes) for box in s.boxes],
    }  # fmt: skip


def as_text(segments: Sequence[Segment], bins: int) -> str:
    """The text of segments, boxes written as location tokens."""
    parts = []
    for segment in segments:
        if isinstance(segment, Text):
            parts.append(segment.text)
        elif isinstance(segment, Boxes):
            parts.append("".join(encode_box(box, bins) for box in segment.boxes))
    return " ".join(parts)


def settings(recipe: Recipe, model: GitVlm) -> dict:
    return {
        "decoding": "greedy", "max_new_tokens": recipe.eval.max_new_tokens, "batch": recipe.eval.batch,
        "image_size": model.config.vision_settings["image_size"], "bins": recipe.text.bins,
        "dtype": recipe.train.dtype, "device": model.device.type, "order": "first samples of the validation set",
    }  # fmt: skip


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"dsvlm": __version__, "python": platform.python_version()} | packages


def render(result: dict) -> str:
    """The result as a plain table."""
    rows = [("task", "type", "metric", "score", "chance", "samples")]
    for name, task in result["tasks"].items():
        for metric, value in task["metrics"].items():
            guess = task["chance"] if metric == task["metric"] else None
            shown = ("-" if number is None else f"{number:.3f}" for number in (value, guess))
            rows.append((name, task["type"], metric, *shown, str(task["samples"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    skipped = {name: task["skipped"] for name, task in result["tasks"].items() if task["skipped"]}
    notes = [f"skipped, not usable: {name} {count}" for name, count in skipped.items()]
    return "\n".join([f"step {result['step']}, {result['weights']}", *lines, *notes])
