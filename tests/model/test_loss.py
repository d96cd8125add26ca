"""The chunked vocabulary loss and the head bank against torch's cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from dsvlm.model.heads import HeadBank
from dsvlm.model.loss import VocabHead


def problem(n=7, size=5, vocab=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(vocab, size, generator=generator, dtype=torch.float64).to(dtype))
    targets = torch.randint(0, vocab, (n,), generator=generator)
    return hidden, weight, targets, torch.rand(n, generator=generator)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_equals_cross_entropy_for_any_chunk(chunk):
    hidden, weight, targets, scale = problem()
    loss, nll, correct = VocabHead(weight, chunk)(hidden, targets, scale)
    got = torch.autograd.grad(3.0 * loss, (hidden, weight))
    logits = hidden @ weight.T
    expected_nll = F.cross_entropy(logits, targets, reduction="none")
    expected = (expected_nll * scale).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(correct, logits.argmax(-1) == targets) and not nll.requires_grad
    for ours, theirs in zip(got, torch.autograd.grad(3.0 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradcheck():
    hidden, weight, targets, scale = problem()
    head = VocabHead(weight, 3)

    def loss(hidden, weight):
        head.weight = weight
        return head(hidden, targets, scale)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_no_target_touches_the_weight():
    hidden, weight, targets, scale = problem(n=0)
    loss, nll, _ = VocabHead(weight, 4)(hidden, targets, scale)
    loss.backward()
    assert loss == 0 and len(nll) == 0
    assert (weight.grad == 0).all() and weight.grad.shape == weight.shape and hidden.grad.shape == hidden.shape


def test_zero_weights_give_zero_gradients():
    hidden, weight, targets, scale = problem()
    VocabHead(weight, 4)(hidden, targets, scale * 0)[0].backward()
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


def test_frozen_weight_has_no_gradient_and_costs_no_buffer():
    hidden, weight, targets, scale = problem()
    expected = torch.autograd.grad(VocabHead(weight, 4)(hidden, targets, scale)[0], hidden)[0]
    weight.requires_grad_(False)
    loss = VocabHead(weight, 4)(hidden, targets, scale)[0]
    assert loss.grad_fn.saved_tensors[1] is None
    loss.backward()
    assert weight.grad is None and torch.equal(hidden.grad, expected)


def test_evaluation_computes_no_gradients():
    hidden, weight, targets, scale = problem()
    with torch.no_grad():
        loss, *_ = VocabHead(weight, 4)(hidden, targets, scale)
    assert not loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32_and_does_not_underflow(dtype):
    """Weights of 1e-9, as 1/N of a large window: the gradient comes back when the loss is scaled."""
    hidden, weight, targets, scale = problem(n=400, size=16, dtype=dtype)
    scale = scale * 1e-9
    loss, nll, _ = VocabHead(weight, 8)(hidden, targets, scale)
    assert loss.dtype == nll.dtype == torch.float32
    got = torch.autograd.grad(loss * 1e9, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = (F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none") * scale.double()).sum() * 1e9
    for ours, theirs in zip(got, torch.autograd.grad(expected, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_logits_without_targets():
    hidden, weight, *_ = problem()
    assert torch.equal(VocabHead(weight, 4)(hidden), hidden @ weight.T)


def test_head_bank_equals_cross_entropy_and_always_touches_every_head():
    torch.manual_seed(0)
    bank = HeadBank({"a": 3, "b": 5}, 4).double()
    pooled = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    head, label = torch.tensor([1, -1, 0, 1, -1]), torch.tensor([4, -100, 2, 0, -100])
    weight = torch.rand(5)
    loss, nll, correct = bank(pooled, head, label, weight)
    assert bank.names == ("a", "b")
    expected = 0.0
    for row in (0, 2, 3):
        logits = bank.bank[head[row]](pooled[row])
        own = F.cross_entropy(logits[None], label[row, None])
        torch.testing.assert_close(nll[row], own.detach(), rtol=1e-12, atol=0)
        assert correct[row] == (logits.argmax() == label[row])
        expected = expected + weight[row].double() * own
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert (nll[[1, 4]] == 0).all() and not correct[[1, 4]].any()

    bank.zero_grad()
    bank(pooled, torch.full((5,), -1), label, weight)[0].backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in bank.parameters())


def test_empty_bank():
    loss, nll, correct = HeadBank({}, 4)(torch.randn(2, 4), torch.tensor([-1, -1]), torch.tensor([0, 0]), torch.ones(2))
    assert loss == 0 and (nll == 0).all() and not correct.any()
