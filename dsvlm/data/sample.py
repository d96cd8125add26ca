"""A sample: an ordered list of segments, each with a loss flag (design, section 2)."""

from dataclasses import dataclass
from typing import NamedTuple

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of the image's width and height


class Text(NamedTuple):
    text: str
    loss: bool = False


@dataclass(frozen=True)
class Boxes:
    """Regions of the sample's image; read and written as location tokens."""

    boxes: tuple[Box, ...]
    loss: bool = False


@dataclass(frozen=True)
class Image:
    """The sample's image; its pixels stay in the shard until the unit is collated."""


Segment = Text | Boxes | Image


class Sample(NamedTuple):
    """What a task makes of one record.

    segments: prompt and target in reading order; the target's segments carry `loss`.
    label: class of a head-bank task, or None.
    """

    segments: tuple[Segment, ...]
    label: int | None = None
