"""Which backend of the GIT attention "auto" is."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from dsvlm.ops.git_kernel import kernel_refuses
from dsvlm.ops.git_mask import GitMask
from dsvlm.ops.library import constant

MEASURED = Path(__file__).with_name("measured.json")


def choose(q: Tensor, k: Tensor, v: Tensor, mask: GitMask, alibi_slopes: Tensor | None, dropout: float) -> str:
    """The backend that "auto" means: on CUDA what was measured as the fastest, and nothing that was not measured."""
    dense = "sdpa" if alibi_slopes is None else "math"
    if dropout > 0.0:
        return "math"
    if q.shape[1] == 1:  # a token that is decoded: its mask is one row
        return dense
    fused = not kernel_refuses(q, k, v, alibi_slopes)
    if q.device.type != "cuda":
        return "kernel" if fused else dense
    can = {
        "kernel": fused,
        # torch.compile cannot trace the corner of its second call
        "two_call": mask.images is not None and alibi_slopes is None and not torch.compiler.is_compiling(),
        "flex": mask.kv_len == q.shape[1],
        "sdpa": alibi_slopes is None,
    }
    able = tuple(backend for backend in can if can[backend])
    return measured(q.device.index or 0, q.shape[3], q.shape[1], mask.packed, able) or dense


@constant
def measured(device: int, head_size: int, queries: int, packed: bool, able: tuple[str, ...]) -> str | None:
    """The fastest able backend in the table, of the next larger number of queries measured; None: not measured."""
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return lookup(table(), name, head_size, queries, packed, able)


@functools.cache
def table() -> list[dict]:
    """Rows of `measured.json`, which `benchmarks/gpu.sh` writes: device, head_size, queries_up_to, packed, backend.

    Of several rows about the same thing the first that can serve counts: "two_call" does not take every batch.
    """
    return json.loads(MEASURED.read_text())


def lookup(
    rows: list[dict], device: str, head_size: int, queries: int, packed: bool, able: tuple[str, ...] | None = None
) -> str | None:
    fitting = [
        row
        for row in rows
        if (row["device"], row["head_size"], row["packed"]) == (device, head_size, packed)
        and row["queries_up_to"] >= queries
    ]
    nearest = min((row["queries_up_to"] for row in fitting), default=None)
    fastest = (row["backend"] for row in fitting if row["queries_up_to"] == nearest)
    return next((backend for backend in fastest if able is None or backend in able), None)
