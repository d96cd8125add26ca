"""One file per source format; each turns a dataset into shard sets with a function, `add_arguments` and `run`."""

import difflib
import hashlib
import math


def choose_tasks(text: str, known) -> tuple[str, ...]:
    """The tasks named in a comma separated list, each once; ValueError for an unknown name, with the nearest one."""
    chosen = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"--tasks: unknown task {name!r}: {hint}")
    if not chosen:
        raise ValueError(f"--tasks is empty: choose from {', '.join(known)}")
    return chosen


def shard_bytes(shard_mb: float) -> int:
    """Bytes of a shard from `--shard-mb`, in MiB; ValueError unless it is more than 0."""
    if not 0 < shard_mb * 2**20 < math.inf:
        raise ValueError(f"--shard-mb {shard_mb}: choose more than 0, and a number")
    return max(1, int(shard_mb * 2**20))


def drawn_rank(seed: int, key: str) -> bytes:
    """The place of a sample in an order drawn from the seed."""
    return hashlib.blake2b(f"{seed}/{key}".encode("ascii"), digest_size=16).digest()
