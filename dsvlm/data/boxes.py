"""Boxes as location tokens: a quantiser that is off by at most half a bin and never makes a box of area 0.

Each axis is quantised as a pair (i, j) of bins for its two ends. Ends in different bins decode to the bins' centres.
Ends in one bin would collapse there, so a short side has codes of its own, half a bin wide: (b, b) is the middle of
bin b, and the otherwise unused (b, b - 1) is centred on the edge between b - 1 and b. The nearest of the two is at
most a quarter of a bin away, and half a side differs from a quarter of a bin by at most another quarter: half a bin
in all. Bins that touch the image's border have no outer edge code; their middle code is moved towards the border by a
quarter of a bin instead.
"""

import re
from collections.abc import Sequence

from dsvlm.data.sample import Box

TOKEN = re.compile(r"<loc_(\d+)>")


def location_tokens(bins: int) -> list[str]:
    """Names of the location tokens, one per bin, shared by both axes and by input and output."""
    return [f"<loc_{i}>" for i in range(bins)]


def encode_side(low: float, high: float, bins: int) -> tuple[int, int]:
    """Bins of a side's two ends, which lie in [0, 1] with low < high."""
    low, high = low * bins, high * bins
    i, j = min(int(low), bins - 1), min(int(high), bins - 1)
    if i != j:
        return i, j
    middle = (low + high) / 2 - i
    if middle > 0.75 and i + 1 < bins:
        return i + 1, i
    if middle < 0.25 and i > 0:
        return i, i - 1
    return i, i


def decode_side(i: int, j: int, bins: int) -> tuple[float, float]:
    """Ends of a side in [0, 1], low < high, whatever two bins a model wrote."""
    if i > j + 1:
        i, j = j, i
    if i < j:
        low, high = i + 0.5, j + 0.5
    elif i == j + 1:
        low, high = i - 0.25, i + 0.25
    elif i == 0:
        low, high = 0.25, 0.5
    elif i == bins - 1:
        low, high = bins - 0.5, bins - 0.25
    else:
        low, high = i + 0.25, i + 0.75
    return low / bins, high / bins


def encode_box(box: Box, bins: int) -> str:
    """A box as four location tokens x0 y0 x1 y1.

    Raises ValueError when the box is not inside the image or has no area.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"box {list(box)}: expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, as shares of the image")
    (a, c), (b, d) = encode_side(x0, x1, bins), encode_side(y0, y1, bins)
    return f"<loc_{a}><loc_{b}><loc_{c}><loc_{d}>"


def decode_boxes(text: str, bins: int) -> list[Box]:
    """All boxes written in a text, four location tokens each; a rest of fewer than four is dropped."""
    codes = [min(int(code), bins - 1) for code in TOKEN.findall(text)]
    boxes = []
    for a, b, c, d in zip(*[iter(codes)] * 4, strict=False):
        (x0, x1), (y0, y1) = decode_side(a, c, bins), decode_side(b, d, bins)
        boxes.append((x0, y0, x1, y1))
    return boxes


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def match_boxes(predicted: Sequence[Box], true: Sequence[Box]) -> float:
    """Sum of the IoUs of the best pairs, greedily from the best, over the larger number of boxes: 1 = the same set."""
    pairs = sorted(((iou(p, t), i, j) for i, p in enumerate(predicted) for j, t in enumerate(true)), reverse=True)
    used_p, used_t, total = set(), set(), 0.0
    for overlap, i, j in pairs:
        if i not in used_p and j not in used_t:
            used_p.add(i)
            used_t.add(j)
            total += overlap
    return total / max(len(predicted), len(true), 1)
