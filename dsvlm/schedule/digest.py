"""What identifies a run: the digest of a step and the fingerprint of its samples."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

from dsvlm.schedule.keys import hash64, key64
from dsvlm.schedule.mixture import Chunks
from dsvlm.schedule.plan import SCHEDULE_VERSION, Schedule, Window


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
    """Return 32 hex digits that name one step of a run; equal for every world size and micro-batch. O(blocks)."""
    return _named(identity, window, window.table)


def mark(identity: bytes, window: Window) -> str:
    """Return 32 hex digits that ranks compare before a step: its digest, or that of a sample where it has many chunks.

    No larger window takes longer, so that every rank of a large job can have it before every step.
    """
    return _named(identity, window, window.source.sample() if isinstance(window.source, Chunks) else window.table)


def _named(identity: bytes, window: Window, content: np.ndarray) -> str:
    order = [0, 0] if window.order_key is None else [1, window.order_key]
    head = np.array([SCHEDULE_VERSION, len(identity), window.step, len(window.source), *order], "<u8")
    named = hashlib.blake2b(head.tobytes() + identity, digest_size=16)
    named.update(np.ascontiguousarray(content, "<i8"))
    return named.hexdigest()


def fingerprint(task_name: str, epoch: np.ndarray, sample: np.ndarray, crc: np.ndarray) -> int:
    """Return the sum over samples of hash64(task, epoch, sample id, crc), mod 2^64: their order does not matter.

    `epoch, sample: [n] int64`, `crc: [n] uint32`; an empty sum is 0.
    """
    hashes = hash64(key64("fingerprint", task_name), epoch, sample, crc)
    return int(hashes.sum(dtype=np.uint64))


def combine(fingerprints: Iterable[int]) -> int:
    """Add fingerprints of parts (of tasks, micro-steps, ranks) mod 2^64; wrapped int64 sums, below 0, are right too."""
    return sum(int(part) for part in fingerprints) % 2**64
