"""The attention kernels for CUDA: their own source on the emulator, and the library's ops on a device (marked gpu)."""

import math
from dataclasses import dataclass

import pytest
import torch

from dsvlm.ops.library import library
from tests.ops.emulation.build import HERE, emulated, guarded

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
BUILT = [("bf16", 64), ("bf16", 80), ("bf16", 96), ("bf16", 128), ("f16", 64)]
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
    lowered: bool = False  # all scores are near -120

    def __str__(self):
        name = f"{self.length} {' & '.join(self.rows)} h{self.heads}/{self.kv_heads} d{self.dim} {self.kind}"
        return name + "".join(f" {flag}" for flag in ("alibi", "tall", "transposed", "lowered") if getattr(self, flag))


NASTY = "3. 20i 2. 17t 1. 2t | 5t | 9i | 2. 30i 4. 6t"
CASES = [
    Case(1, ("1t",)),
    Case(1, ("1i", "1.")),
    Case(63, ("40i 20t", "63t"), heads=2),
    Case(64, ("64i", "33i 31t", "40. 10i 14t")),
    Case(65, ("65i", "1i 64t"), dim=128),
    Case(65, ("65t", "10i"), dim=80, tall=True),
    Case(130, (NASTY, "130."), heads=4, kv_heads=2, dim=96, transposed=True),
    Case(130, ("70. 30i 30t", "100i 20t"), heads=2, kv_heads=1, dim=80, alibi=True),
    Case(130, (NASTY, "64i 66t"), kind="f16", tall=True, alibi=True, heads=2),
    Case(200, (NASTY, "60i 70. 30i 40t"), dim=128, tall=True, heads=2, transposed=True),
    Case(200, ("129i 71t",), dim=128, heads=2, kv_heads=1),
    Case(200, ("1. 64i 64. 63t", "190i"), dim=96, tall=True),
    Case(192, ("150i 42t",), size=120.0),
    Case(192, ("90i 5. 40i 50t",), lowered=True),
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
                seen = [key for key, other in kinds.items() if other == "i" or (kind == "t" and key <= query)]
                dense[b, query, seen] = True
        assert place <= case.length
    return rows, dense


def inputs(case: Case, rows: torch.Tensor, keys: int | None = None):
    """q, k, v, grad_out [B, S, heads, D] with NaN in padding and no memory behind them; slopes or None."""
    rng = torch.Generator().manual_seed(case.length * 131 + case.dim)
    batch, padding = len(case.rows), rows[..., 0] == rows[..., 1]

    def draw(length, heads, size=1.0):
        shape = (batch, heads, length, case.dim) if case.transposed else (batch, length, heads, case.dim)
        values = guarded((torch.randn(shape, generator=rng) * size).to(TYPES[case.kind]))
        values = values.transpose(1, 2) if case.transposed else values
        if length == padding.shape[1]:
            values[padding.expand(batch, -1)] = POISON
        return values

    q = draw(case.length, case.heads, case.size)
    k, v = (draw(keys or case.length, case.kv_heads) for _ in range(2))
    if case.lowered:
        q[..., 0], k[..., 0] = 31, -31 * math.sqrt(case.dim) / 8
    slopes = 2.0 ** -torch.arange(1, case.heads + 1, dtype=torch.float32) if case.alibi else None
    return q, k, v, draw(case.length, case.heads), slopes


def reference(case, dense, q, k, v, grad_out, slopes):
    """out, lse, dq, dk, dv in float64 of the same rounded inputs; padding counts as zeros."""
    queries, keys = dense.any(2), dense.any(1)
    q, grad_out = (torch.where(queries[..., None, None], x.double(), 0.0).requires_grad_() for x in (q, grad_out))
    k, v = (torch.where(keys[..., None, None], x.double(), 0.0).requires_grad_() for x in (k, v))
    wide_k, wide_v = (x.repeat_interleave(case.heads // case.kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) / math.sqrt(case.dim)
    if slopes is not None:
        place, length = torch.arange(keys.shape[1]), queries.shape[1]
        scores = scores + slopes.double()[:, None, None] * (place - place[-length:, None])
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
    return guarded(torch.full(shape, POISON, dtype=dtype))


class Emulated:
    """The kernels on the emulator: whatever they write is NaN before, and has no memory behind it."""

    def __init__(self, kernels):
        self.kernels = kernels

    def call(self, name, results, tensors, case, rows, slopes, *more, strided, seed):
        (batch, queries, heads, dim), (keys, kv_heads) = tensors[-3].shape, tensors[-2].shape[1:3]
        sizes = torch.tensor([batch, queries, keys, heads, kv_heads, dim, 0 if rows.shape[0] < batch else queries])
        strides = torch.tensor([stride for x in strided for stride in x.stride()[:3]])
        self.kernels.call(
            f"{name}_{case.kind}_{dim}", *results, *tensors, guarded(rows), slopes, sizes, strides,
            1 / math.sqrt(dim), *more, seed=seed,
        )  # fmt: skip
        return results

    def forward(self, case, q, k, v, rows, slopes, seed=0):
        results = poisoned(*q.shape, dtype=q.dtype), poisoned(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        blocks = 2 if case.tall else 1
        return self.call("forward", results, (q, k, v), case, rows, slopes, blocks, strided=(q, k, v), seed=seed)

    def backward(self, case, grad_out, q, k, v, out, lse, rows, slopes, seed=0):
        results = [poisoned(*x.shape, dtype=x.dtype) for x in (q, k, v)]
        workspace = (
            poisoned(*lse.shape, 2, dtype=torch.float32),
            poisoned(rows.shape[0], -(-lse.shape[2] // 32), 8, dtype=torch.float32),
        )
        return self.call(
            "backward", results, (grad_out, out, lse, q, k, v), case, rows, slopes, *workspace,
            strided=(q, k, v, grad_out, out), seed=seed,
        )  # fmt: skip


class Device:
    """The library's ops on a CUDA device; results come back."""

    def __init__(self):
        assert library() and torch.cuda.is_available()

    def forward(self, case, q, k, v, rows, slopes):
        tensors = [x if x is None else x.cuda() for x in (q, k, v, rows, slopes)]
        return [x.cpu() for x in torch.ops.dsvlm.git_attention_forward(*tensors, 1 / math.sqrt(case.dim))]

    def backward(self, case, *tensors):
        tensors = [x if x is None else x.cuda() for x in tensors]
        return [x.cpu() for x in torch.ops.dsvlm.git_attention_backward(*tensors, 1 / math.sqrt(case.dim))]


def check(kernels, case, rows, dense, keys=None):
    q, k, v, grad_out, slopes = inputs(case, rows, keys)
    expected = reference(case, dense, q, k, v, grad_out, slopes)
    queries, bound = dense.any(2), 1e-2 if case.kind == "bf16" else 2e-3
    out, lse = kernels.forward(case, q, k, v, rows, slopes)
    assert_close("out", out, expected[0], queries, bound)
    seen = queries[:, None].expand_as(lse)
    assert (lse[~seen] == -math.inf).all()
    torch.testing.assert_close(lse[seen].double(), expected[1][seen], atol=1e-3, rtol=1e-5)
    out[~queries] = POISON
    bound = bound if case.size < 1e3 else math.inf  # weights of 0 and 1: gradients are differences of equal numbers
    bound = 3 * bound if case.lowered else bound  # a column of equal large numbers, whose gradients cancel
    dq, dk, dv = kernels.backward(case, grad_out, q, k, v, out, lse, rows, slopes)
    assert_close("dq", dq, expected[2], queries, bound)
    assert_close("dk", dk, expected[3], dense.any(1), bound)
    assert_close("dv", dv, expected[4], dense.any(1), bound)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    source = f'#include "{HERE / "attention.cuh"}"\n'
    source += "".join(f"DSVLM_TEST_KERNELS({kind}, {dim})\n" for kind, dim in BUILT)
    return Emulated(emulated(source, tmp_path_factory.mktemp("attention")))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_follow_the_reference(emulator, case):
    check(emulator, case, *layout(case))


def test_one_mask_serves_all_samples(emulator):
    case = Case(70, ("3. 40i 20t", "3. 40i 20t"), heads=2)
    rows, dense = layout(case)
    check(emulator, case, rows[:1], dense)


def test_queries_may_be_fewer_than_keys(emulator):
    """No key is known to be padding then, but keys beyond the reach of all queries are still not read."""
    case, keys = Case(33, ("33t",), heads=2, kv_heads=1, alibi=True), 150
    rows, dense = torch.zeros(1, 33, 2, dtype=torch.int32), torch.zeros(1, 33, keys, dtype=torch.bool)
    for query in range(3, 33):
        rows[0, query] = torch.tensor([20, 117 - 32 + query])
        dense[0, query, 20 : 117 - 32 + query] = True
    check(emulator, case, rows, dense, keys)


@pytest.mark.parametrize(
    "case", [Case(130, (NASTY,), 4, 2, 80, alibi=True), Case(200, ("90i 30. 60t",), 2, 1, 128, tall=True)], ids=str
)
def test_the_order_of_threads_changes_no_bit(emulator, case):
    rows, _ = layout(case)
    q, k, v, grad_out, slopes = inputs(case, rows)
    results = []
    for seed in (1, 2, 3):
        out, lse = emulator.forward(case, q, k, v, rows, slopes, seed=seed)
        results.append((out, lse, *emulator.backward(case, grad_out, q, k, v, out, lse, rows, slopes, seed=seed)))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert first.equal(second)


def test_tiles_that_no_query_of_a_block_sees_are_not_loaded(emulator):
    """NaN in the second sample stays there: no block of queries or keys belongs to both."""
    case = Case(128, ("30i 34t | 20i 44t",))
    rows, _ = layout(case)
    q, k, v, grad_out, _ = inputs(case, rows)
    for x in (q, k, v, grad_out):
        x[:, 64:] = POISON
    out, lse = emulator.forward(case, q, k, v, rows, None)
    grads = emulator.backward(case, grad_out, q, k, v, out, lse, rows, None)
    for found in (out, *grads):
        assert not found[:, :64].isnan().any() and found[:, 64:].isnan().all()


LONG = [
    Case(705, ("577i 128t", "577i 60t"), heads=4, kv_heads=2, dim=128),
    Case(705, ("577i 128t", "577i 60t"), heads=4, dim=80, kind="f16", transposed=True),
    Case(1285, ("257i 64t | 257i 64t | 257i 64t | 257i 65t", "1000. 200i 85t"), heads=2, dim=64, alibi=True),
    Case(1089, ("577i 512t",), heads=4, kv_heads=1, dim=96),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LONG, ids=str)
def test_ops_on_a_device_follow_the_reference(case):
    check(Device(), case, *layout(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=str)
def test_a_device_repeats_every_bit(case):
    """Twenty times, with another stream at work for half of them."""
    rows, _ = layout(case)
    q, k, v, grad_out, slopes = (x if x is None else x.cuda() for x in inputs(case, rows))
    rows, busy, scale = rows.cuda(), torch.randn(4096, 4096, device="cuda"), 1 / math.sqrt(case.dim)
    first = None
    for i in range(20):
        if i % 2:
            with torch.cuda.stream(torch.cuda.Stream()):
                busy @ busy
        out, lse = torch.ops.dsvlm.git_attention_forward(q, k, v, rows, slopes, scale)
        grads = torch.ops.dsvlm.git_attention_backward(grad_out, q, k, v, out, lse, rows, slopes, scale)
        first = first or (out, lse, *grads)
        assert all(a.equal(b) for a, b in zip(first, (out, lse, *grads), strict=True))


@pytest.mark.gpu
def test_tensors_that_lie_badly_are_copied():
    """Rows of q that do not begin at 16 bytes, a gradient that is one number everywhere."""
    Device()
    case = Case(100, ("60i 40t",), heads=2)
    rows, _ = layout(case)
    q, k, v, _, _ = inputs(case, rows)
    rows, k, v, scale = rows.cuda(), k.cuda(), v.cuda(), 0.125
    wide = torch.zeros(1, 100, 2, 67, dtype=q.dtype, device="cuda")
    wide[..., 1:65] = q.cuda()
    grad_out = torch.ones((), dtype=q.dtype, device="cuda").expand(1, 100, 2, 64)
    results = []
    for query, grad in ((wide[..., 1:65], grad_out), (q.cuda(), grad_out.contiguous())):
        out, lse = torch.ops.dsvlm.git_attention_forward(query, k, v, rows, None, scale)
        results.append((out, *torch.ops.dsvlm.git_attention_backward(grad, query, k, v, out, lse, rows, None, scale)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_a_device_says_what_it_cannot_take():
    Device()
    q, rows = torch.zeros(1, 8, 2, 72, device="cuda", dtype=torch.bfloat16), torch.zeros(1, 8, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="head size 72, expected 64, 80, 96 or 128"):
        torch.ops.dsvlm.git_attention_forward(q, q, q, rows.cuda(), None, 0.1)
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        single = q[..., :64].float()
        torch.ops.dsvlm.git_attention_forward(single, single, single, rows.cuda(), None, 0.1)
    with pytest.raises(RuntimeError, match="rows is not on q's device"):
        torch.ops.dsvlm.git_attention_forward(*[q[..., :64]] * 3, rows, None, 0.1)
