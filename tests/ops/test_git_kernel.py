"""The compiled GIT attention on the CPU: numbers, padding that must not exist, determinism, decisions about tiles."""

import itertools
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from dsvlm.ops.library import library

NAN, INF = math.nan, math.inf
SIZES = [
    (2, 2, 16), (4, 2, 32), (3, 1, 40), (2, 2, 64), (4, 1, 80), (2, 1, 96), (2, 2, 128), (1, 1, 256), (2, 1, 7),
    (3, 1, 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def op():
    """Not skipped where it is absent: wherever tests run there is a C++ compiler."""
    assert library(), "the compiled ops are not there: pip install --no-build-isolation -e ."
    return torch.ops.dsvlm


class Layout:
    """Samples [images | text] of rows with padding anywhere, and what each position may attend to, by definition."""

    def __init__(self, ids, image):
        """ids: [B, S] of a position's sample, -1 = padding; image: [B, S] bool."""
        self.live = ids >= 0
        key = torch.arange(ids.shape[1])
        before = image[:, None] | (~image[:, :, None] & (key <= key[:, None]))
        self.dense = (ids[:, None] == ids[:, :, None]) & before & self.live[:, None] & self.live[:, :, None]
        first = (ids[:, None] == ids[:, :, None]).int().argmax(dim=2)
        last = (self.dense * (key + 1)).amax(dim=2)
        self.rows = (torch.stack((first, last), dim=2) * self.live[..., None]).int()

    @classmethod
    def drawn(cls, seed, batch, length):
        """Samples of any kind: images only, text only, one token, gaps before, inside and behind them."""
        draw, ids, image = random.Random(seed), [], []
        for _ in range(batch):
            kinds = [(-1, False)] * draw.choice([0, 0, 1, 9])
            for number in itertools.count():
                images, text = draw.choice([0, 1, 5, 17, 40, 130]), draw.choice([0, 1, 3, 20, 70])
                for count, kind in ((images, True), (text, False)):
                    kinds += [(number, kind)] * count
                    if draw.random() < 0.3:  # an unused slot, in front of the text or behind it
                        kinds[len(kinds) - draw.randint(0, count // 2) :] += [(-1, False)] * draw.choice([1, 6, 140])
                if len(kinds) >= length or draw.random() < 0.1:
                    break
            kinds = (kinds + [(-1, False)] * length)[:length]
            ids.append([number for number, _ in kinds])
            image.append([kind for _, kind in kinds])
        return cls(torch.tensor(ids), torch.tensor(image))

    @classmethod
    def packed(cls, samples, length=None):
        """One row of (images, text) samples, one after the other, padding behind them."""
        counts = torch.tensor(samples).flatten()
        ids = torch.arange(len(samples)).repeat_interleave(2).repeat_interleave(counts)
        image = torch.tensor([True, False]).repeat(len(samples)).repeat_interleave(counts)
        rest = (length or len(ids)) - len(ids)
        return cls(F.pad(ids, (0, rest), value=-1)[None], F.pad(image, (0, rest))[None])


def reference(q, k, v, allowed, scale, slopes=None):
    """The formula in fp64 with a dense mask [B, Sq, Sk]: output [B, Sq, H, D], lse [B, H, Sq]; empty rows 0, -inf."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if slopes is not None:
        query = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
        scores = scores + slopes.double()[:, None, None] * (torch.arange(k.shape[2]) - query[:, None])
    allowed = allowed[:, None]
    lse = scores.masked_fill(~allowed, -INF).logsumexp(dim=-1)
    empty = ~allowed.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~allowed & ~empty, -INF).softmax(dim=-1).masked_fill(empty, 0)
    return (weights @ v).transpose(1, 2), lse


def poisoned(x, live, order):
    """The same values as a view into a buffer of NaN, with NaN in padding; order: of the buffer's dimensions."""
    x = torch.where(live[..., None, None], x, NAN)
    whole = torch.full([size + 3 for size in x.permute(order).shape], NAN, dtype=x.dtype)
    view = whole[1:-2, 1:-2, 1:-2, 1:-2]
    view.copy_(x.permute(order))
    return view.permute([order.index(i) for i in range(4)])


def drawn(layout, heads, kv_heads, size, dtype=torch.float32, seed=0, factor=1.0):
    """q, k, v, grad_out [B, S, heads, D]."""
    torch.manual_seed(seed)
    batch, length = layout.live.shape
    shapes = [(batch, length, h, size) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in (q * factor, k, v, grad)]


def run(op, q, k, v, grad, rows, slopes=None, scale=None):
    """Output, lse and the three gradients."""
    scale = scale or q.shape[-1] ** -0.5
    out, lse = op.git_attention_forward(q, k, v, rows, slopes, scale)
    return out, lse, *op.git_attention_backward(grad, q, k, v, out, lse, rows, slopes, scale)


def truth(q, k, v, grad, layout, slopes=None, scale=None):
    """The same in fp64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*leaves, layout.dense, scale or q.shape[-1] ** -0.5, slopes)
    out.backward(grad.double() * layout.live[..., None, None])
    return out.detach(), lse.detach(), *(x.grad for x in leaves)


def sdpa(q, k, v, grad, layout, scale=None):
    """Output and gradients of torch's own attention with a dense mask, in the inputs' type; for layouts unpadded."""
    leaves = [x.transpose(1, 2).detach().clone().requires_grad_() for x in (q, k, v)]
    grouped = q.shape[2] > k.shape[2]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=layout.dense[:, None], enable_gqa=grouped, scale=scale)
    out.backward(grad.transpose(1, 2))
    return [x.transpose(1, 2) for x in (out.detach(), *(leaf.grad for leaf in leaves))]


def error(found, expected):
    """Worse of the relative errors by norm and by largest element."""
    off = found.double() - expected
    return max((off.norm() / expected.norm()).item(), (off.abs().max() / expected.abs().max()).item())


def assert_equal(a, b):
    """Bit by bit; NaN is nowhere."""
    for x, y in zip(a, b, strict=True):
        assert not x.isnan().any()
        assert torch.equal(x, y)


@pytest.fixture
def nan_results():
    """What the op allocates for its results holds NaN at first."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("heads, kv_heads, size", SIZES)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_numbers_with_poison_all_around(op, nan_results, heads, kv_heads, size, dtype, most):
    for seed, slopes in enumerate((None, torch.rand(heads))):
        layout = Layout.drawn(100 * size + seed, batch=2, length=random.Random(size + seed).randint(60, 230))
        inputs = drawn(layout, heads, kv_heads, size, dtype, seed)
        views = [poisoned(x, layout.live, (0, 2, 1, 3) if i % 2 else (0, 1, 2, 3)) for i, x in enumerate(inputs)]
        found, expected = run(op, *views, layout.rows, slopes), truth(*inputs, layout, slopes)
        assert not any(x.isnan().any() for x in found)
        finite = expected[1].isfinite()
        assert torch.equal(found[1].isfinite(), finite) and (found[1][~finite] == -INF).all()
        assert (found[1].double() - expected[1])[finite].abs().max() <= (1e-4 if dtype == torch.float32 else 1e-12)
        for name, i in (("out", 0), ("q", 2), ("k", 3), ("v", 4)):
            assert error(found[i], expected[i]) <= most, name
            assert (found[i][~layout.live] == 0).all(), name
        assert found[0].is_contiguous()


@pytest.mark.parametrize("kv_heads, size", [(4, 64), (2, 80), (1, 128)])
def test_bfloat16_is_as_near_as_sdpa(op, kv_heads, size):
    layout = Layout.packed([(197, 64)])
    q, k, v, grad = drawn(layout, 4, kv_heads, size, torch.bfloat16)
    found, expected = run(op, q, k, v, grad, layout.rows), truth(q, k, v, grad, layout)
    theirs = sdpa(q, k, v, grad, layout)
    for a, b, peer in zip((found[0], *found[2:]), (expected[0], *expected[2:]), theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a, b) <= 2 * error(peer, b)
    assert found[1].dtype == torch.float32 and (found[1] - expected[1]).abs().max() <= 1e-4


@pytest.mark.parametrize("with_slopes", [False, True])
def test_gradcheck(op, with_slopes):
    ids = torch.tensor([[0, 0, -1, 0, 0, -1, 1, 1, 1], [-1, 5, 5, 5, 5, -1, -1, 5, 5]])
    layout = Layout(ids, torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0]]).bool())
    slopes = torch.tensor([0.5, 0.1]) if with_slopes else None

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = op.git_attention_forward(q, k, v, layout.rows, slopes, 0.4)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            return op.git_attention_backward(grad, *ctx.saved_tensors, layout.rows, slopes, 0.4)

    inputs = [x.requires_grad_() for x in drawn(layout, 2, 1, 3, torch.float64)[:3]]
    assert torch.autograd.gradcheck(Attend.apply, inputs)


def test_packed_samples_are_as_alone(op):
    samples = [(197, 64), (1, 1), (30, 0), (0, 45), (257, 7)]
    layout = Layout.packed(samples, length=620)
    q, k, v, grad = drawn(layout, 4, 2, 64)
    together, begin = run(op, q, k, v, grad, layout.rows), 0
    for sample in samples:
        part = slice(begin, begin := begin + sum(sample))
        alone = run(op, *(x[:, part] for x in (q, k, v, grad)), Layout.packed([sample]).rows)
        for name, a, b in zip(("out", "lse", "q", "k", "v"), together, alone, strict=True):
            a = a[:, :, part] if name == "lse" else a[:, part]
            assert (a - b).norm() <= 1e-6 * b.norm(), name


def test_who_sees_whom(op):
    """Text never reaches images, no token reaches an earlier text token, any image token reaches all."""
    layout = Layout.packed([(70, 50)])
    q, k, v, grad = drawn(layout, 2, 2, 64)
    out = op.git_attention_forward(q, k, v, layout.rows, None, 0.1)[0]
    for changed in (69, 70, 95, 119):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, changed], other_v[:, changed] = 3, 7
        other = op.git_attention_forward(q, other_k, other_v, layout.rows, None, 0.1)[0]
        same = (out == other).all(dim=-1).all(dim=-1)[0]
        assert same.tolist() == [changed >= 70 and position < changed for position in range(120)]
    grad[:, 70:] = 0
    grad_k, grad_v = run(op, q, k, v, grad, layout.rows)[3:]
    assert (grad_k[:, 70:] == 0).all() and (grad_v[:, 70:] == 0).all()


def test_padding_changes_nothing(op):
    """Whatever stands in it, bit for bit, and wherever NaN was a number before."""
    layout = Layout.drawn(3, batch=2, length=300)
    inputs = drawn(layout, 2, 2, 40)
    where = ~layout.live[..., None, None]
    first = run(op, *inputs, layout.rows)
    for value in (0.0, 1e30, -INF, NAN):
        assert_equal(run(op, *(x.masked_fill(where, value) for x in inputs), layout.rows), first)


@pytest.mark.parametrize("samples", [[(0, 1)], [(1, 0)], [(1, 1)], [(65, 0)], [(0, 65)], [(64, 1)], [(1, 130)]])
def test_smallest_samples(op, samples):
    layout = Layout.packed(samples, length=sum(samples[0]) + 2)
    inputs = drawn(layout, 2, 1, 16)
    found, expected = run(op, *inputs, layout.rows), truth(*inputs, layout)
    for a, b in ((found[0], expected[0]), (found[4], expected[4])):
        assert error(a, b) <= 1e-5
    for a, b in zip(found[2:4], expected[2:4], strict=True):  # of a single key: nothing but what rounding leaves
        assert (a - b).abs().max() <= 1e-5


def test_rows_without_keys(op, nan_results):
    """All padding, and queries that see only padding."""
    q, k, v, grad = (torch.full((2, 70, 2, 16), NAN) for _ in range(4))
    out, lse, *grads = run(op, q, k, v, grad, torch.zeros(1, 70, 2, dtype=torch.int32))
    assert all((x == 0).all() for x in (out, *grads)) and (lse == -INF).all()
    layout = Layout.packed([(2, 1)], length=5)
    layout.rows[0, 1] = torch.tensor([3, 5])
    q, k, v, grad = drawn(layout, 1, 1, 16)
    out, lse, *grads = run(op, q, k.masked_fill(~layout.live[..., None, None], NAN), v, grad, layout.rows)
    assert (out[0, 1] == 0).all() and lse[0, 0, 1] == -INF and lse[0, 0, 0].isfinite()
    assert not any(x.isnan().any() for x in grads)


@pytest.mark.parametrize("least", [-120, -1e4, 1e4])
def test_extreme_logits(op, least):
    """All about -120 in a length of 64 modulo 128, and +-1e4: exp of none of them is a number of fp32."""
    layout = Layout.packed([(128, 64)])
    q, k, v, grad = drawn(layout, 2, 2, 64, torch.float64)
    q[..., 0], k[..., 0], k[..., 1:] = least, 1, k[..., 1:] * 0.01
    q, k, v, grad = (x.float() for x in (q, k, v, grad))
    found, expected = run(op, q, k, v, grad, layout.rows, scale=1.0), truth(q, k, v, grad, layout, scale=1.0)
    theirs = sdpa(q, k, v, grad, layout, 1.0)
    for a, b, peer in zip((found[0], *found[2:]), (expected[0], *expected[2:]), theirs, strict=True):
        assert a.isfinite().all()
        assert error(a, b) <= 2 * error(peer, b)


def test_one_key_may_take_all(op):
    """Logits from -1e4 to 1e4: weights are exactly 0 or 1, without denormal numbers between them."""
    layout = Layout.packed([(100, 92)])
    q, k, v, grad = drawn(layout, 2, 2, 64, factor=1e4 / 8)
    out, _, *grads = run(op, q, k, v, grad, layout.rows)
    assert error(out, truth(q, k, v, grad, layout)[0]) <= 1e-3
    assert all(x.isfinite().all() for x in grads)


def test_fewer_queries_than_keys(op):
    """With a cache every key is live, also those whose number is that of an empty row."""
    q, k, v, grad = (torch.randn(2, s, 2, 32, generator=torch.Generator().manual_seed(s)) for s in (5, 130, 130, 5))
    rows = torch.tensor([[[0, 126], [0, 0], [0, 128], [60, 129], [0, 130]]], dtype=torch.int32)
    key = torch.arange(130)
    layout = Layout.packed([(0, 5)])
    layout.dense = ((key >= rows[..., :1]) & (key < rows[..., 1:])).expand(2, -1, -1)
    layout.live = (rows[..., 1] > 0).expand(2, -1)
    for slopes in (None, torch.rand(2)):
        found, expected = run(op, q, k, v, grad, rows, slopes), truth(q, k, v, grad, layout, slopes)
        for a, b in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
            assert error(a, b) <= 1e-5


@pytest.mark.parametrize("batch, kv_heads", [(1, 1), (3, 4)])
def test_bits_repeat_on_any_number_of_threads(op, batch, kv_heads):
    layout = Layout.drawn(7, batch, length=400)
    inputs = drawn(layout, 4, kv_heads, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(op, *inputs, layout.rows)
        for repeat in range(20):
            torch.set_num_threads(1 + repeat % 3)
            assert_equal(run(op, *inputs, layout.rows), first)
    finally:
        torch.set_num_threads(threads)


def test_a_little_work_wakes_no_threads():
    """A process of its own counts its threads; a call that shares out 10 us is slow where cores are taken."""
    code = """
import os, torch
from dsvlm.ops.library import library
library(), torch.set_num_threads(4)
for length in (32, 256):
    q, rows = torch.ones(2, length, 4, 16), torch.tensor([0, length], dtype=torch.int32).expand(1, length, 2)
    before = len(os.listdir("/proc/self/task"))
    out, lse = torch.ops.dsvlm.git_attention_forward(q, q, q, rows, None, 1.0)
    torch.ops.dsvlm.git_attention_backward(out, q, q, q, out, lse, rows, None, 1.0)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "3"], done.stdout + done.stderr


def test_rows_may_serve_the_whole_batch(op):
    layout = Layout.packed([(40, 30), (17, 9)], length=120)
    inputs = [x.expand(3, -1, -1, -1) * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
              for x in drawn(layout, 2, 1, 16)]  # fmt: skip
    assert_equal(run(op, *inputs, layout.rows), run(op, *inputs, layout.rows.expand(3, -1, -1)))
    assert_equal(run(op, *inputs[:3], torch.ones(()).expand(3, 120, 2, 16), layout.rows),
                 run(op, *inputs[:3], torch.ones(3, 120, 2, 16), layout.rows))  # fmt: skip


def test_decisions_about_tiles(op):
    """Against the dense mask: none skipped that is needed, none full that is partial, few visits for nothing."""
    visits = needless = 0
    for seed in range(30):
        layout = Layout.drawn(seed, batch=2, length=random.Random(seed).randint(1, 700))
        for query_tile, key_tile in itertools.product((64, 128), repeat=2):
            found = op.git_mask_tiles(layout.rows, layout.live.shape[1], query_tile, key_tile)
            length = layout.live.shape[1]
            down, across = -(-length // query_tile), -(-length // key_tile)
            assert found.shape == (2, down, across) and found.dtype == torch.uint8
            size = (0, across * key_tile - length, 0, down * query_tile - length)
            split = (2, down, query_tile, across, key_tile)
            some = F.pad(layout.dense, size).view(split).any(dim=4).any(dim=2)
            every = F.pad(layout.dense, size, value=True).view(split).all(dim=4).all(dim=2)
            assert (found[some] > 0).all()
            assert torch.equal(found == 2, every)
            visits += int((found > 0).sum())
            needless += int(((found > 0) & ~some).sum())
    assert visits > 1000 and needless <= 0.02 * visits


def test_decisions_with_a_cache(op):
    rows = torch.tensor([[[0, 3], [0, 0]]], dtype=torch.int32)
    assert op.git_mask_tiles(rows, 5, 1, 2).tolist() == [[[2, 1, 0], [0, 0, 0]]]
    assert op.git_mask_tiles(rows[:, :1], 4, 64, 64).tolist() == [[[1]]]


def test_what_does_not_fit_is_refused(op):
    q, k, rows = torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, dtype=torch.int32)

    def refused(message, *arguments):
        with pytest.raises(RuntimeError, match=message):
            op.git_attention_forward(*arguments, 1.0)

    refused("3 heads, expected a multiple of the 2", q, k, k, rows, None)
    k = torch.zeros(1, 4, 3, 8)
    refused(r"v is \[1, 5, 3, 8\], expected \[1, 4, 3, 8\]", q, k, torch.zeros(1, 5, 3, 8), rows, None)
    refused("rows has dtype", q, k, k, rows.long(), None)
    refused("k has dtype", q, k.double(), k.double(), rows, None)
    refused("float32, float64 or bfloat16", q.half(), k.half(), k.half(), rows, None)
    refused("contiguous in its last", q.transpose(1, 3).contiguous().transpose(1, 3), k, k, rows, None)
    refused(r"alibi_slopes is \[2\], expected \[3\]", q, k, k, rows, torch.zeros(2))


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_lesser_instruction_sets(op, instructions):
    """In a process of its own, which chooses anew; what it allocates holds huge numbers at first."""
    few = "poison and (2-64 or 1-80 or 1-7 or 1-5)"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, "-k", few]
    environ = os.environ | {"DSVLM_SIMD": instructions, "MALLOC_PERTURB_": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
