"""What a loader asks for, and the simplest thing that answers: this process itself."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dsvlm.data.reading import Reading, Text


@dataclass
class Job:
    """Samples to be read in one go.

    kind: fetch (of one task), text or image; items: (task, sample); step: of the window they belong to.
    pixels: of image jobs, where each item's image goes ([3, P, P] uint8); starts: the same in the workers' file.
    skip: items (by place) that are not touched any more, with the reason.
    after: of a fetch, the step at which each item is needed again.
    answer: per item: Text, or None or why the image is black; of a fetch: nothing.
    """

    kind: str
    items: list[tuple[int, int]]
    step: int
    pixels: list[np.ndarray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
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
        reading.fetch(job.items[0][0], samples, job.step, after)
        return []
    answers = []
    for place, (task, sample) in enumerate(job.items):
        begin(place)
        if job.kind == "text":
            skipped = place in job.skip
            answers.append(Text(None, 0, job.skip[place]) if skipped else reading.text(task, sample))
        elif place in job.skip:
            job.pixels[place][...] = 0
            answers.append(job.skip[place])
        else:
            answers.append(reading.image(task, sample, job.pixels[place]))
    return answers


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
