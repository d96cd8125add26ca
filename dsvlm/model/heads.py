"""The head bank: one classification head per task, on the pooled hidden state of a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadBank(nn.Module):
    """Linear classifiers that all run on all rows in every forward, so that every head always has a gradient.

    heads: number of classes per head; `names` gives their order, which is the index in `Batch.head`.
    """

    def __init__(self, heads: dict[str, int], hidden_size: int):
        super().__init__()
        self.names = tuple(heads)
        self.bank = nn.ModuleList(nn.Linear(hidden_size, classes) for classes in heads.values())

    def forward(self, pooled: Tensor, head: Tensor, label: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of the rows that name a head.

        pooled: [B, D]; head: [B] int64, -1 = none; label: [B] int64, read where head >= 0; weight: [B].
        Returns loss [] = sum of weight * nll, nll [B] (detached, 0 without head), correct [B] bool; at least fp32.
        """
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        nll = torch.zeros_like(weight, dtype=dtype)
        correct = torch.zeros_like(head, dtype=torch.bool)
        for index, classifier in enumerate(self.bank):
            mine = head == index
            logits = classifier(pooled).to(dtype)
            target = label.masked_fill(~mine, 0)
            nll = nll + F.cross_entropy(logits, target, reduction="none") * mine
            correct = correct | (mine & (logits.argmax(dim=-1) == target))
        return (nll * weight.to(dtype)).sum(), nll.detach(), correct

    def logits(self, pooled: Tensor, head: int) -> Tensor:
        """[B, classes] logits of one head; for evaluation."""
        return self.bank[head](pooled)
