"""What reads samples: one object that a process of its own can hold as well as the training's."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsvlm.data.encode import Encoded, encode_record
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.sample import Sample
from dsvlm.data.tokenizer import Encoder
from dsvlm.data.transforms import make_decoder


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
    """Recipe and rank as the loader sees them; `decoder`: one that `resolve_decoder` has named."""

    seed: int
    rank: int
    world_size: int
    micro_batch: int
    image_size: int
    max_length: int
    encoder_decoder: bool
    workers: int = 0
    cache_mb: int = 0
    worker_timeout: int = 30
    decoder: str = "pillow"
    dct_scaling: bool = False


class Text(NamedTuple):
    """A sample's text as read; `row` is None, and `reason` says why, when it must not teach."""

    row: Encoded | None
    crc: int
    reason: str | None = None


class Reading:
    """Reads samples of the tasks by (task, sample): the same whatever was read before, and by whom."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, config: LoaderConfig):
        self.sources, self.encoder, self.config = list(sources), encoder, config
        self.decode = make_decoder(config.decoder, config.image_size, config.dct_scaling)

    def fetch(self, task: int, samples: np.ndarray, step: int, after: np.ndarray) -> list[Future]:
        """Hint that the samples are read at a step, and not again before the steps `after: [n] int64`.

        Returns what is under way.
        """
        return self.sources[task].reader.fetch(samples, step, after)

    def is_asking(self) -> bool:
        """Whether a store is waited for."""
        return any(source.reader.is_asking for source in self.sources)

    def text(self, task: int, sample: int) -> Text:
        """Text of a sample; ValueError or OSError when its shard cannot be read at all, so that no run can go on."""
        source = self.sources[task]
        crc = source.reader.crc(sample)
        try:
            record = source.reader.record(sample)
            row = encode_record(
                record, source.sample, self.encoder, self.config.max_length,
                encoder_decoder=self.config.encoder_decoder, images=source.images, classes=source.classes,
            )  # fmt: skip
        except BadSample as error:
            return Text(None, crc, error.reason)
        return Text(row, crc)

    def image(self, task: int, sample: int, pixels: np.ndarray) -> str | None:
        """Writes the sample's image into `pixels` [3, P, P]; black, and the reason returned, when it cannot be had."""
        return self.decoded(self.encoded(task, sample), pixels)

    def encoded(self, task: int, sample: int) -> bytes | str:
        """The sample's encoded image, or why it cannot be had."""
        try:
            data = self.sources[task].reader.image(sample)
        except (OSError, ValueError) as error:
            return reason_of(error)
        return "it has no image" if data is None else data

    def decoded(self, data: bytes | str, pixels: np.ndarray) -> str | None:
        """Writes what `encoded` gave into `pixels` [3, P, P]; black, and the reason returned, when it is none."""
        if isinstance(data, str):
            pixels[...] = 0
            return data
        try:
            found = self.decode(data, pixels)
            if found is not pixels:
                pixels[...] = found
        except (OSError, ValueError) as error:
            # Nothing but a masked row will do here: the other ranks are in the middle of the window.
            pixels[...] = 0
            return reason_of(error)
        return None

    def where(self, task: int, sample: int) -> str:
        """`task caption, shard-000003.tar:KEY`, for messages."""
        source = self.sources[task]
        return f"task {source.name}, {source.reader.where(sample)}"


def reason_of(error: Exception) -> str:
    return error.reason if isinstance(error, BadSample) else str(error)
