"""Line charts as inline SVG, drawn by hand: one file without a plotting library, coloured by the page's style."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

MAX_BUCKETS = 300  # points of a drawn line: more than that is not seen, but makes the file heavy
COLOURS = 8  # classes s0 .. s7 of the page's style
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42  # margins around the plot


@dataclass(frozen=True)
class Series:
    """One line: ys over xs (ascending), the same number of both."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def smooth(ys: Sequence[float]) -> list[float]:
    """Means over about a fortieth of the points, each in the middle of its own, so that the line does not lag."""
    sums = [0.0, *accumulate(ys)]
    reach = len(ys) // 80
    smoothed = []
    for i in range(len(ys)):
        r = min(reach, i, len(ys) - 1 - i)
        smoothed.append((sums[i + r + 1] - sums[i - r]) / (2 * r + 1))
    return smoothed


def line_chart(series: Sequence[Series], x_label: str, y_label: str, width: int = 860, height: int = 340) -> str:
    """Smoothed lines over the raw ones, with axes and labels; the y axis is logarithmic when values span much.

    series: at least one that holds a point; all values finite.
    """
    lines = [(s, smooth(s.ys)) for s in series if len(s.ys)]
    low, high = y_range([y for s, _ in lines for y in s.ys], [y for _, ys in lines for y in ys])
    log = low > 0 and high / low > 20
    low = low if log else 0.0
    x_end = max(max(s.xs) for s, _ in lines) or 1
    plot_width, plot_height = width - LEFT - RIGHT, height - TOP - BOTTOM

    def x_of(x: float) -> float:
        return LEFT + plot_width * x / x_end

    def y_of(y: float) -> float:
        if log:
            share = math.log(max(y, low) / low) / math.log(high / low)
        else:
            share = (y - low) / (high - low)
        return TOP + plot_height * (1 - share)

    parts = []
    for value in log_ticks(low, high) if log else linear_ticks(high):
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in linear_ticks(x_end):
        anchor = "middle" if x_of(value) < width - RIGHT - 10 else "end"
        parts.append(f'<text x="{x_of(value):.1f}" y="{height - BOTTOM + 18}" text-anchor="{anchor}">{value:g}</text>')
    centre, middle = LEFT + plot_width / 2, TOP + plot_height / 2
    parts.append(f'<text x="{centre:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    scale = f"{y_label} (log scale)" if log else y_label
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(scale)}</text>'
    )
    parts.append(
        f'<svg x="{LEFT}" y="{TOP}" width="{plot_width}" height="{plot_height}" '
        f'viewBox="{LEFT} {TOP} {plot_width} {plot_height}">'  # an inner svg clips what leaves the plot
    )
    for index, (s, _) in enumerate(lines):
        points = [(x_of(x), y_of(y)) for x, y in extremes(s.xs, s.ys)]
        parts.append(polyline(points, f"raw s{index % COLOURS}"))
    for index, (s, ys) in enumerate(lines):
        points = [(x_of(x), y_of(y)) for x, y in thinned(s.xs, ys)]
        parts.append(polyline(points, f"smooth s{index % COLOURS}"))
    parts.append("</svg>")
    title = f"{y_label} over {x_label}: {', '.join(s.name for s, _ in lines)}"
    return svg(width, height, title, parts)


def legend(names: Sequence[str]) -> str:
    items = (f'<span><i class="swatch s{i % COLOURS}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    return f'<p class="legend">{"".join(items)}</p>'


def sparkline(series: Series, top: float | None = None, width: int = 240, height: int = 64) -> str:
    """A small chart from 0 to `top` (default: a little above what is usual), without axes."""
    ys = smooth(series.ys)
    top = top or 1.15 * y_range(series.ys, ys)[1]
    x_end = max(series.xs) or 1

    def place(points):
        return [(width * x / x_end, 2 + (height - 4) * (1 - y / top)) for x, y in points]

    parts = [
        f'<line class="grid" x1="0" x2="{width}" y1="{height - 2}" y2="{height - 2}"/>',
        polyline(place(extremes(series.xs, series.ys)), "raw s0"),
        polyline(place(thinned(series.xs, ys)), "smooth s0"),
    ]
    return svg(width, height, series.name, parts)


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return "".join([head, *parts, "</svg>"])


def polyline(points: Sequence[tuple[float, float]], style: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{style}" points="{text}"/>'


def y_range(raw: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """Values to show: all smoothed ones, and the raw ones but for the most extreme hundredth at either end."""
    ordered = sorted(raw)
    low = min(ordered[len(ordered) // 100], min(smoothed))
    high = max(ordered[-1 - len(ordered) // 100], max(smoothed))
    if high <= 0:
        return 0.0, 1.0
    return max(low, high * 1e-4), high * 1.05


def thinned(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """At most MAX_BUCKETS points, the last one among them."""
    step = max(1, math.ceil(len(xs) / MAX_BUCKETS))
    points = list(zip(xs, ys, strict=True))
    return points[::step] + ([points[-1]] if (len(points) - 1) % step else [])


def extremes(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """The lowest and highest value of each bucket of points, so that thinning hides no spike."""
    step = math.ceil(len(xs) / MAX_BUCKETS)
    if step <= 1:
        return list(zip(xs, ys, strict=True))
    points = []
    for start in range(0, len(xs), step):
        part = ys[start : start + step]
        points += [(xs[start], min(part)), (xs[start], max(part))]
    return points


def linear_ticks(high: float) -> list[float]:
    """Round values from 0 to `high`, about five."""
    raw = high / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return [round(i * step, 10) for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    ticks = (round(m * 10.0**p, 10) for p in powers for m in factors)
    return [tick for tick in ticks if low <= tick <= high]
