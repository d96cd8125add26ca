"""A rank's share of a window on its way to batches."""

from dataclasses import dataclass, field

import numpy as np

from dsvlm.data.encode import Encoded
from dsvlm.data.jobs import Job


@dataclass(slots=True)
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
class Images:
    """Images of a unit that were asked for.

    drafts: those of the unit that have one; pixels: [N, 3, P, P] uint8, colours innermost in memory, valid when all
    jobs are done.
    """

    drafts: list[Draft]
    pixels: np.ndarray | None = None
    jobs: list[Job] = field(default_factory=list)


@dataclass
class LoadedWindow:
    """This rank's share of a window: its units in order of micro-steps, text read, images not yet.

    units: one list of drafts per micro-step, empty = filler.
    counts: [tasks] int64, targets of each task in this rank's units; known before the first backward.
    shapes: (packed row of each draft or None, least width of a row) of every unit; units without one: (None, 0).
    asked: images of the first units, None once they were used.
    """

    step: int
    units: list[list[Draft]]
    counts: np.ndarray
    shapes: list[tuple[np.ndarray | None, int]] = field(default_factory=list)
    asked: list[Images | None] = field(default_factory=list, repr=False)

    def shape(self, unit: int) -> tuple[np.ndarray | None, int]:
        return self.shapes[unit] if unit < len(self.shapes) else (None, 0)

    @property
    def drafts(self) -> list[Draft]:
        return [draft for unit in self.units for draft in unit]


@dataclass
class Share:
    """A window whose texts are being read.

    sizes: samples of each unit; numbers: (task, epoch, sample, ordinal) of every sample; fetches: jobs that come first;
    texts: jobs for those that were not known, None before they are asked for.
    """

    step: int
    sizes: list[int]
    shapes: list[tuple[np.ndarray | None, int]]
    numbers: list[tuple[int, int, int, int]]
    fetches: list[Job] = field(default_factory=list)
    texts: list[Job] | None = None
    loaded: LoadedWindow | None = None
