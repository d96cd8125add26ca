"""From the plan's numbers to batches: text of a window first, images lazily and a bounded number of units ahead."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dsvlm.data.collate import Batch, Row, collate
from dsvlm.data.encode import Encoded, encode_record, masked_sample
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.sample import Sample
from dsvlm.data.tokenizer import TextCodec
from dsvlm.data.transforms import decode_image

UNITS_AHEAD = 2  # whose images are decoded while an earlier unit trains


@dataclass(frozen=True)
class Source:
    """One task as the loader sees it.

    sample: record -> Sample, the task type's template; head: index in the bank, -1 = the vocabulary; images: whether
    its samples have images (a text-only task's have none); classes: of the head.
    """

    name: str
    reader: ShardReader
    sample: Callable[[dict], Sample]
    head: int = -1
    images: bool = True
    classes: int = 0


@dataclass(frozen=True)
class LoaderConfig:
    seed: int
    rank: int
    world_size: int
    micro_batch: int
    image_size: int
    max_length: int
    encoder_decoder: bool
    workers: int = 0
    cache_mb: int = 0


@dataclass
class Draft:
    """One sample of a window with its text read; `reason` is set when it must not teach."""

    task: int
    epoch: int
    sample: int
    ordinal: int
    crc: int
    text: Encoded
    reason: str | None = None


@dataclass
class LoadedWindow:
    """This rank's share of a window: its units in order of micro-steps, text read, images not yet.

    units: one list of drafts per micro-step, empty = filler.
    counts: [tasks] int64, targets of each task in this rank's units; known before the first backward.
    shapes: (packed row of each draft or None, least width of a row) of every unit; units without one: (None, 0).
    """

    step: int
    units: list[list[Draft]]
    counts: np.ndarray
    shapes: list[tuple[np.ndarray | None, int]] = field(default_factory=list)

    def shape(self, unit: int) -> tuple[np.ndarray | None, int]:
        return self.shapes[unit] if self.shapes else (None, 0)

    @property
    def drafts(self) -> list[Draft]:
        return [draft for unit in self.units for draft in unit]


class Loader:
    """Reads the samples of one rank.

    plan: `window(step)` and `locate(task, ordinals)`; deal: `deal(window) -> rounds` with `unit(rank)`.
    sources: tasks in the plan's order.
    """

    def __init__(self, plan, deal, sources: Sequence[Source], codec: TextCodec, config: LoaderConfig):
        self.plan, self.deal, self.sources, self.codec, self.config = plan, deal, sources, codec, config
        self.masked = masked_sample(codec, config.encoder_decoder)
        self.cache = Cache(config.cache_mb * 2**20)
        self.pool = ThreadPoolExecutor(config.workers) if config.workers else None
        self.next: tuple[int, Future] | None = None

    def window(self, step: int) -> LoadedWindow:
        """Text of this rank's share of a window; starts reading the next one when there are workers."""
        if self.next is not None and self.next[0] == step:
            window = self.next[1].result()
        else:
            window = self.read(step)
        self.next = (step + 1, self.pool.submit(self.read, step + 1)) if self.pool else None
        return window

    def forget(self) -> None:
        """Drops what was read ahead: the plan has changed."""
        self.next = None

    def read(self, step: int) -> LoadedWindow:
        window = self.plan.window(step)
        units, shapes, counts = [], [], np.zeros(len(self.sources), np.int64)
        for round_ in self.deal(window):
            places, rows, width = round_.unit(self.config.rank)
            units.append(self.drafts(*window.take(places)))
            shapes.append((rows, width))
            for draft in units[-1]:
                counts[draft.task] += draft.text.count
        return LoadedWindow(step, units, counts, shapes)

    def drafts(self, tasks: np.ndarray, ordinals: np.ndarray) -> list[Draft]:
        found = np.zeros((2, len(tasks)), np.int64)  # epoch, sample
        for task in np.unique(tasks):
            here = tasks == task
            found[:, here] = self.plan.locate(int(task), ordinals[here])
        columns = (tasks.tolist(), found[0].tolist(), found[1].tolist(), ordinals.tolist())
        return [self.draft(*numbers) for numbers in zip(*columns, strict=True)]

    def draft(self, task: int, epoch: int, sample: int, ordinal: int) -> Draft:
        source, reason = self.sources[task], None
        try:
            text = self.cache.get(("text", task, sample), lambda: self.encode(source, sample))
        except BadSample as error:
            text, reason = self.masked, error.reason
        return Draft(task, epoch, sample, ordinal, source.reader.crc(sample), text, reason)

    def encode(self, source: Source, sample: int) -> tuple[Encoded, int]:
        text = encode_record(
            source.reader.record(sample), source.sample, self.codec, self.config.max_length,
            encoder_decoder=self.config.encoder_decoder, images=source.images, classes=source.classes,
        )  # fmt: skip
        return text, 64 + 16 * len(text.tokens)

    def batches(self, window: LoadedWindow, weights: Sequence[float]) -> Iterator[Batch]:
        """One batch per micro-step; images that fail to decode become masked rows, with the reason in their draft.

        weights: of each target, per task.
        """
        if self.pool is None:
            for index, unit in enumerate(window.units):
                yield self.batch(unit, [self.image(draft) for draft in unit], weights, *window.shape(index))
            return
        ahead: list[list[Future]] = []
        for index, unit in enumerate(window.units):
            while len(ahead) <= index + UNITS_AHEAD and len(ahead) < len(window.units):
                ahead.append([self.pool.submit(self.image, draft) for draft in window.units[len(ahead)]])
            yield self.batch(unit, [future.result() for future in ahead[index]], weights, *window.shape(index))
            ahead[index] = []

    def batch(self, unit: list[Draft], images: list, weights: Sequence[float], packed=None, width: int = 0) -> Batch:
        rows = [
            Row(draft.text, image, 0.0 if draft.reason else float(weights[draft.task]), self.key(draft), draft.task,
                self.sources[draft.task].head)
            for draft, image in zip(unit, images, strict=True)
        ]  # fmt: skip
        if not rows:
            rows, packed, width = [Row(self.masked, None, 0.0, 0, 0)], None, 0
        sizes = {"image_size": self.config.image_size, "pad_id": self.codec.pad_id}
        return collate(rows, **sizes, width=width, packed=packed)

    def image(self, draft: Draft) -> np.ndarray | None:
        """Pixels of a draft, uint8 [3, P, P]; black, with the reason in the draft, when they cannot be had."""
        reader, size = self.sources[draft.task].reader, self.config.image_size
        if not draft.text.images:
            return None
        try:
            return self.cache.get(("image", draft.task, draft.sample), lambda: decoded(reader, draft.sample, size))
        except (BadSample, OSError, ValueError) as error:
            # Nothing but a masked row will do here: the other ranks are in the middle of the window.
            draft.reason = draft.reason or (error.reason if isinstance(error, BadSample) else str(error))
            return np.zeros((3, size, size), np.uint8)

    def key(self, draft: Draft) -> int:
        """What the sample's dropout is keyed by: seed, task and place in the task's stream; never rank or unit."""
        text = f"{self.config.seed}/{self.sources[draft.task].name}/{draft.ordinal}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)

    def journal(self, window: LoadedWindow) -> list[dict]:
        """The masked samples of a window, as journal entries."""
        return [
            {
                "step": window.step,
                "task": self.sources[draft.task].name,
                "where": self.sources[draft.task].reader.where(draft.sample),
                "reason": draft.reason,
            }
            for draft in window.drafts
            if draft.reason
        ]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def decoded(reader: ShardReader, sample: int, size: int) -> tuple[np.ndarray, int]:
    data = reader.image(sample)
    if data is None:
        raise BadSample("it has no image")
    pixels = decode_image(data, size)
    return pixels, pixels.nbytes


class Cache:
    """Least recently used values up to a number of bytes; safe between threads."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.items: OrderedDict = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key, make):
        """The value of a key; `make() -> (value, bytes)` when it is not here. An exception of `make` is not kept."""
        with self.lock:
            if key in self.items:
                self.items.move_to_end(key)
                return self.items[key][0]
        value, size = make()
        with self.lock:
            if key not in self.items and size <= self.limit:
                self.items[key] = (value, size)
                self.used += size
            while self.used > self.limit:
                self.used -= self.items.popitem(last=False)[1][1]
        return value
