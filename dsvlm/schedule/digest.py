"""What identifies a run: the digest of a step, the fingerprint of its samples, and the comparison of ranks."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from dsvlm.schedule.keys import hash64, key64
from dsvlm.schedule.plan import SCHEDULE_VERSION, Schedule, Window

_MISSING = "(missing)"


def identity_bytes(schedule: Schedule, recipe_hash: str, manifest_hashes: Sequence[str]) -> bytes:
    """Return 32 bytes that name a run: its recipe, its data (one manifest hash per stream) and its schedule.

    Only what the data order depends on enters: `quota` for cyclic strategies, else `samples`; never `rounds`.
    """
    assert len(manifest_hashes) == len(schedule.streams)
    streams = [
        {
            "name": stream.name,
            "share": int(stream.quota if schedule.cyclic else stream.samples),
            "shards": [int(size) for size in stream.shard_sizes],
            "manifest": manifest,
        }
        for stream, manifest in zip(schedule.streams, manifest_hashes, strict=True)
    ]
    described = {
        "version": SCHEDULE_VERSION,
        "recipe": recipe_hash,
        "seed": int(schedule.seed),
        "strategy": schedule.strategy,
        "block": int(schedule.block),
        "group": int(schedule.group),
        "samples": int(schedule.samples) if schedule.cyclic else 0,
        "chunk": int(schedule.chunk) if schedule.strategy == "per_rank" else 0,
        "streams": streams,
    }
    if schedule.phases:  # a later field: schedules without phases keep the identity they had
        described["phases"] = [[int(phase.start), *map(int, phase.shares)] for phase in schedule.phases]
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=32).digest()


def digest(identity: bytes, window: Window) -> str:
    """Return 32 hex digits that name one step of a run; equal for every world size and micro-batch."""
    order = [0, 0] if window.order_key is None else [1, window.order_key]
    head = np.array([SCHEDULE_VERSION, len(identity), window.step, len(window.table), *order], "<u8")
    blocks = np.ascontiguousarray(window.table, "<i8")
    return hashlib.blake2b(head.tobytes() + identity + blocks.tobytes(), digest_size=16).hexdigest()


def fingerprint(task_name: str, epoch: np.ndarray, sample: np.ndarray, crc: np.ndarray) -> int:
    """Return the sum over samples of hash64(task, epoch, sample id, crc), mod 2^64: their order does not matter.

    `epoch, sample: [n] int64`, `crc: [n] uint32`; an empty sum is 0.
    """
    hashes = hash64(key64("fingerprint", task_name), epoch, sample, crc)
    return int(hashes.sum(dtype=np.uint64))


def combine(fingerprints: Iterable[int]) -> int:
    """Add fingerprints of parts (of tasks, micro-steps, ranks) mod 2^64; wrapped int64 sums, below 0, are right too."""
    return sum(int(part) for part in fingerprints) % 2**64


def compare(records: Sequence[dict]) -> str | None:
    """Compare one dict (field -> value) per rank: None if all agree, else a message on the first field that differs.

    The message names the ranks that differ from the majority (of ties, the value of the lowest rank) and both values.
    Put causes before effects: seed and recipe before the plan's digest.
    """
    fields = list(dict.fromkeys(field for record in records for field in record))
    different = [field for field in fields if len({repr(record.get(field, _MISSING)) for record in records}) > 1]
    if not different:
        return None
    values = [repr(record.get(different[0], _MISSING)) for record in records]
    usual = Counter(values).most_common(1)[0][0]
    odd = {value: [rank for rank, own in enumerate(values) if own == value] for value in values if value != usual}
    parts = [f"{value} on {_ranks(ranks)}" for value, ranks in odd.items()]
    usual_ranks = _ranks([rank for rank, own in enumerate(values) if own == usual])
    also = f" (different too: {', '.join(different[1:])})" if different[1:] else ""
    return (
        f"the ranks do not agree: {different[0]!r} is {', '.join(parts)}, but {usual} on {usual_ranks}{also}. "
        "Start all ranks with the same recipe, data, code and settings."
    )


def _ranks(ranks: list[int]) -> str:
    """Name ranks as ranges, at most 8 of them: "ranks 0, 2-5"."""
    runs = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = [str(low) if low == high else f"{low}-{high}" for low, high in runs[:8]]
    more = ", ..." if len(runs) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names)}{more}"
