"""The vocabulary head: next-token cross-entropy in chunks, without ever holding logits of all targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class VocabHead(nn.Module):
    """The decoder's output projection, which also computes the loss.

    The loss runs inside the module that owns the weight, in one call, because ZeRO-3 gathers parameters around module
    calls: a call per chunk would make the number of collectives depend on the data, and ranks would wait forever.
    """

    def __init__(self, weight: nn.Parameter, chunk: int):
        super().__init__()
        self.weight = weight
        self.chunk = chunk

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weight: Tensor | None = None):
        """hidden: [..., D]. Without targets: logits [..., vocab].

        With targets [n] int64 and weight [n], hidden being [n, D]: (loss [] = sum of weight * nll, nll [n], correct [n]
        bool), at least fp32; only the loss is differentiable; n may be 0.
        """
        if targets is None:
            return F.linear(hidden, self.weight)
        return _ChunkedNll.apply(hidden, self.weight, targets, weight, self.chunk, torch.is_grad_enabled())


class _ChunkedNll(torch.autograd.Function):
    """Gradients are computed chunk by chunk in the forward, while the logits are there; the backward only scales."""

    @staticmethod
    def forward(ctx, hidden, vocab, targets, weight, chunk, grad):
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_vocab = (grad and need for need in ctx.needs_input_grad[:2])
        weight = weight.to(accumulate)
        # relative weights: 1/N of a large window would underflow in the half-precision product
        largest = weight.abs().max() if len(weight) else weight.new_ones(())
        largest = torch.where(largest > 0, largest, 1)
        nll = hidden.new_empty(len(targets), dtype=accumulate)
        correct = torch.empty_like(targets, dtype=torch.bool)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_vocab = torch.zeros_like(vocab, dtype=accumulate) if need_vocab else None

        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], vocab).to(accumulate)
            target = targets[part, None]
            correct[part] = logits.argmax(dim=-1) == target[:, 0]
            log_normaliser = logits.logsumexp(dim=-1)
            nll[part] = log_normaliser - logits.gather(1, target)[:, 0]
            if not (need_hidden or need_vocab):
                continue
            d_logits = logits.sub_(log_normaliser[:, None]).exp_()
            d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=accumulate))
            if need_hidden:
                d_hidden[part] = d_logits.to(vocab.dtype) @ vocab
            if need_vocab:
                weighted = d_logits.mul_((weight[part] / largest)[:, None]).to(hidden.dtype)
                d_vocab += (weighted.T @ hidden[part]).to(accumulate)

        ctx.save_for_backward(d_hidden, d_vocab, weight, largest)
        ctx.dtypes = hidden.dtype, vocab.dtype
        ctx.mark_non_differentiable(nll, correct)
        return (nll * weight).sum(), nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        d_hidden, d_vocab, weight, largest = ctx.saved_tensors
        hidden_dtype, vocab_dtype = ctx.dtypes
        if d_hidden is not None:
            d_hidden = (d_hidden * (d_loss * weight)[:, None]).to(hidden_dtype)
        if d_vocab is not None:
            d_vocab = (d_vocab * (d_loss * largest)).to(vocab_dtype)
        return d_hidden, d_vocab, None, None, None, None
