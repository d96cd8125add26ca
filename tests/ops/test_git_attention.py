"""git_attention: its backends against the formula, padding that must not exist, and what it must refuse."""

import math

import pytest
import torch

from dsvlm.ops import GitMask, git_attention

IMAGES, TEXTS, WIDTH = torch.tensor([3, 0, 4, 0]), torch.tensor([2, 5, 0, 0]), 7


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


@pytest.mark.parametrize("backend", ["sdpa", "math", "auto"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_backends_equal_the_formula_with_gradients(backend, kv_heads, scale):
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    ours, plain = inputs(kv_heads=kv_heads), inputs(kv_heads=kv_heads)
    out = git_attention(*ours, mask, scale=scale, backend=backend)
    expected = formula(*plain, mask.dense()[:, 0].tolist(), scale or 1 / math.sqrt(8))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_padding_of_nan_reaches_nothing(backend):
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    real = torch.arange(WIDTH) < (IMAGES + TEXTS)[:, None]
    clean, poisoned = inputs(), inputs()
    for x in poisoned:
        x.data[~real] = float("nan")
    outs = [git_attention(*x, mask, backend=backend) for x in (clean, poisoned)]
    assert torch.equal(*outs)
    assert (outs[1][~real] == 0).all()
    for x, out in zip((clean, poisoned), outs, strict=True):
        upstream = torch.ones_like(out)
        upstream[~real] = 3.0
        out.backward(upstream)
        assert all((a.grad[~real] == 0).all() for a in x)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a.grad, b.grad)


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


@pytest.mark.parametrize("backend", ["sdpa", "math"])
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


def test_alibi_is_relative_distance():
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float64)
    q, k, v = inputs()
    expected = formula(q, k, v, mask.dense()[:, 0].tolist(), 1 / math.sqrt(8), slopes)
    torch.testing.assert_close(git_attention(q, k, v, mask, alibi_slopes=slopes), expected, rtol=1e-12, atol=1e-12)


def test_dropout_drops_weights_with_the_given_rate():
    mask = GitMask.from_lengths(torch.tensor([64]), torch.tensor([0]), 64)
    q, k = torch.zeros(1, 64, 8, 4), torch.zeros(1, 64, 8, 4)
    v = torch.ones(1, 64, 8, 4)
    torch.manual_seed(0)
    out = git_attention(q, k, v, mask, dropout=0.25)
    assert abs(out.mean().item() - 1) < 0.02 and out.std() > 0.01


def test_half_precision_close_to_double():
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    exact = git_attention(*inputs(), mask)
    for backend in ("sdpa", "math"):
        half = git_attention(*(x.bfloat16() for x in inputs()), mask, backend=backend)
        assert half.dtype == torch.bfloat16
        assert (half - exact).norm() < 1e-2 * exact.norm()


def test_refuses_what_it_cannot_do():
    mask = GitMask.from_lengths(IMAGES, TEXTS, WIDTH)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="unknown backend 'flash'"):
        git_attention(q, k, v, mask, backend="flash")
    with pytest.raises(ValueError, match="do not fit"):
        git_attention(q, k[:, :3], v[:, :3], mask)
    with pytest.raises(ValueError, match="backend='math'"):
        git_attention(q, k, v, mask, backend="sdpa", dropout=0.1)
