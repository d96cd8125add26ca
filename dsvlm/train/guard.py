"""Checks between ranks, on a CPU group with a short timeout, before any ZeRO collective.

ZeRO-3 ranks that disagree hang; here they say first who disagrees about what, and all raise the same error.
"""

import hashlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import dsvlm
from dsvlm.schedule.digest import compare

PATIENCE = 1800  # seconds: what starts and checkpoints may take on the slowest rank


class Guard:
    """The ranks' own channel: gloo groups over all of them.

    timeout: seconds to wait for the slowest rank at a window; for starts and checkpoints it is PATIENCE.
    """

    def __init__(self, timeout: int):
        self.timeout = timeout
        self.quick = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout, PATIENCE)))

    def same(self, record: dict) -> None:
        """Raises ValueError on every rank, naming field, ranks and values, unless all ranks hold the same record."""
        difference = compare(self.gather(record))
        if difference:
            raise ValueError(f"the ranks do not hold the same run: {difference}")

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
        """Raises ValueError on all ranks when any of them brings an error."""
        errors = self.gather(error)
        ranks = [rank for rank, text in enumerate(errors) if text is not None]
        if ranks:
            where = "" if len(ranks) == len(errors) else f"rank {ranks[0]}: "
            raise ValueError(f"{where}{errors[ranks[0]]}")

    def first(self, function, *arguments):
        """Calls a function on rank 0 alone: its result there, None elsewhere; its ValueError on every rank."""
        return self.together(*((function, *arguments) if dist.get_rank() == 0 else (lambda: None,)))

    def enter_window(self, record: dict, counts: np.ndarray, stop: bool, error: str | None) -> tuple[np.ndarray, bool]:
        """The check before a window: equal records (digest, step), and the sums that normalise it.

        counts: [tasks] int64 of this rank; error: why this rank cannot go on, or None.
        Returns the counts' sum over ranks and whether any rank wants to stop; raises ValueError on all ranks when they
        disagree or one of them cannot go on.
        """
        mark = int.from_bytes(hashlib.blake2b(repr(sorted(record.items())).encode(), digest_size=7).digest(), "little")
        extremes = torch.tensor([mark, -mark, int(stop), int(error is not None)])
        self.collective(dist.all_reduce, extremes, op=dist.ReduceOp.MAX)
        if extremes[0] != -extremes[1]:
            self.same(record)
            raise AssertionError("ranks differ in a record that compares equal")
        if extremes[3]:
            self.raise_any(error)
        totals = torch.from_numpy(counts.copy())
        self.collective(dist.all_reduce, totals)
        return totals.numpy(), bool(extremes[2])

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over ranks of int64 (wrapping) or float64 values."""
        total = torch.from_numpy(values.copy())
        self.collective(dist.all_reduce, total)
        return total.numpy()

    def gather(self, value) -> list:
        """One small Python value of every rank, on every rank."""
        values: list = [None] * dist.get_world_size()
        self.collective(dist.all_gather_object, values, value, patient=True)
        return values

    def collective(self, function, *arguments, patient: bool = False, **options) -> None:
        try:
            function(*arguments, group=self.patient if patient else self.quick, **options)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()}: the other ranks did not answer in time ({self.timeout} s), or one ended; "
                f"its own message says why. If a rank only reads slowly, raise train.timeout ({error})"
            ) from error


def code_version() -> str:
    """Version of the package with a hash of its source: nodes with different checkouts must not train together."""
    digest = hashlib.sha256()
    root = Path(dsvlm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{dsvlm.__version__}+{digest.hexdigest()[:12]}"
