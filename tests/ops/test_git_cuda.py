"""The attention kernels for CUDA: their own source on the emulator, and the library's ops on a device (marked gpu)."""

import math
from dataclasses import dataclass

import pytest
import torch

from tests.ops.emulation.build import HERE, emulated

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
BUILT = [("bf16", 64), ("bf16", 80), ("bf16", 96), ("bf16", 128), ("f16", 64), ("f16", 128)]
POISON = float("nan")


@dataclass
class Case:
    """Rows of samples as text: "9i 4t" is an image of 9 positions and a text of 4, "5." padding, "|" the next sample
    of a packed row; what is left of `length` is padding."""

    length: int
    rows: tuple[str, ...]
    heads: int = 1
    kv_heads: int = 1
    dim: int = 64
    kind: str = "bf16"
    alibi: bool = False
    tall: bool = False  # blocks of 128 queries instead of 64
    transposed: bool = False  # views of [B, H, S, D]
    size: float = 1.0  # of the scores

    def __str__(self):
        name = f"{self.length} {' & '.join(self.rows)} h{self.heads}/{self.kv_heads} d{self.dim} {self.kind}"
        return name + "".join(f" {flag}" for flag in ("alibi", "tall", "transposed") if getattr(self, flag))


NASTY = "3. 20i 2. 17t 1. 2t | 5t | 9i | 2. 30i 4. 6t"
CASES = [
    Case(1, ("1t",)),
    Case(1, ("1i", "1.")),
    Case(63, ("40i 20t", "63t"), heads=2),
    Case(64, ("64i", "33i 31t")),
    Case(65, ("65i", "1i 64t"), dim=128),
    Case(65, ("65t", "10i"), dim=80, kind="bf16", tall=True),
    Case(130, (NASTY, "130."), heads=4, kv_heads=2, dim=96, transposed=True),
    Case(130, ("70. 30i 30t", "100i 20t"), heads=2, kv_heads=1, dim=80, alibi=True),
    Case(130, (NASTY, "64i 66t"), kind="f16", tall=True, alibi=True, heads=2),
    Case(200, (NASTY, "60i 70. 30i 40t"), dim=128, tall=True, heads=2, transposed=True),
    Case(200, ("129i 71t",), dim=128, kind="f16", heads=2, kv_heads=1),
    Case(200, ("1. 64i 64. 63t", "190i"), dim=96, tall=True),
    Case(192, ("150i 42t",), size=120.0),
    Case(192, ("150i 42t",), dim=128, size=1e4, tall=True),
]


def layout(case: Case):
    """Intervals int32 [B, S, 2] and the dense mask bool [B, S, S], each from the text of the case."""
    rows = torch.zeros(len(case.rows), case.length, 2, dtype=torch.int32)
    dense = torch.zeros(len(case.rows), case.length, case.length, dtype=torch.bool)
    for b, text in enumerate(case.rows):
        place = 0
        for sample in text.split("|"):
            kinds = {}
            for part in sample.split():
                kinds |= {place + i: part[-1] for i in range(int(part[:-1])) if part[-1] != "."}
                place += int(part[:-1])
            images = [p for p, kind in kinds.items() if kind == "i"]
            for query, kind in kinds.items():
                last = max(images) if kind == "i" else query
                rows[b, query] = torch.tensor([min(kinds), last + 1])
                for key, other in kinds.items():
                    dense[b, query, key] = other == "i" or (kind == "t" and key <= query)
        assert place <= case.length
    return rows, dense


def inputs(case: Case, rows: torch.Tensor):
    """q, k, v, grad_out [B, S, heads, D] with NaN in padding, and slopes or None."""
    rng = torch.Generator().manual_seed(case.length * 131 + case.dim)
    batch, padding = len(case.rows), rows[..., 0] == rows[..., 1]

    def draw(heads, size=1.0):
        shape = (batch, heads, case.length, case.dim) if case.transposed else (batch, case.length, heads, case.dim)
        values = (torch.randn(shape, generator=rng) * size).to(TYPES[case.kind])
        values = values.transpose(1, 2) if case.transposed else values
        values[padding] = POISON
        return values

    q, k, v = draw(case.heads, case.size), draw(case.kv_heads), draw(case.kv_heads)
    slopes = 2.0 ** -torch.arange(1, case.heads + 1, dtype=torch.float32) if case.alibi else None
    return q, k, v, draw(case.heads), slopes


def reference(case, dense, q, k, v, grad_out, slopes, scale):
    """out, lse, dq, dk, dv in float64 of the same rounded inputs; padding counts as zeros."""
    live = dense.any(2)
    q, k, v, grad_out = (torch.where(live[..., None, None], x.double(), 0.0) for x in (q, k, v, grad_out))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    group = case.heads // case.kv_heads
    wide_k, wide_v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * scale
    if slopes is not None:
        place = torch.arange(case.length)
        scores = scores + slopes.double()[:, None, None] * (place[None, :] - place[:, None])
    scores = scores.masked_fill(~dense[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", weights, wide_v)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def assert_close(name, found, expected, live, bound):
    """Relative to all of `expected`, or to 1e-3 a value where those cancel; padding is exactly 0."""
    assert not torch.isnan(found).any(), f"{name}: NaN"
    assert (found[~live] == 0).all(), f"{name}: padding is not 0"
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-3 * math.sqrt(expected.numel()))
    assert error <= bound, f"{name}: relative error {error:.2e}"


def poisoned(*shape, dtype):
    return torch.full(shape, POISON, dtype=dtype)


class Emulated:
    """Forward and backward on the emulator, with results and workspace full of NaN before."""

    def __init__(self, kernels, case, rows, q, k, v, slopes, scale, shared_rows=False):
        self.kernels, self.case, self.rows, self.qkv, self.slopes, self.scale = kernels, case, rows, (q, k, v), slopes, scale
        batch, length, heads, _ = q.shape
        keys, kv_heads = k.shape[1:3]
        stride = 0 if rows.shape[0] == 1 and batch > 1 else length
        self.sizes = torch.tensor([batch, length, keys, heads, kv_heads, case.dim, stride])

    def strides(self, *tensors):
        return torch.tensor([stride for x in tensors for stride in x.stride()[:3]])

    def call(self, name, *arguments, seed):
        self.kernels.call(f"{name}_{self.case.kind}_{self.case.dim}", *arguments, seed=seed)

    def forward(self, seed=0):
        q = self.qkv[0]
        out = poisoned(*q.shape, dtype=q.dtype)
        lse = poisoned(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        self.call(
            "forward", out, lse, *self.qkv, self.rows, self.slopes, self.sizes, self.strides(*self.qkv), self.scale,
            2 if self.case.tall else 1, seed=seed,
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out, out, lse, seed=0):
        grads = [poisoned(*x.shape, dtype=x.dtype) for x in self.qkv]
        statistics = poisoned(*lse.shape, 2, dtype=torch.float32)
        summaries = torch.full((self.rows.shape[0], -(-lse.shape[2] // 32), 8), -1, dtype=torch.int32)
        self.call(
            "backward", *grads, grad_out, out, lse, *self.qkv, self.rows, self.slopes, self.sizes,
            self.strides(*self.qkv, grad_out, out), self.scale, statistics, summaries, seed=seed,
        )  # fmt: skip
        return grads


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    source = f'#include "{HERE / "attention.cuh"}"\n'
    source += "".join(f"DSVLM_TEST_KERNELS({kind}, {dim})\n" for kind, dim in BUILT)
    return emulated(source, tmp_path_factory.mktemp("attention"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernels_follow_the_reference(kernels, case):
    rows, dense = layout(case)
    q, k, v, grad_out, slopes = inputs(case, rows)
    scale = 1 / math.sqrt(case.dim)
    expected = reference(case, dense, q, k, v, grad_out, slopes, scale)
    live, bound = dense.any(2), 1e-2 if case.kind == "bf16" else 2e-3
    run = Emulated(kernels, case, rows, q, k, v, slopes, scale)
    out, lse = run.forward()
    assert_close("out", out, expected[0], live, bound)
    seen = live[:, None].expand_as(lse)
    assert (lse[~seen] == -math.inf).all()
    torch.testing.assert_close(lse[seen].double(), expected[1][seen], atol=1e-3, rtol=1e-5)
    out[~live] = POISON
    bound = bound if case.size < 1e3 else math.inf  # weights of 0 and 1: gradients are differences of equal numbers
    grads = run.backward(grad_out, out, lse)
    for name, found, wanted in zip(("dq", "dk", "dv"), grads, expected[2:], strict=True):
        assert_close(name, found, wanted, live, bound)
