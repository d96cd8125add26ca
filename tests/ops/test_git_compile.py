"""The compiled GIT attention under torch.compile, the checks of torch.library, and recomputation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dsvlm.ops import GitMask, git_attention
from dsvlm.ops.git_kernel import has_kernel
from dsvlm.ops.library import constant

pytestmark = pytest.mark.skipif(not has_kernel("cpu"), reason="the compiled ops were not built")


def inputs(length, heads=2):
    generator = torch.Generator().manual_seed(length)
    shapes = (2, length, heads, 4), (2, length, 1, 4), (2, length, 1, 4)
    x = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    segments = torch.arange(length).div(5, rounding_mode="floor").repeat(2, 1)
    segments[1, -2:] = -1
    return *x, segments, torch.arange(length).remainder(5).lt(3).repeat(2, 1)


def attend(q, k, v, segments, is_image):
    mask = GitMask.from_segments(segments, is_image)
    return git_attention(q * 2, k, v, mask, backend="auto").square().sum()


def test_fullgraph_with_gradients_and_any_length():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    traced = torch.compile(attend, fullgraph=True, backend=backend)
    for length in (9, 12, 17):
        x = inputs(length)
        for tensor in x:
            torch._dynamo.mark_dynamic(tensor, 1)
        outs = [f(*x) for f in (attend, traced)]
        gradients = [torch.autograd.grad(out, x[:3]) for out in outs]
        torch.testing.assert_close(outs[1], outs[0])
        for a, b in zip(gradients[0], gradients[1], strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1, "one graph for all lengths"


def test_constants_are_marked_as_torch_marks_them():
    def ours(): ...

    def theirs(): ...

    assert vars(constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25])])
def test_torch_library_accepts_the_ops(slopes):
    *x, segments, is_image = inputs(9)
    q, k, v = (t.detach() for t in x)
    rows = GitMask.from_segments(segments, is_image).rows
    forward, backward = torch.ops.dsvlm.git_attention_forward, torch.ops.dsvlm.git_attention_backward
    torch.library.opcheck(forward.default, (q, k, v, rows, slopes, 0.5))
    torch.library.opcheck(forward.default, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, rows, slopes, 0.5))
    out, lse = forward(q, k, v, rows, slopes, 0.5)
    torch.library.opcheck(backward.default, (torch.randn_like(out), q, k, v, out, lse, rows, slopes, 0.5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_is_equal(reentrant):
    *x, segments, is_image = inputs(9)
    plain = torch.autograd.grad(attend(*x, segments, is_image), x)
    again = checkpoint(attend, *x, segments, is_image, use_reentrant=reentrant)
    again.backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, x, strict=True))
