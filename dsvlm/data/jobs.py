"""What a loader asks for, and the simplest thing that answers: this process itself."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from dsvlm.data.encode import Encoded
from dsvlm.data.reading import Reading, Text

AT_ONCE = 2**21  # bytes of images that are read before they are decoded: a part of a processor's cache


@dataclass
class Job:
    """Samples to be read in one go.

    kind: fetch (of one task), text or image; items: (task, sample); step: of the window they belong to.
    pixels: of image jobs, [N, 3, P, P] uint8; places: which of the N each item's image goes to; start: where `pixels`
    begins in the workers' file.
    skip: items (by place) that are not touched any more, with the reason.
    after: of a fetch, the step at which each item is needed again.
    answer: per item: Text, or None or why the image is black; of a fetch: what is under way in this process.
    """

    kind: str
    items: list[tuple[int, int]]
    step: int
    pixels: np.ndarray | None = None
    places: Sequence[int] = ()
    start: int = 0
    skip: dict[int, str] = field(default_factory=dict)
    after: list[int] = field(default_factory=list)
    answer: list | Exception | None = None

    def result(self) -> list:
        """The answer; raises the ValueError or OSError that it may be."""
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None, "not waited for"
        return self.answer


def carry_out(job: Job, reading: Reading, begin: Callable[[int], None] = lambda place: None) -> list:
    """The answer to a job; `begin` is told the place of each item before it is touched."""
    if job.kind == "fetch":
        samples, after = np.array([sample for _, sample in job.items], np.int64), np.array(job.after, np.int64)
        return reading.fetch(job.items[0][0], samples, job.step, after)
    if job.kind == "image":
        return images(job, reading, begin)
    answers = []
    for place, (task, sample) in enumerate(job.items):
        begin(place)
        skipped = place in job.skip
        answers.append(Text(None, 0, job.skip[place]) if skipped else reading.text(task, sample))
    return answers


def images(job: Job, reading: Reading, begin: Callable[[int], None]) -> list[str | None]:
    """The answer to an image job. Many are read before the first is decoded.

    Reading one costs half as much right after another as it does after decoding, which needs the caches for itself.
    """
    answers: list[str | None] = []
    while (first := len(answers)) < len(job.items):
        found: list[bytes | str] = []
        size = 0
        for place in range(first, len(job.items)):
            if size >= AT_ONCE:
                break
            begin(place)
            known = job.skip.get(place)
            found.append(reading.encoded(*job.items[place]) if known is None else known)
            size += len(found[-1])
        for place, data in enumerate(found, first):
            begin(place)
            answers.append(reading.decoded(data, job.pixels[job.places[place]]))
    return answers


def pack(texts: list[Text]) -> tuple[bytes, list[tuple]]:
    """Texts as they travel between processes: all ids as one piece of int32, and of each text the rest."""
    ids = array("i", chain.from_iterable(text.row.ids for text in texts if text.row))
    return ids.tobytes(), [(text.crc, text.reason, text.row and (len(text.row.ids), *text.row[1:])) for text in texts]


def unpack(data: bytes, numbers: list[tuple]) -> list[Text]:
    """What was packed; ids are views of one array."""
    ids, texts, end = np.frombuffer(data, np.int32), [], 0
    for crc, reason, row in numbers:
        if row is not None:
            size, *rest = row
            row, end = Encoded(ids[end : end + size], *rest), end + size
        texts.append(Text(row, crc, reason))
    return texts


class Inline:
    """Jobs are done by this process when their answers are wanted."""

    ahead = 0  # images worth asking for before they are needed

    def __init__(self, reading: Reading):
        self.reading = reading

    def submit(self, job: Job) -> None:
        """Nothing yet."""

    def wait(self, job: Job) -> list:
        """The answer to a job that was submitted."""
        if job.answer is None:
            job.answer = carry_out(job, self.reading)
        return job.result()

    def take(self, count: int) -> tuple[int, np.ndarray]:
        return 0, np.empty(count, np.uint8)

    def poll(self) -> None:
        pass

    def take_events(self) -> list[dict]:
        return []

    def close(self) -> None:
        pass
