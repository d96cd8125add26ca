"""git_attention: its backends against the formula, padding that must not exist, and what it must refuse."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dsvlm.ops import GitMask, git_attention
from dsvlm.ops.git_kernel import has_kernel

needs_kernel = pytest.mark.skipif(not has_kernel("cpu"), reason="the compiled ops were not built")
KERNEL = pytest.param("kernel", marks=needs_kernel)
IMAGES, TEXTS, WIDTH = torch.tensor([3, 0, 4, 0]), torch.tensor([2, 5, 0, 0]), 7


def masks():
    """Layouts of 4 rows: compact, with unused image slots and text at the right, flush right, packed."""
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [0, 1, 2, 2, -1, 3, 3], [-1] * 7, [5, 5, 5, 5, 5, 6, 6]])
    is_image = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1, 1], [0] * 7, [1, 0, 0, 0, 0, 1, 0]]).bool()
    few = torch.tensor([2, 0, 3, 0]), torch.tensor([2, 4, 0, 1])
    return {
        "compact": GitMask.from_lengths(IMAGES, TEXTS, WIDTH),
        "slots": GitMask.from_lengths(*few, WIDTH, padding="left", image_slots=3),
        "flush right": GitMask.from_lengths(*few, WIDTH, padding="left"),
        "packed": GitMask.from_segments(segments, is_image),
        "equal": GitMask.from_lengths(3, TEXTS.clamp(max=4), WIDTH),
        "one row": GitMask.from_lengths(3, 2, WIDTH),
    }


def inputs(heads=4, kv_heads=2, size=8, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, width, heads, size), (4, width, kv_heads, size), (4, width, kv_heads, size))
    return [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]


def formula(q, k, v, allowed, scale, bias=None):
    """Softmax attention one row, head and query at a time; 0 where nothing may be seen."""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if allowed[b][i][j]]
                if keys:
                    scores = k[b, keys, h // group] @ q[b, i, h] * scale
                    if bias is not None:
                        scores = scores + bias[h] * (torch.tensor(keys) - i)
                    out[b, i, h] = scores.softmax(0) @ v[b, keys, h // group]
    return out


def assert_equals_the_formula(mask, backend, kv_heads=2, scale=None, slopes=None):
    ours, plain = inputs(kv_heads=kv_heads), inputs(kv_heads=kv_heads)
    out = git_attention(*ours, mask, scale=scale, alibi_slopes=slopes, backend=backend)
    allowed = mask.dense()[:, 0].expand(4, -1, -1).tolist()
    expected = formula(*plain, allowed, scale or 1 / math.sqrt(8), slopes)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [KERNEL, "sdpa", "math", "auto"])
@pytest.mark.parametrize("layout", ["compact", "slots", "flush right", "packed", "equal", "one row"])
def test_backends_equal_the_formula_with_gradients(backend, layout):
    assert_equals_the_formula(masks()[layout], backend)


@pytest.mark.parametrize("backend", [KERNEL, "sdpa", "math", "two_call"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_groups_of_heads_and_scale(backend, kv_heads, scale):
    assert_equals_the_formula(masks()["equal"], backend, kv_heads, scale)


@pytest.mark.parametrize("images, texts", [(0, TEXTS), (7, 0), (3, 4), (3, 2)])
def test_two_calls_equal_the_formula(images, texts):
    assert_equals_the_formula(GitMask.from_lengths(images, texts, WIDTH), "two_call")


@pytest.mark.parametrize("backend", [KERNEL, "math", "auto"])
@pytest.mark.parametrize("layout", ["compact", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_is_relative_distance(backend, layout, dtype):
    """Slopes of less precision than the scores are what they are: their products with distances are not rounded."""
    slopes = torch.tensor([0.7, 0.3, 0.11, 0.07], dtype=dtype)
    assert_equals_the_formula(masks()[layout], backend, slopes=slopes.double())
    mask, given = masks()[layout], (slopes, slopes.double())
    torch.testing.assert_close(
        *(git_attention(*inputs(), mask, alibi_slopes=x, backend=backend) for x in given), rtol=1e-12, atol=1e-12
    )


@torch.no_grad()
@pytest.mark.parametrize("layout", ["compact", "slots", "packed", "one row"])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25, 0.125, 0.0625])])
def test_flex_equals_the_formula_forward(layout, slopes):
    mask, x = masks()[layout], inputs()
    out = git_attention(*x, mask, scale=0.3, alibi_slopes=slopes, backend="flex")
    expected = formula(*x, mask.dense()[:, 0].expand(4, -1, -1).tolist(), 0.3, slopes)
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("backend", [KERNEL, "sdpa", "math", "two_call", "flex"])
@pytest.mark.parametrize("layout", ["equal", "slots"])
def test_padding_of_nan_reaches_nothing(backend, layout):
    if layout == "slots" and backend == "two_call":
        layout = "one row"
    mask = masks()[layout]
    real = mask.live.expand(4, -1)
    clean, poisoned = inputs(), inputs()
    for x in poisoned:
        x.data[~real] = float("nan")
    with torch.set_grad_enabled(backend != "flex"):
        outs = [git_attention(*x, mask, backend=backend) for x in (clean, poisoned)]
    assert torch.equal(*outs)
    assert (outs[1][~real] == 0).all()
    if backend == "flex":
        return
    for x, out in zip((clean, poisoned), outs, strict=True):
        upstream = torch.ones_like(out)
        upstream[~real] = 3.0 if x is clean else float("nan") if backend == "kernel" else 5.0
        out.backward(upstream)
        assert all((a.grad[~real] == 0).all() for a in x)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("backend", [KERNEL, "sdpa", "math", "auto"])
def test_queries_that_see_only_padding_give_zero(backend):
    rows = torch.tensor([[[0, 0], [0, 1], [2, 4], [2, 4]]], dtype=torch.int32)
    x = inputs(width=4)
    for a in x:
        a.data[:, 0] = float("nan")
    out = git_attention(*x, GitMask(rows, 4), backend=backend)
    gradients = torch.autograd.grad(out.sum(), x)
    assert (out[:, :2] == 0).all() and (out[:, 2:] != 0).all()
    assert all((g[:, :2] == 0).all() and g.isfinite().all() for g in gradients)


def test_text_never_influences_images_and_text_sees_images():
    mask = GitMask.from_lengths(torch.tensor([3]), torch.tensor([4]), WIDTH)
    q, k, v = (x[:1] for x in inputs())
    base = git_attention(q, k, v, mask)
    k2, v2 = k.clone(), v.clone()
    k2[:, 5], v2[:, 5] = 7.0, -7.0
    moved = git_attention(q, k2, v2, mask)
    assert torch.equal(base[:, :5], moved[:, :5]) and not torch.equal(base[:, 5:], moved[:, 5:])
    k2, v2 = k.clone(), v.clone()
    k2[:, 2], v2[:, 2] = 7.0, -7.0
    changed = (git_attention(q, k2, v2, mask) != base).flatten(2).any(-1)[0]
    assert changed.all(), "the last image token must reach the first image token and all text"


@pytest.mark.parametrize("backend", [KERNEL, "sdpa", "math"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_rows_equal_separate_rows(backend, kv_heads):
    """Outputs and gradients; text alone stands right before and right after images."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[0, 0, 0, 0, -1, 1, 1, 2, 2, 2, 3]])
    is_image = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0]]).bool()
    q, k, v, upstream = (
        torch.randn(1, 11, heads, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    packed = git_attention(q, k, v, GitMask.from_segments(segments, is_image), backend=backend)
    gradients = torch.autograd.grad(packed, (q, k, v), upstream)
    for images, texts, first in ((2, 2, 0), (0, 2, 5), (3, 0, 7), (0, 1, 10)):
        part = slice(first, first + images + texts)
        alone = GitMask.from_lengths(torch.tensor([images]), torch.tensor([texts]), images + texts)
        own = [x[:, part].detach().requires_grad_() for x in (q, k, v)]
        out = git_attention(*own, alone, backend=backend)
        torch.testing.assert_close(packed[:, part], out, rtol=1e-12, atol=1e-12)
        for found, wanted in zip(gradients, torch.autograd.grad(out, own, upstream[:, part]), strict=True):
            torch.testing.assert_close(found[:, part], wanted, rtol=1e-12, atol=1e-12)


def test_dropout_drops_weights_with_the_given_rate():
    mask = GitMask.from_lengths(torch.tensor([64]), torch.tensor([0]), 64)
    q, k = torch.zeros(1, 64, 8, 4), torch.zeros(1, 64, 8, 4)
    v = torch.ones(1, 64, 8, 4)
    torch.manual_seed(0)
    out = git_attention(q, k, v, mask, dropout=0.25)
    assert abs(out.mean().item() - 1) < 0.02 and out.std() > 0.01


@pytest.mark.parametrize("backend", [KERNEL, "sdpa", "math"])
def test_half_precision_close_to_double(backend):
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    exact = git_attention(*inputs(), mask)
    half = git_attention(*(x.bfloat16() for x in inputs()), mask, backend=backend)
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 1e-2 * exact.norm()


@needs_kernel
def test_kernel_gradcheck_and_no_second_derivative():
    x = inputs(heads=2, kv_heads=1, size=3)
    slopes = torch.tensor([0.5, 0.25])

    def attend(q, k, v):
        return git_attention(q, k, v, masks()["packed"], alibi_slopes=slopes, backend="kernel")

    assert torch.autograd.gradcheck(attend, x, fast_mode=True)
    for loss in (attend(*x).square().sum(), attend(*x).sum()):  # the second has a gradient that knows no graph
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made in the context has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in made)])
        return out


@pytest.mark.parametrize("backend, square", [KERNEL.values + (False,), ("auto", False), ("sdpa", True)])
def test_the_kernel_makes_no_square(backend, square):
    if not has_kernel("cpu") and not square:
        pytest.skip("the compiled ops were not built")
    segments = torch.arange(600).div(100, rounding_mode="floor")[None]
    q = torch.randn(1, 600, 1, 8, requires_grad=True)
    with Largest() as largest:
        mask = GitMask.from_segments(segments, torch.zeros_like(segments).bool())
        git_attention(q, q, q, mask, backend=backend).square().sum().backward()
    assert (largest.elements >= 600 * 600) == square
    assert square or largest.elements <= 600 * 8


def test_refuses_what_it_cannot_do():
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="unknown backend 'flash'"):
        git_attention(q, k, v, mask, backend="flash")
    misfits = (
        (q, k[:, :3], v[:, :3], mask), (q, k, v, GitMask(mask.rows[:2], WIDTH)), (q, k[:1], v[:1], mask),
        (q, k[..., :4], v[..., :4], mask), (q, k[:, :, :0], v[:, :, :0], mask), (q[0], k[0], v[0], mask),
        (q[:, :, :3], k, v, mask), (q[..., :0], k[..., :0], v[..., :0], mask), (q, k, v, GitMask(mask.rows[0], WIDTH)),
    )  # fmt: skip
    for backend in ("auto", "kernel", "sdpa", "math"):
        for misfit in misfits:
            with pytest.raises(ValueError, match="do not fit"):
                git_attention(*misfit, backend=backend)
        with pytest.raises(ValueError, match="are int32, found torch.int64"):
            git_attention(q, k, v, GitMask(mask.rows.long(), WIDTH), backend=backend)
        with pytest.raises(ValueError, match="is a GitMask, found Tensor"):
            git_attention(q, k, v, mask.dense(), backend=backend)
    with pytest.raises(ValueError, match=r"one for each of 4 heads, found \(1,\)"):
        git_attention(q, k, v, mask, backend="math", alibi_slopes=torch.ones(1))
    for backend in ("kernel", "two_call", "flex", "sdpa"):
        with pytest.raises(ValueError, match="backend='math'"):
            git_attention(q, k, v, mask, backend=backend, dropout=0.1)
    for backend in ("sdpa", "two_call"):
        with pytest.raises(ValueError, match="has no ALiBi; use backend='kernel' or 'math'"):
            git_attention(q, k, v, mask, backend=backend, alibi_slopes=torch.ones(4))
    with pytest.raises(ValueError, match="'two_call' needs rows that begin with equally many image tokens"):
        git_attention(q, k, v, mask, backend="two_call")
    with pytest.raises(ValueError, match="'flex' has no gradients on the CPU"):
        git_attention(q, k, v, mask, backend="flex")
    with pytest.raises(ValueError, match="as many queries as keys, found 2 and 7"):
        git_attention(q[:, :2], k, v, GitMask(mask.rows[:, :2], WIDTH), backend="flex")


@pytest.mark.parametrize("backend", ["auto", "kernel", "sdpa", "math"])
def test_refuses_what_would_be_read_wrongly(backend):
    """Also on the CPU, whose ops take any address for their own."""
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    q, k, v = inputs()
    for more, name in (({"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes"), ({}, "mask")):
        elsewhere = mask if more else GitMask(mask.rows.to("meta"), WIDTH)
        with pytest.raises(ValueError, match=f"git_attention: {name} is on meta, the others are on cpu"):
            git_attention(q, k, v, elsewhere, backend=backend, **more)
    with pytest.raises(ValueError, match="v is on meta"):
        git_attention(q, k, v.to("meta"), mask, backend=backend)
    with pytest.raises(ValueError, match="scale is a number, found a tensor; multiply q"):
        git_attention(q, k, v, mask, backend=backend, scale=torch.nn.Parameter(torch.tensor(0.3)))
    for dropout in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"dropout={dropout}; expected a probability"):
            git_attention(q, k, v, mask, backend=backend, dropout=dropout)
    for misfit, found in (((q, k.float(), v), "float64, float32, float64"), ((q.long(), k.long(), v.long()), "int64")):
        with pytest.raises(ValueError, match=f"one floating point dtype, found {found}"):
            git_attention(*misfit, mask, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "two_call", "flex", "sdpa", "math"])
@pytest.mark.parametrize("batch, width", [(0, 4), (1, 0), (0, 0)])
def test_nothing_gives_nothing(backend, batch, width):
    q = torch.randn(batch, width, 2, 8)
    mask = GitMask.from_lengths(min(2, width), max(0, width - 2), width)
    assert git_attention(q, q, q, mask, backend=backend).shape == q.shape


@needs_kernel
@pytest.mark.parametrize("backend", ["auto", "kernel"])
def test_forward_derivatives_are_refused(backend):
    """Not 0: the op has none, and where nothing asks for a gradient autograd knows nothing of it."""
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    q, k, v = inputs()
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        git_attention(q.detach(), k.detach(), forward_ad.make_dual(v.detach(), v.detach()), mask, backend=backend)


@needs_kernel
def test_kernel_refuses_what_it_cannot_do():
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="float32, float64, bfloat16 on cpu, found float16.*backend='sdpa'"):
        git_attention(q.half(), k.half(), v.half(), mask, backend="kernel")
    with pytest.raises(ValueError, match="found float64, float32, float64"):
        git_attention(q, k.float(), v, mask, backend="kernel")
    with pytest.raises(ValueError, match="alibi_slopes have no gradient; use backend='math'"):
        git_attention(q, k, v, mask, backend="kernel", alibi_slopes=torch.ones(4, requires_grad=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["kernel", "two_call", "flex", "sdpa", "auto"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backends_on_a_gpu(backend, kv_heads, dtype):
    """Against the formula in fp64, with NaN in padding; 192 positions are 64 modulo 128 (pytorch#196678)."""
    mask = GitMask.from_lengths(130, torch.tensor([62, 10, 0, 61], device="cuda"), 192)
    real = mask.live
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(4, 192, heads, 64) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, upstream = (torch.randn(s, dtype=dtype, device="cuda", generator=generator) for s in shapes)
    upstream[~real] = 0
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = git_attention(*exact, mask, backend="math")
    ours = [x.masked_fill(~real[:, :, None, None], float("nan")).requires_grad_() for x in (q, k, v)]
    out = git_attention(*ours, mask, backend=backend)
    found = (out, *torch.autograd.grad(out, ours, upstream))
    for a, b in zip(found, (expected, *torch.autograd.grad(expected, exact, upstream.double())), strict=True):
        assert (a[~real] == 0).all() and (a - b).norm() < 2e-2 * b.norm()
