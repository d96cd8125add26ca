"""Do all ranks hold the same record? Summaries that merge, so that no process sees more than its own part of a job."""

from collections.abc import Iterable, Sequence

SHOWN = 8  # values and runs of ranks that a message names

Ranges = list[tuple[int, int]]  # (first, last) of runs of ranks, ascending
Summary = dict[str, dict[str, Ranges]]  # field -> value -> the ranks that hold it


def summarise(rank: int, record: dict) -> Summary:
    """Return the summary of one rank; `record` maps fields to values, which are compared by their repr."""
    return {field: {repr(value): [(rank, rank)]} for field, value in record.items()}


def merge(summaries: Iterable[Summary]) -> Summary:
    """Return the summary of all ranks of some summaries; ranks that agree take no more room than one of them."""
    merged: Summary = {}
    for summary in summaries:
        for field, values in summary.items():
            held = merged.setdefault(field, {})
            for value, ranges in values.items():
                held.setdefault(value, []).extend(ranges)
    return {field: {value: _joined(ranges) for value, ranges in held.items()} for field, held in merged.items()}


def difference(summary: Summary, world_size: int) -> str | None:
    """Return None if ranks 0 .. world_size - 1 agree, else a message on the first field that differs.

    The message names the ranks that differ from the majority (of ties, the value of the lowest rank) and both values.
    Put causes before effects in a record: seed and recipe before the plan's digest.
    """
    different = [field for field, held in summary.items() if len(held) > 1 or _count(*held.values()) < world_size]
    if not different:
        return None
    held = dict(summary[different[0]])
    lacking = _complement(_joined([run for ranges in held.values() for run in ranges]), world_size)
    if lacking:
        held["'(missing)'"] = lacking
    by_rank = sorted(held, key=lambda value: held[value][0])
    usual = max(by_rank, key=lambda value: _count(held[value]))
    odd = [value for value in by_rank if value != usual]
    parts = [f"{value} on {_names(held[value])}" for value in odd[:SHOWN]]
    if len(odd) > SHOWN:
        parts.append(f"{len(odd) - SHOWN} other values on {_count(*(held[value] for value in odd[SHOWN:]))} ranks")
    also = f" (different too: {', '.join(different[1:])})" if different[1:] else ""
    return (
        f"the ranks do not agree: {different[0]!r} is {', '.join(parts)}, but {usual} on {_names(held[usual])}{also}. "
        "Start all ranks with the same recipe, data, code and settings."
    )


def compare(records: Sequence[dict]) -> str | None:
    """Return the `difference` of one record per rank."""
    return difference(merge(summarise(rank, record) for rank, record in enumerate(records)), len(records))


def _joined(ranges: Ranges) -> Ranges:
    runs: Ranges = []
    for low, high in sorted(ranges):
        if runs and low == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], high)
        else:
            runs.append((low, high))
    return runs


def _complement(ranges: Ranges, world_size: int) -> Ranges:
    edges = [-1, *(edge for run in ranges for edge in run), world_size]
    return [(low + 1, high - 1) for low, high in zip(edges[::2], edges[1::2], strict=True) if high - low > 1]


def _count(*parts: Ranges) -> int:
    return sum(high - low + 1 for ranges in parts for low, high in ranges)


def _names(ranges: Ranges) -> str:
    """Name ranks as ranges: "ranks 0, 2-5"."""
    names = [str(low) if low == high else f"{low}-{high}" for low, high in ranges[:SHOWN]]
    more = ", ..." if len(ranges) > SHOWN else ""
    return f"rank{'s' if _count(ranges) > 1 else ''} {', '.join(names)}{more}"
