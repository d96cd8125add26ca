"""Checks between ranks, on a CPU group with a short timeout, before any ZeRO collective.

ZeRO-3 ranks that disagree hang; here they say first who disagrees about what, and all raise the same error.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import dsvlm
from dsvlm.schedule.agreement import difference, merge, summarise
from dsvlm.train.nodes import Nodes, find_nodes

PATIENCE = 1800  # seconds: what starts and checkpoints may take on the slowest rank


class SharedError(ValueError):
    """An error that all ranks raise together. told: whether this one leaves it to rank 0 to say so."""

    def __init__(self, text: str):
        super().__init__(text)
        self.told = dist.get_rank() > 0


class Guard:
    """The ranks' own channel, in two levels: within each node, then among their leaders.

    timeout: seconds to wait for the slowest rank at a window; for starts and checkpoints it is PATIENCE.
    host: whose ranks are a node; default is this machine's name.
    """

    def __init__(self, timeout: int, host: str = ""):
        self.timeout = timeout
        nodes = find_nodes(host)
        self.quick = Nodes(nodes, timeout)
        self.patient = Nodes(nodes, max(timeout, PATIENCE))

    def same(self, record: dict) -> None:
        """Raises ValueError on every rank, naming field, ranks and values, unless all ranks hold the same record."""
        mark = mark_of(record)
        extremes = torch.tensor([mark, -mark])
        self.collective(self.patient.all_reduce, extremes, dist.ReduceOp.MAX)
        if extremes[0] != -extremes[1]:
            self.raise_difference(record)

    def raise_difference(self, record: dict) -> None:
        summary = self.collective(self.patient.merge, summarise(dist.get_rank(), record), merge)
        message = self.collective(self.patient.broadcast, summary and difference(summary))
        assert message is not None, "ranks differ in a record that compares equal"
        raise SharedError(f"the ranks do not hold the same run: {message}")

    def together(self, function, *arguments):
        """Calls a function on every rank; when it fails on some, all ranks raise the same ValueError, naming them."""
        result, error = None, None
        try:
            result = function(*arguments)
        except (ValueError, OSError) as caught:
            error = str(caught)
        self.raise_any(error)
        return result

    def raise_any(self, error: str | None) -> None:
        """Raises ValueError on all ranks when any of them brings an error: the lowest such rank's."""
        failed = torch.tensor([error is not None], dtype=torch.int64)
        self.collective(self.patient.all_reduce, failed)
        if failed:
            first = self.collective(self.patient.merge, (dist.get_rank(), error), first_error)
            rank, text = self.collective(self.patient.broadcast, first)
            where = "" if failed == dist.get_world_size() else f"rank {rank}: "
            raise SharedError(f"{where}{text}")

    def first(self, function, *arguments):
        """Calls a function on rank 0 alone: its result there, None elsewhere; its ValueError on every rank."""
        return self.together(*((function, *arguments) if dist.get_rank() == 0 else (lambda: None,)))

    def enter_window(self, record: dict, counts: np.ndarray, stop: bool, error: str | None) -> tuple[np.ndarray, bool]:
        """The check before a window: equal records (its mark, step), and the sums that normalise it.

        counts: [tasks] int64 of this rank; error: why this rank cannot go on, or None.
        Returns the counts' sum over ranks and whether any rank wants to stop; raises ValueError on all ranks when they
        disagree or one of them cannot go on.
        """
        mark = mark_of(record)
        extremes = torch.tensor([mark, -mark, int(stop), int(error is not None)])
        self.collective(self.quick.all_reduce, extremes, dist.ReduceOp.MAX)
        if extremes[0] != -extremes[1]:
            self.raise_difference(record)
        if extremes[3]:
            self.raise_any(error)
        return self.sum(counts), bool(extremes[2])

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over ranks of int64 (wrapping) or float64 values."""
        total = torch.from_numpy(values.copy())
        self.collective(self.quick.all_reduce, total)
        return total.numpy()

    def gather(self, value) -> list:
        """One small Python value of every rank, in rank order, on rank 0; [] elsewhere."""
        return self.collective(self.patient.gather, value)

    def collective(self, function, *arguments):
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()}: the other ranks did not answer in time, or one ended; its own message says "
                f"why. Windows wait {self.timeout} s (train.timeout: raise it if a rank only reads slowly), starts and "
                f"saves {max(self.timeout, PATIENCE)} s ({error})"
            ) from error


def mark_of(record: dict) -> int:
    """56 bits of a record: all ranks hold the same one if the largest and the smallest mark are equal."""
    text = repr(sorted(record.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


def first_error(errors: list[tuple[int, str | None]]) -> tuple[int, str | None]:
    return next((item for item in errors if item[1] is not None), errors[0])


def code_version() -> str:
    """Version of the package with a hash of its source: nodes with different checkouts must not train together."""
    digest = hashlib.sha256()
    root = Path(dsvlm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{dsvlm.__version__}+{digest.hexdigest()[:12]}"
