"""Shapes of the attention benchmark: layouts of vision-language rows, their exact work and the floors under it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Segments = tuple[tuple[tuple[int, int], ...], ...]  # of each row, (image tokens, text tokens) of each sample
BACKWARD_WORK, BACKWARD_BYTES = 2.5, 2.0  # of the forward's: five products for two; q k v o do in, dq dk dv out


@dataclass(frozen=True)
class Shape:
    """One batch: what lies in its rows, and the heads. padding: where a short row has it; extra: fewer competitors."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    segments: Segments
    padding: str = "right"
    extra: bool = False

    @property
    def batch(self) -> int:
        return len(self.segments)

    @cached_property
    def length(self) -> int:
        return max(sum(map(sum, row)) for row in self.segments)

    @property
    def packed(self) -> bool:
        return max(map(len, self.segments)) > 1

    @property
    def uniform(self) -> tuple[int, int] | None:
        """Image and text tokens of every row, where all rows are alike and hold one sample: two calls can do it."""
        return self.segments[0][0] if len(set(self.segments)) == 1 and not self.packed else None

    @property
    def tokens(self) -> int:
        """Useful ones."""
        return sum(sum(map(sum, row)) for row in self.segments)

    @cached_property
    def pairs(self) -> int:
        """(query, key) pairs of one head that the mask allows, over the batch."""
        return sum(m * m + t * m + t * (t + 1) // 2 for row in self.segments for m, t in row)

    def flops(self, backward: bool) -> float:
        """Of the exact pairs: 4 per pair and channel forward, 10 backward."""
        forward = 4.0 * self.head_size * self.pairs * self.heads
        return forward * (1 + BACKWARD_WORK) if backward else forward

    def bytes(self, backward: bool) -> float:
        """Every input read once, every output written once, in 2 bytes; padding is counted, as it is allocated."""
        row = self.batch * self.length
        forward = 4.0 * row * self.head_size * (self.heads + self.kv_heads) + 4.0 * row * self.heads
        return forward * (1 + BACKWARD_BYTES) if backward else forward

    def floors(self, ceilings: dict[str, float]) -> dict[str, float]:
        """Shortest times in ms: by bytes and by arithmetic, of the forward and of forward and backward."""
        forward, both = (
            (1e3 * self.bytes(mode) / ceilings["bytes_per_s"], 1e3 * self.flops(mode) / ceilings["flop_per_s"])
            for mode in (False, True)
        )
        backward = [whole - part for whole, part in zip(both, forward, strict=True)]  # a pass with a floor of its own
        return {
            "forward_bytes": forward[0], "both_bytes": both[0],
            "forward": max(forward), "both": max(forward) + max(backward),
        }  # fmt: skip

    def layout(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """segment_ids [B, S] int64 with -1 for padding, is_image [B, S] bool."""
        ids = torch.full((self.batch, self.length), -1)
        image = torch.zeros_like(ids, dtype=torch.bool)
        for row, samples in enumerate(self.segments):
            start = self.length - sum(map(sum, samples)) if self.padding == "left" else 0
            for number, (m, t) in enumerate(samples):
                ids[row, start : start + m + t] = number
                image[row, start : start + m] = True
                start += m + t
        return ids.to(where), image.to(where)

    def inputs(self, where: torch.device, seed: int, dtype=torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v that want gradients and the gradient of the output (0 on padding, as from a loss), from a seed."""
        draw = torch.Generator(where).manual_seed(seed)

        def normal(heads: int) -> Tensor:
            size = (self.batch, self.length, heads, self.head_size)
            return torch.randn(size, generator=draw, device=where, dtype=torch.float32).to(dtype)

        q, k, v = normal(self.heads), normal(self.kv_heads), normal(self.kv_heads)
        live = (self.layout(where)[0] >= 0)[..., None, None]
        return *(x.requires_grad_() for x in (q, k, v)), normal(self.heads) * live


def alike(batch: int, m: int, t: int, times: int = 1) -> Segments:
    return (((m, t),) * times,) * batch


def ragged(batch: int, m: int, times: int, seed: int = 5) -> Segments:
    """Text lengths drawn evenly from 32 to 256; the same samples however many lie in one row."""
    draw = random.Random(seed)
    samples = [(m, draw.randint(32, 256)) for _ in range(batch * times)]
    return tuple(tuple(samples[i : i + times]) for i in range(0, len(samples), times))


# In this order, most telling first: a run that is out of time leaves out the last ones.
SHAPES = (
    Shape("7B 577+128", 32, 32, 128, alike(8, 577, 128)),
    Shape("7B packed 8x(257+64)", 32, 32, 128, alike(4, 257, 64, 8)),
    Shape("7B 257+64", 32, 32, 128, alike(32, 257, 64)),
    Shape("7B packed 4x(577+32..256)", 32, 32, 128, ragged(4, 577, 4)),
    Shape("8B 577+512, GQA", 32, 8, 128, alike(8, 577, 512)),
    Shape("OPT-2.7B 577+128", 32, 32, 80, alike(8, 577, 128)),
    Shape("OPT-350M 197+64", 16, 16, 64, alike(32, 197, 64)),
    Shape("8B 2880+512, GQA", 32, 8, 128, alike(4, 2880, 512)),
    Shape("7B 257+128", 32, 32, 128, alike(16, 257, 128)),
    Shape("7B 577+32..256, right padded", 32, 32, 128, ragged(16, 577, 1)),
    Shape("7B 577+32..256, left padded", 32, 32, 128, ragged(16, 577, 1), padding="left", extra=True),
    Shape("8B 2880+2048, GQA", 32, 8, 128, alike(2, 2880, 2048)),
    Shape("OPT-1.3B 577+128", 32, 32, 64, alike(16, 577, 128), extra=True),
    Shape("OPT-350M packed 8x(197+64)", 16, 16, 64, alike(4, 197, 64, 8), extra=True),
    Shape("OPT-2.7B packed 8x(257+64)", 32, 32, 80, alike(4, 257, 64, 8), extra=True),
    Shape("heads of 96, 577+128", 32, 32, 96, alike(8, 577, 128), extra=True),
    Shape("heads of 96, packed 8x(257+64)", 32, 32, 96, alike(4, 257, 64, 8), extra=True),
)
SMOKE = (
    Shape("smoke 7+5", 4, 4, 16, alike(2, 7, 5)),
    Shape("smoke packed 3x(5+1..4), GQA", 4, 2, 16, (((5, 1), (5, 4), (0, 3)), ((5, 2), (5, 3)))),
    Shape("smoke 7+1..5, left padded", 4, 4, 16, (((7, 1),), ((7, 5),)), padding="left", extra=True),
)


def reference(shape: Shape, allowed: Tensor, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Plain formula in fp64 for the last row of the batch and the last group of heads: output and gradients.

    allowed: [B or 1, 1, S, S] bool. The other rows and heads run the same code; this keeps the check short.
    """
    names = ("q", "k", "v", "out")
    parts = (compared_part(shape, name, x) for name, x in zip(names, inputs, strict=True))
    q, k, v, grad = (x.double().transpose(0, 1).requires_grad_() for x in parts)
    seen = allowed[-1, 0]
    live = seen.any(dim=-1)
    scores = (q @ k.transpose(-1, -2)) * shape.head_size**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).masked_fill(~live[:, None], 0).softmax(dim=-1)
    out = (weights @ v) * live[:, None]
    found = dict(zip(("q", "k", "v"), torch.autograd.grad(out, (q, k, v), grad), strict=True))
    return {name: x.detach().transpose(0, 1) for name, x in (found | {"out": out}).items()}


def compared_part(shape: Shape, name: str, x: Tensor) -> Tensor:
    """What of an output or gradient [B, S, heads, D] the reference holds."""
    count = shape.heads // shape.kv_heads if name in ("out", "q") else 1
    return x[-1, :, -count:].detach()
