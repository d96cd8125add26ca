"""What a plan will do in each step, from numbers alone: the rows of `dsvlm plan`."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dsvlm.schedule.digest import digest
from dsvlm.schedule.plan import Plan, Schedule, Window
from dsvlm.schedule.strategy import idle_share


def preview(
    plan: Plan, schedule: Schedule, world_size: int, deal: Callable[[Window], Sequence], steps: Iterable[int],
    identity: bytes,
) -> list[dict]:  # fmt: skip
    """Return one row per step: step, tasks, epochs, micro_steps, units, fillers, idle_share, digest (all JSON types).

    `deal(window)` gives the rounds. `tasks` maps a task's name to its samples in the window; `epochs` to its exact
    position after the step, as {"epoch": whole epochs done, "position": samples into the next, "size": samples in one}.
    """
    rows = []
    for step in steps:
        window = plan.window(step)
        task, first, count = window.table.T
        samples = np.bincount(task, count, len(schedule.streams)).astype(np.int64).tolist()
        done = np.zeros(len(schedule.streams), np.int64)
        np.maximum.at(done, task, first + count)
        rounds = deal(window)
        units = sum(part.units for part in rounds)
        held = [index for index, number in enumerate(samples) if number]
        rows.append(
            {
                "step": step,
                "tasks": {schedule.streams[index].name: samples[index] for index in held},
                "epochs": {schedule.streams[i].name: position(int(done[i]), schedule.streams[i].size) for i in held},
                "micro_steps": len(rounds),
                "units": units,
                "fillers": len(rounds) * world_size - units,
                "idle_share": float(idle_share(rounds)),
                "digest": digest(identity, window),
            }
        )
    return rows


def position(ordinal: int, size: int) -> dict:
    """Return where a stream of epochs of `size` samples stands."""
    epoch, place = divmod(ordinal, size)
    return {"epoch": epoch, "position": place, "size": size}


def render(rows: list[dict]) -> str:
    """Return the rows of `preview` as a plain-text table, one line per step."""
    lines = [["step", "tasks (samples)", "epochs done", "micro-steps", "units", "fillers", "idle", "digest"]]
    for row in rows:
        epochs = [f"{name} {at['epoch']}+{at['position']}/{at['size']}" for name, at in row["epochs"].items()]
        lines.append(
            [
                str(row["step"]),
                ", ".join(f"{name} {count}" for name, count in row["tasks"].items()),
                ", ".join(epochs),
                str(row["micro_steps"]),
                str(row["units"]),
                str(row["fillers"]),
                f"{100 * row['idle_share']:.1f} %",
                row["digest"],
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
