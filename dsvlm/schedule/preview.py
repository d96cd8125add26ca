"""What a plan will do in each step, from numbers alone: the rows of `dsvlm plan`."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dsvlm.schedule.digest import digest
from dsvlm.schedule.plan import Plan, Schedule, Window
from dsvlm.schedule.strategy import Round, idle_share

WIDTH = 120  # characters of a line of the table


def preview(
    plan: Plan, schedule: Schedule, world_size: int, deal: Callable[[Window], Sequence], steps: Iterable[int],
    identity: bytes,
) -> list[dict]:  # fmt: skip
    """Return one row per step: step, tasks, epochs, micro_steps, units, fillers, idle_share, digest (all JSON types).

    `deal(window)` gives the rounds. `tasks` maps a task's name to its samples in the window; `epochs` to its exact
    position after the step, as {"epoch": whole epochs done, "position": samples into the next, "size": samples in one}.
    """
    rows, known = [], {}
    for step in steps:
        window = plan.window(step)
        task, first, count = window.table.T
        samples = np.bincount(task, count, len(schedule.streams)).astype(np.int64).tolist()
        done = np.zeros(len(schedule.streams), np.int64)
        np.maximum.at(done, task, first + count)
        rounds = deal(window)
        # Windows that are cut alike by samples, those of a phase for instance, have the same figures: O(rounds) once.
        alike = tuple(rounds[0].cut.runs) if isinstance(rounds[0], Round) else step
        if alike not in known:
            known[alike] = sum(part.units for part in rounds), float(idle_share(rounds))
        units, idle = known[alike]
        held = [index for index, number in enumerate(samples) if number]
        rows.append(
            {
                "step": step,
                "tasks": {schedule.streams[index].name: samples[index] for index in held},
                "epochs": {schedule.streams[i].name: position(int(done[i]), schedule.streams[i].size) for i in held},
                "micro_steps": len(rounds),
                "units": units,
                "fillers": len(rounds) * world_size - units,
                "idle_share": idle,
                "digest": digest(identity, window),
            }
        )
    return rows


def position(ordinal: int, size: int) -> dict:
    """Return where a stream of epochs of `size` samples stands."""
    epoch, place = divmod(ordinal, size)
    return {"epoch": epoch, "position": place, "size": size}


def render(rows: list[dict]) -> str:
    """Return the rows of `preview` as a plain-text table of WIDTH: the numbers of a step, then its tasks."""
    lines = [["step", "micro-steps", "units", "fillers", "idle", "digest", "samples of each task (epochs done)"]]
    for row in rows:
        idle = f"{100 * row['idle_share']:.1f} %"
        numbers = [row["step"], row["micro_steps"], row["units"], row["fillers"], idle, row["digest"]]
        lines.append([*map(str, numbers), ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)) for line in lines]
    indent = sum(widths) + 2 * len(widths)
    for number, row in enumerate(rows, 1):
        parts = [
            f"{name} {count} ({at['epoch']}+{at['position']}/{at['size']})"
            for (name, count), at in zip(row["tasks"].items(), row["epochs"].values(), strict=True)
        ]
        padded[number] += f"\n{' ' * indent}".join(filled(parts, WIDTH - indent))
    return "\n".join(line.rstrip() for line in padded)


def filled(parts: Sequence[str], width: int) -> list[str]:
    """Parts with commas between them, in lines of at most `width` characters where no part is longer."""
    lines = [""]
    for index, part in enumerate(parts):
        comma = "," if index + 1 < len(parts) else ""
        if lines[-1] and len(f"{lines[-1]} {part}{comma}") > width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{part}{comma}"
    return lines
