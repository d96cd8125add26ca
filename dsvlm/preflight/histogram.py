"""A histogram as inline SVG, in the page's colours."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from dsvlm.eval.charts import linear_ticks, svg

WIDTH, HEIGHT = 520, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 38
BARS, LEAST = 48, 15  # most bars; least end of the axis, so that few values are no walls


def histogram(values: Sequence[int], label: str, limit: int | None = None, limit_label: str = "") -> str:
    """Bars of how many samples have which whole number; those above `limit` in the colour of mistakes.

    values: at least one. The limit is drawn when it is near enough to the values not to squeeze them.
    """
    top = max(values)
    limit = math.inf if limit is None else limit
    end = max(LEAST, limit if top <= limit <= 1.5 * top else top)
    step = max(1, -(-(end + 1) // BARS))
    counts = np.bincount(np.asarray(values) // step, minlength=end // step + 1)
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bar, high = plot_width / len(counts), int(counts.max()) * 1.05

    def x_of(value: float) -> float:
        return LEFT + plot_width * value / (len(counts) * step)

    def y_of(count: float) -> float:
        return TOP + plot_height * (1 - count / high)

    parts = []
    for tick in (t for t in linear_ticks(high) if t == int(t)):
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for index in np.flatnonzero(counts).tolist():
        low, count = index * step, int(counts[index])
        kind = "column over" if low > limit else "column"
        span = f"{low}" if step == 1 else f"{low} to {low + step - 1}"
        parts.append(
            f'<rect class="{kind}" x="{LEFT + index * bar + 0.5:.1f}" y="{y_of(count):.1f}" '
            f'width="{max(bar - 1, 0.5):.1f}" height="{plot_height + TOP - y_of(count):.1f}">'
            f"<title>{span}: {count}</title></rect>"
        )
    for tick in (t for t in linear_ticks(end) if t == int(t)):
        x = x_of(tick + 0.5) if step == 1 else x_of(tick)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    if limit <= end:
        x = x_of(limit + 1)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{TOP + plot_height}"/>')
        parts.append(f'<text x="{x - 5:.1f}" y="{TOP - 8}" text-anchor="end">{escape(limit_label)}</text>')
    parts.append(f'<text x="{LEFT + plot_width / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>')
    return svg(WIDTH, HEIGHT, f"histogram of {label}", parts)
