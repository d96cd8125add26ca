"""Expert parallelism: each rank holds some of the experts, and rows travel to them and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsvlm.model.moe_experts import Experts, Grouped


class ExpertParallel:
    """Shares the experts among the ranks of a group; their rows come and go by two all-to-alls.

    Rank r of R holds experts r * E / R up to (r + 1) * E / R (`deal`). Rows of all ranks come to them, so a rank's
    gradient of its experts is the whole one already. rows: that a rank sends to an expert, the same on all ranks, from
    the plan; no rank asks another how many come.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int, rows: int):
        self.group, self.rows = group, rows
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if experts % self.ranks:
            raise ValueError(
                f"train.expert_parallel: {experts} experts (model.moe.experts) cannot be dealt to {self.ranks} ranks "
                "evenly; change one of the two"
            )
        self.own = slice(self.rank * experts // self.ranks, (self.rank + 1) * experts // self.ranks)

    def deal(self, experts: Experts) -> None:
        """Keeps this rank's of whole experts, in place: parameters [E / R, ...] that know the whole, see `share_of`."""
        for name, whole in list(experts.named_parameters()):
            own = nn.Parameter(whole.detach()[self.own].clone(), requires_grad=whole.requires_grad)
            own.share = Share(self.own.start * whole[0].numel(), whole.shape)
            setattr(experts, name, own)

    def __call__(self, experts: Experts) -> Callable:
        """What stands for `experts.forward`."""
        return partial(self.run, experts)

    def run(self, experts: Experts, rows: Tensor, offs: Tensor, live: Tensor, most: int) -> Tensor:
        """As `Experts.forward`. Unused rows are 0 on the way there; on the way back nobody reads them, so no gradient
        comes to a bias."""
        assert most <= self.rows, f"{most} rows for an expert, but ranks exchange {self.rows}: not what was planned"
        local = Grouped(offs, len(rows), self.rows)
        out = experts.feed(self.exchange(local.padded(rows), there=True), None, Batched())
        return local.compact(self.exchange(out, there=False))

    def exchange(self, x: Tensor, there: bool) -> Tensor:
        """[E, rows, D] of this rank to [E / R, R * rows, D] of its experts, or the way back."""
        if there:
            x = AllToAll.apply(x, self.group).unflatten(0, (self.ranks, -1))
            return x.transpose(0, 1).flatten(1, 2)
        x = x.unflatten(1, (self.ranks, -1)).transpose(0, 1).flatten(0, 1)
        return AllToAll.apply(x, self.group)


@dataclass(frozen=True)
class Share:
    """Where a rank's part of a parameter begins in the whole one, laid out flat, and the whole one's shape."""

    start: int
    whole: torch.Size


def share_of(parameter: Tensor) -> Share | None:
    """None: this rank holds all of it, or what ZeRO leaves it."""
    return getattr(parameter, "share", None)


class Batched:
    """Products of [n, rows, in] with n experts [n, in, out]."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    def spread(self, bias: Tensor) -> Tensor:
        return bias[:, None]


class AllToAll(torch.autograd.Function):
    """Piece i of dimension 0 goes to rank i; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return AllToAll.apply(grad, ctx.group), None
