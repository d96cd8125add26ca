"""Do all ranks hold the same record? Summaries that merge, so that no process sees more than its own part of a job."""

import json
from collections.abc import Iterable, Sequence

SHOWN = 8  # values and runs of ranks that a message names
MISSING = "'(missing)'"

Ranges = list[tuple[int, int]]  # (first, last) of runs of ranks, ascending
Summary = dict[str, Ranges]  # record -> the ranks that hold it


def summarise(rank: int, record: dict) -> Summary:
    """Return the summary of one rank; `record` maps fields to values, which are compared by their repr."""
    return {json.dumps({field: repr(value) for field, value in record.items()}): [(rank, rank)]}


def merge(summaries: Iterable[Summary]) -> Summary:
    """Return the summary of all ranks of some summaries; ranks that agree take no more room than one of them."""
    merged: Summary = {}
    for summary in summaries:
        for record, ranges in summary.items():
            merged.setdefault(record, []).extend(ranges)
    return {record: _joined(ranges) for record, ranges in merged.items()}


def difference(summary: Summary) -> str | None:
    """Return None if all ranks agree, else a message on the first field that differs.

    The message names the ranks that differ from the majority (of ties, the value of the lowest rank) and both values.
    Put causes before effects in a record: seed and recipe before the plan's digest.
    """
    records = [(json.loads(text), ranges) for text, ranges in sorted(summary.items(), key=lambda item: item[1][0])]
    fields = dict.fromkeys(field for record, _ in records for field in record)
    different = [field for field in fields if len({record.get(field, MISSING) for record, _ in records}) > 1]
    if not different:
        return None
    held: dict[str, Ranges] = {}
    for record, ranges in records:
        held.setdefault(record.get(different[0], MISSING), []).extend(ranges)
    held = {value: _joined(ranges) for value, ranges in held.items()}
    usual = max(held, key=lambda value: _count(held[value]))
    odd = [value for value in held if value != usual]
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
    return difference(merge(summarise(rank, record) for rank, record in enumerate(records)))


def _joined(ranges: Ranges) -> Ranges:
    runs: Ranges = []
    for low, high in sorted(ranges):
        if runs and low == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], high)
        else:
            runs.append((low, high))
    return runs


def _count(*parts: Ranges) -> int:
    return sum(high - low + 1 for ranges in parts for low, high in ranges)


def _names(ranges: Ranges) -> str:
    """Name ranks as ranges: "ranks 0, 2-5"."""
    names = [str(low) if low == high else f"{low}-{high}" for low, high in ranges[:SHOWN]]
    more = ", ..." if len(ranges) > SHOWN else ""
    return f"rank{'s' if _count(ranges) > 1 else ''} {', '.join(names)}{more}"
