"""What a plan will do, from numbers alone: the rows of `dsvlm plan`."""

from dsvlm.schedule.digest import digest
from dsvlm.schedule.plan import Plan, Schedule
from dsvlm.schedule.strategy import deal, idle_share


def preview(
    plan: Plan, schedule: Schedule, world_size: int, micro_batch: int, steps: range, identity: bytes
) -> list[dict]:
    """Return one row per step: step, tasks, epochs, micro_steps, units, fillers, idle_share, digest (all JSON types).

    `tasks` maps a task's name to its samples in the window; `epochs` to its exact position after the step, as
    {"epoch": whole epochs done, "position": samples into the next, "size": samples in an epoch}.
    """
    rows = []
    for step in steps:
        window = plan.window(step)
        tasks, epochs = {}, {}
        for block in window.blocks:
            stream = schedule.streams[block.task]
            tasks[stream.name] = tasks.get(stream.name, 0) + block.count
            epoch, position = divmod(block.first_ordinal + block.count, stream.size)
            epochs[stream.name] = {"epoch": epoch, "position": position, "size": stream.size}
        rounds = deal(window, schedule, world_size, micro_batch)
        units = sum(part.units for part in rounds)
        rows.append(
            {
                "step": step,
                "tasks": tasks,
                "epochs": epochs,
                "micro_steps": len(rounds),
                "units": units,
                "fillers": len(rounds) * world_size - units,
                "idle_share": float(idle_share(rounds)),
                "digest": digest(identity, window),
            }
        )
    return rows


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
