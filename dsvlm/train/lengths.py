"""Lengths of a recipe's samples: where side files are, how they are made, and the cut of a window that uses them."""

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dsvlm.config import Recipe
from dsvlm.config_checks import tokens_of_image
from dsvlm.data.lengths import CHUNK, Lengths, count_lengths, lengths_name, write_lengths
from dsvlm.data.tokenizer import TextCodec
from dsvlm.schedule.lengths import LengthRound, check_lengths, deal_by_length, optimal_edges
from dsvlm.schedule.plan import Plan, Schedule, Window
from dsvlm.train.build import Planned, make_sources, task_types
from dsvlm.train.guard import PATIENCE

EDGE_MULTIPLE = 8  # positions: what matrix units of GPUs are fed with
SHORT = 256  # positions: where no row is longer, rounding would cost more than it gains
RATE = 10_000  # samples whose lengths a process counts in a second, about
EDGE_CANDIDATES = 1024  # more than these, and edges are multiples of 16, 24 and so on


def vision_settings(recipe: Recipe):
    """The vision tower's CLIPVisionConfig, from the recipe or from its checkpoint."""
    from transformers import CLIPVisionConfig

    vision = recipe.model.vision
    if vision.pretrained and not Path(vision.pretrained).is_dir():
        raise ValueError(f"model.vision.pretrained: {vision.pretrained!r} is not a directory; download it first")
    read = CLIPVisionConfig.from_pretrained
    return read(vision.pretrained) if vision.pretrained else CLIPVisionConfig(**vision.config)


def image_tokens(recipe: Recipe) -> int:
    """Positions that an image takes in a row."""
    settings = vision_settings(recipe)
    return tokens_of_image(settings.image_size, settings.patch_size)


def side_files(planned: Planned, codec: TextCodec) -> dict[str, str]:
    """File name of each task's lengths."""
    recipe = planned.recipe
    return {
        name: lengths_name(
            tokenizer=codec.hash(), bins=codec.bins, manifest=planned.manifests[name].hash, prompt=kind.prompt,
            type=recipe.tasks[name].type, classes=recipe.tasks[name].classes, max_length=recipe.text.max_length,
            encoder_decoder=recipe.model.decoder.kind == "t5",
        )  # fmt: skip
        for name, kind in task_types(recipe).items()
    }


def find_lengths(planned: Planned, codec: TextCodec) -> dict[str, Lengths | None]:
    """Each task's lengths: next to its shards, else in the run directory, else None."""
    found, beside = {}, beside_shards(planned)
    for name, file in side_files(planned, codec).items():
        paths = [directory / file for directory in (beside[name], planned.recipe.run_dir)]
        here = next((path for path in paths if path.is_file()), None)
        found[name] = here and Lengths(here, planned.manifests[name].samples)
    return found


def beside_shards(planned: Planned) -> dict[str, Path]:
    """The directory of each task's shards; the run's for remote ones, which are not written to."""
    return {
        name: Path(manifest.path) if manifest.url is None else planned.recipe.run_dir
        for name, manifest in planned.manifests.items()
    }


def make_lengths(planned: Planned, codec: TextCodec, directories: dict[str, Path], workers: int = 0) -> dict[str, Path]:
    """Makes the lengths that are missing, each task's in its directory; the paths of those made.

    A progress bar shows on stderr where that is a terminal.
    """
    made, recipe = {}, planned.recipe
    names, found = side_files(planned, codec), find_lengths(planned, codec)
    for source in make_sources(planned):
        if found[source.name] is not None:
            continue
        bar = partial(progress_bar, total=-(-len(source.reader) // CHUNK), desc=f"lengths of {source.name}")
        table = count_lengths(
            source, codec, recipe.text.max_length, encoder_decoder=recipe.model.decoder.kind == "t5", workers=workers,
            progress=bar,
        )  # fmt: skip
        directories[source.name].mkdir(parents=True, exist_ok=True)
        made[source.name] = directories[source.name] / names[source.name]
        write_lengths(made[source.name], table)
    return made


def progress_bar(items, **options):
    from tqdm import tqdm

    return tqdm(items, file=sys.stderr, unit=f" x {CHUNK} samples", disable=not sys.stderr.isatty(), **options)


def make_run_lengths(planned: Planned, codec: TextCodec) -> None:
    """Rank 0's part at a start: makes what `dsvlm data lengths` has not made, in the run directory.

    ValueError at once when that would take so long that the other ranks give up waiting.
    """
    recipe = planned.recipe
    if not recipe.train.micro_tokens:
        return
    missing = [name for name, lengths in find_lengths(planned, codec).items() if lengths is None]
    samples = sum(planned.manifests[name].samples for name in missing)
    seconds = samples / RATE / max(1, recipe.data.workers)
    if seconds > PATIENCE / 2:
        raise ValueError(
            f"train.micro_tokens: the lengths of {samples:,} samples ({', '.join(missing)}) are not known; to count "
            f"them takes about {seconds / 60:,.0f} minutes, for which the other ranks would wait; make them first: "
            f"dsvlm data lengths RECIPE --workers N"
        )
    make_lengths(planned, codec, dict.fromkeys(planned.manifests, recipe.run_dir), recipe.data.workers)


def open_lengths(planned: Planned, codec: TextCodec) -> dict[str, Lengths]:
    """Each task's lengths, for a recipe that cuts its windows by length; none for others."""
    if not planned.recipe.train.micro_tokens:
        return {}
    found = find_lengths(planned, codec)
    for name, lengths in found.items():
        if lengths is None:
            beside, run = beside_shards(planned)[name], planned.recipe.run_dir
            raise ValueError(
                f"task {name}: no {side_files(planned, codec)[name]} on {socket.gethostname()}, in {beside} or {run}: "
                f"copy it from the node that has it, where `dsvlm data lengths` has put it beside the shards, to "
                f"either of these"
            )
    return found


def lengths_record(lengths: dict[str, Lengths]) -> dict[str, str]:
    """What ranks compare: they must cut every window in the same way."""
    return {f"lengths of task {name}": table.hash() for name, table in lengths.items()}


@dataclass(frozen=True)
class LengthDealer:
    """Deals windows by length; as the loader's `deal`. edges: row lengths of each task; pack: flag of each."""

    plan: Plan
    schedule: Schedule
    world_size: int
    micro_tokens: int
    lengths: tuple[Lengths, ...]
    edges: tuple[np.ndarray, ...]
    pack: tuple[bool, ...]
    image_tokens: int

    def __call__(self, window: Window) -> tuple[LengthRound, ...]:
        return deal_by_length(
            window, self.schedule, self.world_size, micro_tokens=self.micro_tokens, lengths=self.positions(window),
            edges=self.edges, pack=self.pack,
        )  # fmt: skip

    def positions(self, window: Window) -> np.ndarray:
        """[len(window)] int64: positions of each sample in its row."""
        return window_positions(self.plan, window, self.lengths, self.image_tokens)


def window_positions(plan: Plan, window: Window, lengths: tuple[Lengths, ...], image_tokens: int) -> np.ndarray:
    """Positions of each sample of a window, images and text, [len(window)] int64."""
    task, ordinal = window.take(np.arange(len(window)))
    _, sample = plan.locate_all(task, ordinal)
    positions = np.empty(len(window), np.int64)
    for one in np.unique(task).tolist():
        here = task == one
        positions[here] = lengths[one].positions(sample[here], image_tokens)
    return positions


def make_dealer(
    planned: Planned, lengths: dict[str, Lengths], world_size: int
) -> Callable[[Window], tuple[LengthRound, ...]]:
    """The cut of windows by length. lengths: of each task. ValueError when a sample fits no unit."""
    recipe, schedule = planned.recipe, planned.schedule
    tables, tokens = tuple(lengths[name] for name in recipe.tasks), image_tokens(recipe)
    histograms = [table.histogram(tokens) for table in tables]
    for index, histogram in enumerate(histograms):
        check_lengths(np.array([len(histogram) - 1]), np.array([index]), schedule, recipe.train.micro_tokens)
    if schedule.mixes:
        histograms = [joint_histogram(schedule, histograms)] * len(tables)
    edges = tuple(bucket_edges(histogram, recipe.train.buckets) for histogram in histograms)
    pack = tuple(task.pack for task in recipe.tasks.values())
    return LengthDealer(
        planned.plan, schedule, world_size, recipe.train.micro_tokens, tables, edges, pack, tokens
    )


def bucket_edges(histogram: np.ndarray, buckets: int) -> np.ndarray:
    """Row lengths with the least padding for samples of so many positions each, [longest + 1] int64."""
    if len(histogram) <= SHORT:
        return optimal_edges(histogram, buckets, 1)
    coarse = -(-len(histogram) // (EDGE_MULTIPLE * EDGE_CANDIDATES))
    return optimal_edges(histogram, buckets, EDGE_MULTIPLE * coarse)


def joint_histogram(schedule: Schedule, histograms: list[np.ndarray]) -> np.ndarray:
    """Lengths of all tasks as windows hold them: each task by its share of samples. [longest + 1] int64."""
    total = np.zeros(max(map(len, histograms)), np.int64)
    shares = np.sum([phase.shares for phase in schedule.table], axis=0).tolist()
    for stream, histogram, share in zip(schedule.streams, histograms, shares, strict=True):
        # In millionths of a sample: integers, so that all ranks find the same edges; and no length is forgotten. They
        # are Python's own: thousands of samples of a window, many phases and millions of one length are above 2^63.
        millionths = histogram.astype(object) * (share * 10**6) // stream.size
        total[: len(histogram)] += np.maximum(millionths.astype(np.int64), histogram > 0)
    return total
