"""The experts of a layer as packed parameters, and products of rows with their experts' matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Experts(nn.Module):
    """E feed-forward networks, packed: one parameter [E, in, out] for each projection, so that all are always used.

    inner: matrices [D, H], one, or two of a gated network, the gate's first; outer: [H, D out]; biases: an [H] for each
    inner one and a [D out], or none. Every expert starts as a copy of them.
    """

    def __init__(self, experts: int, inner: Sequence[Tensor], outer: Tensor, biases: Sequence[Tensor], act: nn.Module):
        super().__init__()
        self.size, self.gated, self.act = inner[0].shape[0], len(inner) == 2, act
        names = ["gate", "inner"] if self.gated else ["inner"]
        for name, one in zip([*names, "outer"], [*inner, outer], strict=True):
            self.register_parameter(name, packed(one, experts))
        for index, name in enumerate([*names, "outer"]):
            self.register_parameter(f"{name}_bias", packed(biases[index], experts) if biases else None)

    def forward(self, rows: Tensor, offs: Tensor, live: Tensor, most: int) -> Tensor:
        """rows: [R, D], expert after expert; offs: [E] int32, where each ends; live: [R] bool, whether a row is used;
        most: rows of an expert at most. Returns [R, D out]; rows that are not used may hold anything."""
        return self.feed(rows, live, Grouped(offs, len(rows), most))

    def feed(self, rows: Tensor, live: Tensor | None, product) -> Tensor:
        """product: a `Grouped`, or what multiplies and spreads as it does; live: None = all rows hold numbers."""

        def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = product(x, weight)
            out = out if bias is None else out + product.spread(bias)
            # Both ways: past the experts' rows a product holds anything, NaN too, and so does its gradient.
            return out if live is None else torch.where(live[:, None], out, 0)

        hidden = project(rows, self.inner, self.inner_bias)
        hidden = self.act(project(rows, self.gate, self.gate_bias)) * hidden if self.gated else self.act(hidden)
        return project(hidden, self.outer, self.outer_bias)


def packed(one: Tensor, experts: int) -> nn.Parameter:
    return nn.Parameter(one.detach()[None].repeat(experts, *[1] * one.dim()))


class Grouped:
    """Multiplies rows that stand expert after expert, each by its expert's matrix.

    offs: [E] int32, where each expert's rows end; rows: how many there are; most: of one expert at most.
    """

    def __init__(self, offs: Tensor, rows: int, most: int):
        self.offs, self.most = offs, most
        self.row = torch.arange(rows, device=offs.device, dtype=offs.dtype)
        self.expert = torch.searchsorted(offs, self.row, right=True)  # E past the last one's

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: [R, in], weight: [E, in, out]; returns [R, out], anything past the last expert's rows."""
        return torch._grouped_mm(x, weight, offs=self.offs) if groupable(x, weight) else self.batched(x, weight)

    def spread(self, bias: Tensor) -> Tensor:
        """[R, H]: each row's of bias [E, H]; a product, because its gradient is one too, the same in every run."""
        chosen = self.expert[:, None] == torch.arange(len(bias), device=bias.device)
        return chosen.to(bias.dtype) @ bias

    def batched(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same as one product of [E, most, in] and [E, in, out]."""
        out = self.padded(x) @ weight
        return self.compact(out)

    def padded(self, x: Tensor) -> Tensor:
        """[R, D] as [E, most, D], 0 where an expert has fewer rows."""
        start = F.pad(self.offs, (1, 0))[:-1, None]
        index = start + torch.arange(self.most, device=x.device, dtype=self.offs.dtype)
        return torch.where((index < self.offs[:, None])[..., None], x[index.clamp(max=len(x) - 1)], 0)

    def compact(self, x: Tensor) -> Tensor:
        """[E, most, D] back to [R, D]."""
        expert = self.expert.clamp(max=len(self.offs) - 1)
        place = (self.row - F.pad(self.offs, (1, 0))[expert]).clamp(max=self.most - 1)
        return x.flatten(0, 1)[expert * self.most + place]


def groupable(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: no fp64, on a GPU bf16 alone; rows of a multiple of 16 bytes."""
    known = (torch.bfloat16,) if x.is_cuda else (torch.float32, torch.bfloat16)
    return x.dtype in known and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
